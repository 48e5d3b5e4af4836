"""Recorded rollouts: what was written comes back, and what no run can train on is refused."""

import json
import re
from dataclasses import replace

import pytest

from megatron_eopd.data.tokenizer import load_tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Turn
from megatron_eopd.rollout.recording import Recording, write_rollouts
from tests.test_data import make_rollout
from tests.test_preflight import MODELS

TOKENIZER = load_tokenizer(MODELS / "student")


def recording(directory, **changes) -> Recording:
    options = {"num_rollouts": 2, "vocab_size": 112, "max_length": 20} | changes
    return Recording(directory, **options)


@pytest.fixture
def edited(tmp_path):
    """The message about a recording whose second line is changed."""

    def edited(changes: dict, **options) -> str:
        path = tmp_path / "000000.jsonl"
        write_rollouts(path, [make_rollout(0, 3, 4), make_rollout(0, 2, 4)], TOKENIZER)
        lines = path.read_text().splitlines()
        row = json.loads(lines[1])
        row["prompt"] |= changes.pop("prompt", {})
        path.write_text(lines[0] + "\n" + json.dumps(row | changes) + "\n")
        with pytest.raises(ConfigError) as error:
            recording(tmp_path, **options).read(0)
        return str(error.value)

    return edited


def test_recorded_rollouts_come_back_as_they_were(tmp_path):
    rollouts = [make_rollout(0, 3, 4), make_rollout(0, 2, 2)]
    write_rollouts(tmp_path / "000007.jsonl", rollouts, TOKENIZER)
    assert recording(tmp_path).read(7) == rollouts
    first = json.loads((tmp_path / "000007.jsonl").read_text().splitlines()[0])
    assert first["response_text"] == "50 51 52 53"


def test_the_turns_before_a_question_come_back_too(tmp_path):
    rollouts = [make_rollout(0, 3, 4), make_rollout(0, 2, 2)]
    context = (Turn("system", "1"), Turn("user", "2"), Turn("assistant", "3"))
    rollouts[0] = replace(rollouts[0], prompt=replace(rollouts[0].prompt, context=context))
    write_rollouts(tmp_path / "000007.jsonl", rollouts, TOKENIZER)
    assert recording(tmp_path).read(7) == rollouts


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"response_ids": [50, 51, 112, 53]}, "response_ids has the token 112, .* is 0 to 111"),
        ({"response_ids": [50, -1, 52, 53]}, "response_ids has the token -1"),
        ({"response_ids": [50, "51", 52, 53]}, r"response_ids\.1 is '51': .*valid integer"),
        ({"response_ids": [50, True, 52, 53]}, r"response_ids\.1 is True: .*valid integer"),
        ({"response_ids": [50, 51.0, 52, 53]}, r"response_ids\.1 is 51\.0: .*valid integer"),
        ({"response_ids": []}, "response_ids is empty"),
        ({"response_logprobs": [-1.0] * 3}, "3 response_logprobs for 4 response_ids"),
        ({"response_logprobs": [-1.0, float("nan"), -1.0, -1.0]}, "logprobs.1 is nan: .*finite"),
        ({"response_logprobs": [-1.0, float("-inf"), -1.0, -1.0]}, "logprobs.1 is -inf: .*finite"),
        ({"response_logprobs": [-1.0, 0.5, -1.0, -1.0]}, "response_logprobs has 0.5; .* at most 0"),
        ({"response_logprobs": None}, "response_logprobs is None"),
        ({"prompt": {"prompt_ids": []}}, "prompt_ids is empty"),
        ({"prompt": {"prompt_ids": [1] * 17}}, "21 tokens, and at most 20 fit"),
        ({"prompt": {"prompt_ids": [112]}}, "prompt_ids has the token 112"),
        ({"prompt": {"teacher": "other"}}, "teacher is 'other', and this run has teacher"),
        ({"prompt": {"prompt_ids": None}}, r"prompt\.prompt_ids is None"),
        ({"finish_reason": "abort"}, "finish_reason is 'abort': .*'stop' or 'length'"),
        ({"sorce": "reference"}, "sorce is 'reference': Unexpected"),
    ],
)
def test_what_cannot_be_trained_on_names_file_line_and_fault(edited, changes, said):
    message = edited(dict(changes))
    assert "000000.jsonl line 2: " in message
    assert re.search(said, message), message


def test_references_are_refused_where_samples_are_needed(edited):
    option = "objective.reverse_kl=sampled"
    message = edited({"source": "reference"}, refuses_references=option)
    assert "line 2: a reference answer, and objective.reverse_kl=sampled needs tokens" in message


def test_a_line_that_is_no_rollout_is_named(tmp_path):
    path = tmp_path / "000000.jsonl"
    write_rollouts(path, [make_rollout(0, 3, 4)], TOKENIZER)
    whole = path.read_text()
    for line, said in (
        ('{"prompt": {}}', "line 2: .*prompt.index: Field required"),
        ("{", "line 2: not a recorded rollout: Invalid JSON"),
    ):
        path.write_text(whole + line + "\n")
        with pytest.raises(ConfigError, match=said):
            recording(tmp_path).read(0)
    path.write_text(whole)
    with pytest.raises(ConfigError, match=r"holds 1 rollouts. Set rollout.batch_size=1"):
        recording(tmp_path).read(0)


def test_missing_files_are_told_before_the_start(tmp_path):
    rollouts = [make_rollout(0, 3, 4), make_rollout(0, 2, 4)]
    for iteration in (2, 3):
        write_rollouts(tmp_path / f"{iteration:06d}.jsonl", rollouts, TOKENIZER)
    recording(tmp_path).check_files(range(2, 4))
    recording(tmp_path).check_files(range(4, 4))
    with pytest.raises(ConfigError, match=r"000004.jsonl: .* 2 of the 4 .*train_iters=4"):
        recording(tmp_path).check_files(range(2, 6))
    with pytest.raises(ConfigError, match="no recorded rollouts for this iteration"):
        recording(tmp_path).read(9)
    with pytest.raises(ConfigError, match="vocabulary is 0 to 51"):
        recording(tmp_path, vocab_size=52).check_files(range(2, 4))
