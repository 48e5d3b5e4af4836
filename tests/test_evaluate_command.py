"""What the evaluation command makes of its arguments, before any rank works."""

from pathlib import Path

import pytest

from megatron_eopd import evaluate, launch, lone_evaluation
from megatron_eopd.checkpoints.resume import choose_checkpoints
from megatron_eopd.evaluation.settings import model_identity
from tests.test_preflight import MODELS, QUICKSTART


@pytest.fixture
def run(monkeypatch, capsys):
    """Gives back the status, the configuration that would be evaluated, where to, and stderr."""
    found = {}
    monkeypatch.setattr(lone_evaluation, "into", lambda output: found.update(output=output))
    monkeypatch.setattr(
        launch, "on_every_rank", lambda config, *_, trains: found.update(config=config)
    )

    def run(*arguments: str):
        status = evaluate.main([str(argument) for argument in arguments])
        return status, found.get("config"), found.get("output"), capsys.readouterr().err

    return run


def test_a_model_alone_is_no_checkpoint_that_lies_where_its_files_go(run, tmp_path):
    """Else another model would be evaluated, without a word."""
    (tmp_path / "checkpoints/000003").mkdir(parents=True)
    (tmp_path / "checkpoints/000003/DONE").touch()
    options = ("--task", "countdown", "-o", tmp_path, "data.shuffle=false", "seed=3")
    status, config, output, _ = run("--model", MODELS / "student", *options)
    assert status == 0 and output == tmp_path and config.seed == 3 and not config.data.shuffle
    assert config.teacher is None and config.student.hf_path == MODELS / "student"
    assert choose_checkpoints(config, trains=False).directories == []


def test_a_teacher_may_be_named_beside_a_model_and_a_configuration(run):
    teacher = MODELS / "teacher"
    for model in (("--model", MODELS / "student"), (QUICKSTART, "teacher.hf_path=other")):
        _, config, _, _ = run(*model, "--teacher", teacher, "-t", "countdown")
        assert config.teacher.hf_path == teacher


def test_the_words_of_the_command_are_options(run):
    words = ("--num-samples", 8, "--num-problems", 9, "--temperature", 0.5, "--top-p", 0.8)
    tasks = ("-t", "gsm8k=it's.jsonl", "-t", "countdown", "--max-response-length", 77)
    _, config, output, _ = run(QUICKSTART, *words, *tasks)
    found = config.evaluation
    assert (found.samples_per_problem, found.num_problems, found.temperature) == (8, 9, 0.5)
    assert (found.top_p, found.max_response_length, output) == (0.8, 77, None)
    assert found.tasks == ("gsm8k=it's.jsonl", "countdown")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name a CONFIG.toml, or a model"),
        (["--model", MODELS / "student"], "nothing to evaluate on"),
        (
            ["--model", "m", "-t", "countdown", "checkpoint.load=c"],
            "checkpoint.load=c something",
        ),
        (["--compare", "a", "b", "--num-samples", 3], "--compare reads two evaluations"),
        (["--compare", "/nowhere/a", "/nowhere/b"], "/nowhere/a"),
    ],
)
def test_what_contradicts_is_told(run, arguments, said):
    status, _, _, stderr = run(*arguments)
    assert status == 1 and said in stderr


def test_a_model_is_known_by_its_content_wherever_it_lies(tmp_path):
    """And not by the time of its files."""
    original = model_identity(MODELS / "student")
    for file in (MODELS / "student").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert model_identity(tmp_path)["digest"] == original["digest"]
    assert Path(original["path"]).is_absolute()
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert model_identity(tmp_path)["digest"] != original["digest"]
