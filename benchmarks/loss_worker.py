"""One contender of the loss benchmark, in a process of its own: prints rows as JSON.

bench_loss.py starts it, on R ranks through torchrun where the case says so. Timed runs alternate
with plain copies, so that each figure stands beside what the memory gave at that moment.
"""
# Shapes: N tokens, V this tensor-parallel rank's columns, E tokens that are checked.

import ctypes
import functools
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from loss_baselines import CONTENDERS, Contender, Pass, Setting, Terms

from megatron_eopd.losses import dense_kl_terms
from megatron_eopd.losses.kernels import cpu
from megatron_eopd.losses.shards import all_gather

MB = 1e6
Row = dict[str, Any]


@dataclass(frozen=True)
class Width:
    """An instruction set, and what keeps code from going beyond it."""

    flags: tuple[str, ...]
    """Of our compiler."""
    aten: str
    """PyTorch's ATEN_CPU_CAPABILITY. Of MKL's functions nothing is taken away."""


WIDTHS = {
    "avx512": Width((), "avx512"),
    "avx2": Width(("-mno-avx512f",), "avx2"),
    "sse": Width(("-mno-avx512f", "-mno-avx2", "-mno-avx"), "default"),
}


@dataclass(frozen=True)
class Case:
    """One problem, and who is measured on it."""

    name: str
    contenders: tuple[str, ...]
    tokens: int
    vocab: int
    """Of all ranks; each holds vocab / tp columns."""
    dtype: str = "float32"
    tp: int = 1
    threads: int = 1
    """Of each rank, on CPU."""
    masked: float = 0.0
    """Fraction of tokens that do not count."""
    gated: float = 1.0
    """Fraction of tokens whose forward KL counts; the others have upstream gradient 0 there."""
    peaked: bool = False
    """Student and teacher are sure of one token, not always the same."""
    width: str = ""
    """One of WIDTHS; empty: all that the CPU has."""

    @property
    def columns(self) -> int:
        return -(-self.vocab // self.tp)

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def bytes_needed(self) -> float:
        """Per rank: two logits read in the forward and in the backward, one gradient written."""
        accesses = 5 - 4 * self.masked  # of a masked token only the gradient, zeros, is written
        return accesses * self.tokens * self.columns * self.itemsize


def worker(name: str, cases: list[Case], repeats: int) -> list[Row]:
    """Rows of the cases, which share threads and ranks."""
    contender = CONTENDERS[name]
    torch.set_num_threads(cases[0].threads)
    if cases[0].width:
        cpu.library = functools.partial(cpu.library, *WIDTHS[cases[0].width].flags)
    try:
        # Before Megatron's groups: on CPU they emulate CUDA, and ModelOpt cannot be imported then.
        passes = contender.build(cases[0].tp)
        of_megatron = contender.asks_megatron and cases[0].tp > 1
        with tensor_parallel_group(of_megatron) as group:
            found = [measure(Bout(contender, passes, case, group), repeats) for case in cases]
    except contender.may_fail_with as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        found = [{"skipped": reason} for _ in cases]
    head = {"contender": name, "computes": contender.computes}
    if contender.has_kernels and not torch.cuda.is_available() and cpu.library():
        head["kernel"] = "{}, {} lanes".format(*cpu.instruction_set())
    return [{"case": asdict(c)} | head | row for c, row in zip(cases, found, strict=True)]


@contextmanager
def tensor_parallel_group(of_megatron: bool) -> Iterator[dist.ProcessGroup]:
    """All ranks of this launch, which torchrun made or which is this process alone."""
    if of_megatron:
        from megatron_eopd.config import ParallelConfig
        from megatron_eopd.parallel.init import parallel_context

        config = ParallelConfig(tensor_model_parallel_size=int(os.environ["WORLD_SIZE"]))
        with parallel_context(config, seed=1, longest_wait_s=0.0) as context:
            yield context.groups.tp
        return
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", **alone)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


class Bout:
    """One contender on one case: its passes, the logits, and the weights of the loss."""

    def __init__(
        self, contender: Contender, passes: list[Pass], case: Case, group: dist.ProcessGroup
    ) -> None:
        self.passes, self.case, self.tp_group = passes, case, group
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(dist.get_rank(group))
        self.teacher_NV = random_logits(case, self.device)
        self.student_NV = random_logits(case, self.device).requires_grad_()
        self.saved_NV = self.student_NV.detach().clone() if contender.overwrites_student else None
        tenth_N = torch.arange(case.tokens, device=self.device) % 10
        self.kept_N = tenth_N < 10 * (1 - case.masked)
        # Without tensor parallelism nobody needs a group, and gloo's threads would slow down those
        # who start OpenMP's for every operation.
        self.setting = Setting(group if case.tp > 1 else None, self.kept_N if case.masked else None)
        weight_N = self.kept_N.float()
        gate_N = tenth_N < 10 * case.gated
        self.weights = {"reverse_kl": weight_N, "forward_kl": weight_N * gate_N, "jsd": weight_N}

    def reset(self) -> None:
        self.student_NV.grad = None
        if self.saved_NV is not None:
            with torch.no_grad():
                self.student_NV.copy_(self.saved_NV)

    def run(self) -> tuple[Terms, list]:
        """Forward and backward of every pass. Returns all terms, and the times between halves."""
        terms, marks = {}, [self.mark()]
        for one_pass in self.passes:
            found = one_pass(self.student_NV, self.teacher_NV, self.setting)
            loss = weighted_sum(found, self.weights)
            marks.append(self.mark())
            loss.backward()
            marks.append(self.mark())
            terms |= {name: term.detach() for name, term in found.items()}
        return terms, marks

    def mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, marks: list) -> list[float]:
        """Between each mark and the next."""
        pairs = list(itertools.pairwise(marks))
        if self.device.type == "cpu":
            return [1e3 * (end - begin) for begin, end in pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]


def random_logits(case: Case, device: torch.device) -> torch.Tensor:
    """Made in place: no temporary as large as the logits."""
    shape = (case.tokens, case.columns)
    logits_NV = torch.empty(shape, dtype=getattr(torch, case.dtype), device=device).normal_()
    if case.peaked:
        # e^15 against Σ exp ≈ 1.65 · 151,936: probability 0.93.
        columns_N1 = torch.randint(0, min(2, case.columns), (case.tokens, 1), device=device)
        logits_NV.scatter_(1, columns_N1, 15.0)
    return logits_NV


def weighted_sum(terms: Terms, weights: Terms) -> torch.Tensor:
    return sum((weights[name] * term).sum() for name, term in terms.items() if name in weights)


def measure(bout: Bout, repeats: int) -> Row:
    expected = float64_rows(bout)
    bout.run()  # compiles, allocates and warms whatever there is
    bout.reset()
    memory = PeakMemory(bout.device)
    with counted_collectives() as sent_bytes:
        terms, _ = bout.run()
    gradient_bytes = bout.student_NV.nbytes
    row = {
        "memory_mb": (memory.growth() - gradient_bytes) / MB,
        "collectives": len(sent_bytes),
        "collective_bytes": sum(sent_bytes),
        **errors(bout, terms, expected),
    }
    rows = [None] * dist.get_world_size(bout.tp_group)
    dist.all_gather_object(rows, row | timings(bout, repeats), group=bout.tp_group)
    worst = {n: max((r[n] for r in rows if r[n] is not None), default=None) for n in row}
    return worst | rates(rows, bout.case)


def timings(bout: Bout, repeats: int) -> Row:
    """Milliseconds of every run: forward, backward, and two kinds of copy in between."""
    spent = {"forward": [], "backward": [], "copy": [], "fresh_copy": []}
    target_NV = bout.teacher_NV.clone()
    # Larger than the cache of a GPU, where a small case would otherwise stay from run to run.
    flush = torch.empty(1 << 28 if bout.device.type == "cuda" else 0, device=bout.device)
    for _ in range(repeats):
        bout.reset()
        flush.zero_()
        if bout.case.tp > 1:
            dist.barrier(bout.tp_group)
        halves = bout.milliseconds(bout.run()[1])
        spent["forward"].append(sum(halves[::2]))
        spent["backward"].append(sum(halves[1::2]))
        bout.student_NV.grad = None
        marks = [bout.mark()]
        target_NV.copy_(bout.teacher_NV)
        marks.append(bout.mark())
        bout.teacher_NV.clone()
        copies = bout.milliseconds([*marks, bout.mark()])
        spent["copy"].append(copies[0])
        spent["fresh_copy"].append(copies[1])
    return spent


def rates(ranks: list[Row], case: Case) -> Row:
    """From the slowest rank of every run."""

    def slowest(what: str) -> torch.Tensor:
        return torch.tensor([rank[what] for rank in ranks]).amax(0)

    forward, backward = slowest("forward"), slowest("backward")
    percentiles = (forward + backward).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    ms = dict(zip(("p20", "p50", "p80"), percentiles, strict=True))
    gb_per_s = case.bytes_needed / ms["p50"] / 1e6
    copied_gb = 2 * case.tokens * case.columns * case.itemsize / 1e6
    copy, fresh_copy = (copied_gb / slowest(x).median().item() for x in ("copy", "fresh_copy"))
    return {
        "ms": ms,
        "forward_ms": forward.median().item(),
        "backward_ms": backward.median().item(),
        "gb_per_s": gb_per_s,
        "copy_gb_per_s": copy,
        "fresh_copy_gb_per_s": fresh_copy,
        "percent_of_copy": 100 * gb_per_s / copy,
    }


class PeakMemory:
    """How much more memory than now the process held at its peak, from here on."""

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        if self.on_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            # glibc: give back what is free, or it would hide as much of what comes. Linux: forget
            # the peak of the process so far.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self._peak()

    def growth(self) -> int:
        return self._peak() - self.before

    def _peak(self) -> int:
        if self.on_cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """The bytes that this rank hands to each collective inside the block."""
    sent: list[int] = []
    names = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single")
    names += ("reduce_scatter_tensor", "all_to_all_single", "broadcast")
    originals = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
            sent.append(tensors[-1].nbytes)  # its own part comes last, after room for the others'
            return function(*args, **kwargs)

        return call

    for name, function in originals.items():
        setattr(dist, name, counted(function))
    try:
        yield sent
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


# --- errors --------------------------------------------------------------------------------------


@dataclass
class Expected:
    rows_E: torch.Tensor
    terms: Terms
    gradients: dict[str, torch.Tensor]
    """Of each term's weighted sum, in this rank's columns: float64 [E, V]."""


def float64_rows(bout: Bout) -> Expected:
    """Terms and gradients of the first and the last tokens that count, in float64."""
    kept_K = bout.kept_N.nonzero().squeeze(-1)
    rows_E = torch.cat([kept_K[:4], kept_K[-4:]]).unique()
    group = bout.setting.tp_group
    part = dist.get_rank(group) if group is not None else 0

    def whole(logits_NV: torch.Tensor) -> torch.Tensor:
        return torch.cat(list(all_gather(logits_NV.detach()[rows_E], group)), dim=-1).double()

    student, teacher = whole(bout.student_NV).requires_grad_(), whole(bout.teacher_NV)
    terms = dense_kl_terms(student, teacher)._asdict() | {"jsd": jsd(student, teacher)}
    gradients = {}
    for name, weight_N in bout.weights.items():
        loss = (weight_N[rows_E] * terms[name]).sum()
        (gradient,) = torch.autograd.grad(loss, student, retain_graph=True)
        gradients[name] = gradient.chunk(bout.case.tp, -1)[part]
    return Expected(rows_E, {name: term.detach() for name, term in terms.items()}, gradients)


def jsd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    q, p = student.softmax(-1), teacher.softmax(-1)
    log_mean = ((p + q) / 2).log()
    return (p * (p.log() - log_mean) + q * (q.log() - log_mean)).sum(-1) / 2


def errors(bout: Bout, terms: Terms, expected: Expected) -> Row:
    """Largest error of a value, in nats; and of the gradient, over its largest element. None where
    a contender gives no value per token."""
    values = [
        (term[expected.rows_E] - expected.terms[name]).abs().max().item()
        for name, term in terms.items()
        if term.ndim
    ]
    reference_EV = sum(g for name, g in expected.gradients.items() if name in terms)
    found_EV = bout.student_NV.grad[expected.rows_E]
    error = (found_EV - reference_EV).abs().max() / reference_EV.abs().max()
    return {"value_error": max(values, default=None), "gradient_error": error.item()}


if __name__ == "__main__":
    _, contender_name, cases_json, timed_runs = sys.argv
    rows = worker(contender_name, [Case(**c) for c in json.loads(cases_json)], int(timed_runs))
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(rows), flush=True)
