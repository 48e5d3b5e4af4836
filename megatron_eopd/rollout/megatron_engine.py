"""The exact reference sampler: the trainer's own student writes the responses.

No key/value cache: every new token costs a whole forward pass through Megatron's schedule. Slow,
and exact: its log-probabilities are the trainer's own. It serves where vLLM is not installed, and
as the yardstick in tests.
"""
# Shapes: B sequences of one round, S padded length, V this rank's columns, W whole vocabulary.

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_eopd.models.build import CausalLM
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.vocab import gather_vocab, vocab_parallel_logprobs
from megatron_eopd.records import MicroBatch, Prompt, Rollout
from megatron_eopd.rollout.engine import Sampling, SyncReport, sample_seed
from megatron_eopd.training.forward import map_hidden


class MegatronEngine:
    def __init__(
        self, model: CausalLM, vocab_size: int, max_num_seqs: int, context: ParallelContext
    ) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._max_num_seqs = max_num_seqs
        self._context = context
        self._version = -1

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        layout = self._context.layout
        jobs = [(p, i) for p in prompts for i in range(sampling.samples_per_prompt)]
        own = jobs[layout.dp_rank :: layout.dp]
        rollouts = []
        for first in range(0, len(own), self._max_num_seqs):
            rollouts += self._round(own[first : first + self._max_num_seqs], sampling)
        parts: list = [None] * layout.dp
        dist.all_gather_object(parts, rollouts, group=self._context.groups.dp)
        # Dealt out like cards, so collected like cards.
        return [parts[n % layout.dp][n // layout.dp] for n in range(len(jobs))]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return score_tokens(self._model, sequences, self._vocab_size, self._context)

    def update_weights(self, version: int) -> SyncReport:
        """Nothing moves: the engine samples from the student itself."""
        self._version = version
        return SyncReport(version, seconds=0.0, num_bytes=0)

    def close(self) -> None: ...

    def _round(self, jobs: list[tuple[Prompt, int]], sampling: Sampling) -> list[Rollout]:
        """All responses of the jobs, token by token; finished ones leave the batch."""
        generators = [
            torch.Generator().manual_seed(sample_seed(sampling.seed, prompt, i))
            for prompt, i in jobs
        ]
        ids: list[list[int]] = [[] for _ in jobs]
        logprobs: list[list[float]] = [[] for _ in jobs]
        active = list(range(len(jobs)))
        for _ in range(sampling.max_response_length):
            if not active:
                break
            batch = _batch([(*jobs[n][0].prompt_ids, *ids[n]) for n in active], self._context)
            uniforms = torch.stack([torch.rand((), generator=generators[n]) for n in active])
            tokens, chosen = self._next_tokens(batch, uniforms, sampling.temperature)
            for n, token, logprob in zip(active, tokens, chosen, strict=True):
                ids[n].append(token)
                logprobs[n].append(logprob)
            active = [n for n in active if ids[n][-1] not in sampling.stop_ids]
        return [
            Rollout(
                prompt=prompt,
                sample_index=i,
                response_ids=tuple(ids[n]),
                response_logprobs=tuple(logprobs[n]),
                finish_reason="stop" if ids[n][-1] in sampling.stop_ids else "length",
                weight_version=self._version,
            )
            for n, (prompt, i) in enumerate(jobs)
        ]

    def _next_tokens(
        self, batch: MicroBatch, uniforms_B: torch.Tensor, temperature: float
    ) -> tuple[list[int], list[float]]:
        """Sample by inverting the cumulative distribution; every rank gets the same tokens."""

        def at_last_stage(batch: MicroBatch, hidden_SBH: torch.Tensor) -> list:
            logits_BV = self._model.lm_head(
                self._model.pick_rows(hidden_SBH, batch.prediction_rows_N)
            )
            logits_BW = gather_vocab(logits_BV, self._context.groups.tp, self._vocab_size)
            logprobs_BW = (logits_BW.float() / temperature).log_softmax(-1).cpu()
            cumulative_BW = logprobs_BW.double().exp().cumsum(-1)
            # Of the sum, not of 1: rounding must not leave a gap behind the last token.
            target_B = uniforms_B.double() * cumulative_BW[:, -1]
            tokens_B1 = torch.searchsorted(cumulative_BW, target_B[:, None], right=True)
            return [tokens_B1[:, 0].tolist(), logprobs_BW.gather(-1, tokens_B1)[:, 0].tolist()]

        result = map_hidden(self._model, [batch], at_last_stage, self._context)
        return _from_last_stage(result[0] if result else None, self._context)


def score_tokens(
    model: CausalLM,
    sequences: Sequence[Sequence[int]],
    vocab_size: int,
    context: ParallelContext,
) -> list[list[float]]:
    """log p at temperature 1 of every token but the first of each sequence, on every rank."""
    batch = _batch(sequences, context, score_all=True)

    def at_last_stage(batch: MicroBatch, hidden_SBH: torch.Tensor) -> list[float]:
        logits_NV = model.lm_head(model.pick_rows(hidden_SBH, batch.prediction_rows_N))
        logprobs_N = vocab_parallel_logprobs(
            logits_NV, batch.target_ids_N, tp_group=context.groups.tp, vocab_size=vocab_size
        )
        return logprobs_N.tolist()

    result = map_hidden(model, [batch], at_last_stage, context)
    flat = iter(_from_last_stage(result[0] if result else None, context))
    return [[next(flat) for _ in sequence[1:]] for sequence in sequences]


def _batch(
    sequences: Sequence[Sequence[int]], context: ParallelContext, score_all: bool = False
) -> MicroBatch:
    """Right-padded sequences; the rows behind the last token, or (score_all) before every token."""
    longest = max(len(sequence) for sequence in sequences)
    seq_length = -(-longest // context.layout.tp) * context.layout.tp
    token_ids_BS = torch.zeros(len(sequences), seq_length, dtype=torch.long)
    rows, targets = [], []
    for b, sequence in enumerate(sequences):
        token_ids_BS[b, : len(sequence)] = torch.tensor(sequence)
        last = len(sequence) - 1
        positions = range(last) if score_all else [last]
        rows += [position * len(sequences) + b for position in positions]
        targets += sequence[1:] if score_all else [0]
    return MicroBatch(
        token_ids_BS=token_ids_BS.to(context.device),
        prediction_rows_N=torch.tensor(rows, device=context.device),
        target_ids_N=torch.tensor(targets, device=context.device),
        rollout_logprobs_N=torch.zeros(len(rows), device=context.device),
        positions_N=torch.zeros(len(rows), device=context.device),
        teacher_hidden_NH=None,
    )


def _from_last_stage(value, context: ParallelContext):
    """What the last stage of this pipeline knows, told to its other stages."""
    told = [value]
    group = context.groups.pp
    last = dist.get_global_rank(group, context.layout.pp - 1)
    dist.broadcast_object_list(told, src=last, group=group, device=context.device)
    return told[0]
