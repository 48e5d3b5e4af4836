"""The teachers of a run, opened where the configuration puts them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch.distributed as dist
from torch.distributed import PrefixStore

from megatron_eopd.config import Config
from megatron_eopd.parallel.collectives import collecting, raise_together
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.parallel.worlds import STUDENT, Role, colocated_layout, roles_of
from megatron_eopd.records import teacher_name
from megatron_eopd.teacher.colocated import ColocatedTeacher
from megatron_eopd.teacher.model import Swaps
from megatron_eopd.teacher.pool import TeacherPool
from megatron_eopd.teacher.separate import SeparateTeacher


def rank_table(
    config: Config,
    world_size: int,
    hosts: Sequence[str] = (),
    engines: Mapping[int, str] | None = None,
) -> str:
    """Who sits where: a line for each rank of the job. `engines`: by rank, what it has of them."""
    models = [STUDENT, *config.all_teachers]
    rows = [["rank", *(["host"] if hosts else []), *models, *(["engines"] if engines else [])]]
    roles = roles_of(config, world_size)
    for rank in range(world_size):
        row = [str(rank), *([hosts[rank]] if hosts else [])]
        for name in models:
            layout = _layout_at(name, config, roles, rank)
            row.append(layout.place() if layout else "-")
        rows.append([*row, *([engines.get(rank, "-")] if engines else [])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([text.ljust(w) for text, w in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _layout_at(name: str, config: Config, roles: Mapping[str, Role], rank: int) -> Layout | None:
    """The layout of a model, if it has a part on this rank of the job."""
    if name in roles:
        return roles[name].layout(config, rank) if roles[name].holds(rank) else None
    student = _layout_at(STUDENT, config, roles, rank)
    teacher = config.all_teachers[name]
    return colocated_layout(teacher, name, student) if student else None


def wire_store(store: dist.Store, section: str) -> dist.Store:
    """What student and teacher share of the job's store."""
    return PrefixStore(f"wire/{section}", store)


@contextmanager
def open_teachers(
    config: Config,
    roles: Mapping[str, Role],
    swaps: Mapping[str, Swaps],
    vocab_size: int,
    store: dist.Store,
    context: ParallelContext,
) -> Iterator[TeacherPool]:
    """On the student's ranks. Collective over them; an error of one is raised on all.

    `roles` and `swaps` by section, `store` the job's; `vocab_size`: tokens that are compared.
    """
    teachers: dict[str, ColocatedTeacher | SeparateTeacher] = {}
    errors: list[Exception] = []
    with ExitStack() as stack:
        for section, teacher in config.all_teachers.items():
            with collecting(errors):
                if section in roles:
                    joint = wire_store(store, section)
                    opened = SeparateTeacher(
                        teacher, roles[section], config, vocab_size, joint, context
                    )
                    stack.enter_context(opened)
                else:
                    opened = ColocatedTeacher(
                        teacher, section, config, swaps[section], vocab_size, context
                    )
                teachers[teacher_name(section)] = opened
            raise_together(errors, context.cpu_group)
        yield TeacherPool(teachers, context)
