"""What of a run can be scored afterwards, and what is said of the rest."""

import json
import re

import pytest

from megatron_eopd import view
from megatron_eopd.config import Config
from megatron_eopd.errors import ConfigError
from megatron_eopd.scoring import scoring_config


@pytest.fixture
def run(tmp_path):
    """A run that kept its rollouts, and has one checkpoint; options can be set."""

    def make(**sections):
        options = {
            "run_dir": str(tmp_path / "run"),
            "student": {"hf_path": "s"},
            "teacher": {"hf_path": "t"},
            "rollout": {"record": True, "batch_size": 32},
            "evaluation": {"tasks": ["countdown"]},
        }
        for section, own in sections.items():
            options[section] = options.get(section, {}) | own
        for iteration in (0, 1, 50):
            path = tmp_path / f"run/rollouts/{iteration:06d}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        (tmp_path / "run/checkpoints/000050").mkdir(parents=True)
        config = Config.model_validate(options).model_dump_json()
        (tmp_path / "run/config.json").write_text(config)
        return tmp_path / "run"

    return make


def test_nothing_but_the_models_and_their_layout_is_taken_over(run):
    """No engine of its own, no evaluation, and never the run's own files."""
    run_dir = run(rollout={"placement": "separate", "world_size": 2})
    config = scoring_config(run_dir, 50, ["logging.record_tokens_samples=4"])
    assert config.checkpoint.load == run_dir / "checkpoints/000050"
    assert config.rollout.replay == run_dir / "rollouts" and not config.rollout.record
    assert config.rollout.placement == "colocated" and not config.evaluation.tasks
    assert config.run_dir.parent == run_dir and config.logging.record_tokens_samples == 4
    assert scoring_config(run_dir, 0, []).checkpoint.load is None, "the student as it came"


@pytest.mark.parametrize(
    "iteration,sections,overrides,said",
    [
        (7, {}, [], "no rollouts of iteration 7 were kept, but of 0, 1, 50.*rollout.record=true"),
        (1, {}, [], "000001: the weights that wrote .* iteration 1 are not there.* of 50"),
        (0, {"rollout": {"replay": "r", "record": False}}, [], "rollouts of r, which other"),
        (0, {}, ["logging.record_tokens_samples=0"], "scores nothing"),
        (0, {"objective": {"gate": "quantile"}}, [], "gate=quantile .*samples=8 .* Set it to 32"),
        (0, {}, ["logging.x=1"], "logging.x"),
    ],
)
def test_what_cannot_be_scored_is_said(run, iteration, sections, overrides, said):
    with pytest.raises(ConfigError) as error:
        scoring_config(run(**sections), iteration, overrides)
    assert re.search(said, str(error.value)), error.value


@pytest.mark.parametrize("text", [None, "{}", "[]", "{"])
def test_what_is_no_run_is_said(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: the configuration of no run"):
        scoring_config(tmp_path, 0, [])


def test_what_is_recorded_already_stays(run, capsys):
    run_dir = run()
    (run_dir / "tokens").mkdir()
    (run_dir / "tokens/000050.npz").write_text("kept")
    assert view.main([str(run_dir), "--iteration", "50", "--score"]) == 1
    assert "recorded already. --overwrite" in capsys.readouterr().err
    assert (run_dir / "tokens/000050.npz").read_text() == "kept"
    assert view.main([str(run_dir), "--score"]) == 1
    assert "--iteration N" in capsys.readouterr().err


def test_a_quantile_is_that_of_whole_steps(run):
    run_dir = run(objective={"gate": "quantile"})
    config = scoring_config(run_dir, 0, ["logging.record_tokens_samples=32"])
    assert json.loads(config.model_dump_json())["objective"]["gate"] == "quantile"
