"""The model that is trained and that teaches: Megatron's GPTModel, cut off before the LM head.

Its forward stops at the last hidden states: the loss picks the rows that predict a response token
before it calls `lm_head`, so prompt and padding rows never meet the vocabulary.
"""
# Shapes: S tokens of this rank, H hidden size, N picked rows, V this rank's vocabulary columns.

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_eopd.models.attention import unpacks
from megatron_eopd.models.packed_sequences import unpacking_of
from megatron_eopd.models.rope import rotation_of
from megatron_eopd.records import PackedSequences


class CausalLM(GPTModel):
    """GPTModel whose last stage returns hidden states [S, 1, H] after the final norm.

    Of its own forward pass only `_postprocess` is replaced: both Megatron-Core lines that are
    supported call it with keywords, as the last act of forward.
    """

    frequencies_F: torch.Tensor | None = None
    """Of the rotary embeddings, where our own attention applies them. With TransformerEngine they
    are Megatron's, and its kernel's."""

    def forward(
        self, *inputs: torch.Tensor, packed_seq_params: PackedSequences, **options: Any
    ) -> torch.Tensor:
        """[S, 1, H] on the last stage; under sequence parallelism this rank's part of it."""
        packed = packed_seq_params
        if self.frequencies_F is not None:
            packed = self._prepare(packed)
        return super().forward(*inputs, packed_seq_params=packed, **options)

    def _prepare(self, packed: PackedSequences) -> PackedSequences:
        """What attention needs in every layer, made once for all of them."""
        dtype, cp_group = self.config.params_dtype, self.pg_collection.cp
        rotation = rotation_of(packed.positions_S, self.frequencies_F, dtype)
        unpacking = None
        if unpacks(packed.positions_S.is_cuda, dtype, cp_group.size()):
            unpacking = unpacking_of(packed, cp_group.size(), cp_group.rank())
        return replace(packed, rotation=rotation, unpacking=unpacking)

    def _postprocess(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states

    def pick_rows(self, hidden_S1H: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
        """Rows of the last hidden states, [N, H].

        Forward: one all-gather under sequence parallelism, else none. Backward: none; the gradient
        is split, because lm_head's own backward has already summed it over the group.
        """
        if self.config.sequence_parallel:
            hidden_S1H = gather_from_sequence_parallel_region(
                hidden_S1H, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden_S1H.squeeze(1).index_select(0, rows_N)

    def lm_head(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Vocab-parallel logits [N, V]. Backward: one all-reduce of the hidden states' gradient."""
        # Unlike the layers before it, the head gets whole sequences: see pick_rows.
        self.output_layer.sequence_parallel = False
        logits_1NV, _ = self.output_layer(hidden_NH.unsqueeze(0), weight=self.lm_head_weight())
        return logits_1NV.squeeze(0)

    def lm_head_weight(self) -> torch.Tensor:
        """This rank's rows of the LM head, [V, H]; the embedding's where the two are tied."""
        # Megatron's hook, with `overlap_param_gather`: the head is read without being called, and
        # its updated rows may still be on their way.
        for hook in list(self.output_layer._forward_pre_hooks.values()):
            hook(self.output_layer)
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight
