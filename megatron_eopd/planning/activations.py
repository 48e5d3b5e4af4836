"""What microbatches leave behind for the backward pass. In: a model, its cut, tokens. Out: bytes.

Korthikanti et al. 2022 (arXiv 2205.05198), restated tensor by tensor for RMSNorm, SwiGLU, grouped
queries and attention that builds no score matrix. docs/planning.md compares it with measurements.
"""
# Letters: S tokens of a microbatch on one rank, e bytes of an element.

from dataclasses import dataclass

from megatron_eopd.config import ModelConfig, TrainingConfig
from megatron_eopd.data.packing import Limits
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.planning.shapes import LayerWeights, ModelShape, layers_of_stage


@dataclass(frozen=True)
class Lengths:
    """Tokens of every sample that is planned for."""

    prompt: int
    response: int
    teacher_prompt: int | None = None
    """What teachers read in the place of the prompt; None: the same."""

    @property
    def total(self) -> int:
        return self.prompt + self.response

    @property
    def of_teachers(self) -> "Lengths":
        return Lengths(self.teacher_prompt or self.prompt, self.response)


@dataclass(frozen=True)
class Load:
    """What packing makes of one data-parallel rank's part of an optimizer step."""

    tokens: int
    """Of a microbatch, over its context-parallel ranks."""
    response_tokens: int
    """Of these."""
    sequence: int
    """Tokens of one sample."""
    num_microbatches: int

    @classmethod
    def of(cls, training: TrainingConfig, lengths: Lengths, layout: Layout) -> "Load":
        samples = -(-training.global_batch_size // layout.dp)
        limits = Limits.of(training)
        tokens = min(limits.max_sequences or samples, samples) * lengths.total
        tokens = min(limits.max_tokens or tokens, tokens)
        count = -(-samples * lengths.total // tokens)
        if layout.vpp > 1:  # the interleaved schedule takes multiples of the pipeline size only
            count = -(-count // layout.pp) * layout.pp
        return cls(tokens, tokens * lengths.response // lengths.total, lengths.total, count)


@dataclass(frozen=True)
class Platform:
    """Where and with which layers the run will be: it decides what autograd keeps."""

    on_gpu: bool = True
    transformer_engine: bool = False
    expert_imbalance: float = 1.0
    """Tokens of the busiest rank's experts over the mean of all ranks."""


@dataclass(frozen=True)
class Activations:
    """What one microbatch leaves on one rank, in bytes.

    On the local specification every term is a tensor that autograd was seen to keep, on a CPU.
    Flash attention on a GPU and TransformerEngine's layers are as their sources read.
    """

    shape: ModelShape
    layout: Layout
    load: Load
    e: int
    platform: Platform = Platform()

    @property
    def tokens(self) -> int:
        """S"""
        return -(-self.load.tokens // self.layout.cp)

    @property
    def shard(self) -> int:
        """Tokens between the parallel layers: under sequence parallelism a part of S."""
        return -(-self.tokens // (self.layout.tp if self.layout.sequence_parallel else 1))

    @property
    def layer_input(self) -> int:
        return self.e * self.shape.hidden_size * self.shard

    @property
    def rotation(self) -> int:
        """Sines and cosines, for all layers."""
        return self.e * self.shape.heads.head_dim * self.tokens

    def layer(self, weights: LayerWeights, *, selective: bool = False) -> int:
        """A whole layer; `selective`: its core attention will be computed once more."""
        norms = 2 * (self.norm(self.shape.hidden_size) * self.shard + self.layer_input)
        attention = self._attention_row(selective) * self.tokens
        return norms + attention + (self._experts() if weights.experts else self._mlp())

    def forward_layer(self, weights: LayerWeights) -> int:
        """A layer at work without autograd, the larger of its two halves. Attention and MLP hold
        what they would keep; beside them are the residual and the normalised rows."""
        attention = self._attention_row(selective=False) * self.tokens
        mlp = self._experts() if weights.experts else self._mlp()
        return max(attention, mlp) + 2 * self.layer_input

    def norm(self, width: int) -> int:
        """Of one row. The local norm keeps its input in float32, and the normalised row."""
        kept = self.e if self.platform.transformer_engine else 4 + self.e
        return kept * width + 4

    def _attention_row(self, selective: bool) -> int:
        """Of one token: behind the input norm, up to what the output projection reads."""
        heads, e, tp = self.shape.heads, self.e, self.layout.tp
        queries, keys = (n // tp * heads.head_dim for n in (heads.num_heads, heads.num_groups))
        kept = 2 * e * queries + e * keys  # into and out of the core, keys
        # Values are a view of the projection and keep all of it alive, unless they are copied.
        keeps_projection = selective or self._is_flash
        if self.shape.has_qk_norms:
            kept += (heads.num_heads + heads.num_groups) // tp * self.norm(heads.head_dim)
            if e == 4 and not self.platform.transformer_engine:
                # A cast to float32 is no copy of float32: keys are a view, too, and so are the
                # queries of a single group.
                keeps_projection = True
                kept -= 4 * (keys + (queries if heads.num_groups == tp else 0))
        elif selective and not self.platform.transformer_engine:
            # The core was given the keys as they came out of the projection, a view, too.
            kept -= e * keys
        if keeps_projection:
            kept += e * (queries + 2 * keys)
        if not selective:
            kept += 4 * heads.num_heads // tp  # log-sum-exp
            kept += 0 if self._is_flash else e * (keys + queries)  # values; output, still padded
            kept += self._context_row(keys)
        return kept

    @property
    def _is_flash(self) -> bool:
        on_flash = self.platform.on_gpu and self.e == 2 and self.layout.cp == 1
        return on_flash or self.platform.transformer_engine

    @property
    def builds_scores(self) -> bool:
        """Whether attention builds its score matrix. The local specification needs a mask under
        context parallelism, and with a mask and grouped queries PyTorch has nothing better on a
        GPU."""
        return self.layout.cp > 1 and self.platform.on_gpu and not self.platform.transformer_engine

    def _context_row(self, keys: int) -> int:
        """What context parallelism adds to one token of the local specification: all other ranks'
        keys and values, and the mask or the float32 softmax."""
        cp = self.layout.cp
        if cp == 1 or self.platform.transformer_engine:
            return 0
        heads = self.shape.heads.num_heads // self.layout.tp
        mask = 4 * heads if self.builds_scores else self.e + 1
        return 2 * self.e * keys * (cp - 1) + mask * self.load.sequence

    def _mlp(self) -> int:
        """What the fused SwiGLU keeps, its input of twice the width, and what it makes."""
        return 3 * self.e * self.shape.intermediate_size // self.layout.tp * self.tokens

    def _experts(self) -> int:
        shape, layout = self.shape, self.layout
        router = 5 * shape.num_experts + 12 * shape.experts_per_token
        # As in an MLP, and the product with the router's probability.
        width = shape.expert_intermediate_size // layout.expert_tp
        row = self.e * (shape.hidden_size + 3 * width) + 12
        rows = shape.experts_per_token * layout.expert_tp * self.platform.expert_imbalance
        return int((router + row * rows) * self.shard)


def activation_bytes(activations: Activations, stage: int, model: ModelConfig) -> int:
    """Of all microbatches that a rank of the stage has in flight, at their peak."""
    layout = activations.layout
    layers = layers_of_stage(activations.shape, layout, stage)
    selective = model.recompute_granularity == "selective"
    sizes = {w: activations.layer(w, selective=selective) for w in layers}
    # All chunks of a stage are taken to be alike.
    num_layers = sum(layers.values()) // layout.vpp
    kept, at_work = sum(n * sizes[w] for w, n in layers.items()) // layout.vpp, 0
    kept += activations.rotation
    if model.recompute_granularity == "full":
        group = min(model.recompute_num_layers, num_layers)
        if model.recompute_method == "uniform":
            kept = -(-num_layers // group) * activations.layer_input
            at_work = group * max(sizes.values())
        else:
            kept = kept * (num_layers - group) // num_layers + group * activations.layer_input
            at_work = max(sizes.values())
    if layout.pp > 1:  # what came from the stage before, and what goes to the next one
        kept += 2 * activations.layer_input
    if stage == layout.pp - 1:
        at_work += activations.norm(activations.shape.hidden_size) * activations.shard
    return chunks_in_flight(layout, stage, activations.load.num_microbatches) * kept + at_work


def chunks_in_flight(layout: Layout, stage: int, num_microbatches: int) -> int:
    """Forward passes of model chunks that a stage has run before its first backward pass is done:
    Megatron's 1F1B, interleaved or not."""
    warm_up = layout.pp - stage - 1
    if layout.vpp > 1:
        warm_up = 2 * warm_up + (layout.vpp - 1) * layout.pp
    return min(warm_up + 1, num_microbatches * layout.vpp)
