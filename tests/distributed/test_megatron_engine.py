"""The exact reference sampler: the same responses on every layout, with the trainer's numbers."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_eopd.errors import RemoteError
from megatron_eopd.records import Prompt, Rollout
from megatron_eopd.rollout.engine import Sampling
from megatron_eopd.rollout.megatron_engine import (
    MegatronEngine,
    logprobs_to_draw_from,
    most_likely,
    score_tokens,
)
from tests.dense_sampling import nucleus
from tests.distributed.test_models import load, load_into
from tests.ranks import context_for, leave_groups, run_ranks

STOP_IDS = tuple(range(40))
PROMPTS = [Prompt(i, "", "", tuple(range(50 + i, 53 + 2 * i))) for i in range(5)]
SAMPLING = Sampling(2, temperature=1.0, max_response_length=6, stop_ids=STOP_IDS, seed=9)
TRUNCATED = dataclasses.replace(SAMPLING, temperature=0.8, top_p=0.6)


def make_engine(model, hf_config, context, **options) -> MegatronEngine:
    engine = MegatronEngine(
        [model], hf_config.vocab_size, max_num_seqs=3, context=context, **options
    )
    engine.update_weights(4)
    return engine


def check_sampling(hf_dir, layouts, out_dir):
    for tp, pp in layouts:
        model, hf_config, context = load(hf_dir, tp, pp)
        engine = make_engine(model, hf_config, context)
        rollouts = engine.generate(PROMPTS, SAMPLING)
        assert [(r.prompt.index, r.sample_index) for r in rollouts] == [
            (i, j) for i in range(5) for j in range(2)
        ]
        for rollout in rollouts:
            assert rollout.weight_version == 4
            ended = rollout.response_ids[-1] in STOP_IDS
            assert rollout.finish_reason == ("stop" if ended else "length")
            assert not set(rollout.response_ids[:-1]) & set(STOP_IDS)
        sequences = [r.prompt.prompt_ids + r.response_ids for r in rollouts]
        scores = score_tokens([model], sequences, hf_config.vocab_size, context)
        for rollout, score in zip(rollouts, scores, strict=True):
            of_response = score[len(rollout.prompt.prompt_ids) - 1 :]
            assert list(rollout.response_logprobs) == pytest.approx(of_response, abs=1e-4)
        (out_dir / f"{tp}-{pp}-{context.layout.rank}.json").write_text(
            json.dumps([r.response_ids for r in rollouts])
        )
        leave_groups()


def test_the_same_seed_samples_the_same_on_every_layout_and_rank(qwen3_dir, tmp_path):
    """TP, PP and DP change who computes, not what is drawn; both finish reasons occur."""
    out = tmp_path / "out"
    out.mkdir()
    run_ranks(2, tmp_path, check_sampling, qwen3_dir, [(2, 1), (1, 2), (1, 1)], out)
    responses = {path.read_text() for path in out.iterdir()}
    assert len(list(out.iterdir())) == 6 and len(responses) == 1
    lengths = {len(ids) for ids in json.loads(responses.pop())}
    assert 6 in lengths and min(lengths) < 6


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999])
def test_top_p_leaves_the_most_likely_tokens_and_their_proportions(top_p):
    """The tokens and probabilities of the float64 loop; among equally likely tokens, too."""
    logits_NW = 3 * torch.randn(20, 100, generator=torch.Generator().manual_seed(1))
    logits_NW[10:] = logits_NW[10:].round()  # ties everywhere
    found_NW = most_likely(logits_NW.log_softmax(-1), top_p)
    for logits_W, found_W in zip(logits_NW, found_NW, strict=True):
        expected_W = torch.full_like(found_W, -torch.inf)
        for token, logprob in nucleus(logits_W, 1.0, top_p).items():
            expected_W[token] = logprob
        torch.testing.assert_close(found_W, expected_W, atol=2e-6, rtol=1e-6)


def test_at_temperature_zero_the_likeliest_token_is_certain():
    logits_NW = torch.randn(50, 30, generator=torch.Generator().manual_seed(4))
    found_NW = logprobs_to_draw_from(logits_NW, Sampling(1, 0.0, 8, (1,), seed=1, top_p=0.5))
    assert torch.equal(found_NW.exp() == 1, logits_NW.argmax(-1)[:, None] == torch.arange(30))


def test_without_top_p_not_a_bit_changes():
    logprobs_NW = torch.randn(4, 100).log_softmax(-1)
    assert most_likely(logprobs_NW, 1.0) is logprobs_NW


def check_truncated(hf_dir, layouts, out_dir):
    for tp, pp in layouts:
        model, hf_config, context = load(hf_dir, tp, pp)
        rollouts = make_engine(model, hf_config, context).generate(PROMPTS, TRUNCATED)
        (out_dir / f"{tp}-{pp}-{context.layout.rank}.json").write_text(
            json.dumps([(r.response_ids, r.response_logprobs) for r in rollouts])
        )
        leave_groups()


def test_top_p_draws_the_same_on_every_layout_and_from_the_models_distribution(qwen3_dir, tmp_path):
    """Token by token, with log-probabilities: transformers' logits, and the rest in float64."""
    out = tmp_path / "out"
    out.mkdir()
    run_ranks(2, tmp_path, check_truncated, qwen3_dir, [(2, 1), (1, 2), (1, 1)], out)
    first, *others = (json.loads(path.read_text()) for path in out.iterdir())
    model = AutoModelForCausalLM.from_pretrained(qwen3_dir, dtype=torch.float32)
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    for n, (prompt, (ids, _)) in enumerate(zip(prompts, first, strict=True)):
        with torch.no_grad():
            logits_TW = model(torch.tensor([[*prompt.prompt_ids, *ids]])).logits[0, -len(ids) - 1 :]
        kept = [nucleus(row, temperature=0.8, top_p=0.6) for row in logits_TW[:-1]]
        expected = [tokens[token] for tokens, token in zip(kept, ids, strict=True)]
        for other in (first, *others):
            assert other[n][0] == ids
            assert other[n][1] == pytest.approx(expected, abs=1e-4)


def check_telling(dense_dir, moe_dir):
    """Only rank 0 has somebody who listens."""
    for hf_dir, sizes in [
        (dense_dir, {"tp": 1, "pp": 1}),
        (dense_dir, {"tp": 2, "pp": 1}),
        (dense_dir, {"tp": 1, "pp": 2}),
        (moe_dir, {"tp": 1, "pp": 1, "ep": 2}),
    ]:
        context = context_for(**sizes)
        told: list[tuple[int, Rollout]] = []
        heard_at_pause = []
        engine = make_engine(
            *load_into(context, hf_dir),
            context,
            pause=lambda told=told, heard=heard_at_pause: heard.append(len(told)),
        )
        finished = (lambda *it, told=told: told.append(it)) if context.layout.rank == 0 else None
        rollouts = engine.generate(PROMPTS, SAMPLING, finished)
        assert rollouts == engine.generate(PROMPTS, SAMPLING)
        if finished is not None:
            assert sorted(n for n, _ in told) == list(range(10)), sizes
            assert dict(told) == dict(enumerate(rollouts)), sizes
            # 3 at a time, or 2 replicas × 3.
            both_sample = sizes == {"tp": 1, "pp": 1}
            batches = [0, 6] if both_sample else [0, 3, 6, 9]
            assert heard_at_pause[: len(batches)] == batches, (sizes, heard_at_pause)
        leave_groups()


def test_rank_0_hears_of_every_response_behind_its_batch(qwen3_dir, family_dirs, tmp_path):
    """Once, by its number in the list: with DP, TP, PP, and experts shared by two replicas."""
    run_ranks(2, tmp_path, check_telling, qwen3_dir, family_dirs["qwen3_moe"])


def check_refusing(hf_dir):
    model, hf_config, context = load(hf_dir, 2, 1)
    batches = []
    engine = make_engine(model, hf_config, context, pause=lambda: batches.append(None))
    told = []

    def refuse_the_fifth(number: int, rollout: Rollout) -> None:
        if number == 4:
            raise OSError("no place for a response")
        told.append(number)

    expected = OSError if context.layout.rank == 0 else RemoteError
    with pytest.raises(expected, match="no place for a response"):
        engine.generate(PROMPTS, SAMPLING, refuse_the_fifth)
    assert len(batches) == 2 and told == ([0, 1, 2, 3] if context.layout.rank == 0 else [])
    leave_groups()


def test_who_cannot_hear_of_a_response_ends_the_call_on_every_rank(qwen3_dir, tmp_path: Path):
    run_ranks(2, tmp_path, check_refusing, qwen3_dir)
