"""Options in pairs: a small set of runs in which every two values of different options meet.

In: AXES. Out: settings, each one value of every axis, that together hold every pair (or every
three) of values that the configuration accepts, known as a covering array; and the combinations
that it refuses, with its messages. A setting's run is compared with that of a single process by
tests.distributed.parity.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from megatron_eopd.objectives import PRESETS
from megatron_eopd.records import ALL_TEACHERS, Rollout
from tests.distributed.parity import Case, Distance, distance, run_cases

Setting = Mapping[str, str]
"""Axis → value."""
Combination = tuple[tuple[str, str], ...]
"""Values of some axes."""

AXES: dict[str, tuple[str, ...]] = {
    "objective": tuple(PRESETS),
    "gate": (
        *("preset", "hard", "sigmoid", "quantile", "student", "disagreement"),
        *("always", "never"),
    ),
    "weights": ("uniform", "position", "early and confidence"),
    "clip": ("none", "reverse_kl", "forward_kl"),
    "payload": ("hidden", "logits", "topk"),
    "exchange": ("whole step", "1", "2"),
    "recompute": ("none", "selective", "full"),
    "head": ("materialized", "chunked"),
    "logits": ("model", "float32"),
    "inplace": ("no", "yes"),
    "support": ("teacher", "student", "union"),
    "packing": ("samples", "tokens"),
    "dtype": ("float32", "bfloat16"),
    "tp": ("1", "2", "2 with sequence parallelism"),
    "pp": ("1", "2", "2 interleaved"),
    "cp": ("1", "2"),
    "dp": ("1", "2"),
    "placement": ("colocated", "separate"),
    "mixture": ("none", "divergences", "distributions"),
}
PLAIN: Setting = {axis: values[0] for axis, values in AXES.items()}
SIZES = ("tp", "pp", "cp", "dp")
MOST_RANKS = 4
BOUNDS = {"float32": (1e-5, 1e-5, 1e-5), "bfloat16": (5e-3, 0.03, 0.1)}
"""Of loss, terms and gradients; relative."""
# In bfloat16 where no teacher entropy of the batch is near: rounding, up to 0.1 nats, must open no
# gate, since one token's forward KL is a tenth of a gradient. The quantile is of the same tokens;
# and so for the student's entropy and the tokens in both top k.
THRESHOLD = {"float32": 2.8, "bfloat16": 2.135}
QUANTILE = {"float32": 0.6, "bfloat16": 0.058}
STUDENT_THRESHOLD = {"float32": 4.85, "bfloat16": 4.396}
MAX_OVERLAP = {"float32": 0.0, "bfloat16": 0.25}
OF_GATES = {
    "quantile": ("gate_quantile", QUANTILE),
    "disagreement": ("gate_max_overlap", MAX_OVERLAP),
}
# Above all terms in bfloat16.
CLIP = {
    "reverse_kl": {"float32": 3.3, "bfloat16": 50.0},
    "forward_kl": {"float32": 2.7, "bfloat16": 50.0},
}
OPTIONS = {
    "objective": ("reverse_kl", "forward_kl", "combine"),
    "gate": ("gate",),
    "clip": ("reverse_kl_clip", "forward_kl_clip"),
    "payload": ("teacher.payload",),
    "exchange": ("microbatches_per_exchange",),
    "logits": ("logits_dtype",),
    "support": ("top_k_support",),
    "inplace": ("inplace_backward",),
    "mixture": ("teacher_mixture",),
}
"""Axis → the options of which a refusal that has to do with it must name one."""
ATTEMPTS = 600
"""Random completions of a pair before it counts as refused."""


def case_of(setting: Setting) -> Case:
    """The run of a setting."""
    dtype, clipped = setting["dtype"], setting["clip"]
    is_weighted = setting["weights"] == "early and confidence"
    thresholds = STUDENT_THRESHOLD if setting["gate"] == "student" else THRESHOLD
    objective = {
        "name": setting["objective"],
        "gate": None if setting["gate"] == "preset" else setting["gate"],
        "head": setting["head"],
        "logits_dtype": setting["logits"],
        "head_chunk_size": 16,
        "inplace_backward": setting["inplace"] == "yes",
        "top_k": 4,
        "top_k_support": setting["support"],
        "entropy_threshold": thresholds[dtype],
        "token_weight": "early" if is_weighted else setting["weights"],
        "entropy_weight": "confidence" if is_weighted else "uniform",
        "teacher_mixture": setting["mixture"],
    }
    if setting["gate"] in OF_GATES:
        option, values = OF_GATES[setting["gate"]]
        objective[option] = values[dtype]
    if clipped != "none":
        objective[f"{clipped}_clip"] = CLIP[clipped][dtype]
    recompute = None if setting["recompute"] == "none" else setting["recompute"]
    exchange = None if setting["exchange"] == "whole step" else int(setting["exchange"])
    teacher = {"microbatches_per_exchange": exchange}
    if setting["placement"] == "separate":
        teacher |= {"placement": "separate", "world_size": 1, "parallel": {}}
    # The same model, so that no threshold is near: how others mix is for test_several_teachers.py.
    second = {"hf_path": "teacher", "payload": setting["payload"], "weight": 0.5}
    budget = {"micro_batch_size": None, "max_tokens_per_microbatch": 64}
    return Case(
        **{size: int(setting[size][0]) for size in SIZES},
        sp="sequence" in setting["tp"],
        vpp=2 if "interleaved" in setting["pp"] else 1,
        payload=setting["payload"],
        teacher=teacher,
        training=budget if setting["packing"] == "tokens" else {},
        other={
            "objective": objective,
            "teachers": {"more": second} if setting["mixture"] != "none" else {},
            "model": {"dtype": setting["dtype"], "recompute_granularity": recompute},
        },
    )


def alone(setting: Setting) -> Setting:
    """What it is compared with: one process, and the plain way for all that must change nothing.
    The top k is another estimate of the same divergences, so that payload stays."""
    axes = ("objective", "gate", "weights", "clip", "support", "dtype", "logits", "mixture")
    kept = {axis: setting[axis] for axis in axes}
    payload = "topk" if setting["payload"] == "topk" else "hidden"
    return PLAIN | kept | {"payload": payload}


def refusal(setting: Setting) -> str | None:
    """What the configuration says against it."""
    try:
        case_of(setting).config({"student": Path("s"), "teacher": Path("t")})
    except ValidationError as error:
        return error.errors()[0]["msg"]
    return None


def ranks_of(setting: Setting) -> tuple:
    """Runs with the same ranks can share their processes."""
    return tuple(setting[axis] for axis in (*SIZES, "placement"))


def run(
    settings: Sequence[Setting], models: dict[str, Path], rollouts: list[Rollout], folder: Path
) -> list[Distance]:
    """Of each setting's run from that of its `alone`."""
    plain = [alone(setting) for setting in settings]
    found = {}
    for same in _grouped([*settings, *plain]).values():
        results = run_cases([case_of(setting) for setting in same], models, rollouts, folder)
        found |= {tuple(s.values()): result for s, result in zip(same, results, strict=True)}
    return [
        distance(found[tuple(setting.values())], found[tuple(other.values())])
        for setting, other in zip(settings, plain, strict=True)
    ]


def is_right(setting: Setting, far: Distance) -> bool:
    """Also false for NaN."""
    bounds = BOUNDS[setting["dtype"]]
    found = (far.loss, far.terms, far.gradients)
    return all(x <= bound for x, bound in zip(found, bounds, strict=True))


def table(settings: Sequence[Setting], distances: Sequence[Distance]) -> list[str]:
    """Of each value, its runs and the farthest of them in each type."""
    names = ("loss", "terms", "gradients")
    lines = ["| option | value | runs | loss | terms | gradients | the three in bfloat16 |"]
    lines.append("|" + "---|" * 7)
    pairs = list(zip(settings, distances, strict=True))
    for axis, values in AXES.items():
        for value in values:
            own = [(setting, far) for setting, far in pairs if setting[axis] == value]
            by_dtype = {}
            for dtype in BOUNDS:
                same = [far for setting, far in own if setting["dtype"] == dtype]
                worst = [max((getattr(far, name) for far in same), default=0) for name in names]
                by_dtype[dtype] = [f"{x:.0e}" if same else "" for x in worst]
            fine, coarse = " | ".join(by_dtype["float32"]), ", ".join(by_dtype["bfloat16"])
            lines.append(f"| {axis} | {value} | {len(own)} | {fine} | {coarse.strip(', ')} |")
    return lines


def _grouped(settings: Sequence[Setting]) -> dict[tuple, list[Setting]]:
    """By their ranks, each once."""
    groups: dict[tuple, dict[tuple, Setting]] = {}
    for setting in settings:
        groups.setdefault(ranks_of(setting), {})[tuple(setting.values())] = setting
    return {ranks: list(group.values()) for ranks, group in groups.items()}


def fits(setting: Setting) -> bool:
    return case_of(setting).world_size <= MOST_RANKS


@dataclass(frozen=True)
class Crossing:
    settings: list[Setting]
    refused: dict[Combination, set[str]]
    """What the configuration said to every attempt."""
    too_large: list[Combination]
    """Of layouts that take more than MOST_RANKS."""


def cross(strength: int) -> Crossing:
    """Every combination of `strength` values of different axes. Greedy: each setting is the best of
    some random completions of a combination that is still open."""
    draw = random.Random(0)
    every = [
        tuple(zip(axes, values, strict=True))
        for axes in combinations(AXES, strength)
        for values in product(*(AXES[axis] for axis in axes))
    ]
    todo, settings, refused, too_large = set(every), [], {}, []
    for combination in every:
        if combination not in todo:
            continue
        attempts = [s for s in (_complete(combination, draw) for _ in range(ATTEMPTS)) if fits(s)]
        messages = [refusal(setting) for setting in attempts]
        accepted = [s for s, message in zip(attempts, messages, strict=True) if message is None]
        if accepted:
            held = [set(combinations(setting.items(), strength)) for setting in accepted]
            best = max(range(len(held)), key=lambda n: len(held[n] & todo))
            settings.append(accepted[best])
            todo -= held[best]
        elif attempts:
            refused[combination] = set(messages)
        else:
            too_large.append(combination)
    return Crossing(settings, refused, too_large)


def _complete(combination: Combination, draw: random.Random) -> Setting:
    return {axis: draw.choice(values) for axis, values in AXES.items()} | dict(combination)


def half_of_all(rollouts: list[Rollout]) -> list[Rollout]:
    """Every other prompt is scored by all teachers that there are."""
    return [
        replace(r, prompt=replace(r.prompt, teacher=ALL_TEACHERS)) if n % 2 else r
        for n, r in enumerate(rollouts)
    ]


def near_logprobs(student: Path, rollouts: list[Rollout], temperature: float) -> list[Rollout]:
    """The same with log-probabilities that a student of a step before might have had: its own, and
    0.5 nats more or less. So the ratios that `sampled` and `vopd` clip lie far from the clip's
    edges, which rounding in bfloat16 would cross."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    found = []
    for rollout in rollouts:
        prompt_ids, response_ids = rollout.prompt.prompt_ids, torch.tensor(rollout.response_ids)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt_ids, *rollout.response_ids]])).logits[0]
        logprobs = (logits[len(prompt_ids) - 1 : -1] / temperature).log_softmax(-1)
        own = logprobs.gather(-1, response_ids[:, None])[:, 0]
        moved = own + 0.5 * (torch.arange(len(own)) % 3 - 1)
        found.append(replace(rollout, response_logprobs=tuple(moved.tolist())))
    return found
