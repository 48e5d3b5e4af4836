"""What divergences that were saved are known by: all that changes them, and nothing else."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eopd.config import Config
from megatron_eopd.evaluation.problems import ProblemSet
from megatron_eopd.evaluation.sample_file import Measured
from megatron_eopd.evaluation.settings import measuring_settings
from megatron_eopd.records import ALL_TEACHERS, Prompt
from megatron_eopd.tasks.countdown import Countdown
from tests.test_preflight import MODELS

PROMPTS = [Prompt(n, "", "", (n, 5, 6)) for n in range(2)]
FOLLOWER = {"source": "student", "ema_decay": 0.9}


def told(prompts: list[Prompt] = PROMPTS, checkpoint: Path | None = None, **sections) -> dict:
    teacher = {"hf_path": MODELS / "teacher"} | sections.pop("teacher", {})
    if teacher.get("source") == "student":
        del teacher["hf_path"]
    tree = {"run_dir": "run", "student": {"hf_path": MODELS / "student"}, "teacher": teacher}
    config = Config.model_validate(tree | sections)
    return measuring_settings(ProblemSet(Countdown(), [], prompts), config, 64, checkpoint)


def shown(teacher: str, ids: tuple[int, ...]) -> list[Prompt]:
    return [replace(PROMPTS[0], teacher_ids={teacher: ids}), PROMPTS[1]]


@pytest.mark.parametrize(
    "other",
    [
        {"prompts": shown("teacher", (7,))},
        {"prompts": [replace(PROMPTS[0], teacher="code"), PROMPTS[1]]},
        {"teacher": {"eos_token_map": {"<eos>": "->"}}},
        {"teacher": {"payload": "logits"}},
        {"teacher": {"dtype": "bfloat16"}},
        {"teacher": {"hf_path": MODELS / "student"}},
        {"teacher": {"source": "student"}},
        {"teacher": FOLLOWER},
        {"objective": {"top_k": 2}},
        {"objective": {"entropy_threshold": 0.5}},
        {"objective": {"teacher_temperature": 0.5}},
        {"rollout": {"temperature": 0.5}},
        {"model": {"dtype": "bfloat16"}, "teacher": {"dtype": "float32"}},
    ],
    ids=str,
)
def test_what_changes_divergences_is_told(other):
    assert told(**other) != told()


@pytest.mark.parametrize(
    "other",
    [
        {"prompts": shown("teacher", PROMPTS[0].prompt_ids)},
        {"prompts": shown("code", (7,))},
        {"teacher": {"prompt": {"template": "{prompt}"}}},
        {"teacher": {"placement": "separate", "world_size": 1, "check": "never"}},
        {"teacher": {"dtype": "float32", "parallel": {"tensor_model_parallel_size": 2}}},
        {"objective": {"head": "chunked", "head_chunk_size": 7}},
        {"checkpoint": MODELS / "student"},
        {"training": {"lr": 1.0}},
    ],
    ids=str,
)
def test_what_changes_none_is_not(other):
    """Prompts that come out the same, of no teacher that scores them, or a teacher's place; a
    checkpoint in which no teacher lies."""
    assert told(**other) == told()


def test_each_of_several_teachers_is_told():
    code = {"code": {"hf_path": MODELS / "teacher"}}
    mixed = {"objective": {"teacher_mixture": "divergences"}}
    prompts = [replace(prompt, teacher=ALL_TEACHERS) for prompt in PROMPTS]
    first = told(prompts, teachers=code, **mixed)
    weighted = {"code": code["code"] | {"weight": 2.0}}
    others = [
        told(prompts, teachers=code, objective={"teacher_mixture": "distributions"}),
        told(prompts, teachers=weighted, **mixed),
        told([replace(prompts[0], teacher_ids={"code": (7,)}), prompts[1]], teachers=code, **mixed),
        told(prompts, **mixed | {"objective": {"teacher_mixture": "none"}}),
    ]
    assert all(other != first for other in others)


def test_a_follower_is_told_by_the_checkpoint_that_holds_it(tmp_path):
    """And by the way it goes."""
    checkpoint = shutil.copytree(MODELS / "student", tmp_path / "checkpoint")
    first = told(teacher=FOLLOWER, checkpoint=checkpoint)
    ways = [{"ema_decay": 0.8}, {"ema_interval": 2}, {"ema_decay": None, "lag_steps": 3}]
    assert all(told(teacher=FOLLOWER | way, checkpoint=checkpoint) != first for way in ways)
    assert told(teacher=FOLLOWER, checkpoint=checkpoint) == first != told(teacher=FOLLOWER)
    (checkpoint / "config.json").write_text("{}")
    assert told(teacher=FOLLOWER, checkpoint=checkpoint) != first


def test_what_was_saved_before_these_were_told_is_measured_again(tmp_path):
    """Any of them may have been otherwise. What is told comes out of the file as it went in."""
    path, settings = tmp_path / "task.measured.jsonl", told(objective={"name": "eopd_mix"})
    for name in settings:
        rows = {"settings": {n: v for n, v in settings.items() if n != name}}, {"chunk": 0}
        path.write_text("".join(json.dumps(row | {"sums": {}}) + "\n" for row in rows))
        assert Measured(path, settings, anew=False).of(0) is None, name
    Measured(path, settings, anew=True).add(0, {"loss/total": [1.0, 2.0]})
    assert Measured(path, settings, anew=False).of(0) == {"loss/total": [1.0, 2.0]}
