"""Both sweeps on CUDA, each logit read once. What they compute is said in __init__.

Forward: every thread keeps maxima and sums of its own columns and meets the others at the end of
the row only, so nothing in the loop waits for another thread. Backward: element by element. Both
should wait for memory alone, which leaves about 25 instructions per pair of logits on a Hopper GPU:
count them in the disassembly before adding one. Hence exponentials in base 2.
"""
# Shapes: N tokens, V columns, R segments of a row, K top-k, G groups of neighbouring columns.
# In the kernels a tile is U steps of L lanes (one per thread) with E neighbouring columns each.

import math

import torch
import triton
import triton.language as tl

from megatron_eopd.losses.kernels import LOWEST, ShardSums, with_unit_stride
from megatron_eopd.losses.shards import merge_shards

LOAD_BYTES = 16
"""The most that one thread loads at once."""

SEGMENT_STEP = 8192
"""Rows are split at multiples of this many columns: a whole number of tiles and groups."""

PROGRAMS_PER_MULTIPROCESSOR = 16
"""With fewer tokens than this many per multiprocessor, rows are split: two to three rounds of what
a multiprocessor holds at once keep the last round from leaving many of them idle."""

GRADIENT_BLOCK = 4096
"""Columns per program of the backward: 8 loads in flight per thread. Not tuned, because tuning runs
a kernel many times over the same tensors, which a gradient written over the logits does not survive
(and a saved copy of the logits would cost the memory that writing over them saves)."""

_FLOOR = tl.constexpr(LOWEST)
_LN_2 = tl.constexpr(math.log(2))
_LOG2_E = tl.constexpr(math.log2(math.e))
_WARP = tl.constexpr(32)
_KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)


def _config(steps: int, warps: int, stages: int) -> triton.Config:
    kwargs = {"STEPS": steps, "LANES": 32 * warps, "STAGES": stages}
    return triton.Config(kwargs, num_warps=warps)


# More steps move the sums to new maxima less often, but leave registers for fewer threads; stages
# load tiles ahead into shared memory. The interpreter has no clock to choose by, and small tiles
# let it see several of them in a short row.
_CONFIGS = (
    [_config(2, 1, 1)]
    if triton.knobs.runtime.interpret
    else [_config(*c) for c in ((1, 4, 1), (1, 8, 1), (2, 4, 1), (4, 4, 1), (2, 4, 3))]
)


def shard_sums(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    mask_N: torch.Tensor | None,
    num_columns: int,
    temperatures: tuple[float, float],
    top_k: int,
) -> ShardSums:
    num_tokens = len(student_NV)
    values_NK = student_NV.new_full((num_tokens, top_k), LOWEST, dtype=torch.float32)
    columns_NK = student_NV.new_zeros((num_tokens, top_k), dtype=torch.int64)
    if not num_tokens:
        return ShardSums(student_NV.new_zeros((0, 8), dtype=torch.float32), values_NK, columns_NK)
    student_NV, teacher_NV = with_unit_stride(student_NV), with_unit_stride(teacher_NV)
    mask_N = None if mask_N is None else mask_N.contiguous()
    num_segments, segment_columns = _segments(student_NV, num_columns)
    sums_RN8 = student_NV.new_empty((num_segments, num_tokens, 8), dtype=torch.float32)
    columns_at_once = LOAD_BYTES // min(student_NV.itemsize, teacher_NV.itemsize)
    # What one warp loads in one step: its maximum is found without the other warps.
    group = 32 * columns_at_once
    num_groups = triton.cdiv(num_columns, group)
    group_maxima_NG = None
    if top_k:
        group_maxima_NG = student_NV.new_empty((num_tokens, num_groups), dtype=torch.float32)
    with torch.cuda.device_of(student_NV):
        _sums_kernel[(num_tokens * num_segments,)](
            student_NV,
            teacher_NV,
            mask_N,
            sums_RN8,
            group_maxima_NG,
            student_NV.stride(0),
            teacher_NV.stride(0),
            num_tokens,
            num_columns,
            num_segments,
            segment_columns,
            num_groups,
            *(_LOG2_E.value / t for t in temperatures),
            COLUMNS_AT_ONCE=columns_at_once,
            enable_fp_fusion=True,
        )
        if top_k and num_groups:
            num_lanes = triton.next_power_of_2(num_groups)
            _top_k_kernel[(num_tokens,)](
                teacher_NV,
                mask_N,
                group_maxima_NG,
                values_NK,
                columns_NK,
                teacher_NV.stride(0),
                num_columns,
                num_groups,
                top_k,
                GROUPS=num_lanes,
                GROUP=group,
                num_warps=min(max(num_lanes // 1024, 1), 8),
                enable_fp_fusion=True,
            )
    sums_N8 = sums_RN8[0] if num_segments == 1 else merge_shards(sums_RN8, temperatures)
    return ShardSums(sums_N8, values_NK, columns_NK)


def shard_gradient(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    mask_N: torch.Tensor | None,
    num_columns: int,
    temperatures: tuple[float, float],
    weights_N7: torch.Tensor,
    inplace: bool,
) -> torch.Tensor:
    # As on CPU: with odd strides the gradient gets memory of its own after all.
    in_rows = student_NV.stride(-1) == 1
    out_NV = student_NV if inplace and in_rows else student_NV.new_empty(student_NV.shape)
    student_NV, teacher_NV = with_unit_stride(student_NV), with_unit_stride(teacher_NV)
    num_tokens, width = student_NV.shape
    num_blocks = triton.cdiv(width, GRADIENT_BLOCK)
    if not out_NV.numel():
        return out_NV
    with torch.cuda.device_of(student_NV):
        _gradient_kernel[(num_tokens * num_blocks,)](
            student_NV,
            teacher_NV,
            None if mask_N is None else mask_N.contiguous(),
            weights_N7.contiguous(),
            out_NV,
            student_NV.stride(0),
            teacher_NV.stride(0),
            out_NV.stride(0),
            num_columns,
            width,
            num_blocks,
            *(_LOG2_E.value / t for t in temperatures),
            1 / temperatures[0],
            BLOCK=GRADIENT_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out_NV


def _segments(logits_NV: torch.Tensor, num_columns: int) -> tuple[int, int]:
    """(segments per row, columns per segment)."""
    wanted = 1
    if logits_NV.is_cuda:
        gpu = torch.cuda.get_device_properties(logits_NV.device)
        wanted = PROGRAMS_PER_MULTIPROCESSOR * gpu.multi_processor_count // len(logits_NV)
    columns = triton.cdiv(num_columns, max(wanted, 1))
    columns = max(triton.cdiv(columns, SEGMENT_STEP), 1) * SEGMENT_STEP
    return max(triton.cdiv(num_columns, columns), 1), columns


# The choice decides the order of summation, so it is kept on disk: the next run repeats this one.
@triton.autotune(configs=_CONFIGS, key=["num_columns"], cache_results=True)
@triton.jit
def _sums_kernel(
    student,
    teacher,
    mask,
    sums,
    group_maxima,
    student_stride,
    teacher_stride,
    num_tokens,
    num_columns,
    num_segments,
    segment_columns,
    num_groups,
    student_scale,
    teacher_scale,
    COLUMNS_AT_ONCE: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One segment of one row. Scales are log2(e) / temperature: s and t are in base 2 here."""
    STEP: tl.constexpr = LANES * COLUMNS_AT_ONCE
    TILE: tl.constexpr = STEPS * STEP
    program = tl.program_id(0)
    segment = program % num_segments
    row = (program // num_segments).to(tl.int64)  # times a stride it passes 2^31
    begin = segment * segment_columns
    end = min(begin + segment_columns, num_columns)
    counts = True
    if mask is not None:
        counts = tl.load(mask + row)
        end = tl.where(counts, end, begin)
    student += row * student_stride
    teacher += row * teacher_stride
    if group_maxima is not None:
        group_maxima += row * num_groups

    # A step lies in one piece, which is what makes its loads wide. Seen as [U, L, E] afterwards,
    # the columns of a thread are the thread's own lane, and sums over U and E stay within it.
    columns_UC = tl.arange(0, STEPS)[:, None] * STEP + tl.arange(0, STEP)[None, :]
    SHAPE: tl.constexpr = (STEPS, LANES, COLUMNS_AT_ONCE)
    lowest_L = tl.full([LANES], _FLOOR, tl.float32)
    zeros_L = tl.zeros([LANES], tl.float32)
    maxima = (lowest_L, lowest_L)
    totals = (zeros_L, zeros_L, zeros_L, zeros_L, zeros_L, zeros_L)

    # A mask would cut the loads to one logit each wherever num_columns is no multiple of 16, so
    # whole tiles go without.
    whole_end = begin + (end - begin) // TILE * TILE
    for first in tl.range(begin, whole_end, TILE, num_stages=STAGES):
        x_s = tl.reshape(tl.load(student + first + columns_UC), SHAPE).to(tl.float32)
        x_t = tl.reshape(tl.load(teacher + first + columns_UC), SHAPE).to(tl.float32)
        maxima, totals = _add_tile(x_s, x_t, maxima, totals, student_scale, teacher_scale)
        if group_maxima is not None:
            _store_group_maxima(x_t, group_maxima, first, end)
    if whole_end < end:
        inside = whole_end + columns_UC < end
        x_s = tl.load(student + whole_end + columns_UC, inside, other=float("-inf"))
        x_t = tl.load(teacher + whole_end + columns_UC, inside, other=float("-inf"))
        x_s = tl.reshape(x_s, SHAPE).to(tl.float32)
        x_t = tl.reshape(x_t, SHAPE).to(tl.float32)
        maxima, totals = _add_tile(x_s, x_t, maxima, totals, student_scale, teacher_scale)
        if group_maxima is not None:
            _store_group_maxima(x_t, group_maxima, whole_end, end)

    m_s = tl.max(maxima[0], 0)
    m_t = tl.max(maxima[1], 0)
    totals = _relative_to(m_s, m_t, maxima, totals, student_scale, teacher_scale)
    z_s, z_t, d_s, d_t, a_t, a_s = totals
    sums += (segment * num_tokens + row) * 8
    tl.store(sums, tl.where(counts, m_s, 0.0))
    tl.store(sums + 1, tl.where(counts, m_t, 0.0))
    tl.store(sums + 2, tl.sum(z_s, 0))
    tl.store(sums + 3, tl.sum(z_t, 0))
    tl.store(sums + 4, tl.sum(d_s, 0) * _LN_2)
    tl.store(sums + 5, tl.sum(d_t, 0) * _LN_2)
    tl.store(sums + 6, tl.sum(a_t, 0) * _LN_2)
    tl.store(sums + 7, tl.sum(a_s, 0) * _LN_2)


@triton.jit
def _add_tile(x_s, x_t, maxima, totals, student_scale, teacher_scale):
    # These maxima ignore NaN; the sums carry it.
    m_s = tl.maximum(maxima[0], _max_of_lane(x_s))
    m_t = tl.maximum(maxima[1], _max_of_lane(x_t))
    totals = _relative_to(m_s, m_t, maxima, totals, student_scale, teacher_scale)
    z_s, z_t, d_s, d_t, a_t, a_s = totals
    # Bounded, because a logit of -inf would make NaN of 0 · (-inf). After the product, unlike in
    # _gradient: else the compiler fuses the product into s - t as well, for many more registers.
    s = (x_s - m_s[None, :, None]) * student_scale
    t = (x_t - m_t[None, :, None]) * teacher_scale
    s = tl.maximum(s, _FLOOR, propagate_nan=_KEEP_NAN)
    t = tl.maximum(t, _FLOOR, propagate_nan=_KEEP_NAN)
    e_s = tl.exp2(s)
    e_t = tl.exp2(t)
    d = s - t
    z_s += _sum_of_lane(e_s)
    z_t += _sum_of_lane(e_t)
    d_s += _sum_of_lane(e_s * d)
    d_t += _sum_of_lane(e_t * d)
    a_t += _sum_of_lane(e_t * t)
    a_s += _sum_of_lane(e_s * s)
    return (m_s, m_t), (z_s, z_t, d_s, d_t, a_t, a_s)


@triton.jit
def _relative_to(m_s, m_t, maxima, totals, student_scale, teacher_scale):
    """The totals moved from their maxima to higher ones; the same formula as in merge_shards."""
    z_s, z_t, d_s, d_t, a_t, a_s = totals
    shift_s = (maxima[0] - m_s) * student_scale
    shift_t = (maxima[1] - m_t) * teacher_scale
    scale_s = tl.exp2(shift_s)
    scale_t = tl.exp2(shift_t)
    shift = shift_s - shift_t
    return (
        scale_s * z_s,
        scale_t * z_t,
        scale_s * (d_s + z_s * shift),
        scale_t * (d_t + z_t * shift),
        scale_t * (a_t + z_t * shift_t),
        scale_s * (a_s + z_s * shift_s),
    )


@triton.jit
def _max_of_lane(x_ULE):
    return tl.max(tl.max(x_ULE, 2), 0)


@triton.jit
def _sum_of_lane(x_ULE):
    return tl.sum(tl.sum(x_ULE, 2), 0)


@triton.jit
def _store_group_maxima(x_ULE, group_maxima, first, end):
    """A group is what one warp holds of one step."""
    STEPS: tl.constexpr = x_ULE.shape[0]
    WARPS: tl.constexpr = x_ULE.shape[1] // _WARP
    GROUP: tl.constexpr = _WARP * x_ULE.shape[2]
    maxima_UW = tl.max(tl.reshape(tl.max(x_ULE, 2), (STEPS, WARPS, _WARP)), 2)
    groups_UW = tl.arange(0, STEPS)[:, None] * WARPS + tl.arange(0, WARPS)[None, :]
    tl.store(group_maxima + first // GROUP + groups_UW, maxima_UW, first + groups_UW * GROUP < end)


@triton.jit
def _top_k_kernel(
    teacher,
    mask,
    group_maxima,
    values,
    columns,
    teacher_stride,
    num_columns,
    num_groups,
    top_k,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One row: k times the largest entry after the last one, by (value, lower column).

    Only the group that holds it is read again. In PyTorch this would need an integer key for each
    of the k · GROUP candidates, to order equal values: many times the traffic of the whole sweep.
    """
    row = tl.program_id(0).to(tl.int64)
    teacher += row * teacher_stride
    values += row * top_k
    columns += row * top_k
    group_maxima += row * num_groups
    if mask is not None:
        num_groups = tl.where(tl.load(mask + row), num_groups, 0)
    groups_G = tl.arange(0, GROUPS)
    # The largest entry of each group that has not been taken yet.
    next_G = tl.load(group_maxima + groups_G, groups_G < num_groups, other=float("-inf"))
    last_value = float("inf")
    last_column = -1
    for at in range(top_k):
        value = tl.max(next_G, 0)
        group = tl.min(tl.where(next_G == value, groups_G, GROUPS), 0)
        columns_C = group * GROUP + tl.arange(0, GROUP)
        found = value > _FLOOR
        end = tl.where(found, num_columns, 0)
        x_C = tl.load(teacher + columns_C, columns_C < end, other=float("-inf")).to(tl.float32)
        untaken_C = (x_C < last_value) | ((x_C == last_value) & (columns_C > last_column))
        column = tl.min(tl.where(untaken_C & (x_C == value), columns_C, num_columns), 0)
        rest_C = (x_C < value) | ((x_C == value) & (columns_C > column))
        next_G = tl.where(
            groups_G == group, tl.max(tl.where(rest_C, x_C, float("-inf")), 0), next_G
        )
        tl.store(values + at, value, found)
        tl.store(columns + at, column.to(tl.int64), found)
        last_value = value
        last_column = column


@triton.jit
def _gradient_kernel(
    student,
    teacher,
    mask,
    weights,
    out,
    student_stride,
    teacher_stride,
    out_stride,
    num_columns,
    width,
    num_blocks,
    student_scale,
    teacher_scale,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """One block of one row. `out` may be `student`: a thread reads its own columns first."""
    program = tl.program_id(0)
    row = (program // num_blocks).to(tl.int64)
    first = program % num_blocks * BLOCK
    if mask is not None:
        num_columns = tl.where(tl.load(mask + row), num_columns, 0)
    columns = first + tl.arange(0, BLOCK)
    student += row * student_stride + columns
    teacher += row * teacher_stride + columns
    out += row * out_stride + columns
    weights += row * 7
    if first + BLOCK <= num_columns:
        x_s = tl.load(student).to(tl.float32)
        x_t = tl.load(teacher).to(tl.float32)
        grad = _gradient(x_s, x_t, weights, student_scale, teacher_scale, inverse_temperature)
        tl.store(out, grad.to(out.dtype.element_ty))
    else:
        inside = columns < num_columns
        x_s = tl.load(student, inside, other=0.0).to(tl.float32)
        x_t = tl.load(teacher, inside, other=0.0).to(tl.float32)
        grad = _gradient(x_s, x_t, weights, student_scale, teacher_scale, inverse_temperature)
        grad = tl.where(inside, grad, 0.0)
        tl.store(out, grad.to(out.dtype.element_ty), columns < width)


@triton.jit
def _gradient(x_s, x_t, weights, student_scale, teacher_scale, inverse_temperature):
    m_s = tl.load(weights)
    m_t = tl.load(weights + 1)
    log_z_s = tl.load(weights + 2) * _LOG2_E
    log_z_t = tl.load(weights + 3) * _LOG2_E
    a = tl.load(weights + 4) * inverse_temperature * _LN_2
    b = tl.load(weights + 5) * inverse_temperature
    f = tl.load(weights + 6) * inverse_temperature
    s = tl.maximum(x_s - m_s, _FLOOR, propagate_nan=_KEEP_NAN) * student_scale
    t = tl.maximum(x_t - m_t, _FLOOR, propagate_nan=_KEEP_NAN) * teacher_scale
    return tl.exp2(s - log_z_s) * (a * (s - t) + b) - f * tl.exp2(t - log_z_t)
