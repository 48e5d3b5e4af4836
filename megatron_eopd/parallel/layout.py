"""The rank grid as plain integers. In: sizes. Out: who sits where. Knows no process group.

Megatron's default order is tp-cp-ep-dp-pp, tensor-parallel ranks next to each other and pipeline
stages farthest apart, so `arange(world).view(pp, dp, tp)`. Experts cut the ranks of a stage in
their own way, `arange(world).view(pp, expert_dp, ep, expert_tp)`.
"""

from dataclasses import dataclass

from megatron_eopd.config import ConfigError, ParallelConfig


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

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size}"

    @classmethod
    def from_config(cls, config: ParallelConfig, world_size: int, rank: int) -> "Layout":
        tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
        if world_size % (tp * pp):
            raise ConfigError(
                f"parallel.tensor_model_parallel_size={tp} × "
                f"parallel.pipeline_model_parallel_size={pp} = {tp * pp} does not divide the "
                f"world size {world_size}. Start torchrun with --nproc_per_node={tp * pp} (or a "
                f"multiple of it), or change the two sizes."
            )
        dp = world_size // (tp * pp)
        ep, expert_tp = config.expert_model_parallel_size, config.expert_tensor_parallel_size
        if tp * dp % (ep * expert_tp):
            raise ConfigError(
                f"parallel.expert_model_parallel_size={ep} × parallel.expert_tensor_parallel_size="
                f"{expert_tp} = {ep * expert_tp} does not divide the {tp * dp} ranks of a pipeline "
                f"stage (world size {world_size} / pipeline {pp})."
            )
        return cls(tp, pp, dp, rank, config.sequence_parallel, ep, expert_tp)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp % self.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp * self.dp)

    @property
    def rank_in_stage(self) -> int:
        return self.rank % (self.tp * self.dp)

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
        return self.tp * self.dp * (self.pp - 1)

    @property
    def leads_stage(self) -> int | None:
        """The pipeline stage whose weights this rank sends out, if it is a stage's leader."""
        return self.pp_rank if self.rank_in_stage == 0 else None

    def describe(self) -> str:
        experts = f", experts EP {self.ep} × TP {self.expert_tp}" if self.ep > 1 else ""
        return f"{self.world_size} ranks = TP {self.tp} × PP {self.pp} × DP {self.dp}{experts}"


def pad_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """The vocabulary as Megatron allocates it: a multiple of divisible_by · tp."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple
