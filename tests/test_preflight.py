"""Bad input is refused before a process group exists: one message, exit code 1."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_eopd import preflight
from megatron_eopd.config import load_config
from megatron_eopd.errors import ConfigError
from megatron_eopd.parallel.worlds import smallest_world
from megatron_eopd.rollout import choice
from megatron_eopd.train import main

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "examples/quickstart/models"
QUICKSTART = ROOT / "examples/quickstart/eopd.toml"


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Starts the quick start with overrides; gives back the error it must end with."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("megatron_eopd.launch.job_store", lambda *a, **k: pytest.fail("late"))

    def start(*overrides: str) -> str:
        assert main([str(QUICKSTART), f"run_dir={tmp_path / 'run'}", *overrides]) == 1
        return capsys.readouterr().err

    return start


@pytest.fixture
def with_vllm(monkeypatch):
    """On a machine that has it."""
    monkeypatch.setattr(choice, "vllm_available", lambda: True)


@pytest.fixture
def broken_model(tmp_path):
    """A copy of the student whose files a test may damage."""
    return Path(shutil.copytree(MODELS / "student", tmp_path / "model"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_model_directory(refused):
    assert "no config.json there" in refused("student.hf_path=/nowhere")


def test_truncated_safetensors(refused, broken_model):
    weights = broken_model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = refused(f"teacher.hf_path={broken_model}")
    assert "model.safetensors: cannot be read" in message and "truncated" in message


def test_missing_safetensors(refused, broken_model):
    (broken_model / "model.safetensors").unlink()
    assert "no such file" in refused(f"student.hf_path={broken_model}")


def test_broken_json_files(refused, broken_model):
    index = broken_model / "model.safetensors.index.json"
    index.write_text('{"weight_map"')
    assert "not a safetensors index" in refused(f"student.hf_path={broken_model}")
    (broken_model / "config.json").write_text("{")
    assert str(broken_model) in refused(f"student.hf_path={broken_model}")


@pytest.mark.parametrize("model_type", ["gpt2", "no_such_family"])
def test_unsupported_architecture(refused, broken_model, model_type):
    edit_json(broken_model / "config.json", model_type=model_type, architectures=["X"])
    message = refused(f"student.hf_path={broken_model}")
    assert model_type in message and str(broken_model) in message


def test_teacher_with_the_same_size_and_other_ids(refused, broken_model):
    """Equal sizes are not enough: column 3 must be the same token for both."""
    path = broken_model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]
    path.write_text(json.dumps(tokenizer))
    assert "different ids" in refused(f"teacher.hf_path={broken_model}")


def test_teacher_that_ends_with_another_token(refused, broken_model):
    edit_json(broken_model / "generation_config.json", eos_token_id=107)
    assert "ends a response" in refused(f"teacher.hf_path={broken_model}")


EOS_IS_PAD = 'teacher.eos_token_map={ "<eos>" = "<pad>" }'


def test_end_tokens_that_trade_places(refused, broken_model):
    """A teacher that ends with another token is taken with the map that says so, and only then."""
    edit_json(broken_model / "generation_config.json", eos_token_id=[107, 3])
    teacher = f"teacher.hf_path={broken_model}"
    assert "teacher.eos_token_map" in refused(teacher)
    config = load_config(QUICKSTART, [teacher, EOS_IS_PAD, "parallel.tensor_model_parallel_size=2"])
    inputs = preflight.check(config, 2)
    assert inputs.tokenizers.swaps == {"teacher": [(109, 107)]}
    told = preflight.derived_numbers(config, inputs, 2)
    assert "trade places 109 ↔ 107" in told["teacher"] and "padded to 256" in told["vocabulary"]
    given = load_config(
        QUICKSTART, [teacher, EOS_IS_PAD, "rollout.stop_token_ids=[109]", "run_dir=unused"]
    )
    assert preflight.check(given, 2).tokenizers.swaps == {"teacher": [(109, 107)]}
    assert "'<im_end>' is no token" in refused('teacher.eos_token_map={ "<eos>" = "<im_end>" }')
    twice = 'teacher.eos_token_map={ "<eos>" = "<pad>", "<bos>" = "<pad>" }'
    assert "names a token twice" in refused(twice)
    # The shipped teacher ends as the student does: then the map would be wrong.
    assert "ends a response" in refused(EOS_IS_PAD)


def test_teachers_that_cannot_be_where_they_are_put(refused):
    separate = ["teacher.placement=separate", "teacher.world_size=1"]
    assert "= 2 does not divide the ranks left to the student, 1" in refused(*separate)
    separate += [
        f"{who}parallel.tensor_model_parallel_size={n}" for who, n in (("", 1), ("teacher.", 2))
    ]
    assert "= 2 does not divide teacher.world_size = 1" in refused(*separate)
    alone = [*separate[:1], "teacher.world_size=2"]
    assert "leaves no rank to the student" in refused(*alone)
    heads = "teacher.parallel.tensor_model_parallel_size=3"
    assert "teacher.parallel.tensor_model_parallel_size=3" in refused(heads)
    experts = "teacher.parallel.expert_model_parallel_size=2"
    assert "the teacher has no experts" in refused(experts)


def test_a_prompt_that_names_an_unknown_teacher(refused, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "1 2 3 4 -> 10 :"}\n{"prompt": "1 2 3 4 -> 10 :", "teacher": "art"}\n'
    )
    message = refused(f"data.prompts={path}", f"teachers.code.hf_path={MODELS / 'teacher'}")
    assert "line 2: teacher='art'" in message and "teacher, code" in message


def test_what_prompts_hold_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1 2 <eos> 3"}\n')
    config = load_config(QUICKSTART, [f"data.prompts={path}", "run_dir=unused"])
    assert any("1 prompts hold special tokens" in w for w in preflight.check(config, 2).warnings)
    assert not preflight.check(load_config(QUICKSTART, ["run_dir=unused"]), 2).warnings


@pytest.mark.parametrize(
    "line,problem",
    [
        ("not json", "not valid JSON"),
        ('{"text": "1 2"}', "prompt"),
        ('{"prompt": 5}', "neither text nor chat messages"),
    ],
)
def test_broken_prompt_line(refused, tmp_path, line, problem):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "1 2 3 4 -> 10 :"}}\n\n{line}\n')
    message = refused(f"data.prompts={path}")
    assert "prompts.jsonl line 3" in message and problem in message


def test_prompt_file_missing_empty_or_too_long(refused, tmp_path):
    assert "no such file" in refused("data.prompts=/nowhere.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert "no prompts" in refused(f"data.prompts={tmp_path / 'empty.jsonl'}")
    (tmp_path / "long.jsonl").write_text('{"prompt": "1 2 3 4 5 6 7 8 9 10"}\n')
    message = refused(f"data.prompts={tmp_path / 'long.jsonl'}", "data.max_prompt_length=9")
    assert "long.jsonl line 1: 10 tokens" in message


@pytest.mark.parametrize(
    "override,message",
    [
        ("parallel.tensor_model_parallel_size=3", "does not divide the world size 2"),
        ("parallel.pipeline_model_parallel_size=2", "= 4 does not divide the world size 2"),
        ("training.max_tokens_per_microbatch=9", "Set one of the two to none"),
        (
            "parallel.context_parallel_size=3",
            "parallel.context_parallel_size=3 = 6 does not divide",
        ),
        ("rollout.max_response_length=100", "max_position_embeddings is 64"),
        ("rollout.replay=/nowhere", "no such directory"),
        ("run_dir=/dev/null/run", "/dev/null is no directory"),
        ("checkpoint.load=/nowhere", "no such checkpoint directory"),
    ],
)
def test_options_that_contradict_the_models_or_the_ranks(refused, override, message):
    assert message in refused(override)


def test_a_token_budget_that_the_longest_sample_exceeds(refused):
    message = refused("training.micro_batch_size=none", "training.max_tokens_per_microbatch=9")
    assert "cannot hold the longest prompt" in message


def test_fewer_samples_than_data_parallel_ranks(refused):
    message = refused("parallel.tensor_model_parallel_size=1", "training.global_batch_size=1")
    assert "less than the data-parallel size 2" in message


def test_heads_that_tensor_parallelism_cannot_cut(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    message = refused("parallel.tensor_model_parallel_size=4")
    assert "num_key_value_heads=2" in message and "one of [1, 2]" in message


@pytest.mark.parametrize(
    "options,message",
    [
        (
            "rollout.num_engines=3",
            "rollout.num_engines=3 engines of rollout.tensor_model_parallel_size=1 need 3 ranks, "
            "each engine's on one host; 2 (the student's) hold 2",
        ),
        (
            "rollout.tensor_model_parallel_size=3",
            "rollout.tensor_model_parallel_size=3 does not divide the 2 ranks (the student's) of "
            "host 0",
        ),
        (
            "rollout.num_engines=none rollout.min_engines=3",
            "rollout.min_engines=3 is more than the 2 engines that the ranks hold",
        ),
        (
            "rollout.placement=separate rollout.world_size=2",
            "rollout.world_size=2 leaves no rank to the student in a world of 2",
        ),
        (
            "rollout.placement=separate rollout.world_size=1 rollout.num_engines=2 "
            "parallel.tensor_model_parallel_size=1",
            "1 (1 own) hold 1",
        ),
    ],
)
def test_engines_that_the_ranks_do_not_hold(refused, with_vllm, options, message):
    assert message in refused(*options.split())


def test_an_engine_does_not_reach_over_two_hosts(refused, with_vllm, monkeypatch):
    """torchrun says how many ranks a host has."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    message = refused("rollout.tensor_model_parallel_size=2")
    assert "does not divide the 1 ranks (the student's) of host 0" in message


def test_memory_that_no_other_process_can_open_is_refused_on_a_gpu(refused, with_vllm, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    preflight.check(load_config(QUICKSTART, ["run_dir=unused"]), 2)  # on a CPU it means nothing
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    message = refused()
    assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in message
    assert "Leave expandable_segments out of it" in message
    preflight.check(load_config(QUICKSTART, ["run_dir=unused", "rollout.engine=megatron"]), 2)


def test_transformer_engine_demanded_and_absent(refused):
    message = refused("model.transformer_impl=transformer_engine")
    assert "set model.transformer_impl=local" in message


def test_unfinished_checkpoint(refused, tmp_path):
    (tmp_path / "000010").mkdir()
    assert "never finished" in refused(f"checkpoint.load={tmp_path / '000010'}")


def test_a_dry_run_prints_numbers_first_and_every_option_on_request(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    command = [str(QUICKSTART), f"run_dir={tmp_path / 'run'}", "--dry-run", "--world-size", "2"]
    assert main(command) == 0
    short = capsys.readouterr().out
    assert short.startswith("layout: 2 ranks") and '"entropy_threshold"' not in short
    assert main([*command, "--show-config"]) == 0
    whole = capsys.readouterr().out
    assert whole.startswith(short) and '"entropy_threshold": 0.8' in whole


ENGINES = [
    ("", 4, "1 engine, colocated, of rank 0", [0]),
    ("rollout.num_engines=none", 4, "4 engines, colocated, of ranks 0, 1, 2, 3", [0, 1, 2, 3]),
    (
        "rollout.num_engines=none rollout.tensor_model_parallel_size=2",
        4,
        "2 engines, TP 2, colocated, of ranks 0, 2",
        [0, 0, 1, 1],
    ),
    (
        "rollout.num_engines=none rollout.placement=separate rollout.world_size=2",
        4,
        "2 engines, separate, of ranks 2, 3",
        [None, None, 0, 1],
    ),
    (
        "rollout.num_engines=none parallel.tensor_model_parallel_size=1",
        10,
        "10 engines, colocated, of ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more",
        list(range(10)),
    ),
]


@pytest.mark.parametrize("options,ranks,said,engines", ENGINES)
def test_a_dry_run_tells_the_engines_and_who_has_which(
    with_vllm, monkeypatch, capsys, tmp_path, options, ranks, said, engines
):
    monkeypatch.chdir(ROOT)
    command = [str(QUICKSTART), f"run_dir={tmp_path / 'run'}", "training.global_batch_size=512"]
    more = [*options.split(), "--dry-run", "--world-size", str(ranks)]
    assert main([*command, *more]) == 0
    printed = capsys.readouterr().out
    assert f"rollouts: vLLM: {said}\n" in printed
    header, *rows = printed[printed.index("\nrank ") :].strip().splitlines()
    assert header.split() == ["rank", "student", "teacher", "engines"] and len(rows) == ranks
    expected = ["-" if n is None else f"engine {n}" for n in engines + [None] * ranks]
    assert [row[header.index("engines") :] for row in rows] == expected[:ranks]


def test_a_dry_run_without_engines_has_no_column_of_them(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    options = [f"run_dir={tmp_path / 'run'}", "rollout.engine=megatron"]
    assert main([str(QUICKSTART), *options, "--dry-run"]) == 0
    assert "\nrank  student  teacher\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "overrides,ranks",
    [
        ([], 2),
        (["parallel.context_parallel_size=2"], 4),
        (["teacher.parallel.pipeline_model_parallel_size=3"], 6),
        (["teacher.placement=separate", "teacher.world_size=3"], 5),
        (["rollout.placement=separate", "rollout.world_size=3"], 5),
        (["parallel.expert_model_parallel_size=4"], 4),
    ],
)
def test_a_dry_run_without_a_world_size_takes_the_smallest_that_all_layouts_divide(
    overrides, ranks
):
    assert smallest_world(load_config(QUICKSTART, overrides)) == ranks


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["checkpoint.keep_best=pas@8"], "pas@8 is no figure .* avg@16, .*pass@8"),
        (
            ["checkpoint.keep_best=pass@8", "evaluation.samples_per_problem=4"],
            "pass@8 is no figure",
        ),
        (["checkpoint.keep_best=pass@8", "evaluation.tasks=none"], "nothing is evaluated"),
    ],
)
def test_the_best_checkpoint_is_known_by_a_figure_that_there_will_be(options, said):
    """A misspelt one would keep nothing, without a word."""
    with pytest.raises(ConfigError, match=said):
        preflight.check(load_config(QUICKSTART, ["run_dir=unused", *options]), 2)
    for name in ("pass@8", "countdown/reverse_kl"):
        preflight.check(
            load_config(QUICKSTART, ["run_dir=unused", f"checkpoint.keep_best={name}"]), 2
        )
