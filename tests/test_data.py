"""Prompts, packing and recordings: who comes when, which row predicts which token."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_eopd.config import DataConfig, load_config
from megatron_eopd.data.prompts import PromptSet, load_prompts
from megatron_eopd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.problems import load_problem_sets
from megatron_eopd.parallel.layout import Layout, pad_vocab_size
from megatron_eopd.records import Prompt, Rollout, Turn
from megatron_eopd.rollout.engine import Sampling, numbered_samples, sample_seed
from megatron_eopd.tasks.registry import training_rows
from tests.test_preflight import MODELS


def make_rollout(index: int, prompt_length: int, response_length: int) -> Rollout:
    first = 100 * index
    prompt = Prompt(index, f"p{index}", "a", tuple(range(first, first + prompt_length)))
    response = tuple(range(first + 50, first + 50 + response_length))
    return Rollout(prompt, 0, response, tuple(-0.1 * i for i in response), "stop", 3)


def prompt_set(count: int, seed: int = 1, shuffle: bool = True) -> PromptSet:
    return PromptSet([Prompt(i, str(i), "", (i,)) for i in range(count)], seed, shuffle)


def test_the_rank_grid_is_megatrons():
    """tp fastest, pp slowest; one leader per stage."""
    grid = [Layout(tp=2, pp=2, dp=3, rank=r) for r in range(12)]
    assert [(g.pp_rank, g.dp_rank, g.tp_rank) for g in grid[:4]] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 0),
        (0, 1, 1),
    ]
    assert [g.rank for g in grid if g.leads_stage is not None] == [0, 6]
    assert grid[0].last_stage_leader == 6


def test_vocabulary_padding():
    """Qwen3's 151,936 columns at TP 1, 2, 4, 8."""
    padded = [pad_vocab_size(151_936, 128, tp) for tp in (1, 2, 4, 8)]
    assert padded == [151_936, 152_064, 152_064, 152_576]


def test_an_epoch_shows_every_prompt_once_and_epochs_differ():
    prompts = prompt_set(10)
    seen = [p.index for i in range(4) for p in prompts.batch(i, 5)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:] and seen[:10] != list(range(10))
    # A batch may span two epochs.
    assert [p.index for i in range(2) for p in prompts.batch(i, 10)] == seen


def test_the_order_depends_on_seed_and_iteration_alone():
    """What a resumed run relies on: asking for iteration 7 first changes nothing."""
    assert prompt_set(10).batch(7, 4) == [prompt_set(10).batch(i, 4) for i in range(8)][7]
    assert prompt_set(10, seed=2).batch(0, 10) != prompt_set(10, seed=1).batch(0, 10)
    assert [p.index for p in prompt_set(4, shuffle=False).batch(0, 6)] == [0, 1, 2, 3, 0, 1]


def test_every_sample_has_a_seed_of_its_own():
    prompts = [make_rollout(i, 1, 1).prompt for i in range(20)]
    seeds = {sample_seed(s, p, i) for s in range(5) for p in prompts for i in range(8)}
    assert len(seeds) == 5 * 20 * 8


def test_chat_template_wraps_the_prompt_up_to_the_answer(tmp_path):
    model = shutil.copytree(MODELS / "student", tmp_path / "model")
    with pytest.raises(ConfigError, match="no chat template"):
        load_tokenizer(model).encode_chat([Turn("user", "1 2")])
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}<bos> {{ m.content }} ;{% endfor %}"
        "{% if add_generation_prompt %} :{% endif %}"
    )
    tokenizer.save_pretrained(model)
    ours = load_tokenizer(model)
    assert ours.encode_chat([Turn("user", "1 2")]) == ours.encode("<bos> 1 2 ; :")


TEMPLATE = (
    "{% for m in messages %}<bos> {{ m.content }} ;{% endfor %}{{ mood }}"
    "{% if add_generation_prompt %} :{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tmp_path):
    """The student's, with a template that reads one variable, `mood`."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "student")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    return load_tokenizer(tmp_path / "chat", model_path=MODELS / "student")


@pytest.fixture
def toml(tmp_path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('run_dir = "r"\n[student]\nhf_path = "s"\n[teacher]\nhf_path = "t"\n')
    return path


def load_countdown(data: DataConfig, tokenizer: Tokenizer) -> PromptSet:
    return load_prompts(data, tokenizer, seed=1, rows=training_rows(data.prompts))


def test_training_and_evaluation_encode_prompts_alike(chat_tokenizer, toml):
    """Suffix inside the template, template options, and the answer left alone, on both paths."""
    config = load_config(
        toml,
        [
            "data.apply_chat_template=true",
            'data.chat_template_kwargs.mood=" 9"',
            'data.prompt_suffix=" 7"',
            "evaluation.tasks=countdown",
            "evaluation.num_problems=3",
        ],
    )
    (held_out,) = load_problem_sets(config, chat_tokenizer)
    assert len(held_out.prompts) == 3
    for prompt in [*held_out.prompts, *load_countdown(config.data, chat_tokenizer).batch(0, 3)]:
        problem = prompt.text.removesuffix(" 7")
        assert prompt.answer == problem.removesuffix(" :")
        assert prompt.prompt_ids == chat_tokenizer.encode(f"<bos> {problem} 7 ; 9 :")
    tight = config.data.model_copy(update={"max_prompt_length": 11})
    with pytest.raises(ConfigError, match="countdown problem 0: 12 tokens"):
        load_countdown(tight, chat_tokenizer)


def test_a_mistyped_template_option_stops_the_run(chat_tokenizer):
    data = DataConfig(apply_chat_template=True, chat_template_kwargs={"moot": "x"})
    with pytest.raises(ConfigError, match=r"data\.chat_template_kwargs\.moot.* It reads mood\."):
        load_countdown(data, chat_tokenizer)


def test_template_options_come_from_a_table_and_from_the_command_line(toml):
    toml.write_text(
        toml.read_text() + "[data]\napply_chat_template = true\n"
        "prompt_suffix = ' Within \\boxed{}.'\n"
        "[data.chat_template_kwargs]\nenable_thinking = true\nbudget = 5\n"
    )
    data = load_config(toml, ["data.chat_template_kwargs.enable_thinking=false"]).data
    assert data.chat_template_kwargs == {"enable_thinking": False, "budget": 5}
    assert data.prompt_suffix == " Within \\boxed{}."
    data = load_config(toml, [r'data.prompt_suffix="\nWithin \\boxed{}."']).data
    assert data.prompt_suffix == "\nWithin \\boxed{}."
    with pytest.raises(ConfigError, match=r"kwargs=.*would be ignored with data\.apply_chat_templ"):
        load_config(toml, ["data.apply_chat_template=false"])


@pytest.mark.parametrize("command", ["boxed", "frac", "text"])
def test_a_backslash_that_toml_took_for_itself_is_told(toml, command):
    r"""In double quotes \b is a backspace, \f a form feed, \t a tab."""
    with pytest.raises(ConfigError, match=r"data\.prompt_suffix=.*Write each backslash twice"):
        load_config(toml, [rf'data.prompt_suffix="\{command}{{}}"'])


def test_prompt_files_may_hold_any_text(tmp_path):
    """U+2028 ends a line for Python's text files, not for JSON; an answer may be null or absent."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "1\u2028 2", "answer": None}, {"prompt": "3"}, {"prompt": "4", "answer": 5}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n\n".join(lines), encoding="utf-8-sig")
    data = DataConfig(prompts=str(path), shuffle=False)
    prompts = load_countdown(data, load_tokenizer(MODELS / "student")).batch(0, 3)
    assert [(p.text, p.answer) for p in prompts] == [("1\u2028 2", ""), ("3", ""), ("4", "5")]


def test_stop_ids_come_from_the_generation_config_first(tmp_path):
    """Instruct models name several; the tokenizer knows only one."""
    model = Path(shutil.copytree(MODELS / "student", tmp_path / "model"))
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [109, 107]}))
    assert load_tokenizer(model).stop_ids == (109, 107)
    path.unlink()
    assert load_tokenizer(model).stop_ids == (109,)


def test_a_prompt_that_comes_twice_draws_other_samples():
    """As in a batch over the end of an epoch; its first samples are those that it draws alone."""
    prompt = Prompt(3, "", "", (1,))
    sampling = Sampling(2, 1.0, 8, (1,), seed=5)
    jobs = numbered_samples([prompt, prompt_set(1)[0], prompt], sampling)
    assert [(p.index, i) for p, i, _ in jobs] == [(3, 0), (3, 1), (0, 0), (0, 1), (3, 0), (3, 1)]
    assert len({seed for _, _, seed in jobs}) == 6
    assert numbered_samples([prompt], sampling) == jobs[:2]
