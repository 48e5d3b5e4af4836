"""A teacher and its forward pass. In: rollouts. Out: what it says of their tokens.

It runs forward-only through Megatron's pipeline schedule, several microbatches in flight, in a
layout of its own. What the student's ranks get of it is the business of exchange.py.
"""
# Shapes: N tokens, H teacher hidden size, V this rank's columns of the vocabulary.

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_eopd.config import Config, StudentConfig, TeacherConfig
from megatron_eopd.data.packing import make_microbatches
from megatron_eopd.host_memory import host_memory_like
from megatron_eopd.losses.chunked_head import chunk_size, logits_dtype
from megatron_eopd.losses.head_products import logits_of
from megatron_eopd.losses.teacher_top_k import top_k_of_teacher
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.load import MakeModel, load_model
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.layout import pad_vocab_size
from megatron_eopd.parallel.pipeline import map_hidden
from megatron_eopd.records import (
    HiddenStates,
    Logits,
    MicroBatch,
    Payload,
    ScoredRollout,
    TeacherTopK,
)
from megatron_eopd.teacher.assignment import Item, TeacherPlan
from megatron_eopd.teacher.exchange import PayloadShape, VocabCut
from megatron_eopd.teacher.following import make_follower

Swaps = Sequence[tuple[int, int]]
"""Pairs of token ids that trade places in the teacher's distribution."""


class TeacherModel:
    """Its weights, where they are, and `score`."""

    def __init__(
        self,
        teacher: TeacherConfig,
        config: Config,
        swaps: Swaps,
        vocab_size: int,
        context: ParallelContext,
        make_model: MakeModel = load_model,
    ) -> None:
        """`vocab_size`: tokens that are compared; columns at or past it are padding."""
        own = {"dtype": config.dtype_of(teacher), "recompute_granularity": None}
        model_config = config.model.model_copy(update=own)
        hf_config = read_hf_config(teacher.hf_path)
        self.hidden_size = hf_config.hidden_size
        self.dtype = model_dtype(teacher, config)
        self.cut = vocab_cut(teacher, vocab_size, config, context.layout.tp)
        self._teacher, self._config, self.context = teacher, config, context
        self.chunks: Sequence[CausalLM] = make_model(teacher.hf_path, model_config, context)
        for chunk in self.chunks:
            chunk.requires_grad_(False).eval()
        self._head_VH = self._load_head(swaps) if context.layout.is_last_stage else None
        self._parameters = [p for chunk in self.chunks for p in chunk.parameters()]
        weights = [p.data for p in self._parameters]
        if teacher.offload and context.device.type == "cuda":
            memory = host_memory_like(weights)
            weights = [host.copy_(w) for host, w in zip(memory, weights, strict=True)]
        self.follower = make_follower(teacher, weights)
        """Where the weights follow the student's."""
        if self.follower is not None:
            self._head_VH, weights = None, self.follower.weights()
        self._rest(weights)

    def _rest(self, weights: Sequence[torch.Tensor]) -> None:
        """While nothing is scored, the parameters are these: in host memory with `offload`, and
        those of a follower in its own type."""
        for parameter, weight in zip(self._parameters, weights, strict=True):
            parameter.data = weight

    def take_new_weights(self) -> None:
        """The follower has others now."""
        self._rest(self.follower.weights())

    @property
    def head_VH(self) -> torch.Tensor | None:
        """This rank's rows of the LM head, on the last stage, with swapped tokens in place."""
        if self.follower is None or not self.context.layout.is_last_stage:
            return self._head_VH
        return self._on_device(self.chunks[-1].lm_head_weight().data)

    def _on_device(self, weight: torch.Tensor) -> torch.Tensor:
        # First there, then in its type: a host would take long to cast.
        return weight.to(self.context.device, non_blocking=True).to(self.dtype)

    def drop_head(self) -> None:
        """Nobody needs the head in this layout any more; a tied one stays, as the embedding, and
        that of a follower, which goes on following."""
        self._head_VH = None
        if self.follower is not None:
            return
        last = self.chunks[-1]
        if self.context.layout.is_last_stage and not last.share_embeddings_and_output_weights:
            last.output_layer.weight = None
            self._parameters = [p for chunk in self.chunks for p in chunk.parameters()]

    def _load_head(self, swaps: Swaps) -> torch.Tensor:
        head_VH = self.chunks[-1].lm_head_weight().data
        if not swaps:
            return head_VH
        if self.chunks[-1].share_embeddings_and_output_weights:
            head_VH = head_VH.clone()  # as input the tokens stay what they are
        return swap_rows(head_VH, swaps, self.cut, self.context.groups.tp)

    def score(self, items: Mapping[int, Item], plan: TeacherPlan) -> dict[int, Payload]:
        """Payload of each item that the plan gives to this rank, on the last stage; else {}.

        Collective over the ranks of the teacher.
        """
        own = plan[self.context.layout.dp_rank]
        unscored = [[ScoredRollout(items[n].read) for n in batch] for batch in own]
        batches = make_microbatches(unscored, self.context.layout, self.context.device)
        with self._resident():
            payloads = map_hidden(self.chunks, batches, self._payload, self.context)
        held: dict[int, Payload] = {}
        for batch, payload in zip(own, payloads, strict=False):
            lengths = [len(items[n].rollout.response_ids) for n in batch]
            if batch:
                parts = zip(*(x.split(lengths) for x in payload), strict=True)
                held |= {n: type(payload)(*p) for n, p in zip(batch, parts, strict=True)}
        return held

    def _payload(self, batch: MicroBatch, hidden_S1H: torch.Tensor) -> Payload:
        hidden_NH = self.chunks[-1].pick_rows(hidden_S1H, batch.prediction_rows_N)
        if self._teacher.payload == "hidden":
            return HiddenStates(hidden_NH)
        if self._teacher.payload == "logits":
            return Logits(F.linear(hidden_NH, self.head_VH))
        # In chunks: all logits of a microbatch never exist at once. At least one, of no tokens.
        size = chunk_size(self._config.objective, self.context.device.type == "cuda")
        bounds = [*range(0, max(len(hidden_NH), 1), size), len(hidden_NH)]
        chunks = [self._top_k(batch, hidden_NH, slice(a, b)) for a, b in pairwise(bounds)]
        return TeacherTopK(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))

    def _top_k(self, batch: MicroBatch, hidden_NH: torch.Tensor, rows: slice) -> TeacherTopK:
        return top_k_of_teacher(
            logits_of(hidden_NH[rows], self.head_VH, logits_dtype(self._config.objective)),
            batch.target_ids_N[rows],
            top_k=self._config.objective.top_k,
            tp_group=self.context.groups.tp,
            vocab_size=self.cut.vocab_size,
            temperature=self._config.teacher_temperature,
        )

    @contextmanager
    def _resident(self) -> Iterator[None]:
        """In here the weights are on the device and in the teacher's type, which costs nothing
        where they are so anyway."""
        resting = [parameter.data for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.data = self._on_device(parameter.data)
        try:
            yield
        finally:
            # Scoring changes no weight, so what was kept is still right.
            for parameter, data in zip(self._parameters, resting, strict=True):
                parameter.data = data


def vocab_cut(
    model: StudentConfig | TeacherConfig, vocab_size: int, config: Config, tp: int
) -> VocabCut:
    """How a model's columns are cut, of which the first `vocab_size` are compared. Models of one
    tokenizer may have other numbers of columns, and so other cuts."""
    columns = read_hf_config(model.hf_path).vocab_size
    padded = pad_vocab_size(columns, config.model.make_vocab_size_divisible_by, tp)
    return VocabCut(vocab_size, padded // tp)


def model_dtype(teacher: TeacherConfig, config: Config) -> torch.dtype:
    """Of its parameters and of what it hands over."""
    return getattr(torch, config.dtype_of(teacher))


def payload_shape(teacher: TeacherConfig, vocab_size: int, config: Config) -> PayloadShape:
    """What the teacher's payload consists of, as both ends must know it."""
    hf_config = read_hf_config(teacher.hf_path)
    dtype = model_dtype(teacher, config)
    if teacher.payload == "hidden":
        return PayloadShape(HiddenStates, ((dtype, hf_config.hidden_size),))
    if teacher.payload == "logits":
        return PayloadShape(Logits, ((dtype, None),))
    k = min(config.objective.top_k, vocab_size)
    numbers = (torch.float32, None)
    top_k = ((torch.int64, k), (torch.float32, k), numbers, numbers, numbers)
    return PayloadShape(TeacherTopK, top_k)


def swap_rows(
    head_VH: torch.Tensor, swaps: Swaps, cut: VocabCut, tp_group: dist.ProcessGroup
) -> torch.Tensor:
    """Exchange pairs of the head's rows, wherever they are. One all-reduce of [2 · pairs, H]."""
    first = dist.get_rank(tp_group) * cut.width
    ids = [token for pair in swaps for token in pair]
    rows = head_VH.new_zeros(len(ids), head_VH.shape[1])
    owned = [n for n, token in enumerate(ids) if 0 <= token - first < cut.width]
    for n in owned:
        rows[n] = head_VH[ids[n] - first]
    dist.all_reduce(rows, group=tp_group)
    for n in owned:
        head_VH[ids[n] - first] = rows[n ^ 1]
    return head_VH
