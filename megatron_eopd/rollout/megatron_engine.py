"""The exact reference sampler: the trainer's own student writes the responses.

No key/value cache: every new token costs a whole forward pass through Megatron's schedule. Slow,
and exact: its log-probabilities are the trainer's own. It serves where vLLM is not installed, and
as the yardstick in tests.
"""
# Shapes: N tokens asked for on this rank, V this rank's columns, W whole vocabulary.

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from megatron_eopd.data.packing import make_microbatches, own_response_tokens
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.parallel.collectives import from_rank_zero, gather_everywhere
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.pipeline import map_hidden
from megatron_eopd.parallel.vocab import gather_vocab, vocab_parallel_logprobs
from megatron_eopd.records import MicroBatch, Prompt, Rollout, ScoredRollout
from megatron_eopd.rollout.engine import (
    SAMPLER,
    Finished,
    Sampling,
    SyncReport,
    numbered_samples,
)

Place = tuple[int, int]
"""(which sequence, which response token of it)."""


class MegatronEngine:
    """A RolloutEngine; see megatron_eopd.rollout.engine for what its methods promise."""

    name = SAMPLER
    compares_weights = False

    def __init__(
        self,
        chunks: Sequence[CausalLM],
        vocab_size: int,
        max_num_seqs: int,
        context: ParallelContext,
        pause: Callable[[], None] | None = None,
    ) -> None:
        """`pause`: called by all ranks between two batches of sequences; may raise."""
        self._pause = pause or (lambda: None)
        self._chunks = chunks
        self._vocab_size = vocab_size
        self._max_num_seqs = max_num_seqs
        self._context = context
        self._version = -1

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, finished: Finished | None = None
    ) -> list[Rollout]:
        """`finished` hears of `max_num_seqs` responses of each replica when all of them ended."""
        layout = self._context.layout
        jobs = numbered_samples(prompts, sampling)
        # Replicas that share experts run every layer together, so all of them sample everything.
        replicas = 1 if layout.experts_span_replicas else layout.dp
        # Dealt out like cards, so collected like cards.
        hands = [range(replica, len(jobs), replicas) for replica in range(replicas)]
        rollouts: dict[int, Rollout] = {}
        # As many batches on every rank as the first replica has, be the last one empty.
        for first in range(0, len(hands[0]), self._max_num_seqs):
            self._pause()
            dealt = [hand[first : first + self._max_num_seqs] for hand in hands]
            own = [jobs[number] for number in dealt[layout.dp_rank % replicas]]
            parts = gather_everywhere(self._round(own, sampling), self._context.groups.dp)
            batch = {
                number: rollout
                for numbers, part in zip(dealt, parts, strict=False)  # shared experts: equal parts
                for number, rollout in zip(numbers, part, strict=True)
            }
            self._tell(batch, finished)
            rollouts |= batch
        return [rollouts[number] for number in range(len(jobs))]

    def update_weights(self, version: int, probes: Sequence[Sequence[int]] = ()) -> SyncReport:
        """Nothing moves: the engine samples from the student itself."""
        self._version = version
        return SyncReport(version, seconds=0.0, num_bytes=0)

    def asleep(self) -> AbstractContextManager[None]:
        return nullcontext()

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self, error: BaseException | None = None) -> None: ...

    def _tell(self, batch: dict[int, Rollout], finished: Finished | None) -> None:
        def tell() -> None:
            if finished is not None:
                for number, rollout in batch.items():
                    finished(number, rollout)

        from_rank_zero(tell, self._context.cpu_group)

    def _round(self, jobs: list[tuple[Prompt, int, int]], sampling: Sampling) -> list[Rollout]:
        """All responses of the jobs, token by token; finished ones leave the batch."""
        generators = [torch.Generator().manual_seed(seed) for _, _, seed in jobs]
        ids: list[list[int]] = [[] for _ in jobs]
        logprobs: list[list[float]] = [[] for _ in jobs]
        active = list(range(len(jobs)))
        for _ in range(sampling.max_response_length):
            if not active:
                break
            sequences = [(*jobs[n][0].prompt_ids, *ids[n]) for n in active]
            uniforms = torch.stack([torch.rand((), generator=generators[n]) for n in active])
            drawn = self._next_tokens(sequences, uniforms, sampling)
            for n, (token, logprob) in zip(active, drawn, strict=True):
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
            for n, (prompt, i, _) in enumerate(jobs)
        ]

    def _next_tokens(
        self, sequences: Sequence[tuple[int, ...]], uniforms: torch.Tensor, sampling: Sampling
    ) -> list[tuple[int, float]]:
        """(token, log-probability) behind each sequence, drawn by inverting the cumulative
        distribution at the given uniform numbers; the same on every rank."""

        def draw(logits_NV: torch.Tensor, places: Sequence[Place]) -> list[tuple[int, float]]:
            logits_NW = gather_vocab(logits_NV, self._context.groups.tp, self._vocab_size)
            logprobs_NW = logprobs_to_draw_from(logits_NW.float(), sampling).cpu()
            cumulative_NW = logprobs_NW.double().exp().cumsum(-1)
            uniforms_N = uniforms[[sequence for sequence, _ in places]]
            # Of the sum, not of 1: rounding must not leave a gap behind the last token.
            target_N = uniforms_N.double() * cumulative_NW[:, -1]
            tokens_N1 = torch.searchsorted(cumulative_NW, target_N[:, None], right=True)
            chosen_N1 = logprobs_NW.gather(-1, tokens_N1)
            return list(zip(tokens_N1[:, 0].tolist(), chosen_N1[:, 0].tolist(), strict=True))

        # The token asked for is not known; any id stands in its place, which nothing reads.
        asked = [_as_rollout(sequence, (0,)) for sequence in sequences]
        return [token for (token,) in map_tokens(self._chunks, asked, draw, self._context)]


def logprobs_to_draw_from(logits_NW: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    if sampling.temperature == 0:  # the likeliest token alone
        likeliest_N1 = logits_NW.argmax(-1, keepdim=True)
        return torch.full_like(logits_NW, -torch.inf).scatter_(-1, likeliest_N1, 0.0)
    return most_likely((logits_NW / sampling.temperature).log_softmax(-1), sampling.top_p)


def most_likely(logprobs_NW: torch.Tensor, top_p: float) -> torch.Tensor:
    """log p within the smallest set of most likely tokens that has `top_p` of the probability, and
    -inf outside of it. Of equally likely tokens at its edge the last ones are in it; vLLM, of which
    this is the rule otherwise, takes any on a CPU and the first ones on a GPU."""
    if top_p == 1:
        return logprobs_NW
    ascending_NW, tokens_NW = logprobs_NW.sort(dim=-1, stable=True)
    outside_NW = ascending_NW.double().exp().cumsum(-1) <= 1 - top_p
    outside_NW[:, -1] = False  # rounding must not leave the set empty
    outside_NW = torch.empty_like(outside_NW).scatter_(-1, tokens_NW, outside_NW)
    return logprobs_NW.masked_fill(outside_NW, -torch.inf).log_softmax(-1)


def score_tokens(
    chunks: Sequence[CausalLM],
    sequences: Sequence[Sequence[int]],
    vocab_size: int,
    context: ParallelContext,
) -> list[list[float]]:
    """log p at temperature 1 of every token but the first of each sequence, on every rank."""

    def logprobs(logits_NV: torch.Tensor, places: Sequence[Place]) -> list[float]:
        token_ids = [sequences[sequence][1 + token] for sequence, token in places]
        logprobs_N = vocab_parallel_logprobs(
            logits_NV,
            torch.tensor(token_ids, dtype=torch.long, device=logits_NV.device),
            tp_group=context.groups.tp,
            vocab_size=vocab_size,
        )
        return logprobs_N.tolist()

    asked = [_as_rollout(tuple(sequence[:1]), tuple(sequence[1:])) for sequence in sequences]
    return map_tokens(chunks, asked, logprobs, context)


def map_tokens(
    chunks: Sequence[CausalLM],
    rollouts: Sequence[Rollout],
    of_tokens: Callable[[torch.Tensor, Sequence[Place]], list],
    context: ParallelContext,
) -> list[list]:
    """For each rollout what `of_tokens` says of each response token, on every rank of a replica.

    `of_tokens(logits_NV, places)` gets the logits that predict the tokens at these places.
    """
    layout = context.layout
    # The interleaved schedule wants as many microbatches as there are stages, at least.
    count = layout.pp if layout.vpp > 1 else 1
    numbers = [list(range(len(rollouts)))[i::count] for i in range(count)]
    unscored = [[ScoredRollout(rollouts[n], None) for n in batch] for batch in numbers]
    batches = make_microbatches(unscored, layout, context.device)
    model = chunks[-1]

    def logits_of(batch: MicroBatch, hidden_S1H: torch.Tensor) -> torch.Tensor:
        return model.lm_head(model.pick_rows(hidden_S1H, batch.prediction_rows_N))

    logits = map_hidden(chunks, batches, logits_of, context)
    found: list[tuple[Place, object]] = []
    for batch, logits_NV in zip(numbers, logits, strict=False):  # none but on the last stage
        places = [
            (n, token)
            for n in batch
            for token in own_response_tokens(rollouts[n], layout, layout.cp_rank)[1]
        ]
        found += zip(places, of_tokens(logits_NV, places), strict=True)
    values = dict(_from_last_stage(found, context))
    return [
        [values[n, token] for token in range(len(rollout.response_ids))]
        for n, rollout in enumerate(rollouts)
    ]


def _as_rollout(prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> Rollout:
    prompt = Prompt(0, text="", answer="", prompt_ids=prompt_ids)
    return Rollout(prompt, 0, response_ids, (0.0,) * len(response_ids), "length", 0)


def _from_last_stage(values: list, context: ParallelContext) -> list:
    """What the context-parallel ranks of the last stage know, told to all stages of a replica."""
    groups, layout = context.groups, context.layout
    if layout.is_last_stage and layout.cp > 1:
        parts = gather_everywhere(values, groups.cp)
        values = [value for part in parts for value in part]
    told = [values]
    last = dist.get_global_rank(groups.pp, layout.pp - 1)
    dist.broadcast_object_list(told, src=last, group=groups.pp, device=context.device)
    return told[0]
