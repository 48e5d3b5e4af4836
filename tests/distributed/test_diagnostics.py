"""Where student and teacher are apart: what runs report, against transformers in float64."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_eopd.data.packing import Limits, exchange_size, pack, rounds_of
from megatron_eopd.losses import dense_kl_terms
from megatron_eopd.losses.divergences import KLTerms
from megatron_eopd.losses.overlap import Overlap
from megatron_eopd.metrics.means import Means, divide
from megatron_eopd.metrics.names import ENTROPY_EDGES, NUM_QUARTERS
from megatron_eopd.training.diagnostics import add_diagnostics
from megatron_eopd.training.step import measure
from tests.dense_objective import dense_overlap
from tests.distributed.test_models import random_rollouts
from tests.distributed.test_step import VOCAB, build, make_config, take_step
from tests.ranks import context_for, leave_groups, run_ranks

# Shapes: N tokens.
FOLDERS = ("overlap/", "by_position/", "by_entropy/", "entropy/gap")
CLIPS = {"reverse_kl_clip": 17.0, "forward_kl_clip": 5.0}
CLIPPED = tuple(f"loss/{name}ped" for name in CLIPS)
RUNS = [
    ("hidden", {}),
    ("hidden", {"head": "chunked", "head_chunk_size": 7, "top_k_support": "student"}),
    (
        "logits",
        {"gate": "disagreement", "top_k_support": "union", "inplace_backward": True} | CLIPS,
    ),
    ("topk", {"name": "eopd_paper", "gate": "disagreement", "head": "chunked"}),
]
"""Payload, and options of the objective."""
OPTIONS = {"top_k": 48, "student_temperature": 0.8, "teacher_temperature": 0.25}
LAYOUTS = {1: [({}, RUNS)], 2: [({"tp": 2}, RUNS), ({"cp": 2}, RUNS[1:2]), ({"dp": 2}, RUNS[1:2])]}
"""World size → sizes, and what runs there."""


def dense_metrics(student_dir, teacher_dir, rollouts) -> dict[str, float]:
    """Of every part that has a token, and of the clips."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (student_dir, teacher_dir)
    )
    rows, quarters = ([], []), []
    for rollout in rollouts:
        tokens = torch.tensor([rollout.prompt.prompt_ids + rollout.response_ids])
        first, length = len(rollout.prompt.prompt_ids) - 1, len(rollout.response_ids)
        for model, own in zip((student, teacher), rows, strict=True):
            with torch.no_grad():
                own.append(model(tokens).logits[0, first:-1])
        quarters += [min(NUM_QUARTERS * n // (length - 1), NUM_QUARTERS - 1) for n in range(length)]
    temperatures = (OPTIONS["student_temperature"], OPTIONS["teacher_temperature"])
    scaled = [torch.cat(own) / t for own, t in zip(rows, temperatures, strict=True)]
    overlap = dense_overlap(*(x.log_softmax(-1) for x in scaled), OPTIONS["top_k"])
    kl = dense_kl_terms(*scaled)
    figures = dict(zip(("overlap", "teacher_mass", "student_mass"), overlap, strict=True)) | {
        "entropy_gap": kl.teacher_entropy - kl.student_entropy,
        "reverse_kl": kl.reverse_kl,
        "forward_kl": kl.forward_kl,
    }
    means = {"overlap/top_k": figures["overlap"], "entropy/gap": figures["entropy_gap"]}
    means |= {f"overlap/{name}": figures[name] for name in ("teacher_mass", "student_mass")}
    found = {name: values.mean().item() for name, values in means.items()}
    buckets = [sum(h >= edge for edge in ENTROPY_EDGES) for h in kl.teacher_entropy.tolist()]
    for folder, parts in (("by_position", quarters), ("by_entropy", buckets)):
        for part in set(parts):
            inside = torch.tensor([own == part for own in parts])
            for name, values in figures.items():
                found[f"{folder}/{part + 1}/{name}"] = values[inside].mean().item()
            if folder == "by_entropy":
                found[f"{folder}/{part + 1}/tokens"] = inside.double().mean().item()
    for name, clip in CLIPS.items():
        found[f"loss/{name}ped"] = (figures[name[:-5]] > clip).double().mean().item()
    return found


def check_layouts(student_dir, teacher_dir, rollouts, layouts, expected):
    for sizes, runs in layouts:
        context = context_for(sizes.get("tp", 1), 1, cp=sizes.get("cp", 1))
        assert context.layout.dp == sizes.get("dp", 1)
        for payload, objective in runs:
            config = make_config(
                student_dir,
                teacher_dir,
                teacher={"hf_path": teacher_dir, "payload": payload},
                objective=OPTIONS | objective,
            )
            student, pool, token_loss = build(config, context)
            packed = pack(rollouts, Limits.of(config.training), context.layout)
            rounds = pool.microbatches(rounds_of(packed, exchange_size(config)))
            measured = measure(token_loss, student.chunks, rounds, context)
            args = (student, token_loss, pool, rollouts, config, context)
            report = take_step(*args, 0, diagnose=True)
            for sums in (measured.sums, report.sums):
                assert_as_expected(divide([sums]), expected, config)
            assert not [name for name in take_step(*args, 1).sums if name.startswith(FOLDERS)]
        leave_groups()


def assert_as_expected(found, expected, config):
    has_clips = config.objective.reverse_kl_clip is not None
    theirs = {n: x for n, x in expected.items() if has_clips or n not in CLIPPED}
    ours = {n: x for n, x in found.items() if n.startswith(FOLDERS) or n in CLIPPED}
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if config.teacher.payload == "topk" and name.endswith("_kl"):
            assert 0 < ours[name] < value, name  # of k + 1 parts
        else:
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_parts_of_the_tokens_match_transformers(world_size, qwen3_dir, teacher_dir, tmp_path):
    """Overlaps, masses, entropies and divergences over the position and by the teacher's entropy,
    of steps and evaluations, whatever the payload, the head and the support, over TP, CP and DP;
    and nothing of it where it was not asked for."""
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    expected = dense_metrics(qwen3_dir, teacher_dir, rollouts)
    assert {f"by_position/{n}/overlap" for n in (1, 2, 3, 4)} <= expected.keys()
    assert all(f"by_entropy/{n}/tokens" in expected for n in (1, 2, 3, 4, 5))
    assert all(0.1 < expected[name] < 0.9 for name in ("overlap/top_k", *CLIPPED))
    layouts = LAYOUTS[world_size]
    run_ranks(
        world_size, tmp_path, check_layouts, qwen3_dir, teacher_dir, rollouts, layouts, expected
    )


def test_a_rank_without_tokens_adds_the_same_names():
    """So that all ranks' sums can be added; and what is infinite stays in its own part."""
    names = []
    for count in (0, 3):
        kl = KLTerms(*torch.tensor([[math.inf, 1.0, 2.0], [0.5] * 3, [0.0, 0.1, 9.0], [1.0] * 3]))
        kl = KLTerms(*(x[:count] for x in kl))
        means = Means()
        overlap = Overlap(*torch.zeros(3, count))
        add_diagnostics(means, kl, overlap, torch.tensor([0.0, 0.5, 1.0])[:count])
        names.append(means._sums.keys())
    assert names[0] == names[1]
    sums = {name: tuple(pair.tolist()) for name, pair in means._sums.items()}
    kls = [sums[f"by_entropy/{n}/reverse_kl"] for n in range(1, 6)]
    assert kls == [(math.inf, 1.0), (1.0, 1.0), (0.0, 0.0), (0.0, 0.0), (2.0, 1.0)]
    assert sums["by_position/1/reverse_kl"] == (math.inf, 1.0)
    assert sums["by_position/4/reverse_kl"] == (2.0, 1.0)
