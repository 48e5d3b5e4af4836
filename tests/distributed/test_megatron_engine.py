"""The exact reference sampler: the same responses on every layout, with the trainer's numbers."""

import json

import pytest

from megatron_eopd.records import Prompt
from megatron_eopd.rollout.engine import Sampling
from megatron_eopd.rollout.megatron_engine import MegatronEngine
from tests.distributed.test_models import load
from tests.ranks import leave_groups, run_ranks

STOP_IDS = tuple(range(40))


def check_sampling(hf_dir, layouts, out_dir):
    prompts = [Prompt(i, "", "", tuple(range(50 + i, 53 + 2 * i))) for i in range(5)]
    sampling = Sampling(2, temperature=1.0, max_response_length=6, stop_ids=STOP_IDS, seed=9)
    for tp, pp in layouts:
        model, hf_config, context = load(hf_dir, tp, pp)
        engine = MegatronEngine([model], hf_config.vocab_size, max_num_seqs=3, context=context)
        engine.update_weights(4)
        rollouts = engine.generate(prompts, sampling)
        assert [(r.prompt.index, r.sample_index) for r in rollouts] == [
            (i, j) for i in range(5) for j in range(2)
        ]
        for rollout in rollouts:
            assert rollout.weight_version == 4
            ended = rollout.response_ids[-1] in STOP_IDS
            assert rollout.finish_reason == ("stop" if ended else "length")
            assert not set(rollout.response_ids[:-1]) & set(STOP_IDS)
        scores = engine.score([r.prompt.prompt_ids + r.response_ids for r in rollouts])
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
