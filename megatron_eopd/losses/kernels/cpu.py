"""Both sweeps on CPU: cpu.cpp, compiled once per machine. What they compute is said in __init__.

Without a compiler, or for other types than float32 and bfloat16, `handles` says no and the eager
form takes over.
"""
# Shapes: N tokens, V columns, K top-k.

import ctypes
import functools
import mmap
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_eopd.losses.kernels import LOWEST, ShardSums, with_unit_stride
from megatron_eopd.losses.kernels.compiled import CompilerError, load_library

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    "-Wno-psabi",  # no vector leaves the library
)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

HUGE_PAGE = 2 << 20

_pointer, _integer, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_COMMON = (*(_pointer,) * 2, *(_integer,) * 3, *(_real,) * 2, _pointer, _integer)
_ARGUMENTS = {
    "sums": (*_COMMON, _pointer, _integer, _pointer, _pointer),
    "gradient": (*_COMMON, _pointer, _pointer, _integer),
}


def handles(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> bool:
    return student_logits.dtype in NAMES and teacher_logits.dtype in NAMES and library() is not None


@functools.cache
def library(*more_flags: str) -> ctypes.CDLL | None:
    """The compiled sweeps; None, with a warning that says why, without them. `more_flags` may ask
    for less than this CPU has: "-mno-avx512f"."""
    try:
        return load_library(SOURCE, (*FLAGS, *more_flags))
    except CompilerError as error:
        warnings.warn(f"the loss runs up to 4 times slower on CPU: {error}", stacklevel=2)
        return None


def instruction_set() -> tuple[str, int]:
    """What the library was compiled for, and how many float32 it works on at once."""
    name = library().instruction_set
    name.restype = ctypes.c_char_p
    return name().decode(), library().lanes()


def _function(sweep: str, student: torch.Tensor, teacher: torch.Tensor) -> Callable:
    function = getattr(library(), f"{sweep}_{NAMES[student.dtype]}_{NAMES[teacher.dtype]}")
    function.argtypes, function.restype = _ARGUMENTS[sweep], None
    return function


def shard_sums(
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    mask_N: torch.Tensor | None,
    num_columns: int,
    temperatures: tuple[float, float],
    top_k: int,
) -> ShardSums:
    num_tokens = len(student_NV)
    sums_N8 = torch.zeros(num_tokens, 8)
    values_NK = torch.full((num_tokens, top_k), LOWEST)
    columns_NK = torch.zeros(num_tokens, top_k, dtype=torch.int64)
    student_NV, teacher_NV = with_unit_stride(student_NV), with_unit_stride(teacher_NV)
    results = (sums_N8.data_ptr(), top_k, values_NK.data_ptr(), columns_NK.data_ptr())
    function = _function("sums", student_NV, teacher_NV)
    _over_rows(function, student_NV, teacher_NV, mask_N, num_columns, temperatures, results)
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
    # Odd strides are not worth a kernel: then the gradient gets memory of its own after all.
    in_rows = student_NV.stride(-1) == 1
    out_NV = student_NV if inplace and in_rows else _empty(student_NV.shape, student_NV.dtype)
    out_NV[:, num_columns:] = 0
    if mask_N is not None:
        out_NV[~mask_N] = 0
    student_NV, teacher_NV = with_unit_stride(student_NV), with_unit_stride(teacher_NV)
    weights_N7 = weights_N7.contiguous()
    results = (weights_N7.data_ptr(), out_NV.data_ptr(), out_NV.stride(0))
    function = _function("gradient", student_NV, teacher_NV)
    _over_rows(function, student_NV, teacher_NV, mask_N, num_columns, temperatures, results)
    return out_NV


def _empty(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """On huge pages where the system lets us ask for them: a gradient of a real vocabulary is fresh
    memory, and touching it page by page would cost as much as the sweep."""
    empty = torch.empty(shape, dtype=dtype)
    start, end = empty.data_ptr(), empty.data_ptr() + empty.nbytes
    start, end = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
    if end > start and hasattr(mmap, "MADV_HUGEPAGE"):
        # Advice only: what it answers changes nothing.
        ctypes.CDLL(None).madvise(_pointer(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)
    return empty


def _over_rows(
    function: Callable,
    student_NV: torch.Tensor,
    teacher_NV: torch.Tensor,
    mask_N: torch.Tensor | None,
    num_columns: int,
    temperatures: tuple[float, float],
    results: tuple,
) -> None:
    """Call `function` on the unmasked rows, in parts, on PyTorch's number of threads."""
    if mask_N is None:
        rows = torch.arange(len(student_NV))
    else:
        rows = mask_N.nonzero().squeeze(-1).contiguous()
    logits = (student_NV.data_ptr(), teacher_NV.data_ptr(), student_NV.stride(0))
    logits = (*logits, teacher_NV.stride(0), num_columns, *(1 / t for t in temperatures))
    num_threads = torch.get_num_threads()
    # Several parts per thread: a thread that is held up leaves its share to the others.
    size = max(1, -(-len(rows) // (8 * num_threads)))
    parts = range(0, len(rows), size)

    def run(first: int) -> None:
        count = min(size, len(rows) - first)
        function(*logits, rows.data_ptr() + first * rows.element_size(), count, *results)

    if num_threads == 1 or len(parts) <= 1:
        for first in parts:
            run(first)
        return
    with ThreadPoolExecutor(num_threads) as pool:  # ctypes lets go of the interpreter lock
        list(pool.map(run, parts))
