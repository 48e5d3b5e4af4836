"""Clusters' runs rehearsed at their real size, by the command that a user types."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import Qwen3MoeConfig

from megatron_eopd.config import load_config
from megatron_eopd.rehearsal.answers import READS
from megatron_eopd.rehearsal.tables import planned_peak
from megatron_eopd.rehearse import main, make_the_plan, parse_arguments
from tests.test_plan import write_config

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Of Qwen3's shapes, and two whose layers are as wide and few."""
    root = tmp_path_factory.mktemp("models")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shapes = {
        "1.7B": (2048, 6144, 28, 16),
        "4B": (2560, 9728, 36, 32),
        "8B": (4096, 12_288, 36, 32),
        "32B": (5120, 25_600, 64, 64),
        "few": (1024, 3072, 1, 16),
    }
    tied = {"1.7B", "4B", "few"}
    return {
        name: write_config(
            root / name, tie_word_embeddings=name in tied, **dict(zip(names, shape, strict=True))
        )
        for name, shape in shapes.items()
    }


@dataclass(frozen=True)
class Result:
    exit_status: int
    output: str
    ranks: list[dict]


def rehearse(tmp_path: Path, config: Path, *arguments: str) -> Result:
    out = tmp_path / "rehearsal.json"
    command = [sys.executable, "-m", "megatron_eopd.rehearse", str(config), *arguments]
    found = subprocess.run(
        [*command, "--json", str(out)], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    ranks = json.loads(out.read_text()) if out.is_file() else []
    return Result(found.returncode, found.stdout + found.stderr, ranks)


LAYOUTS = {
    "8 GPUs": ("qwen3_8b_to_1.7b", "1.7B", "8B", 8, []),
    "24 GPUs": ("qwen3_32b_to_4b_multinode", "4B", "32B", 24, []),
    "64 GPUs, PP 4": (
        "qwen3_32b_to_4b_multinode",
        *("4B", "32B", 64),
        [
            "teacher.world_size=32",
            "teacher.parallel.pipeline_model_parallel_size=4",
            "teacher.microbatches_per_exchange=4",
            "parallel.pipeline_model_parallel_size=4",
            "parallel.decoder_last_pipeline_num_layers=6",
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_cluster_is_rehearsed_as_planned_and_waits_for_its_devices_at_most_6_times(
    name, models, tmp_path
):
    """Every stage within 5 % of the planner's table. No place waits but those that answers.py
    lists, none of which is in a layer, the loss, the exchange or anything once a microbatch."""
    example, student, teacher, num_ranks, options = LAYOUTS[name]
    config = ROOT / "examples" / example / "eopd.toml"
    arguments = [
        *("--world-size", str(num_ranks), "--gpu-memory-gib", "80"),
        f"student.hf_path={models[student]}",
        f"teacher.hf_path={models[teacher]}",
        *options,
    ]
    found = rehearse(tmp_path, config, *arguments)
    assert found.exit_status == 0, found.output
    assert found.output.endswith("\nIt fits.\n")
    args = parse_arguments([str(config), *arguments])
    plan = make_the_plan(args, load_config(args.config, args.overrides))
    stages = {(rank["role"], rank["stage"]) for rank in found.ranks}
    assert stages == {(who, n) for who, s in plan.memory.stages.items() for n in range(len(s))}
    for rank in found.ranks:
        planned = plan.memory.stages[rank["role"]][rank["stage"]]
        reads: dict[str, int] = {}
        for stretch, measured in rank["stretches"].items():
            expected = planned_peak(planned, stretch)
            where = (rank["role"], rank["stage"], stretch)
            assert abs(expected / measured["peak"] - 1) < 0.05, where
            reads |= measured["reads"]
        assert set(reads) <= set(READS)
        assert sum(reads.values()) <= 6


@pytest.mark.slow
@pytest.mark.parametrize("payload", ["hidden", "logits", "topk"])
def test_memory_does_not_grow_with_the_number_of_microbatches(payload, models, tmp_path):
    """4 and 32 of them in a step: what the teacher hands over is all that grows, and with logits,
    which come a few microbatches at a time, not even that."""
    options = [
        f"student.hf_path={models['few']}",
        f"teacher.hf_path={models['few']}",
        f"teacher.payload={payload}",
        *(["objective.name=eopd_paper"] if payload == "topk" else []),
        *("model.dtype=bfloat16", "training.micro_batch_size=1", "rollout.max_response_length=384"),
        *("data.max_prompt_length=128", "objective.head=chunked", "data.prompts=none.jsonl"),
    ]
    toml = tmp_path / "run.toml"
    toml.write_text('run_dir = "unused"\n[student]\nhf_path = "x"\n[teacher]\nhf_path = "x"\n')

    def with_samples(count: int) -> Result:
        own = tmp_path / str(count)
        own.mkdir()
        sizes = (f"training.global_batch_size={count}", f"rollout.batch_size={count}")
        return rehearse(own, toml, "--world-size", "1", *options, *sizes)

    peaks, payloads = [], []
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(with_samples, (4, 32)))
    for found in both:
        assert found.exit_status == 0, found.output
        ((training, scoring),) = [
            (rank["stretches"]["training"], rank["stretches"]["scoring"]) for rank in found.ranks
        ]
        peaks.append(training["peak"])
        payloads.append(training["kinds"].get("payload", 0))
        assert scoring["peak"] < training["peak"]
    grown = payloads[1] - payloads[0]
    assert grown == (0 if payload == "logits" else payloads[0] * 7)
    assert abs(peaks[1] - peaks[0] - grown) < 2**20


def test_what_does_not_fit_is_said_by_stage_tensor_and_option(models, tmp_path):
    config = ROOT / "examples" / "qwen3_8b_to_1.7b" / "eopd.toml"
    found = rehearse(
        tmp_path,
        config,
        *("--world-size", "8", "--gpu-memory-gib", "6", "--prompt-length", "64"),
        *(f"student.hf_path={models['few']}", f"teacher.hf_path={models['few']}"),
    )
    assert found.exit_status == 1, found.output
    assert "It does NOT fit: rank 0 (student, pipeline stage 0 of 1) needs" in found.output
    assert "GiB too much" in found.output
    assert "such as" in found.output and "model.recompute_granularity=full" in found.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--world-size", "9"], "does not divide the 1 ranks (the student's) of host 1"),
        (["--world-size", "8", "--rank", "8"], "--rank 8 is none of student or teachers"),
        (["--world-size", "8", "student.hf_path=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused_before_any_model_is_built(
    arguments, told, models, capsys, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the command sets it, and this takes it back
    paths = (f"student.hf_path={models['few']}", f"teacher.hf_path={models['few']}")
    config = ROOT / "examples" / "qwen3_8b_to_1.7b" / "eopd.toml"
    assert main([str(config), *paths, *arguments]) == 2
    assert told in capsys.readouterr().err


def test_experts_are_refused_by_name(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = write_config(tmp_path / "moe", Qwen3MoeConfig, num_hidden_layers=2, num_experts=8)
    paths = (f"student.hf_path={models['few']}", f"teacher.hf_path={path}")
    config = ROOT / "examples" / "qwen3_8b_to_1.7b" / "eopd.toml"
    assert main([str(config), *paths, "--world-size", "8"]) == 2
    assert "teacher has experts, which are not rehearsed" in capsys.readouterr().err
