"""Prompts, packing and recordings: who comes when, which row predicts which token."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_eopd.config import ConfigError
from megatron_eopd.data.packing import make_microbatches, padded_length, rank_part
from megatron_eopd.data.prompts import PromptSet
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.parallel.layout import Layout, pad_vocab_size
from megatron_eopd.records import Prompt, Rollout, ScoredRollout
from megatron_eopd.rollout.engine import sample_seed
from megatron_eopd.rollout.recording import read_rollouts, write_rollouts
from tests.test_preflight import MODELS


def make_rollout(index: int, prompt_length: int, response_length: int) -> Rollout:
    first = 100 * index
    prompt = Prompt(index, f"p{index}", "a", tuple(range(first, first + prompt_length)))
    response = tuple(range(first + 50, first + 50 + response_length))
    return Rollout(prompt, 0, response, tuple(-0.1 * i for i in response), "stop", 3)


def prompt_set(count: int, seed: int = 1, shuffle: bool = True) -> PromptSet:
    return PromptSet([Prompt(i, str(i), "", (i,)) for i in range(count)], seed, shuffle)


def test_every_target_stands_right_behind_the_row_that_predicts_it():
    """Off by one here and the loss trains on the wrong token: rows are [S, B] flattened, so the
    token after row r of the same sequence is at r + B."""
    rollouts = [make_rollout(1, 3, 4), make_rollout(2, 1, 6), make_rollout(3, 5, 1)]
    hidden = [torch.full((len(r.response_ids), 2), float(r.prompt.index)) for r in rollouts]
    scored = [ScoredRollout(r, h) for r, h in zip(rollouts, hidden, strict=True)]
    (batch,) = make_microbatches(scored, 3, 8, torch.device("cpu"))
    tokens_SB = batch.token_ids_BS.t().flatten()
    assert torch.equal(tokens_SB[batch.prediction_rows_N + 3], batch.target_ids_N)
    assert batch.num_valid_tokens == 11
    # Teacher states and engine log-probabilities lie at the same places as the targets.
    assert torch.equal(batch.teacher_hidden_NH[:, 0].long(), batch.target_ids_N // 100)
    torch.testing.assert_close(batch.rollout_logprobs_N, -0.1 * batch.target_ids_N.float())


def test_microbatches_hold_every_rollout_once_and_pad_alike():
    scored = [ScoredRollout(make_rollout(i, 2, 1 + i), None) for i in range(5)]
    batches = make_microbatches(scored, 2, 9, torch.device("cpu"))
    assert [tuple(b.token_ids_BS.shape) for b in batches] == [(2, 9), (2, 9), (1, 9)]
    assert sum(b.num_valid_tokens for b in batches) == sum(1 + i for i in range(5))
    assert batches[0].teacher_hidden_NH is None


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_ranks_share_the_rollouts_without_gap_or_overlap(dp):
    rollouts = [make_rollout(i, 1, 1) for i in range(7)]
    parts = [rank_part(rollouts, Layout(tp=1, pp=1, dp=dp, rank=r)) for r in range(dp)]
    assert [r for part in parts for r in part] == rollouts
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_padded_length_can_be_cut_by_sequence_parallelism():
    rollouts = [make_rollout(0, 3, 4)]
    assert padded_length(rollouts, Layout(tp=1, pp=1, dp=1, rank=0)) == 7
    assert padded_length(rollouts, Layout(tp=4, pp=1, dp=1, rank=0)) == 8


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
        Tokenizer(model).encode_chat("1 2")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}<bos> {{ m.content }} ;{% endfor %}"
        "{% if add_generation_prompt %} :{% endif %}"
    )
    tokenizer.save_pretrained(model)
    ours = Tokenizer(model)
    assert ours.encode_chat("1 2") == ours.encode("<bos> 1 2 ; :")


def test_stop_ids_come_from_the_generation_config_first(tmp_path):
    """Instruct models name several; the tokenizer knows only one."""
    model = Path(shutil.copytree(MODELS / "student", tmp_path / "model"))
    path = model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [109, 107]}))
    assert Tokenizer(model).stop_ids == (109, 107)
    path.unlink()
    assert Tokenizer(model).stop_ids == (109,)


def test_recorded_rollouts_come_back_as_they_were(tmp_path):
    tokenizer = Tokenizer(MODELS / "student")
    rollouts = [make_rollout(0, 3, 4), make_rollout(0, 2, 2)]
    write_rollouts(tmp_path / "000007.jsonl", rollouts, tokenizer)
    assert read_rollouts(tmp_path / "000007.jsonl") == rollouts
    first = json.loads((tmp_path / "000007.jsonl").read_text().splitlines()[0])
    assert first["response_text"] == "50 51 52 53"


def test_a_damaged_recording_names_the_line(tmp_path):
    path = tmp_path / "000000.jsonl"
    write_rollouts(path, [make_rollout(0, 3, 4)], Tokenizer(MODELS / "student"))
    path.write_text(path.read_text() + '{"prompt": {}}\n')
    with pytest.raises(ConfigError, match=r"000000\.jsonl line 2: not a recorded rollout"):
        read_rollouts(path)
    with pytest.raises(ConfigError, match="no recorded rollouts for this iteration"):
        read_rollouts(tmp_path / "000001.jsonl")
