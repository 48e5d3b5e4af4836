"""Rollouts into microbatches. In: one optimizer step's rollouts. Out: MicroBatch, right-padded.

Every rank holds the same rollouts, so each cuts its own part without talking to the others, and
all agree on the padded length that the pipeline stages exchange.
"""
# Shapes: B sequences, S padded length, N valid response tokens, T tokens of one response.

from collections.abc import Sequence

import torch

from megatron_eopd.parallel.layout import Layout
from megatron_eopd.records import MicroBatch, Rollout, ScoredRollout


def rank_part(rollouts: Sequence[Rollout], layout: Layout) -> list[Rollout]:
    """This data-parallel rank's consecutive part; parts differ by at most one rollout."""
    bounds = [len(rollouts) * r // layout.dp for r in (layout.dp_rank, layout.dp_rank + 1)]
    return list(rollouts[bounds[0] : bounds[1]])


def padded_length(rollouts: Sequence[Rollout], layout: Layout) -> int:
    """Longest sequence, rounded up so that sequence parallelism can cut it evenly."""
    longest = max(len(r.prompt.prompt_ids) + len(r.response_ids) for r in rollouts)
    return -(-longest // layout.tp) * layout.tp


def make_microbatches(
    scored: Sequence[ScoredRollout], micro_batch_size: int, seq_length: int, device: torch.device
) -> list[MicroBatch]:
    groups = [scored[i : i + micro_batch_size] for i in range(0, len(scored), micro_batch_size)]
    return [_make_microbatch(group, seq_length, device) for group in groups]


def _make_microbatch(
    scored: Sequence[ScoredRollout], seq_length: int, device: torch.device
) -> MicroBatch:
    rollouts = [s.rollout for s in scored]
    num_sequences = len(rollouts)
    # Token 0 as padding: causal attention keeps it out of every real token, and no row of it is
    # ever picked.
    token_ids_BS = torch.zeros(num_sequences, seq_length, dtype=torch.long)
    rows = []
    for b, rollout in enumerate(rollouts):
        tokens = torch.tensor(rollout.prompt.prompt_ids + rollout.response_ids)
        token_ids_BS[b, : len(tokens)] = tokens
        position_T = torch.arange(len(rollout.response_ids))
        # Response token j sits at P + j and is predicted by the row before it, P + j − 1.
        rows.append((len(rollout.prompt.prompt_ids) + position_T - 1) * num_sequences + b)
    hidden = [s.teacher_hidden_TH for s in scored]
    return MicroBatch(
        token_ids_BS=token_ids_BS.to(device),
        prediction_rows_N=torch.cat(rows).to(device),
        target_ids_N=_flat([r.response_ids for r in rollouts], torch.long, device),
        rollout_logprobs_N=_flat([r.response_logprobs for r in rollouts], torch.float32, device),
        positions_N=torch.cat(
            [torch.linspace(0, 1, len(r.response_ids), device=device) for r in rollouts]
        ),
        teacher_hidden_NH=torch.cat(hidden) if hidden[0] is not None else None,
    )


def _flat(values: Sequence[Sequence], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor([x for row in values for x in row], dtype=dtype, device=device)
