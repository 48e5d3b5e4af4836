"""The loss benchmark: our loss and other people's on the same logits; `bench.py --only loss`.

Here: which cases there are, who is measured on them, and the tables. Each contender runs in a
process of its own (loss_worker.py), so that its peak memory is its own.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from loss_baselines import CONTENDERS
from loss_worker import WIDTHS, Case, Row
from tqdm import tqdm

VOCAB = 151_936  # Qwen3
WORKER = Path(__file__).with_name("loss_worker.py")

# --- which cases ---------------------------------------------------------------------------------

EVERYBODY = tuple(CONTENDERS)
SHARDED = ("ours", "modelopt", "nemo-rl")  # the others know no tensor parallelism
TWO = ("ours", "modelopt")
OF_EACH_WIDTH = ("ours", "ours-eager", "modelopt")
PLOTTED = ("ours", "modelopt", "autograd")


def cpu_cases(tokens: int = 512, vocab: int = VOCAB) -> list[Case]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    case = functools.partial(Case, tokens=tokens, vocab=vocab, threads=cores)
    return [
        case("float32", EVERYBODY),
        case("tp2", SHARDED, tp=2, threads=1),
        case("bfloat16", EVERYBODY, dtype="bfloat16"),
        case("masked", TWO, masked=0.3),
        case("gated", TWO, gated=0.2),
        case("peaked", TWO, peaked=True),
        *(case(width, OF_EACH_WIDTH, width=width) for width in widths_of_this_cpu()),
    ]


def widths_of_this_cpu() -> list[str]:
    """Those that an x86 CPU can run; other kinds have one width only."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    widest = {"AVX512": "avx512", "AVX2": "avx2"}
    first = widest.get(torch.backends.cpu.get_cpu_capability(), "sse")
    return list(WIDTHS)[list(WIDTHS).index(first) :]


def cuda_cases(tokens: int | None = None, vocab: int = VOCAB) -> list[Case]:
    """Ours over all sizes, with the columns that one of 1, 2, 4 or 8 ranks would hold; everybody
    at one size."""
    sizes = [tokens] if tokens else [1024 << i for i in range(6) if i != 1]
    usual = functools.partial(Case, tokens=tokens or 8192, vocab=vocab, dtype="bfloat16")
    return [
        usual("bfloat16", EVERYBODY),
        usual("float32", EVERYBODY, dtype="float32"),
        usual("masked", TWO, masked=0.3),
        usual("gated", TWO, gated=0.2),
        usual("peaked", TWO, peaked=True),
        *(
            Case("grid", ("ours",), tokens=size, vocab=-(-vocab // ranks), dtype=dtype)
            for dtype in ("bfloat16", "float32")
            for size in sizes
            for ranks in (1, 2, 4, 8)
        ),
    ]


def plot_cases(case: Case) -> list[Case]:
    """The given case at four sizes, for a few contenders."""
    sizes = [case.tokens * factor // 4 for factor in (1, 2, 4, 8)]
    fields = asdict(case) | {"name": "plot", "contenders": PLOTTED}
    return [Case(**(fields | {"tokens": max(1, size)})) for size in sizes]


# --- the benchmark -------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    cases = cuda_cases() if torch.cuda.is_available() else cpu_cases()
    names = [*dict.fromkeys(case.name for case in cases), "plot"]
    group = parser.add_argument_group("options of the loss benchmark")
    group.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help=" ".join(names))
    some = {"nargs": "+", "choices": EVERYBODY, "metavar": "CONTENDER"}
    group.add_argument("--contenders", **some, help=" ".join(EVERYBODY))
    group.add_argument("--tokens", type=positive, help="512, on CUDA 8192")
    group.add_argument("--vocab", type=positive, default=VOCAB, help="%(default)s")
    group.add_argument("--repeats", type=positive, help="timed runs of each; 7, on CUDA 30")
    drawn = "draw time and memory over N to this file; with --cases plot nothing else is measured"
    group.add_argument("--plot", type=Path, metavar="PNG", help=drawn)


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def bench_loss(arguments: argparse.Namespace) -> list[Row]:
    """A row for each case and contender, in the order in which `markdown` shows them."""
    on_cuda = torch.cuda.is_available()
    sizes = {"vocab": arguments.vocab} | ({"tokens": arguments.tokens} if arguments.tokens else {})
    cases = cuda_cases(**sizes) if on_cuda else cpu_cases(**sizes)
    plotted = plot_cases(cases[0]) if arguments.plot else []
    cases = [case for case in cases if case.name in (arguments.cases or [case.name])] + plotted
    jobs: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        for name in case.contenders:
            if case.name == "plot" or name in (arguments.contenders or EVERYBODY):
                jobs.setdefault((case.name, name), []).append(case)
    rows = []
    for (case_name, name), cases_of_job in (bar := tqdm(jobs.items(), unit="run", leave=False)):
        bar.set_description(f"{case_name}: {name}")
        rows += run_worker(name, cases_of_job, arguments.repeats or (30 if on_cuda else 7))
    add_ratios(rows)
    if arguments.plot:
        plot(rows, arguments.plot)
    return rows


def run_worker(name: str, cases: list[Case], repeats: int) -> list[Row]:
    """All cases in one process, or in one per rank."""
    command, tp = [sys.executable], cases[0].tp
    if tp > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={tp}"]
    command += [str(WORKER), name, json.dumps([asdict(case) for case in cases]), str(repeats)]
    width = WIDTHS.get(cases[0].width)
    environment = os.environ | ({"ATEN_CPU_CAPABILITY": width.aten} if width else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    *_, last = done.stdout.splitlines() or [""]
    # The result is the last line. What comes after it does not count: ModelOpt's process sometimes
    # aborts while it exits, by a C++ thread that nobody has joined.
    if not last.startswith("["):
        raise RuntimeError(f"{name} failed on {cases}:\n{done.stderr[-4000:]}")
    return json.loads(last)


def add_ratios(rows: list[Row]) -> None:
    """How many times as long as ours each took on the same case."""
    ours = {json.dumps(r["case"]): r["ms"]["p50"] for r in rows if r["contender"] == "ours"}
    for row in rows:
        reference = ours.get(json.dumps(row["case"]))
        if reference and "ms" in row:
            row["times_ours"] = row["ms"]["p50"] / reference


# --- what comes out ------------------------------------------------------------------------------

HEAD = (
    "| contender | N × V/R | ms p50 (p20–p80) | forward + backward | × ours | GB/s, of copy "
    "| memory, MB | error of value, gradient | collectives |\n|" + "---|" * 9
)
LEGEND = """GB/s: the bytes of two reads of both logits and one write of the gradient, over the
time; the percentage is of the copy measured beside it. Copy: bytes read and written, into memory
that exists already, or into fresh memory. Memory: peak beyond both logits and the gradient. Error:
largest, against float64; of the gradient, over its largest element. Collectives: how many in
forward and backward, and the bytes that a rank hands to them."""


def markdown(rows: list[Row]) -> str:
    """A table per case, and at the end what the columns and the contenders mean."""
    lines = []
    for name in dict.fromkeys(row["case"]["name"] for row in rows):
        of_case = [row for row in rows if row["case"]["name"] == name]
        lines += ["", title(of_case), "", HEAD, *(table_row(row) for row in of_case)]
    computes = {row["contender"]: row["computes"] for row in rows}
    lines += ["", LEGEND, "", *(f"- {name}: {what}" for name, what in computes.items())]
    return "\n".join(lines)


def title(rows: list[Row]) -> str:
    case = rows[0]["case"]
    parts = [f"**{case['name']}**: TP {case['tp']}", f"{case['threads']} CPU thread(s) per rank"]
    parts += [f"{case['masked']:.0%} of the tokens masked"] if case["masked"] else []
    parts += [f"forward KL on {case['gated']:.0%}"] if case["gated"] < 1 else []
    parts += ["peaked logits"] if case["peaked"] else []
    parts += [f"nobody beyond {case['width']}"] if case["width"] else []
    kernels = {row["kernel"]: None for row in rows if "kernel" in row}
    parts += [f"our kernel: {'; '.join(kernels)}"] if kernels else []
    for label, key in (("copy", "copy_gb_per_s"), ("into fresh memory", "fresh_copy_gb_per_s")):
        rates = [row[key] for row in rows if key in row]
        parts += [f"{label} {min(rates):.1f}–{max(rates):.1f} GB/s"] if rates else []
    return ", ".join(parts)


def table_row(row: Row) -> str:
    case, name = row["case"], row["contender"]
    columns = -(-case["vocab"] // case["tp"])
    start = f"| {name} | {case['tokens']:,} × {columns:,} {case['dtype']}"
    if "skipped" in row:
        return f"{start} | skipped: {row['skipped']}" + " |" * 7
    ms, ratio = row["ms"], row.get("times_ours")
    value_error = row["value_error"]
    cells = [
        f"{ms['p50']:.4g} ({ms['p20']:.4g}–{ms['p80']:.4g})",
        f"{row['forward_ms']:.4g} + {row['backward_ms']:.4g}",
        "" if ratio is None else f"{ratio:.2f}",
        f"{row['gb_per_s']:.1f}, {row['percent_of_copy']:.0f} %",
        f"{round(row['memory_mb']):,}",
        f"{'–' if value_error is None else format(value_error, '.0e')}, "
        f"{row['gradient_error']:.0e}",
        f"{row['collectives']}, {row['collective_bytes']:,} B",
    ]
    return " | ".join([start, *cells]) + " |"


def plot(rows: list[Row], path: Path) -> None:
    """Time and memory over the number of tokens."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (time_axes, memory_axes) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    measured = [row for row in rows if row["case"]["name"] == "plot" and "ms" in row]
    for name in dict.fromkeys(row["contender"] for row in measured):
        own = [row for row in measured if row["contender"] == name]
        tokens = [row["case"]["tokens"] for row in own]
        low, middle, high = ([r["ms"][p] / 1e3 for r in own] for p in ("p20", "p50", "p80"))
        time_axes.plot(tokens, middle, marker="o", label=name)
        time_axes.fill_between(tokens, low, high, alpha=0.2)
        memory_axes.plot(tokens, [row["memory_mb"] / 1e3 for row in own], marker="o", label=name)
    case = measured[0]["case"]
    figure.suptitle(f"forward + backward, V = {case['vocab']:,}, {case['dtype']}", fontsize=11)
    time_axes.set(xlabel="tokens", ylabel="seconds", ylim=0)
    memory_axes.set(xlabel="tokens", ylabel="GB beyond both logits and the gradient")
    for axes in (time_axes, memory_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
