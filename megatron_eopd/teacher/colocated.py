"""A teacher on the student's own ranks. In: Rollout. Out: ScoredRollout, aligned token for token.

It runs forward-only through Megatron's pipeline schedule and hands over its last hidden states,
not its logits: H numbers per token instead of V. `lm_head` makes logits of them, microbatch by
microbatch, on the student's last stage, where the loss is. With the student's layout the two
models' last stages and vocabulary shards coincide, so nothing travels at all.
"""
# Shapes: N picked rows, H teacher hidden size, V this rank's slice of the vocabulary.

from collections.abc import Sequence

import torch

from megatron_eopd.config import Config
from megatron_eopd.data.packing import make_microbatches, padded_length
from megatron_eopd.models.build import build_model
from megatron_eopd.models.load import load_weights
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.records import MicroBatch, Rollout, ScoredRollout
from megatron_eopd.training.forward import map_hidden


class ColocatedTeacher:
    def __init__(self, config: Config, context: ParallelContext) -> None:
        hf_path = config.teacher.hf_path
        self._context = context
        self._micro_batch_size = config.training.micro_batch_size
        self._model = build_model(hf_path, config.model, context)
        load_weights(self._model, hf_path, context)
        self._model.requires_grad_(False).eval()

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """Attach the teacher's hidden states to this data-parallel rank's rollouts.

        Collective over the pipeline and tensor-parallel groups. Hidden states are on the last
        stage's ranks, whole on each tensor-parallel rank.
        """
        unscored = [ScoredRollout(rollout, None) for rollout in rollouts]
        seq_length = padded_length(rollouts, self._context.layout)
        batches = make_microbatches(
            unscored, self._micro_batch_size, seq_length, self._context.device
        )
        picked = map_hidden(self._model, batches, self._response_rows, self._context)
        if not self._context.layout.is_last_stage:
            return unscored
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        hidden = torch.cat(picked).split(lengths)
        return [ScoredRollout(r, h) for r, h in zip(rollouts, hidden, strict=True)]

    def _response_rows(self, batch: MicroBatch, hidden_SBH: torch.Tensor) -> torch.Tensor:
        return self._model.pick_rows(hidden_SBH, batch.prediction_rows_N)

    @torch.no_grad()
    def lm_head(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Vocab-parallel logits [N, V] of hidden states that `score` handed out."""
        return self._model.lm_head(hidden_NH)
