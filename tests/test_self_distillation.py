"""A teacher that is the student: its options, and what it is refused."""

import json
import shutil

import pytest

from megatron_eopd import preflight
from megatron_eopd.config import load_config
from megatron_eopd.errors import ConfigError
from megatron_eopd.parallel.worlds import student_layout
from megatron_eopd.planning.activations import Lengths, Platform
from megatron_eopd.planning.memory import Setup, plan_memory
from megatron_eopd.planning.shapes import Models
from tests.test_preflight import MODELS, QUICKSTART, ROOT, edit_json, refused

__all__ = ["refused"]

STUDENT = ["teacher.hf_path=none", "teacher.source=student"]


def config(*overrides: str):
    return load_config(QUICKSTART, ["run_dir=unused", *overrides])


def test_a_teacher_that_is_the_student_has_its_files():
    own = config(*STUDENT, "student.tokenizer=examples/quickstart/models/student")
    assert own.teacher.hf_path == own.student.hf_path
    assert own.teacher.tokenizer == own.student.tokenizer
    more = config("teachers.old.source=student", "teachers.old.lag_steps=2")
    assert more.teachers["old"].hf_path == more.student.hf_path != more.teacher.hf_path
    other = ["teacher.source=student", "teacher.ema_decay=0.9"]
    assert (
        config(f"teacher.hf_path={MODELS / 'teacher'}", *other).teacher.hf_path
        == MODELS / "teacher"
    )
    explicit = config(*STUDENT, f"teacher.tokenizer={MODELS / 'teacher'}")
    assert explicit.teacher.tokenizer == MODELS / "teacher"
    assert config(*STUDENT).model_dump(mode="json") == json.loads(
        config(*STUDENT).model_dump_json()
    )


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["teacher.ema_decay=0.9"], "Set source=student"),
        (["teacher.lag_steps=1"], "Set source=student"),
        ([*STUDENT, "teacher.ema_decay=0.9", "teacher.lag_steps=1"], "Set one of them"),
        ([*STUDENT, "teacher.ema_decay=1"], "teacher.ema_decay=1: .* less than 1"),
        ([*STUDENT, "teacher.lag_steps=0"], "teacher.lag_steps=0: .* greater than 0"),
        ([*STUDENT, "teacher.ema_interval=3"], "ema_interval=3 without ema_decay"),
        ([*STUDENT, "teacher.eos_token_map.a=b"], "Leave the map out"),
        (
            [*STUDENT, "teacher.lag_steps=1", "teacher.placement=separate", "teacher.world_size=1"],
            "Set placement=colocated",
        ),
        (["teacher.hf_path=none"], "teacher.hf_path"),
        (["teacher.source=student"], "the student itself, and teacher.hf_path=.* another model"),
    ],
)
def test_options_that_contradict_each_other(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


def test_only_a_model_of_the_same_shape_can_follow_the_student(refused, tmp_path):
    following = ["teacher.source=student", "teacher.ema_decay=0.9"]
    message = refused(*following)
    assert "another architecture: hidden_size is" in message and "ema_decay=0.9" in message
    other = shutil.copytree(MODELS / "student", tmp_path / "other")
    edit_json(other / "config.json", rms_norm_eps=1e-3)
    message = refused(f"teacher.hf_path={other}", *following)
    assert "rms_norm_eps is 0.001 to the teacher and 1e-06 to the student" in message


def test_the_planner_counts_what_a_follower_keeps():
    """A mean in float32, and a copy in the model's type to score with; and as many copies as steps
    of lag."""

    def teacher_bytes(*overrides: str) -> tuple[int, int]:
        own = config(*STUDENT, "model.dtype=bfloat16", *overrides)
        layout, lengths = student_layout(own, 2), Lengths(16, 24)
        setup = Setup.of(own, Models.of(own), layout, lengths, Platform())
        (stage,) = plan_memory(setup).stages["student"]
        return stage.teacher_weights, stage.offloaded_teacher

    frozen, _ = teacher_bytes()
    assert teacher_bytes("teacher.ema_decay=0.9") == (2 * frozen, frozen)
    assert teacher_bytes("teacher.lag_steps=3") == (3 * frozen, 0)
    assert teacher_bytes("teacher.ema_decay=0.9", "teacher.offload=true") == (0, frozen)


def test_the_dry_run_says_who_the_teacher_is(monkeypatch, tmp_path):
    """And that one with nothing to teach has nothing to teach."""
    monkeypatch.chdir(ROOT)
    run = [f"run_dir={tmp_path}", "rollout.engine=megatron"]
    own = load_config(QUICKSTART, [*run, *STUDENT, "teacher.ema_decay=0.9"])
    inputs = preflight.check(own, 2)
    told = preflight.derived_numbers(own, inputs, 2)["teacher"]
    assert told.startswith("the student itself, ema_decay=0.9; ")
    assert any("[teacher] is the student and reads what" in text for text in inputs.warnings)
    more = ["teachers.more.source=student", "objective.teacher_mixture=divergences"]
    own = load_config(QUICKSTART, [*run, *more, "teachers.more.weight=0.5"])
    numbers = preflight.derived_numbers(own, preflight.check(own, 2), 2)
    told = numbers["teachers.more"]
    assert told.startswith("the student itself, as it began; weight 0.5, scores 12,")
    assert numbers["mixture of teachers"] == "divergences"
