"""Teachers that follow the student: the mean of all students, and the student of some steps ago."""

import gc
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from megatron_eopd.config import Config
from megatron_eopd.data.packing import Limits, exchange_size, pack, rounds_of
from megatron_eopd.metrics.means import divide
from megatron_eopd.models.export import Exporter
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.load import load_model
from megatron_eopd.parallel.init import join_groups, leave_groups
from megatron_eopd.parallel.worlds import student_layout
from megatron_eopd.schedules import Progress
from megatron_eopd.teacher.placement import open_teachers
from megatron_eopd.training.optimizer import make_trainable
from megatron_eopd.training.step import train_step
from megatron_eopd.training.token_loss import TokenLoss
from tests.distributed.parity import Case
from tests.distributed.test_parallelism import (
    make_expert_models,
    make_models,
    own_layout,
    unequal_rollouts,
)
from tests.distributed.test_teacher_prompts import with_solutions
from tests.ranks import run_ranks

STEPS = 5
DECAY = 0.7
FOLLOWERS = {
    "ema": {"ema_decay": DECAY},
    "every second": {"ema_decay": DECAY, "ema_interval": 2},
    "lag 3": {"lag_steps": 3},
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("following"))


@pytest.fixture(scope="session")
def rollouts():
    """Behind other prompts of the teacher: a student of no steps ago would teach nothing else."""
    return with_solutions(unequal_rollouts(8, seed=4))


def config_of(case: Case, models: dict, following: dict) -> Config:
    teacher = case.teacher | {"source": "student"} | following
    options = {"lr": 3e-3, "lr_decay_style": "constant"}
    case = replace(case, teacher=teacher, training=case.training | options)
    return case.config({"student": models["student"], "teacher": models["student"]})


class Run:
    """Some steps of a run on this rank, and the weights that it has."""

    def __init__(self, config: Config, rollouts, context, stack: ExitStack) -> None:
        self.config, self.context = config, context
        chunks = load_model(config.student.hf_path, config.model, context)
        self.student = make_trainable(chunks, config, context)
        self.vocab_size = read_hf_config(config.student.hf_path).vocab_size
        opened = open_teachers(config, {}, {"teacher": ()}, self.vocab_size, HashStore(), context)
        self.pool = stack.enter_context(opened)
        self.loss = TokenLoss(chunks[-1], self.pool.heads, config, self.vocab_size, context)
        packed = pack(rollouts, Limits.of(config.training), context.layout)
        self.rounds = rounds_of(packed, exchange_size(config))

    def step(self, number: int) -> dict[str, float]:
        report = self._train_step(number)
        assert report.fault is None
        return divide([report.sums])

    def skip(self, number: int) -> None:
        """A step whose gradient is too large."""
        assert self._train_step(number, skip_above=0.0).fault.kind == "spike"

    def _train_step(self, number: int, **options):
        return train_step(
            self.student,
            self.loss,
            self.pool.microbatches(self.rounds),
            self.context,
            num_rounds=len(self.rounds),
            progress=Progress(iterations=number, steps=number, train_iters=STEPS),
            around_update=self.pool.following(self.student, number + 1),
            **options,
        )

    def students_weights(self) -> dict[str, torch.Tensor]:
        return whole(self.student.chunks, self.config.student.hf_path, self.context)

    def teachers_weights(self) -> dict[str, torch.Tensor]:
        """In the teacher's own layout."""
        ((_, teacher),) = self.pool._colocated()
        return whole(teacher.model.chunks, self.config.teacher.hf_path, teacher._own)


def whole(chunks, hf_path: Path, context) -> dict[str, torch.Tensor]:
    """By Hugging Face names, in float64; on the leader of each stage its own."""
    hf_config = read_hf_config(hf_path)
    exporter = Exporter(chunks, hf_config, hf_config.vocab_size, context, 2**20)
    stage = exporter.manifest.stages[context.layout.pp_rank]
    tensors = [tensor for bucket in exporter.buckets() for tensor in bucket]
    names = [spec.name for bucket in stage for spec in bucket]
    pairs = zip(names, tensors, strict=True) if tensors else ()
    return {name: tensor.double().clone() for name, tensor in pairs}


def follow(case: Case, models, rollouts, out: Path, steps: int = STEPS) -> None:
    """Writes, for each way to follow, both models' weights and the metrics of every step."""
    layout = student_layout(case.config(models), dist.get_world_size(), dist.get_rank())
    context = join_groups(layout, torch.device("cpu"), timeout_minutes=1, seed=1)
    for name, following in FOLLOWERS.items():
        config = config_of(case, models, following)
        with ExitStack() as stack:
            run = Run(config, rollouts, context, stack)
            students, metrics = [run.students_weights()], []
            for number in range(steps):
                metrics.append(run.step(number))
                students.append(run.students_weights())
            found = {"students": students, "teacher": run.teachers_weights(), "metrics": metrics}
            found["alike"] = run.pool._colocated()[0][1]._weights.are_cut_alike
        torch.save(found, out / f"{name}-{dist.get_rank()}.pt")
    leave_groups()


def merged(out: Path, name: str) -> dict:
    """Of all ranks."""
    parts = [torch.load(path) for path in sorted(out.glob(f"{name}-*.pt"))]
    students = [
        {key: value for part in parts for key, value in part["students"][n].items()}
        for n in range(STEPS + 1)
    ]
    teacher = {key: value for part in parts for key, value in part["teacher"].items()}
    alike = {part["alike"] for part in parts}
    return {
        "students": students,
        "teacher": teacher,
        "metrics": parts[0]["metrics"],
        "alike": alike,
    }


def dense(students: list[dict], following: dict) -> dict[str, torch.Tensor]:
    """What the teacher must be after all steps, by the formulas."""
    if "lag_steps" in following:
        return students[max(len(students) - 1 - following["lag_steps"], 0)]
    teacher = students[0]
    for number, student in enumerate(students[1:], start=1):
        if number % following.get("ema_interval", 1) == 0:
            decay = following["ema_decay"]
            teacher = {n: decay * teacher[n] + (1 - decay) * student[n] for n in teacher}
    return teacher


LAYOUTS = {
    "alone": Case(),
    "as the student": Case(tp=2, pp=2),
    "over context": Case(cp=2),
    "cut otherwise": Case(tp=2, dp=2, teacher=own_layout(pp=2)),
    "interleaved": Case(pp=2, vpp=2, payload="logits"),
    "overlapped": Case(dp=2, training={"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "top k": Case(tp=2, payload="topk", teacher=own_layout(pp=2)),
}


@pytest.fixture(scope="session")
def found(models, rollouts, tmp_path_factory):
    """What a layout's ranks found of every follower, each layout once."""

    @cache
    def run(name: str) -> dict[str, dict]:
        case, out = LAYOUTS[name], tmp_path_factory.mktemp("out")
        own = tmp_path_factory.mktemp("ranks")
        run_ranks(case.world_size, own, follow, case, models, rollouts, out, timeout_s=120)
        return {way: merged(out, way) for way in FOLLOWERS}

    return run


def check_weights(found: dict[str, dict]) -> None:
    """Within 1e-6 of a restatement in float64."""
    for way, following in FOLLOWERS.items():
        own = found[way]
        expected = dense(own["students"], following)
        assert own["teacher"].keys() == expected.keys()
        moved = max((expected[n] - own["students"][0][n]).abs().max() for n in expected)
        far = max((expected[n] - own["teacher"][n]).abs().max() for n in expected)
        assert far < 1e-6 < 1e-3 < moved, (way, far, moved)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_follower_is_what_the_formulas_make_of_five_steps(name, found):
    """In the student's layout, shard by shard, and in others."""
    check_weights(found(name))
    case = LAYOUTS[name]
    assert all(own["alike"] == {not case.teacher and case.vpp == 1} for own in found(name).values())


@pytest.mark.parametrize("name", ["as the student", "cut otherwise"])
def test_every_layout_scores_with_the_same_follower(name, found):
    """The metrics of all five steps are those of a single process."""
    for way, own in found(name).items():
        for ours, theirs in zip(own["metrics"], found("alone")[way]["metrics"], strict=True):
            for key in ("loss/reverse_kl", "loss/forward_kl", "entropy/teacher_mean"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (way, key)


def test_experts_follow(rollouts, tmp_path):
    """Dealt out over ranks to the student, and whole to the teacher."""
    models, out = make_expert_models(tmp_path), tmp_path / "out"
    out.mkdir()
    case = Case(dp=2, ep=2, teacher=own_layout(pp=2))
    run_ranks(2, tmp_path, follow, case, models, rollouts, out, timeout_s=120)
    check_weights({way: merged(out, way) for way in FOLLOWERS})


def skip(models, rollouts, out: Path) -> None:
    layout = student_layout(Case().config(models), 1, 0)
    context = join_groups(layout, torch.device("cpu"), timeout_minutes=1, seed=1)
    found = {}
    for name, following in FOLLOWERS.items():
        with ExitStack() as stack:
            run = Run(config_of(Case(), models, following), rollouts, context, stack)
            run.step(0)
            run.step(1)
            before = run.teachers_weights()
            run.skip(2)
            after = run.teachers_weights()
            found[name] = all(torch.equal(after[n], weight) for n, weight in before.items())
    torch.save(found, out / "found.pt")
    leave_groups()


def test_a_step_that_is_skipped_moves_nothing(models, rollouts, tmp_path):
    run_ranks(1, tmp_path, skip, models, rollouts, tmp_path, timeout_s=120)
    assert torch.load(tmp_path / "found.pt") == dict.fromkeys(FOLLOWERS, True)


def bytes_of_tensors() -> int:
    """Of all that are alive on this rank, each memory once."""
    gc.collect()
    alive = [x.untyped_storage() for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values())


def weigh(models, rollouts, out: Path) -> None:
    """Bytes that two steps of a run with each teacher leave, and parameters of a model."""
    layout = student_layout(Case(tp=2).config(models), 2, dist.get_rank())
    context = join_groups(layout, torch.device("cpu"), timeout_minutes=1, seed=1)
    found = {}
    for dtype in ("float32", "bfloat16"):
        case = Case(tp=2, other={"model": {"dtype": dtype}})
        for way, following in {"frozen": {}, **FOLLOWERS}.items():
            config = config_of(case, models, following)
            found[dtype, way], found["parameters"] = _weigh(config, rollouts, context)
    torch.save(found, out / f"{dist.get_rank()}.pt")
    leave_groups()


def _weigh(config: Config, rollouts, context) -> tuple[int, int]:
    before = bytes_of_tensors()  # Megatron-Core lets go of the runs before late
    with ExitStack() as stack:
        run = Run(config, rollouts, context, stack)
        run.step(0)
        run.step(1)
        num_parameters = sum(p.numel() for p in run.student.chunks[0].parameters())
        return bytes_of_tensors() - before, num_parameters


def test_a_follower_is_kept_once(models, rollouts, tmp_path):
    """In the student's layout a mean takes the memory of a frozen teacher in float32, also where
    both models are bfloat16, and a student of three steps ago that of three. In bfloat16 the loss
    reads a head of that type beside it."""
    out = tmp_path / "out"
    out.mkdir()
    run_ranks(2, tmp_path, weigh, models, rollouts, out, timeout_s=120)
    for path in out.iterdir():
        found = torch.load(path)
        weights = found["parameters"]
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            more = {way: found[dtype, way] - found[dtype, "frozen"] for way in FOLLOWERS}
            head = 0 if size == 4 else 128 * 64 * size
            mean = (4 - size) * weights + head
            expected = {"ema": mean, "every second": mean, "lag 3": 2 * size * weights}
            for way, more_bytes in expected.items():
                assert abs(more[way] - more_bytes) < 0.02 * weights, (dtype, way, more)
