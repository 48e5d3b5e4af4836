"""A checkpoint of one layout goes on under another: model, optimizer and schedule."""

import json
from types import SimpleNamespace

import pytest

from megatron_eopd.checkpoints import files
from megatron_eopd.checkpoints.loader import load
from megatron_eopd.checkpoints.position import make_position
from megatron_eopd.checkpoints.resume import Candidates, first_sound
from megatron_eopd.errors import CheckpointError, RemoteError
from megatron_eopd.metrics.means import divide
from megatron_eopd.schedules import Progress
from tests.distributed.test_models import random_rollouts
from tests.distributed.test_step import VOCAB, build, make_config, take_step
from tests.ranks import context_for, leave_groups, run_ranks
from tests.saving import save
from tests.tiny_models import make_model

LAYOUTS = [(2, 1), (1, 2), (1, 1)]


def check_resume(student_dir, teacher_dir, run_dir):
    """Two steps and a save at TP 2; then everybody takes the third step."""
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    config = make_config(student_dir, teacher_dir)
    for number, (tp, pp) in enumerate([LAYOUTS[0], *LAYOUTS]):
        context = context_for(tp, pp)
        student, pool, token_loss = build(config, context)
        own = (student, token_loss, pool, rollouts, config, context)
        if number == 0:
            for _ in range(2):
                take_step(*own, step=0)
            position = make_position(2, config.seed, "digest", context)
            save(run_dir, student, position, student_dir, context, keep_last=3)
        else:
            position = load(files.newest(run_dir), student, VOCAB, context)
            assert position.iteration == 2 and position.layout["tp"] == 2
        report = take_step(*own, step=0)
        if context.layout.rank == 0:
            row = [divide([report.sums])["loss/total"], report.grad_norm, report.lr]
            (run_dir / f"{number}.json").write_text(json.dumps(row))
        leave_groups()


CUTS = [
    {"ep": 2},
    {"ep": 2},
    {"tp": 2, "sequence_parallel": True, "ep": 2},
    {},
    {"pp": 2, "vpp": 2},
]


def check_cuts(student_dir, teacher_dir, run_dir, cuts):
    """A step and a save under the first cut; then every one takes the second step."""
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    for number, sizes in enumerate(cuts):
        context = context_for(**{"tp": 1, "pp": 1} | sizes)
        config = make_config(student_dir, teacher_dir)
        student, pool, token_loss = build(config, context)
        own = (student, token_loss, pool, rollouts, config, context)
        if number == 0:
            take_step(*own, step=0)
            position = make_position(1, config.seed, "digest", context)
            save(run_dir, student, position, student_dir, context, keep_last=3)
        else:
            load(files.newest(run_dir), student, VOCAB, context)
        report = take_step(*own, step=0)
        if context.layout.rank == 0:
            row = [divide([report.sums])["loss/total"], report.grad_norm, report.lr]
            (run_dir / f"{number}.json").write_text(json.dumps(row))
        leave_groups()


UNEVEN_CUTS = [
    {"pp": 2, "layers": (None, 1)},
    {"pp": 2, "layers": (None, 1)},
    {"pp": 2, "layers": (1, None)},
    {"pp": 2},
    {"pp": 2, "vpp": 2},
    {"tp": 2},
]


@pytest.mark.parametrize("family,cuts", [("qwen3_moe", CUTS), ("qwen3_tied", UNEVEN_CUTS)])
def test_every_cut_goes_on_from_the_first(family, cuts, tmp_path):
    """Experts saved at EP 2 over DP go on at EP 2 over TP, whole, and in interleaved chunks; three
    layers and one as one and three, two and two, and all on each rank."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    student, teacher = (make_model(family, tmp_path / f"model{seed}", seed=seed) for seed in (1, 2))
    run_ranks(2, tmp_path, check_cuts, student, teacher, run_dir, cuts)
    straight, same, *others = (
        json.loads((run_dir / f"{n}.json").read_text()) for n in range(len(cuts))
    )
    assert same == straight
    for other in others:
        assert other == pytest.approx(straight, rel=1e-5)


def check_fewer_ranks(student_dir, teacher_dir, run_dir, sizes):
    """Two steps and a save, or, where there is one, the third step of a checkpoint."""
    context = context_for(**{"tp": 1, "pp": 1} | sizes)
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    config = make_config(student_dir, teacher_dir)
    student, pool, token_loss = build(config, context)
    own = (student, token_loss, pool, rollouts, config, context)
    saved = files.newest(run_dir)
    if saved is None:
        for _ in range(2):
            take_step(*own, step=0)
        position = make_position(2, config.seed, "digest", context)
        save(run_dir, student, position, student_dir, context)
    else:
        load(saved, student, VOCAB, context)
    report = take_step(*own, step=0)
    if context.layout.rank == 0:
        row = [divide([report.sums])["loss/total"], report.grad_norm]
        (run_dir / f"{context.layout.world_size}.json").write_text(json.dumps(row))
    leave_groups()


@pytest.mark.parametrize(
    "family,sizes",
    [("qwen3", {}), ("qwen3", {"pp": 2, "vpp": 2}), ("qwen3_moe", {"ep": 2})],
    ids=["DP", "VPP", "EP"],
)
def test_half_of_the_ranks_go_on(family, sizes, tmp_path):
    """DP 2, VPP 2 and EP 2, each on one rank alone then."""
    models = [make_model(family, tmp_path / f"model{seed}", seed=seed) for seed in (1, 2)]
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_ranks(2, tmp_path, check_fewer_ranks, *models, run_dir, sizes)
    run_ranks(1, tmp_path, check_fewer_ranks, *models, run_dir, {})
    both, one = (json.loads((run_dir / f"{ranks}.json").read_text()) for ranks in (2, 1))
    assert one == pytest.approx(both, rel=1e-5)


def check_changed_options(student_dir, teacher_dir, run_dir):
    context = context_for(1, 1)
    for number, training in enumerate(({}, {"lr": 5e-3, "adam_beta2": 0.99, "train_iters": 10})):
        config = make_config(student_dir, teacher_dir)
        training = config.training.model_copy(update=training)
        student, _, _ = build(config.model_copy(update={"training": training}), context)
        if number == 0:
            student_after_a_step(student)
            position = make_position(1, config.seed, "digest", context)
            save(run_dir, student, position, student_dir, context, keep_last=1)
            lr = student.set_lr(Progress(3, 3, 10))
        else:
            load(files.newest(run_dir), student, VOCAB, context)
            lower = student.set_lr(Progress(3, 3, 10))
            assert lower == pytest.approx(lr / 2), "the same place on a lower curve"
            assert student.optimizer.param_groups[0]["betas"] == (0.9, 0.99)


def test_a_resumed_run_obeys_the_options_it_is_given_now(qwen3_dir, teacher_dir, tmp_path):
    run_ranks(1, tmp_path, check_changed_options, qwen3_dir, teacher_dir, tmp_path / "run")


def test_the_next_step_is_the_same_on_every_layout(qwen3_dir, teacher_dir, tmp_path):
    """Bitwise on the layout that saved, within rounding elsewhere, DP 2 included."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    run_ranks(2, tmp_path, check_resume, qwen3_dir, teacher_dir, run_dir)
    straight, same, *others = (
        json.loads((run_dir / f"{n}.json").read_text()) for n in range(len(LAYOUTS) + 1)
    )
    assert same == straight
    for other in others:
        assert other == pytest.approx(straight, rel=1e-5)


def check_refusals(student_dir, run_dir):
    config = make_config(student_dir, student_dir)
    context = context_for(1, 1)
    student, _, _ = build(config, context)
    for iteration in (1, 2, 3):
        position = make_position(iteration, config.seed, "digest", context)
        student_after_a_step(student)
        save(run_dir, student, position, student_dir, context, keep_last=2)
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["000002", "000003", "latest"], "only keep_last complete checkpoints stay"
    assert (run_dir / "checkpoints/latest").read_text() == "000003\n"
    newest = files.newest(run_dir)
    (newest / "DONE").unlink()
    assert files.newest(run_dir).name == "000002", "an unfinished one never counts"
    with pytest.raises(RemoteError, match="never finished"):
        load(newest, student, VOCAB, context)
    data = next((run_dir / "checkpoints/000002").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(RemoteError, match="truncated"):
        load(run_dir / "checkpoints/000002", student, VOCAB, context)


def student_after_a_step(student):
    for chunk in student.wrapped:
        chunk.zero_grad_buffer()
    student.optimizer.step()
    return student


def test_damaged_and_unfinished_checkpoints_are_refused(qwen3_dir, tmp_path):
    run_ranks(1, tmp_path, check_refusals, qwen3_dir, tmp_path / "run")


def check_damage(newer, older):
    """Each rank reads a part of the files; what one of them finds, all act on."""
    context = context_for(1, 1)
    told = []
    candidates, log = Candidates([newer, older], []), SimpleNamespace(line=told.append)
    assert first_sound(candidates, context, log) == older
    (line,) = told
    assert f"{newer} is damaged: b has other content" in line and f"from {older}" in line
    with pytest.raises(CheckpointError, match="b has other content than was written"):
        first_sound(Candidates([newer], []), context, log)
    leave_groups()


def test_damage_that_one_rank_finds_leads_all_to_the_checkpoint_before(tmp_path):
    checkpoints = [files.checkpoint_dir(tmp_path / "run", n) for n in (4, 2)]
    for path in checkpoints:
        path.mkdir(parents=True)
        for name in "abc":
            (path / name).write_text(name)
        files.write_sums(path, files.sum_files(path.iterdir()))
    (checkpoints[0] / "b").write_text("B")
    run_ranks(2, tmp_path, check_damage, *checkpoints)
