"""Who does what in a torchrun job: the student's ranks, behind them separate teachers and engines.

Each role is a world of its own: a torch.distributed default group, and Megatron's global state,
over its ranks alone. A role's code is therefore the same whether it has the job to itself or not,
and one role's collectives can never wait for another's. What worlds share is the job's store; what
they say to each other goes over wires that are joined on it.
"""

import math
from dataclasses import dataclass, replace

from megatron_eopd.config import Config, TeacherConfig
from megatron_eopd.errors import ConfigError
from megatron_eopd.parallel.layout import Layout

STUDENT = "student"
ENGINES = "engines"
"""Of ranks on which engines alone sit."""


@dataclass(frozen=True)
class Role:
    """A world's place among the ranks of the job."""

    name: str
    """`student`, or the teacher's section: `teacher`, `teachers.math`, …"""
    first_rank: int
    size: int

    def holds(self, rank: int) -> bool:
        return self.first_rank <= rank < self.first_rank + self.size

    def layout(self, config: Config, rank: int) -> Layout:
        """Of this world; `rank` of the job, one of the world's."""
        own_rank = rank - self.first_rank
        if self.name == ENGINES:
            return Layout(tp=1, pp=1, dp=self.size, rank=own_rank)
        if self.name == STUDENT:
            separate = bool(_separate_sizes(config))
            world = "the ranks left to the student," if separate else "the world size"
            return Layout.from_config(config.parallel, self.size, own_rank, world=world)
        teacher = config.all_teachers[self.name]
        return separate_layout(teacher, self.name, config, own_rank)

    def describe(self) -> str:
        last = self.first_rank + self.size - 1
        return f"ranks {self.first_rank} to {last}" if self.size > 1 else f"rank {last}"


def roles_of(config: Config, world_size: int) -> dict[str, Role]:
    """Of a job with this many ranks, the student first.

    Raises:
        ConfigError: separate teachers and engines leave no rank to the student.
    """
    separate = _separate_sizes(config)
    student = world_size - sum(separate.values())
    if student < 1:
        asked = " + ".join(
            f"{'rollout' if name == ENGINES else name}.world_size={size}"
            for name, size in separate.items()
        )
        raise ConfigError(
            f"{asked} leaves no rank to the student in a world of {world_size}. Start torchrun "
            f"with more processes, or set smaller numbers."
        )
    roles, first = {}, 0
    for name, size in {STUDENT: student, **separate}.items():
        roles[name] = Role(name, first, size)
        first += size
    return roles


def _separate_sizes(config: Config) -> dict[str, int]:
    """Ranks of those that have their own, in their order behind the student."""
    sizes = {name: t.world_size for name, t in config.all_teachers.items() if t.world_size}
    return sizes | ({ENGINES: config.rollout.world_size} if config.rollout.world_size else {})


def smallest_world(config: Config) -> int:
    """Ranks of the smallest job that all layouts divide."""
    own = config.parallel
    sizes = [own, *(t.parallel for t in config.all_teachers.values() if not t.world_size)]
    ranks = own.tensor_model_parallel_size * own.pipeline_model_parallel_size
    students = [ranks * own.context_parallel_size]
    for size in filter(None, sizes):
        experts = size.expert_model_parallel_size * size.expert_tensor_parallel_size
        stage = math.lcm(size.tensor_model_parallel_size, experts)
        students.append(stage * size.pipeline_model_parallel_size)
    return math.lcm(*students) + sum(_separate_sizes(config).values())


def student_layout(config: Config, world_size: int, rank: int = 0) -> Layout:
    """In a job with this many ranks; `rank` among the student's."""
    return roles_of(config, world_size)[STUDENT].layout(config, rank)


def teacher_layout(teacher: TeacherConfig, section: str, config: Config, student: Layout) -> Layout:
    """Wherever it was put; of a separate one as its first rank sees it.

    Raises:
        ConfigError: its sizes do not divide its ranks.
    """
    if teacher.placement == "separate":
        return separate_layout(teacher, section, config, rank=0)
    return colocated_layout(teacher, section, student)


def colocated_layout(teacher: TeacherConfig, section: str, student: Layout) -> Layout:
    """On the student's ranks; it never cuts sequences or interleaves chunks.

    Raises:
        ConfigError: its sizes do not divide the world size.
    """
    if teacher.parallel is None:
        return replace(student.grid, cp=1, dp=student.dp * student.cp)
    named = f"{section}.parallel"
    return Layout.from_config(teacher.parallel, student.world_size, student.rank, named)


def separate_layout(teacher: TeacherConfig, section: str, config: Config, rank: int) -> Layout:
    """Of a teacher on ranks of its own; `rank` among them.

    Raises:
        ConfigError: its sizes do not divide its ranks.
    """
    sizes = teacher.parallel or config.parallel.for_other_model()
    named = f"{section}.parallel" if teacher.parallel else "parallel"
    world = f"{section}.world_size ="
    return Layout.from_config(sizes, teacher.world_size, rank, named, world)
