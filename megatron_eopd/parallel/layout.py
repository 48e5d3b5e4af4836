"""The rank grid as plain integers. In: sizes. Out: who sits where. Knows no process group.

Megatron's default order is tp-cp-ep-dp-pp, tensor-parallel ranks next to each other and pipeline
stages farthest apart, so `arange(world).view(pp, dp, cp, tp)`. Experts cut the ranks of a stage in
their own way, `arange(world).view(pp, expert_dp, ep, expert_tp)`.
"""

from dataclasses import dataclass, replace

from megatron_eopd.config import ParallelConfig, ParallelSizes
from megatron_eopd.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Sizes of the grid and this rank's place in it. What models and stages are cut by."""

    tp: int
    pp: int
    dp: int
    rank: int
    sequence_parallel: bool = False
    """Between the parallel layers, each tensor-parallel rank holds its part of the sequence."""
    ep: int = 1
    """Parts that the experts of a layer are dealt out to; 1 in models without experts."""
    expert_tp: int = 1
    """Tensor-parallel size inside an expert."""
    cp: int = 1
    """Ranks that share each sequence."""
    vpp: int = 1
    """Model chunks on each pipeline stage."""
    first_stage_layers: int | None = None
    """Of the first pipeline stage, in all its chunks; None: as many as others without a number."""
    last_stage_layers: int | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size}"

    @classmethod
    def from_config(
        cls,
        config: ParallelSizes,
        world_size: int,
        rank: int,
        section: str = "parallel",
        world: str = "the world size",
    ) -> "Layout":
        """Of the student or a teacher: for messages, `section` says whose options these are, and
        `world` what gives the number of ranks.

        Raises:
            ConfigError: the sizes do not divide the world size.
        """
        tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
        cp, vpp = 1, 1
        if isinstance(config, ParallelConfig):
            cp, vpp = config.context_parallel_size, config.virtual_pipeline_model_parallel_size
        if world_size % (tp * pp * cp):
            context = f" × {section}.context_parallel_size={cp}" if cp > 1 else ""
            raise ConfigError(
                f"{section}.tensor_model_parallel_size={tp} × "
                f"{section}.pipeline_model_parallel_size={pp}{context} = {tp * pp * cp} does not "
                f"divide {world} {world_size}. Give it {tp * pp * cp} ranks (or a multiple of it): "
                f"torchrun --nproc_per_node, or world_size of a separate teacher; or change the "
                f"sizes."
            )
        dp = world_size // (tp * pp * cp)
        ep, expert_tp = config.expert_model_parallel_size, config.expert_tensor_parallel_size
        stage = tp * cp * dp
        if stage % (ep * expert_tp):
            raise ConfigError(
                f"{section}.expert_model_parallel_size={ep} × {section}.expert_tensor_parallel_size"
                f"={expert_tp} = {ep * expert_tp} does not divide the {stage} ranks of a pipeline "
                f"stage ({world} {world_size} / pipeline {pp})."
            )
        first = config.decoder_first_pipeline_num_layers
        last = config.decoder_last_pipeline_num_layers
        sp = config.sequence_parallel
        return cls(tp, pp, dp, rank, sp, ep, expert_tp, cp, vpp, first, last)

    @property
    def world_size(self) -> int:
        return self.stage_size * self.pp

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp % self.cp

    @property
    def dp_rank(self) -> int:
        return self.rank // (self.tp * self.cp) % self.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // self.stage_size

    @property
    def rank_in_stage(self) -> int:
        return self.rank % self.stage_size

    @property
    def expert_tp_rank(self) -> int:
        return self.rank_in_stage % self.expert_tp

    @property
    def ep_rank(self) -> int:
        return self.rank_in_stage // self.expert_tp % self.ep

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    @property
    def last_stage_leader(self) -> int:
        """The first rank of the last pipeline stage: its metrics are everyone's."""
        return self.stage_size * (self.pp - 1)

    def last_stage_rank(self, dp_rank: int, cp_rank: int, tp_rank: int) -> int:
        """The rank of the last pipeline stage at this place."""
        return self.last_stage_leader + (dp_rank * self.cp + cp_rank) * self.tp + tp_rank

    @property
    def leads_stage(self) -> int | None:
        """The pipeline stage whose weights this rank sends out, if it is a stage's leader."""
        return self.pp_rank if self.rank_in_stage == 0 else None

    @property
    def experts_span_replicas(self) -> bool:
        """Whether a layer's experts sit on several data-parallel replicas, which must then run
        every layer at the same time."""
        return self.ep * self.expert_tp > self.tp * self.cp

    def cuts_like(self, other: "Layout") -> bool:
        """Whether both put the same shards and, packed alike, the same sequences on a rank."""
        ours, theirs = ((x.tp, x.pp, x.dp, x.cp) for x in (self, other))
        return ours == theirs

    @property
    def grid(self) -> "Layout":
        """The ranks alone, without what says which layers they have: what groups depend on."""
        return replace(self, vpp=1, first_stage_layers=None, last_stage_layers=None)

    @property
    def is_uneven(self) -> bool:
        """Whether a pipeline stage has a number of layers of its own."""
        return self.first_stage_layers is not None or self.last_stage_layers is not None

    def layers_per_stage(self, num_layers: int) -> tuple[int, ...]:
        """Layers of every pipeline stage. Where they do not add up to `num_layers`, or a chunk has
        no whole number of them, the model cannot be cut so (models/fit.py refuses it)."""
        ends = {0: self.first_stage_layers, self.pp - 1: self.last_stage_layers}
        own = {stage: count for stage, count in ends.items() if count is not None}
        share = (num_layers - sum(own.values())) // max(self.pp - len(own), 1)
        return tuple(own.get(stage, share) for stage in range(self.pp))

    def stages_of_layers(self, num_layers: int) -> tuple[int, ...]:
        """The pipeline stage of every layer: chunk after chunk, in each the stages in turn."""
        chunks = [count // self.vpp for count in self.layers_per_stage(num_layers)]
        return self.vpp * tuple(stage for stage, n in enumerate(chunks) for _ in range(n))

    def padded(self, num_tokens: int) -> int:
        """Of a sequence, up to what context parallelism can cut."""
        return -(-num_tokens // self.sequence_multiple) * self.sequence_multiple

    @property
    def sequence_multiple(self) -> int:
        """Packed sequences are padded to this: context parallelism cuts each into 2 · cp chunks."""
        return 1 if self.cp == 1 else 2 * self.cp

    def place(self) -> str:
        """This rank's, in as few words as tell it from all others."""
        sizes = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "dp": self.dp, "ep": self.ep}
        parts = [f"{n}{getattr(self, f'{n}_rank')}" for n, size in sizes.items() if size > 1]
        return " ".join(parts) or "whole"

    def describe(self) -> str:
        cut = [f"× {self.vpp} chunks"] if self.vpp > 1 else []
        if self.first_stage_layers is not None:
            cut.append(f"{self.first_stage_layers} layers first")
        if self.last_stage_layers is not None:
            cut.append(f"{self.last_stage_layers} layers last")
        stages = f" ({', '.join(cut)})" if cut else ""
        context = f" × CP {self.cp}" if self.cp > 1 else ""
        experts = f", experts EP {self.ep} × TP {self.expert_tp}" if self.ep > 1 else ""
        return (
            f"{self.world_size} ranks = TP {self.tp} × PP {self.pp}{stages}{context} × "
            f"DP {self.dp}{experts}"
        )


def pad_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """The vocabulary as Megatron allocates it: a multiple of divisible_by · tp."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple
