"""The tool that trains the quick start's teacher and student, and the models that it made."""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_eopd.tasks import countdown

REPOSITORY = Path(__file__).parents[1]
MODELS = REPOSITORY / "examples" / "quickstart" / "models"


@pytest.fixture(scope="module")
def tool() -> Iterator[ModuleType]:
    """tools/make_toy_models.py as a module: tools/ is no package."""
    spec = importlib.util.spec_from_file_location(
        "make_toy_models", REPOSITORY / "tools" / "make_toy_models.py"
    )
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up by name while the class is made.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def recipe(tool):
    return replace(tool.RECIPES["student"], steps=20, warmup_steps=2, batch_size=16)


def test_training_lowers_the_loss_and_repeats_exactly(tool, recipe):
    """Twenty steps leave the loss far below ln 112, and the same seed gives the same weights."""
    model = tool.train_model("student", recipe, seed=0)
    again = tool.train_model("student", recipe, seed=0)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    sampler = tool.TraceSampler(countdown.split("train"), torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert tool.response_loss(model, sampler.draw(64)) < 3.5  # ln 112 = 4.72


def test_loss_counts_response_tokens_only(tool, recipe):
    """The loss equals a plain mean of -log p over positions 7 to 24, in float64."""
    torch.manual_seed(0)
    model = tool.build_model(recipe)
    sampler = tool.TraceSampler(countdown.split("train"), torch.Generator().manual_seed(0))
    token_ids_BS = sampler.draw(8)
    with torch.no_grad():
        logprobs_BSV = model(token_ids_BS).logits.double().log_softmax(-1)
        expected = -torch.stack(
            [logprobs_BSV[:, t - 1].gather(1, token_ids_BS[:, t, None]) for t in range(7, 25)]
        ).mean()
        # float32 against float64 logits: rounding of 18 x 8 terms near 4.7.
        torch.testing.assert_close(
            tool.response_loss(model, token_ids_BS).double(), expected, rtol=1e-6, atol=0
        )


def test_sampler_draws_problems_evenly_and_only_their_own_traces(tool):
    """A problem with one trace comes as often as one with many, and each trace solves it."""
    tokenizer = countdown.build_tokenizer()
    by_count = sorted(countdown.split("train"), key=countdown.num_valid_traces)
    problems = [by_count[0], by_count[-1]]
    sampler = tool.TraceSampler(problems, torch.Generator().manual_seed(0))
    seen = dict.fromkeys(problems, 0)
    for ids in sampler.draw(2_000).tolist():
        text = tokenizer.decode(ids[: countdown.PROMPT_LENGTH])
        problem = countdown.Problem.from_answer(text.removesuffix(" :"))
        assert ids[-1] == tokenizer.eos_token_id
        assert countdown.verify(problem, tokenizer.decode(ids[countdown.PROMPT_LENGTH : -1]))
        seen[problem] += 1
    assert min(seen.values()) > 900  # 1,000 expected, standard deviation 22


def test_a_shown_solution_is_right_and_half_of_the_answers_follow_it(tool):
    """In front stands a solution of the same problem, as the template writes it; behind it comes
    the same one as often as FOLLOWED and chance say, else another right one."""
    tokenizer = countdown.build_tokenizer()
    by_count = sorted(countdown.split("train"), key=countdown.num_valid_traces)
    problem = by_count[-1]
    sampler = tool.TraceSampler([problem], torch.Generator().manual_seed(0))
    followed = 0
    for ids in sampler.draw_shown(1_000).tolist():
        answer = tokenizer.decode(ids[-countdown.RESPONSE_LENGTH : -1])
        read = tokenizer.decode(ids[: -countdown.RESPONSE_LENGTH])
        shown = read.removesuffix(f" ; {problem.prompt_text()}")
        assert read == tool.SHOWN_TEMPLATE.format(solution=shown, prompt=problem.prompt_text())
        assert countdown.verify(problem, shown) and countdown.verify(problem, answer)
        assert ids[-1] == tokenizer.eos_token_id
        followed += answer == shown
    # Standard deviation 16; a draw among all the others follows by chance, too.
    expected = 1_000 * (tool.FOLLOWED + (1 - tool.FOLLOWED) / countdown.num_valid_traces(problem))
    assert abs(followed - expected) < 70, (followed, expected)


def test_a_privileged_model_goes_on_from_the_shipped_one_on_both_prompts(tool, monkeypatch):
    """It has that model's weights at step 0, and prompts of both kinds by turns."""
    seen = []
    loss = tool.response_loss
    monkeypatch.setattr(
        tool, "response_loss", lambda model, ids: (seen.append(ids.shape[1]), loss(model, ids))[1]
    )
    own = tool.RECIPES["privileged_student"]
    untouched = tool.train_model("student", replace(own, steps=0), seed=0)
    for name, weight in AutoModelForCausalLM.from_pretrained(MODELS / "student").named_parameters():
        assert torch.equal(weight, untouched.get_parameter(name)), name
    tool.train_model("student", replace(own, steps=4, batch_size=4), seed=0)
    assert seen == [25, 43, 25, 43]


def test_saved_directory_loads_with_the_auto_classes(tool, recipe, tmp_path, monkeypatch):
    """What save_model writes is an ordinary Qwen3 directory with the same weights."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tool.train_model("student", replace(recipe, steps=2), seed=0)
    tool.save_model(model, tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]  # no temporary leftovers
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert loaded.config.model_type == "qwen3"
    assert loaded.dtype == torch.float32
    assert loaded.generation_config.top_k == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer.get_vocab() == countdown.build_tokenizer().get_vocab()


def test_evaluation_of_an_untrained_model_finds_nothing(tool, recipe):
    """The sampler and the verifier fit together: random weights solve no problem."""
    report = tool.evaluate(
        tool.build_model(recipe), countdown.split("test")[:3], num_samples=4, seed=0
    )
    assert report["pass@4"] == report["coverage"] == 0.0


def test_existing_models_are_not_overwritten(tool, tmp_path):
    """Minutes of training are not lost to a second run, and the message names the way out."""
    (tmp_path / "student").mkdir()
    with pytest.raises(SystemExit, match=r"student already exists.*--force.*--output"):
        tool.main(["--output", str(tmp_path), "--which", "student"])
    tool.check_output(tmp_path, ["student"], force=True)
    tool.check_output(tmp_path, ["teacher"], force=False)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_shipped_models_are_what_the_recipe_says(tool, name):
    """The weights beside the quick start have the shape that the tool would give them now."""
    shipped = AutoModelForCausalLM.from_pretrained(MODELS / name)
    built = tool.build_model(tool.RECIPES[name])
    assert {key: value.shape for key, value in shipped.state_dict().items()} == {
        key: value.shape for key, value in built.state_dict().items()
    }
    assert shipped.config.head_dim == 32
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    assert tokenizer.get_vocab() == countdown.build_tokenizer().get_vocab()


def test_shipped_teacher_is_better_than_the_shipped_student(tool):
    """Distillation has something to teach: the teacher solves far more held-out problems."""
    problems = countdown.split("test")[:40]
    pass_at_8 = {
        name: tool.evaluate(
            AutoModelForCausalLM.from_pretrained(MODELS / name), problems, num_samples=8, seed=0
        )["pass@8"]
        for name in ("teacher", "student")
    }
    # 0.87 and 0.5 over all problems; 40 problems give a standard error of about 0.08.
    assert pass_at_8["teacher"] > pass_at_8["student"] + 0.15, pass_at_8
