"""Reference answers: which prompts get them, what they look like, and what is refused."""

import json

import pytest

from megatron_eopd.config import DataConfig, RolloutConfig, load_config
from megatron_eopd.data.prompts import load_prompts
from megatron_eopd.data.tokenizer import load_tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.rollout.references import (
    places_of_references,
    reference_fraction_at,
    reference_rollouts,
)
from megatron_eopd.schedules import Progress
from tests.test_preflight import MODELS, QUICKSTART

STUDENT = MODELS / "student"
REFERENCES = [
    "rollout.reference_fraction=0.5",
    "data.prompts=p.jsonl",
    "data.response_key=r",
]
PROMPT = "1 2 3 4 -> 10 :"


@pytest.fixture
def load(tmp_path):
    """Writes a prompt file of these answers, and loads it."""
    path = tmp_path / "prompts.jsonl"

    def load(*responses, max_length: int = 24, **more):
        rows = [
            {"prompt": PROMPT, "gold": r} if r is not None else {"prompt": PROMPT}
            for r in responses
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(prompts=str(path), response_key="gold", **more)
        tokenizer = load_tokenizer(STUDENT)
        return load_prompts(data, tokenizer, seed=1, max_reference_length=max_length)

    return load


def test_a_reference_is_the_text_and_the_end_of_sequence(load):
    """Several answers of a prompt take turns; nothing is put in front of them."""
    prompts = load("4 * 3 = 12 ;", ["1 + 2 = 3 ;", "2 + 1 = 3 ;"])
    tokenizer = load_tokenizer(STUDENT)
    rollouts = reference_rollouts([prompts[0], prompts[1]], prompts, 3, version=7)
    assert [(r.prompt.index, r.sample_index) for r in rollouts] == [
        (p, i) for p in (0, 1) for i in range(3)
    ]
    texts = [tokenizer.decode(r.response_ids) for r in rollouts]
    assert texts == ["4 * 3 = 12 ;"] * 3 + ["1 + 2 = 3 ;", "2 + 1 = 3 ;", "1 + 2 = 3 ;"]
    for rollout in rollouts:
        assert rollout.response_ids[-1] == tokenizer.eos_id
        assert rollout.response_ids[:-1] == tokenizer.encode_response(
            tokenizer.decode(rollout.response_ids)
        )
        assert rollout.source == "reference" and rollout.finish_reason == "stop"
        assert rollout.weight_version == 7 and set(rollout.response_logprobs) == {0.0}


def test_lines_without_a_reference_are_all_named(load):
    with pytest.raises(
        ConfigError, match=r"7 of 10 prompts .*prompts.jsonl lines 2-4, 6, 8-10\. Write"
    ):
        load("1", None, "", "  ", "1", ["1", None], "1", [], "\u200b", ["1", "\ud800"])


def test_references_over_the_limit_are_all_named(load):
    """The end of sequence counts: five tokens and their end do not fit five."""
    five = "1 + 2 = 3"
    assert len(load(five, five, max_length=6)) == 2
    with pytest.raises(
        ConfigError,
        match=r"2 prompts have reference answers longer .* tokens, the longest 8: .* lines 1, 3\.",
    ):
        load(five, "1", "1 + 2 = 3 ; 4", max_length=5)


def test_references_belong_to_the_digest_of_the_prompts(load, tmp_path):
    """A run cannot be continued on other answers, and can be without any."""
    one, other = load("1 + 2 = 3 ;"), load("2 + 1 = 3 ;")
    assert one.digest == other.digest
    assert one.references_digest != other.references_digest
    assert one.references_digest == load("1 + 2 = 3 ;").references_digest


def test_an_end_that_a_reference_spells_out_is_taken_off_and_told(load):
    """Otherwise it would stand there twice, and teach an end behind the end."""
    plain = load("1 + 2 = 3 ;")
    for text in ("1 + 2 = 3 ;<eos>", "1 + 2 = 3 ; <eos>\n"):
        prompts = load(text, "4")
        assert prompts.reference(prompts[0], 0) == plain.reference(plain[0], 0)
        (told,) = prompts.warnings
        assert "1 reference answers spell out" in told and "the run puts <eos> there" in told
    assert load("4").warnings == []


@pytest.mark.parametrize("text", ["1 <eos> 2", "<eos> 1", "1 <eos><eos>", "<eos>"])
def test_a_reference_with_an_end_inside_is_refused(load, text):
    with pytest.raises(ConfigError, match=r"line 2: a reference answer.*has <eos> in its text"):
        load("1", ["1", text])


def test_other_special_tokens_of_references_are_told(load):
    (told,) = load("1 <pad> 2 <eos>", "3 <bos>", "4").warnings[1:]
    assert "2 reference answers hold special tokens" in told and "line 1, which has <pad>" in told


def test_the_share_is_exact_on_average_and_the_same_after_a_resume():
    numbers = [len(places_of_references(4, 0.1, seed=3, iteration=i)) for i in range(4000)]
    assert set(numbers) == {0, 1} and abs(sum(numbers) / 16000 - 0.1) < 0.01
    assert places_of_references(16, 0.5, 3, 9) == places_of_references(16, 0.5, 3, 9)
    assert places_of_references(16, 0.5, 3, 9) != places_of_references(16, 0.5, 3, 10)
    assert places_of_references(5, 1.0, 3, 0) == set(range(5))
    assert places_of_references(5, 0.0, 3, 0) == set()


def test_the_share_follows_its_schedule():
    def at(iteration, **options):
        return reference_fraction_at(
            RolloutConfig(**options), Progress(iteration, 0, train_iters=20)
        )

    falling = {"reference_fraction": 1.0, "final_reference_fraction": 0.0}
    assert [at(i, **falling, reference_schedule_iters=10) for i in (0, 5, 10, 15)] == [1, 0.5, 0, 0]
    assert at(10, **falling) == 0.5 and at(5, **falling, reference_schedule="cosine") > 0.75
    assert at(19, reference_fraction=0.3) == 0.3


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["rollout.reference_fraction=1.5"], "less than or equal to 1"),
        (["rollout.reference_fraction=-0.1"], "greater than or equal to 0"),
        (["rollout.final_reference_fraction=2"], "less than or equal to 1"),
        (["rollout.reference_fraction=nan"], "finite number"),
        (["rollout.reference_fraction=0.5"], "data.prompts=countdown has none"),
        (
            ["rollout.reference_fraction=0.5", "data.prompts=p.jsonl"],
            "data.response_key does not say which key",
        ),
        (
            ["rollout.reference_schedule_iters=5"],
            "ignored without rollout.final_ref",
        ),
        (
            [*REFERENCES, "objective.reverse_kl=sampled"],
            "needs tokens that the student sampled",
        ),
    ],
)
def test_options_that_make_no_sense(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, overrides)
