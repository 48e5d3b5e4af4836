"""Rollouts into microbatches of packed sequences. In: a step's rollouts. Out: MicroBatch.

Every rank holds the same rollouts, so each computes the whole plan, who trains on what, without
talking to the others. All data-parallel ranks get the same number of microbatches, with about as
many tokens each; the order of rollouts inside a step means nothing to the loss.
"""
# Shapes: S tokens of a microbatch on this rank, N valid response tokens of them, T tokens of one
# response.

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch

from megatron_eopd.config import Config, TrainingConfig
from megatron_eopd.errors import ConfigError
from megatron_eopd.models.packed_sequences import (
    chunks_of,
    describe_sequences,
    on_device,
    positions_of,
)
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.records import (
    MicroBatch,
    ResponseTokens,
    Rollout,
    ScoredRollout,
    TeacherPart,
    TeacherSignal,
)

PackedRollouts = list[list[list[Rollout]]]
"""[data-parallel rank][microbatch] → its rollouts. The same on every rank."""


@dataclass(frozen=True)
class Limits:
    """What fits into one microbatch."""

    max_sequences: int | None
    max_tokens: int | None

    @classmethod
    def of(cls, training: TrainingConfig) -> "Limits":
        if training.max_tokens_per_microbatch is not None:
            return cls(None, training.max_tokens_per_microbatch)
        return cls(training.micro_batch_size or 1, None)


def check_budget(training: TrainingConfig, longest: int, what: str) -> None:
    """Raise ConfigError when a microbatch cannot hold the longest sample, padding included.

    `what`: how its tokens come together, for the message.
    """
    budget = training.max_tokens_per_microbatch
    if budget is not None and budget < longest:
        raise ConfigError(
            f"training.max_tokens_per_microbatch={budget} cannot hold {what}. Set it to {longest} "
            f"or more."
        )


def num_tokens(rollout: Rollout) -> int:
    """Of prompt and response."""
    return len(rollout.prompt.prompt_ids) + len(rollout.response_ids)


def pack(rollouts: Sequence[Rollout], limits: Limits, layout: Layout) -> PackedRollouts:
    """As few microbatches as the limits allow, the same number on every data-parallel rank.

    A rank that gets no rollout for one of them gets an empty microbatch. The interleaved pipeline
    schedule takes multiples of the pipeline size only.
    """
    lengths = [num_tokens(rollout) for rollout in rollouts]
    return [
        [[rollouts[i] for i in members] for members in microbatches]
        for microbatches in pack_lengths(lengths, limits, layout)
    ]


def pack_lengths(lengths: Sequence[int], limits: Limits, layout: Layout) -> list[list[list[int]]]:
    """As `pack`, of indices into the sequences' lengths."""
    padded = [layout.padded(length) for length in lengths]
    bins = _balance(padded, layout.dp, limits, step=layout.pp if layout.vpp > 1 else 1)
    # Bins come with falling loads. Dealt back and forth, the ranks' sums are nearly equal, and the
    # microbatches that they work on at the same time are nearly equally long.
    ranks: list[list[list[int]]] = [[] for _ in range(layout.dp)]
    for n, members in enumerate(bins):
        turn, place = divmod(n, layout.dp)
        ranks[place if turn % 2 == 0 else layout.dp - 1 - place].append(members)
    return ranks


def _balance(lengths: Sequence[int], dp: int, limits: Limits, step: int) -> list[list[int]]:
    """Indices in dp · (a multiple of step) bins, the fullest bin first."""
    fewest = 1
    if limits.max_sequences is not None:
        fewest = -(-len(lengths) // (limits.max_sequences * dp))
    if limits.max_tokens is not None:
        fewest = max(fewest, -(-sum(lengths) // (limits.max_tokens * dp)))
    per_rank = -(-fewest // step) * step
    while True:
        bins = _fill(lengths, dp * per_rank, limits)
        if bins is not None:
            return bins
        assert per_rank <= len(lengths) + step, f"no plan for lengths {lengths} with {limits}"
        per_rank += step


def _fill(lengths: Sequence[int], count: int, limits: Limits) -> list[list[int]] | None:
    """Longest first into the emptiest bin: the fullest one has at most 4/3 of the least possible
    (Graham 1969). None if that does not keep to the limits."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    open_bins = [(0, b) for b in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not open_bins:
            return None
        load, emptiest = heappop(open_bins)
        bins[emptiest].append(i)
        loads[emptiest] = load + lengths[i]
        if limits.max_tokens is not None and loads[emptiest] > limits.max_tokens:
            return None
        if len(bins[emptiest]) != limits.max_sequences:
            heappush(open_bins, (loads[emptiest], emptiest))
    return [bins[b] for b in sorted(range(count), key=lambda b: -loads[b])]


def exchange_size(config: Config) -> int | None:
    """Microbatches of each data-parallel rank that teachers hand over at a time; None: those of an
    optimizer step. The interleaved schedule takes whole groups of them."""
    stages = config.parallel.pipeline_model_parallel_size
    size = config.teacher.microbatches_per_exchange
    if size is None and config.teacher.payload == "logits":
        size = stages
    if size is not None and config.parallel.virtual_pipeline_model_parallel_size > 1:
        size = -(-size // stages) * stages
    return size


def rounds_of(packed: PackedRollouts, size: int | None) -> list[PackedRollouts]:
    """The same in portions of `size` microbatches of each rank; None: in one."""
    count = len(packed[0])
    size = size or count
    return [[rank[first : first + size] for rank in packed] for first in range(0, count, size)]


def rounds_as_trained(
    rollouts: Sequence[Rollout], config: Config, layout: Layout
) -> list[PackedRollouts]:
    """As many at a time as in an optimizer step, so that no more of what teachers hand over lies in
    memory than in training."""
    size, limits = config.training.global_batch_size, Limits.of(config.training)
    plans = [pack(rollouts[n : n + size], limits, layout) for n in range(0, len(rollouts), size)]
    return [part for plan in plans for part in rounds_of(plan, exchange_size(config))]


def padding_fraction(packed: PackedRollouts, layout: Layout) -> float:
    """Share of padding in all tokens that the ranks work on."""
    padded = real = 0
    for microbatches in packed:
        row = common_row_length(microbatches, layout)
        padded += sum(sum(padded_lengths(rollouts, layout, row)) for rollouts in microbatches)
        real += sum(num_tokens(rollout) for rollouts in microbatches for rollout in rollouts)
    return 1 - real / padded


def load_imbalance(packed: PackedRollouts) -> float:
    """Tokens of the data-parallel rank that has the most, over their mean; 1 is perfect."""
    loads = [sum(num_tokens(r) for microbatch in rank for r in microbatch) for rank in packed]
    return max(loads) * len(loads) / sum(loads)


def padded_lengths(rollouts: Sequence[Rollout], layout: Layout, row_length: int = 0) -> list[int]:
    """Of each sequence, its padding causally behind all of it; and behind them, where one is
    needed, of a sequence of padding that fills the row up to what sequence parallelism can cut, or
    to `row_length`."""
    lengths = [layout.padded(num_tokens(rollout)) for rollout in rollouts]
    row_multiple = layout.sequence_multiple * layout.tp
    row_length = max(row_length, row_multiple)
    filled = max(row_length, -(-sum(lengths) // row_multiple) * row_multiple)
    return lengths + [filled - sum(lengths)] * (filled > sum(lengths))


def common_row_length(microbatches: Sequence[Sequence[Rollout]], layout: Layout) -> int:
    """What all rows of a rank's microbatches are filled up to; 0 where each has its own length.

    Megatron's interleaved schedule knows one length only: with two stages it cannot tell a message
    to the next one from a message to the one before, so lengths cannot travel with them.
    """
    if layout.vpp == 1:
        return 0
    return max(sum(padded_lengths(rollouts, layout)) for rollouts in microbatches)


def own_response_tokens(
    rollout: Rollout, layout: Layout, cp_rank: int
) -> tuple[list[int], list[int]]:
    """(rows, response tokens): which of a sequence's rows on a context-parallel rank predict a
    response token, and which token each of them predicts, in rising order."""
    # Response token j stands at P + j and is predicted by the row before it.
    shift = len(rollout.prompt.prompt_ids) - 1
    rows: list[int] = []
    tokens: list[int] = []
    length = layout.padded(num_tokens(rollout))
    for row, chunk in chunks_of(length, layout.cp, cp_rank):
        first, last = max(chunk.start, shift), min(chunk.stop, shift + len(rollout.response_ids))
        rows += range(row + first - chunk.start, row + last - chunk.start)
        tokens += range(first - shift, last - shift)
    return rows, tokens


def make_microbatches(
    scored: Sequence[Sequence[ScoredRollout]], layout: Layout, device: torch.device
) -> list[MicroBatch]:
    """Of one rank, for one run of the pipeline schedule."""
    row_length = common_row_length([[s.rollout for s in batch] for batch in scored], layout)
    return [_make_microbatch(batch, layout, device, row_length) for batch in scored]


def _make_microbatch(
    scored: Sequence[ScoredRollout], layout: Layout, device: torch.device, row_length: int
) -> MicroBatch:
    """This context-parallel rank's part of the packed sequences; without any, a row of padding."""
    rollouts = [s.rollout for s in scored]
    lengths = padded_lengths(rollouts, layout, row_length)
    cp, cp_rank = layout.cp, layout.cp_rank
    token_ids: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    logprobs: list[float] = []
    sampled: list[bool] = []
    positions: list[float] = []
    responses: list[ResponseTokens] = []
    for rollout, length in zip(rollouts, lengths, strict=False):
        first_row = len(token_ids)
        # Token 0 as padding: causal attention keeps it out of every real token, and no row of it
        # is ever picked.
        ids = [*rollout.prompt.prompt_ids, *rollout.response_ids, *[0] * length]
        token_ids += [ids[position] for position in positions_of(length, cp, cp_rank)]
        own_rows, tokens = own_response_tokens(rollout, layout, cp_rank)
        rows += [first_row + row for row in own_rows]
        targets += [rollout.response_ids[token] for token in tokens]
        logprobs += [rollout.response_logprobs[token] for token in tokens]
        sampled += [rollout.source == "sampled"] * len(tokens)
        last = max(rollout.whole_length - 1, 1)
        positions += [token / last for token in tokens]
        responses.append(ResponseTokens(rollout, tokens))
    token_ids += [0] * (sum(lengths) // cp - len(token_ids))
    ids_S, rows_N, targets_N, sampled_N = on_device(
        device, torch.int64, token_ids, rows, targets, sampled
    )
    logprobs_N, positions_N = on_device(device, torch.float32, logprobs, positions)
    return MicroBatch(
        token_ids_1S=ids_S.unsqueeze(0),
        sequences=describe_sequences(lengths, cp, cp_rank, device),
        prediction_rows_N=rows_N,
        target_ids_N=targets_N,
        rollout_logprobs_N=logprobs_N,
        sampled_N=sampled_N.bool(),
        positions_N=positions_N,
        responses=tuple(responses),
        teacher=join_signals([s.signals for s in scored]),
    )


def join_signals(signals: Sequence[Sequence[TeacherSignal]]) -> tuple[TeacherPart, ...]:
    """One part for each teacher, from the signals of consecutive rollouts; none without signals."""
    by_teacher: dict[str, list[tuple[range, TeacherSignal]]] = {}
    first = 0
    for of_rollout in signals:
        if not of_rollout:
            return ()
        run = range(first, first + of_rollout[0].num_tokens)
        for signal in of_rollout:
            by_teacher.setdefault(signal.teacher, []).append((run, signal))
        first = run.stop
    parts = []
    for teacher, members in by_teacher.items():
        payloads = [signal.payload for _, signal in members]
        payload = type(payloads[0])(*(torch.cat(x) for x in zip(*payloads, strict=True)))
        parts.append(TeacherPart(teacher, tuple(run for run, _ in members), payload))
    return tuple(parts)
