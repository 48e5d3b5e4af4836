"""Every teacher of a run is compared with transformers at its start, wherever it sits."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing import ProcessExitedException

from megatron_eopd import launch, loop
from megatron_eopd.config import load_config
from megatron_eopd.data.run_tokenizers import load_run_tokenizers
from megatron_eopd.errors import RemoteError, TeacherError
from megatron_eopd.metrics.rows import read_metrics
from megatron_eopd.models import load
from megatron_eopd.parallel.init import free_port
from megatron_eopd.teacher_check import check, remembered
from megatron_eopd.teacher_check.check import check_teachers
from tests.ranks import start_ranks

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "examples/quickstart/models"
OPTIONS = [
    "rollout.engine=megatron",
    "rollout.batch_size=8",
    "rollout.max_response_length=12",
    "rollout.temperature=0.7",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "training.train_iters=2",
    "training.lr_warmup_steps=0",
    "parallel.tensor_model_parallel_size=1",
    "evaluation.tasks=none",
    "checkpoint.export_hf=false",
    "logging.trackers=[]",
]
TOPK = ["objective.name=eopd_paper", "teacher.payload=topk"]
SEPARATE = ["teacher.placement=separate", "teacher.world_size=1"]
TP, PP = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
TEACHER_PP = "teacher.parallel.pipeline_model_parallel_size=2"


def _rank(rank: int, port: int, world_size: int, options: list[str], work, damage) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(ROOT)
    if damage:
        _damage_teacher()
    config = load_config(ROOT / "examples/quickstart/eopd.toml", options)
    launch.on_every_rank(config, work or loop.train)


def _damage_teacher() -> None:
    """One matrix of it arrives otherwise than it lies on the disk."""
    load_weights = load.load_weights

    def damaging(chunks, path, context):
        load_weights(chunks, path, context)
        if path.name == "teacher":
            names = [(n, p) for chunk in chunks for n, p in chunk.named_parameters()]
            matrix = next(p for n, p in names if n.endswith("linear_fc2.weight"))
            matrix.data = matrix.data.flip(0)

    load.load_weights = damaging


def start(run_dir: Path, *options: str, ranks: int = 1, work=None, damage: bool = False) -> None:
    every = [f"run_dir={run_dir}", *OPTIONS, *options]
    start_ranks(ranks, _rank, free_port(), ranks, every, work, damage)


def log(run_dir: Path, rank: int = 0) -> str:
    return (run_dir / f"log/rank{rank}.txt").read_text()


def _nothing(session) -> None: ...


@pytest.mark.parametrize(
    "ranks,options",
    [
        (2, [TP]),
        (2, [PP, "teacher.payload=logits"]),
        (2, [TP, TEACHER_PP, *TOPK]),
        (2, [*SEPARATE, "teacher.payload=logits"]),
        (2, ["model.dtype=bfloat16"]),
    ],
)
def test_a_sound_teacher_agrees(ranks, options, tmp_path):
    """Whatever it hands over, in whatever layout; data parallelism leaves ranks without a token."""
    start(tmp_path, *options, ranks=ranks, work=_nothing)
    assert "[teacher] agrees with transformers: 12 tokens behind prompt 0" in log(tmp_path)
    assert "teacher check" in log(tmp_path), "the seconds it took"
    assert json.loads((tmp_path / "teacher_check.json").read_text()).keys() == {"teacher"}


@pytest.mark.parametrize("options", [[TP], [*SEPARATE, *TOPK]])
def test_weights_that_are_not_those_of_the_files_stop_the_run_on_every_rank(options, tmp_path):
    with pytest.raises(ProcessExitedException):
        start(tmp_path, *options, ranks=2, work=_nothing, damage=True)
    said = "examples/quickstart/models/teacher is not in this run what it is in transformers: of 12"
    for rank in range(2):
        assert said in log(tmp_path, rank), f"rank {rank}"
        assert "teacher.check=never goes on without" in log(tmp_path, rank)
    assert "agrees with" not in log(tmp_path)
    assert json.loads((tmp_path / "teacher_check.json").read_text()) == {}


def _once_more_and_changed(session) -> None:
    """After the check at the start."""
    path, tokenizers = session.config.teacher.hf_path, load_run_tokenizers(session.config)
    assert tokenizers.swaps == {"teacher": [(109, 105)]}
    check_teachers(session, tokenizers)
    assert log(session.config.run_dir).count("agreed when this run began") == 1
    _fail_at_a_later_start(session, tokenizers)
    # What transformers is asked about trades no places any more, and the end is found elsewhere.
    with pytest.raises((TeacherError, RemoteError), match=r"token 11 of the response, '<eos>'"):
        check_teachers(session, replace(tokenizers, swaps={"teacher": []}))
    if session.context.layout.rank == 0:
        weights = load_file(path / "model.safetensors")
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((TeacherError, RemoteError), match="not in this run what it is in transf"):
        check_teachers(session, tokenizers)


def _fail_at_a_later_start(session, tokenizers) -> None:
    """The next start compares again what failed in the last one, though it agreed in the first."""
    run_dir, teacher = session.config.run_dir, session.config.teacher
    always = {"teacher": teacher.model_copy(update={"check": "always"})}
    at_every_start = replace(session, config=session.config.model_copy(update=always))
    sound = check.opinion

    def far(*asked):
        found = sound(*asked)
        return replace(found, logprobs=tuple(value - 1.0 for value in found.logprobs))

    def broken(*_asked):
        raise OSError("no such file")

    for other, told in ((far, "not in this run what it is in"), (broken, "cannot be asked")):
        check.opinion = other
        with pytest.raises((TeacherError, RemoteError), match=told):
            check_teachers(at_every_start, tokenizers)
        check.opinion = sound
        assert remembered.read(run_dir) == {}
        before = log(run_dir).count("agrees with transformers")
        check_teachers(session, tokenizers)
        assert log(run_dir).count("agrees with transformers") == before + 1


def test_a_teacher_is_compared_again_when_it_is_another(tmp_path):
    """Or failed, and not before. Tokens that trade places are seen to do so at the end of the
    response."""
    teacher = shutil.copytree(MODELS / "teacher", tmp_path / "teacher")
    for name in ("config.json", "generation_config.json"):
        options = json.loads((teacher / name).read_text())
        (teacher / name).write_text(json.dumps(options | {"eos_token_id": 105}))
    token = "teacher.eos_token_map={ '<eos>' = '->' }"
    run_dir = tmp_path / "run"
    start(run_dir, TP, f"teacher.hf_path={teacher}", token, ranks=2, work=_once_more_and_changed)


def _state(run_dir: Path):
    rows = read_metrics(run_dir / "metrics.jsonl")
    clocked = ("time/", "memory/", "throughput/", "weight_sync/")
    rows = [{k: v for k, v in row.items() if not k.startswith(clocked)} for row in rows]
    return rows, load_file(run_dir / "hf/model.safetensors")


def test_a_run_is_the_same_to_the_bit_without_it(tmp_path):
    """Metrics of all iterations and the weights that they come to."""
    for how in ("auto", "never"):
        start(tmp_path / how, f"teacher.check={how}", "checkpoint.export_hf=true")
    assert "agrees with transformers" in log(tmp_path / "auto")
    assert "transformers" not in log(tmp_path / "never")
    (rows, weights), (expected_rows, expected) = (_state(tmp_path / x) for x in ("auto", "never"))
    assert len(rows) >= 2 and rows == expected_rows
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
