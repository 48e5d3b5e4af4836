"""Which checkpoint a run goes on from, and what may have changed since."""

import json
from pathlib import Path

import pytest

from megatron_eopd import checkpoint, preflight
from megatron_eopd.config import Config, load_config
from megatron_eopd.errors import ConfigError
from megatron_eopd.resume import choose_checkpoint

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples/quickstart/eopd.toml"


@pytest.fixture
def config(monkeypatch, tmp_path):
    """The quick start's, 6 iterations long, with overrides."""
    monkeypatch.chdir(ROOT)
    common = [f"run_dir={tmp_path / 'run'}", "rollout.engine=megatron", "training.train_iters=6"]

    def load(*overrides: str) -> Config:
        return load_config(QUICKSTART, [*common, *overrides])

    return load


def finish_checkpoint(run_dir: Path, iteration: int, **position) -> Path:
    """All of a complete checkpoint that is looked at before anything is loaded."""
    path = checkpoint.checkpoint_dir(run_dir, iteration)
    path.mkdir(parents=True)
    common = {"iteration": iteration, "seed": 1234, "prompts_digest": "", "layout": {}}
    (path / "position.json").write_text(json.dumps(common | position))
    (path / checkpoint.DONE).touch()
    return path


def test_a_runs_own_checkpoints_come_before_another_runs(config, tmp_path):
    """Given again, the command that began from another run must not begin there again."""
    other = finish_checkpoint(tmp_path / "other", 9)
    load = f"checkpoint.load={other}"
    assert choose_checkpoint(config(), trains=True) is None
    assert choose_checkpoint(config(load), trains=True) == other
    own = [finish_checkpoint(tmp_path / "run", n) for n in (2, 4)]
    assert choose_checkpoint(config(), trains=True) == own[1]
    assert choose_checkpoint(config(load), trains=True) == own[1]
    assert choose_checkpoint(config(load), trains=False) == other, "an evaluation of this one"
    assert choose_checkpoint(config("checkpoint.resume=2"), trains=True) == own[0]
    with pytest.raises(ConfigError, match=r"resume=3: no complete .*000003\. There are 000002, 00"):
        choose_checkpoint(config("checkpoint.resume=3"), trains=True)
    with pytest.raises(ConfigError, match=r"resume=none, but .*000004 is there"):
        choose_checkpoint(config("checkpoint.resume=none"), trains=True)


def test_later_checkpoints_are_set_aside_and_kept(tmp_path):
    for n in (2, 4, 6):
        finish_checkpoint(tmp_path, n)
    moved = checkpoint.set_aside_later(tmp_path, 2)
    assert [path.name for path in moved] == ["superseded-000004-1", "superseded-000006-1"]
    assert all((path / checkpoint.DONE).is_file() for path in moved)
    assert checkpoint.newest(tmp_path).name == "000002"
    finish_checkpoint(tmp_path, 4)
    assert checkpoint.set_aside_later(tmp_path, 3)[0].name == "superseded-000004-2"
    assert checkpoint.set_aside_later(tmp_path, 3) == []


def test_a_million_iterations_are_newer_than_the_one_before(tmp_path):
    """A name of seven digits sorts before one of six."""
    for n in (999_999, 1_000_000):
        finish_checkpoint(tmp_path, n)
    assert checkpoint.newest(tmp_path).name == "1000000"


LONGER = "training.train_iters=12"


@pytest.mark.parametrize(
    "options,said",
    [
        ((), "the learning rate would jump.*Set training.lr_decay_iters=6"),
        (
            ("training.lr_decay_style=constant", "objective.final_entropy_threshold=0.1"),
            "threshold of forward KL would jump.*objective.schedule_steps=24",
        ),
    ],
)
def test_a_longer_run_says_how_its_schedules_go_on(config, tmp_path, options, said):
    prompts = preflight.check(config(), 2).prompts
    digest = {"seed": config().seed, "prompts_digest": prompts.digest}
    finish_checkpoint(tmp_path / "run", 3, **digest, optimizer_steps=12, train_iters=6)
    assert preflight.check(config(*options), 2).resume_from.name == "000003"
    with pytest.raises(ConfigError, match=rf"of a run of 6 iterations.*train_iters=12: .*{said}"):
        preflight.check(config(LONGER, *options), 2)
    kept = ("training.lr_decay_iters=6", "objective.schedule_steps=24")
    assert preflight.check(config(LONGER, *options, *kept), 2).resume_from.name == "000003"
    assert preflight.check(config(LONGER, *options), 2, trains=False).resume_from is not None
