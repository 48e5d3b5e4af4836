"""The rank grid as plain integers. In: sizes. Out: who sits where. Knows no process group.

Megatron's default order is tp-cp-ep-dp-pp, tensor-parallel ranks next to each other and pipeline
stages farthest apart, so `arange(world).view(pp, dp, tp)`.
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
        return cls(tp, pp, dp, rank, sequence_parallel=config.sequence_parallel)

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
        return self.pp_rank if self.tp_rank == 0 and self.dp_rank == 0 else None

    def describe(self) -> str:
        return f"{self.world_size} ranks = TP {self.tp} × PP {self.pp} × DP {self.dp}"


def pad_vocab_size(vocab_size: int, divisible_by: int, tp: int) -> int:
    """The vocabulary as Megatron allocates it: a multiple of divisible_by · tp."""
    multiple = divisible_by * tp
    return -(-vocab_size // multiple) * multiple
