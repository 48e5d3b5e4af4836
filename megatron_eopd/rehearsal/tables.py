"""What a rehearsal found, as text. In: Rehearsals, and what the planner expected. Out: lines."""

from collections.abc import Iterator, Sequence

from megatron_eopd.planning.memory import StageMemory
from megatron_eopd.planning.search import HELPS
from megatron_eopd.rehearsal.answers import READS
from megatron_eopd.rehearsal.rehearse import Rehearsal
from megatron_eopd.rehearsal.watch import Block, Tally

GIB, MIB, TERA = 2**30, 2**20, 1e12
NUM_BLOCKS = 6
"""Largest tensors that are shown."""


def rehearsal_text(rehearsal: Rehearsal, planned: StageMemory) -> str:
    return "\n".join(
        [
            heading(rehearsal),
            "",
            *memory_lines(rehearsal, planned),
            "",
            *operation_lines(rehearsal),
            "",
            *collective_lines(rehearsal),
            "",
            *read_lines(rehearsal),
        ]
    )


def heading(rehearsal: Rehearsal) -> str:
    layout = rehearsal.layout
    return (
        f"rank {rehearsal.rank}: {rehearsal.role}, pipeline stage {layout.pp_rank} of "
        f"{layout.pp} ({layout.place()}); {rehearsal.num_parameters:,} parameters, "
        f"{rehearsal.num_microbatches} microbatches a step"
    )


def memory_lines(rehearsal: Rehearsal, planned: StageMemory) -> Iterator[str]:
    stretches = rehearsal.tallies
    yield _row("GiB at the peak, while", stretches)
    kinds = dict.fromkeys(kind for tally in stretches.values() for kind in tally.kinds)
    for kind in kinds:
        yield _row(f"  {kind}", [_gib(tally.kinds[kind]) for tally in stretches.values()])
    yield _row("  = peak", [_gib(tally.peak) for tally in stretches.values()])
    yield _row("  planned", [_gib(planned_peak(planned, name)) for name in stretches])
    fullest = max(stretches, key=lambda name: stretches[name].peak)
    yield ""
    yield f"largest tensors at the peak of {fullest}:"
    yield from (f"  {_block(block)}" for block in stretches[fullest].blocks[:NUM_BLOCKS])


def planned_peak(planned: StageMemory, stretch: str) -> int:
    """What is handed over when scoring is done belongs to that stretch here."""
    phases = ("scoring", "exchanging") if stretch == "scoring" else (stretch,)
    return max(map(planned.during, phases))


def operation_lines(rehearsal: Rehearsal) -> Iterator[str]:
    for name, tally in rehearsal.tallies.items():
        # PyTorch's formula for attention does not know that half of the square is masked.
        yield (
            f"{name}: {tally.flops / TERA:,.1f} TFLOP in matrix products and attention, the masked "
            f"half of it included"
        )


def collective_lines(rehearsal: Rehearsal) -> Iterator[str]:
    yield f"{'collectives':<44}{'group':<38}{'ranks':>6}{'calls':>7}{'MiB':>10}"
    for name, tally in rehearsal.tallies.items():
        for what, calls in tally.collectives.most_common():
            group = what.group.lower().replace("_group", "")
            yield (
                f"  {name + ': ' + what.name:<42}{group:<38}{what.ranks:>6}{calls:>7}"
                f"{tally.bytes_moved[what] / MIB:>10,.1f}"
            )


def read_lines(rehearsal: Rehearsal) -> Iterator[str]:
    reads = sum((tally.reads for tally in rehearsal.tallies.values()), start=Tally().reads)
    yield f"the device is asked for a value {reads.total()} times a step:"
    for place, count in reads.most_common():
        known = READS.get(place)
        yield f"  {count} × {place}: {known.reason if known else 'NOT EXPECTED'}"


def shortage(rehearsal: Rehearsal, memory: int) -> str | None:
    """What is too much on a GPU that may be filled with so many bytes; None where it fits."""
    name = max(rehearsal.tallies, key=lambda name: rehearsal.tallies[name].peak)
    tally = rehearsal.tallies[name]
    if tally.peak <= memory:
        return None
    layout, large = rehearsal.layout, []
    for kind, size in tally.kinds.most_common():
        if 10 * size > tally.peak:
            example = next(block for block in tally.blocks if block.kind == kind)
            help_ = HELPS.get(kind.replace(" ", "_"), "more GPUs")
            large.append(f"  {kind} {_gib(size)} GiB, such as {_block(example)}\n    {help_}")
    return (
        f"rank {rehearsal.rank} ({rehearsal.role}, pipeline stage {layout.pp_rank} of "
        f"{layout.pp}) needs {_gib(tally.peak)} GiB while {name}, and {_gib(memory)} may be used: "
        f"{_gib(tally.peak - memory)} GiB too much. Its large parts, and what makes them "
        f"smaller:\n" + "\n".join(large)
    )


def _block(block: Block) -> str:
    shape = " × ".join(map(str, block.shape))
    dtype = str(block.dtype).removeprefix("torch.")
    return f"{_gib(block.size)} GiB {dtype} [{shape}], {block.kind}, {block.place}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _row(title: str, values: Sequence[str]) -> str:
    return f"{title:<28}" + "".join(f"{value:>12}" for value in values)
