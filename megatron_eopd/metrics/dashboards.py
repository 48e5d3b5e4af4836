"""Which curves TensorBoard shows together. In: the names that a run writes. Out: charts of them.

A curve of a chart is named by a regular expression, which must match the whole tag.
"""

import re
from collections.abc import Collection

Chart = list
"""["Multiline", tags], or ["Margin", [value, lower, upper]], as SummaryWriter has it."""

FIGURES = ("loss/total", "loss/reverse_kl", "loss/forward_kl")
"""Of training, beside those of the evaluations, in the table that compares runs."""


def _lines(*names: str) -> Chart:
    return ["Multiline", [f"^{name}$" for name in names]]


_TRAINING: dict[str, dict[str, Chart]] = {
    "Loss": {
        "loss": _lines("loss/total", "loss/reverse_kl", "loss/forward_kl"),
        "reverse KL by gate": _lines("loss/reverse_kl_gated", "loss/reverse_kl_ungated"),
        "forward KL by gate": _lines("loss/forward_kl_gated", "loss/forward_kl_ungated"),
        "by source": _lines("sampled/loss", "reference/loss"),
    },
    "Entropy and gate": {
        "student and teacher": _lines("entropy/student_mean", "entropy/teacher_mean"),
        "teacher by token": _lines("entropy/teacher_(mean|p50|p90)"),
        "student at open gates": _lines("entropy/student_gated", "entropy/student_mean"),
        "gate": _lines("gate/fraction"),
        "threshold": _lines("gate/threshold"),
        "top k": _lines("topk/teacher_mass", "topk/sampled_outside"),
    },
    "Student against teacher": {
        "top k in common": _lines("overlap/top_k", "overlap/(teacher|student)_mass"),
        "entropy gap": _lines("entropy/gap"),
        "reverse KL by quarter of the response": _lines(r"by_position/\d+/reverse_kl"),
        "reverse KL by the teacher's entropy": _lines(r"by_entropy/\d+/reverse_kl"),
        "tokens by the teacher's entropy": _lines(r"by_entropy/\d+/tokens"),
        "top k in common by the teacher's entropy": _lines(r"by_entropy/\d+/overlap"),
        "clipped": _lines("loss/(reverse|forward)_kl_clipped"),
    },
    "Several teachers": {
        "share of tokens": _lines("teacher/.+/token_share"),
        "reverse KL of each": _lines("teacher/.+/reverse_kl"),
        "forward KL of each": _lines("teacher/.+/forward_kl"),
        "entropy of each": _lines("teacher/.+/entropy"),
        "gate of each": _lines("teacher/.+/gate_fraction"),
        "scoring": _lines("time/score_.+"),
    },
    "Responses": {
        "length": _lines("rollout/length_mean", "reference/length_mean"),
        "truncated and repeated": _lines("rollout/truncated_fraction", "rollout/repetition"),
        "log-probability of the end token": _lines("end/(teacher|student)_logprob"),
    },
    "Engine against trainer": {
        "mismatch": _lines("mismatch/mult_prob_error"),
        "difference of log-probabilities": _lines("mismatch/logprob_abs_(mean|p99)"),
        "after a weight sync": _lines("weight_sync/probe_difference"),
        "weight version": _lines("weight_sync/version"),
    },
    "Time": {
        "stages": _lines("time/(rollout|score|train|sync|record)", "time/total"),
        "weight sync": _lines("weight_sync/(seconds|.+_s)"),
        "throughput": _lines("throughput/tokens_per_s"),
        "packing": _lines("packing/padding_fraction", "packing/load_imbalance"),
    },
    "Engines": {
        "alive": _lines("engine/alive"),
        "tokens per second": _lines(r"engine/\d+/tokens_per_s"),
        "requests in flight": _lines(r"engine/\d+/requests_in_flight"),
        "idle share": _lines(r"engine/\d+/idle_share"),
        "queue": _lines("engine/queue_wait_s"),
        "failures": _lines(r"engine/\d+/(restarts|failed_requests|failed_probes)"),
    },
    "Optimizer": {
        "gradient norm": _lines("optim/grad_norm"),
        "learning rate": _lines("optim/lr"),
        "skipped steps": _lines("optim/skipped_steps"),
    },
    "Memory": {
        "device": _lines("memory/cuda_peak_gib(/.+)?"),
        "host": _lines("memory/host_peak_gib"),
    },
}


_OF_SOME_RUNS = (
    *("by source", "device", "clipped", "share of tokens", "reverse KL of each"),
    *("forward KL of each", "entropy of each", "gate of each", "scoring"),
)
"""Charts of what a run has from its first iteration on, or never."""


def _has(chart: Chart, names: Collection[str]) -> bool:
    return any(re.fullmatch(tag, name) for tag in chart[1] for name in names)


def dashboards(names: Collection[str]) -> dict[str, dict[str, Chart]]:
    """Category → title → chart. `names`: written so far; they say which tasks are evaluated."""
    found = (re.fullmatch(r"eval/([^/]+)/avg@(\d+)", name) for name in names)
    charts: dict[str, Chart] = {}
    for task, count in (match.groups() for match in found if match):
        folder, own = f"eval/{task}", re.escape(f"eval/{task}")
        bounds = [f"{folder}/accuracy_low", f"{folder}/accuracy_high"]
        charts |= {
            f"{task}: accuracy, 95 %": ["Margin", [f"{folder}/avg@{count}", *bounds]],
            f"{task}: pass@k": _lines(rf"{own}/pass@\d+"),
            f"{task}: diversity": _lines(rf"{own}/distinct(_correct)?@\d+", f"{own}/coverage"),
            f"{task}: held-out KL": _lines(f"{own}/(reverse|forward)_kl"),
            f"{task}: held-out entropy": _lines(f"{own}/(student|teacher)_entropy"),
            f"{task}: length": _lines(f"{own}/length_mean"),
            f"{task}: verdicts": _lines(f"{own}/verdict/.+"),
        }
    first, *others = (
        (category, {t: c for t, c in own.items() if t not in _OF_SOME_RUNS or _has(c, names)})
        for category, own in _TRAINING.items()
    )
    others = [(category, own) for category, own in others if own]
    return dict([first, *([("Evaluation", charts)] if charts else []), *others])


def figures_of_a_run(names: Collection[str]) -> list[str]:
    """What the table that compares runs has of each, in its last row of them."""
    figures = [name for name in names if re.fullmatch(r"eval/[^/]+/[^/]+", name)]
    return [*figures, *(name for name in FIGURES if name in names)]
