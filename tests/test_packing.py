"""Rollouts into packed microbatches: no token is lost, doubled, or predicted by the wrong row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eopd.data.packing import (
    Limits,
    load_imbalance,
    make_microbatches,
    num_tokens,
    pack,
    padding_fraction,
    rounds_of,
)
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.records import HiddenStates, Prompt, Rollout, ScoredRollout, TeacherSignal

CPU = torch.device("cpu")


def make_rollout(index: int, prompt_length: int, response_length: int) -> Rollout:
    """Every token id says which rollout it is of and where it stands."""
    first = 1000 * (index + 1)
    ids = tuple(range(first, first + prompt_length + response_length))
    prompt = Prompt(index, f"p{index}", "a", ids[:prompt_length])
    response = ids[prompt_length:]
    return Rollout(prompt, 0, response, tuple(-0.1 * i for i in response), "stop", 3)


def layout_of(tp=1, pp=1, dp=1, cp=1, vpp=1, rank=0) -> Layout:
    return Layout(tp=tp, pp=pp, dp=dp, rank=rank, cp=cp, vpp=vpp)


@pytest.mark.parametrize("tp,cp", [(1, 1), (4, 1), (1, 2), (2, 4)])
def test_every_target_stands_right_behind_the_row_that_predicts_it(tp, cp):
    """Off by one here and the loss trains on the wrong token."""
    rollouts = [make_rollout(1, 3, 4), make_rollout(2, 1, 6), make_rollout(3, 5, 1)]
    seen = []
    for cp_rank in range(cp):
        layout = layout_of(tp=tp, cp=cp, rank=cp_rank * tp)
        unscored = [ScoredRollout(r) for r in rollouts]
        (batch,) = make_microbatches([unscored], layout, CPU)
        assert batch.token_ids_1S.shape[1] % tp == 0
        predicting = batch.token_ids_1S[0, batch.prediction_rows_N]
        assert torch.equal(predicting + 1, batch.target_ids_N), "ids count up by one"
        torch.testing.assert_close(batch.rollout_logprobs_N, -0.1 * batch.target_ids_N.float())
        seen += batch.target_ids_N.tolist()
    assert sorted(seen) == sorted(i for r in rollouts for i in r.response_ids), "each once"


@pytest.mark.parametrize("cp", [1, 2])
def test_padding_never_stands_before_a_token_of_its_sequence(cp):
    """Causal attention then keeps it out of everything that is read."""
    rollouts = [make_rollout(1, 3, 4), make_rollout(2, 1, 7)]
    layout = layout_of(tp=4, cp=cp)
    (batch,) = make_microbatches([[ScoredRollout(r) for r in rollouts]], layout, CPU)
    ends = batch.sequences.cu_seqlens_q.tolist()
    assert ends[-1] == batch.token_ids_1S.shape[1] * cp
    assert [end % (2 * cp if cp > 1 else 1) for end in ends] == [0] * len(ends)


def test_signals_lie_at_the_places_of_their_tokens_whoever_gave_them():
    """Two teachers in one microbatch: each token finds the one that its prompt names."""
    rollouts = [make_rollout(i, 2, 3 + i) for i in range(4)]
    scored = []
    for n, rollout in enumerate(rollouts):
        hidden = torch.tensor(rollout.response_ids).unsqueeze(-1)
        signal = TeacherSignal(("math", "code")[n % 2], HiddenStates(hidden))
        scored.append(ScoredRollout(rollout, (signal,)))
    (batch,) = make_microbatches([scored], layout_of(), CPU)
    assert {part.teacher for part in batch.teacher} == {"math", "code"}
    for part in batch.teacher:
        tokens = [token for run in part.runs for token in run]
        assert torch.equal(part.payload.hidden_NH[:, 0], batch.target_ids_N[tokens])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    dp=st.integers(1, 4),
    pp=st.integers(1, 3),
    vpp=st.integers(1, 2),
    budget=st.one_of(st.none(), st.integers(64, 200)),
)
def test_a_plan_has_every_rollout_once_and_respects_its_limits(lengths, dp, pp, vpp, budget):
    """All data-parallel ranks get as many microbatches, in whole groups where chunks interleave."""
    vpp = vpp if pp > 1 else 1
    rollouts = [make_rollout(i, 1, n) for i, n in enumerate(lengths)]
    limits = Limits(None if budget else 3, budget)
    packed = pack(rollouts, limits, layout_of(pp=pp, vpp=vpp, dp=dp))
    planned = [r.prompt.index for rank in packed for batch in rank for r in batch]
    assert sorted(planned) == list(range(len(rollouts)))
    (count,) = {len(rank) for rank in packed}
    assert count % (pp if vpp > 1 else 1) == 0
    for rank in packed:
        for batch in rank:
            assert len(batch) <= (limits.max_sequences or len(batch))
            assert sum(map(num_tokens, batch)) <= (budget or 10**9)


def test_ranks_are_balanced_by_tokens_not_by_samples():
    """One response of 400 tokens and 40 of 10: a cut by number gives one rank twice the other's."""
    rollouts = [make_rollout(0, 1, 399)] + [make_rollout(i, 1, 9) for i in range(1, 41)]
    packed = pack(rollouts, Limits(None, 512), layout_of(dp=2))
    assert load_imbalance(packed) == 1.0
    assert padding_fraction(packed, layout_of(dp=2)) == 0.0
    assert padding_fraction(packed, layout_of(dp=2, cp=4)) > 0


def test_rounds_are_portions_of_every_ranks_microbatches():
    packed = pack([make_rollout(i, 1, i + 1) for i in range(10)], Limits(1, None), layout_of(dp=2))
    rounds = rounds_of(packed, 2)
    assert [len(portion[0]) for portion in rounds] == [2, 2, 1]
    assert [[b for p in rounds for b in p[rank]] for rank in range(2)] == packed
    assert rounds_of(packed, None) == [packed]


def test_interleaved_chunks_get_rows_of_one_length():
    rollouts = [make_rollout(i, 1, 3 + 5 * i) for i in range(4)]
    layout = layout_of(tp=2, pp=2, vpp=2)
    batches = make_microbatches([[ScoredRollout(r)] for r in rollouts], layout, CPU)
    assert len({batch.token_ids_1S.shape for batch in batches}) == 1


def test_a_rank_without_rollouts_works_on_padding():
    """It must take part in the collectives of a step that has fewer rollouts than ranks."""
    (batch,) = make_microbatches([[]], layout_of(tp=4, cp=2), CPU)
    assert batch.token_ids_1S.shape[1] % 4 == 0 and batch.num_valid_tokens == 0
