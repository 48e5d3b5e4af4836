"""Rehearse a cluster's run on one CPU: real models, one step, no memory and no other ranks.

    python -m megatron_eopd.rehearse CONFIG.toml --world-size 64 section.key=value …

One rank of each pipeline stage of the student and of separate teachers scores and trains once, by
the trainer's own code, with tensors that have a shape and no values. Said of each: its memory at
the peak, its largest tensors, its operations and collectives, and every place that waits for the
device. The models' config.json files are enough.
"""

import argparse
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eopd.cli import add_memory_options, finite, make_parser, positive, tell
from megatron_eopd.config import Config, load_config
from megatron_eopd.errors import ConfigError, ExpectedError

if TYPE_CHECKING:
    from megatron_eopd.planning.activations import Lengths
    from megatron_eopd.planning.memory import StageMemory
    from megatron_eopd.planning.search import Plan
    from megatron_eopd.rehearsal.rehearse import Rehearsal

GIB = 2**30
EXAMPLES = """\
  python -m megatron_eopd.rehearse examples/qwen3_8b_to_1.7b/eopd.toml --world-size 8
  … --world-size 64 --gpu-memory-gib 80 parallel.pipeline_model_parallel_size=4
      whether each stage fits, and if not, what is too large
  … --world-size 64 --rank 32 --json rank32.json
      one rank alone

Engines are not rehearsed, and TransformerEngine's layers only where it is installed; NCCL's buffers
and CUDA's context are in no number. Exit status: 0 if every rank fits, 1 if not, 2 if the options
are wrong. docs/planning.md has more.
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("megatron_eopd.rehearse", __doc__.split("\n\n")[0], EXAMPLES)
    add = parser.add_argument
    add("--world-size", type=positive, required=True, metavar="N", help="ranks of the job")
    add("--rank", type=int, metavar="R", help="this one alone (default: one of each stage)")
    add("--gpu-memory-gib", type=finite, metavar="G", help="of one GPU, to say whether it fits")
    add_memory_options(parser)
    add("--json", type=Path, metavar="FILE", help="everything, for scripts; memory in bytes")
    # Intermixed: overrides may stand behind options.
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    # Also where there are GPUs: here, and in the processes that it starts, none is met.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        return run(args, load_config(args.config, args.overrides))
    except ExpectedError as error:
        tell(error)
        return 2


def run(args: argparse.Namespace, config: Config) -> int:
    from megatron_eopd.rehearsal.tables import rehearsal_text, shortage

    plan = make_the_plan(args, config)
    ranks = ranks_to_rehearse(config, args.world_size, args.rank)
    print(
        f"samples of at most {plan.request.longest.prompt} + {plan.request.longest.response} "
        f"tokens, every microbatch full; {len(ranks)} of {args.world_size} ranks: "
        f"{', '.join(map(str, ranks))}",
        flush=True,
    )
    shortages, found = [], []
    for rehearsal in rehearse_all(config, args.world_size, ranks, plan):
        found.append(rehearsal)
        print(f"\n{rehearsal_text(rehearsal, planned_of(rehearsal, plan))}", flush=True)
        if args.gpu_memory_gib is not None:
            shortages += filter(None, [shortage(rehearsal, plan.request.memory)])
    if args.json is not None:
        args.json.write_text(json.dumps([as_json(each) for each in found], indent=2) + "\n")
    if args.gpu_memory_gib is None:
        return 0
    told = [f"It does NOT fit: {text}" for text in shortages] or ["It fits."]
    print("\n" + "\n".join(told))
    return 1 if shortages else 0


def make_the_plan(args: argparse.Namespace, config: Config) -> "Plan":
    """
    Raises:
        ConfigError: the trainer would not take the configuration.
    """
    from megatron_eopd.models.megatron_config import uses_transformer_engine
    from megatron_eopd.planning.activations import Platform
    from megatron_eopd.planning.search import Request, check_request, longest_sample, make_plan
    from megatron_eopd.planning.shapes import Models

    models = Models.of(config)
    request = Request(
        config=config,
        models=models,
        num_gpus=args.world_size,
        memory=int(((args.gpu_memory_gib or 0) - args.reserve_gib) * GIB),
        longest=longest_sample(config, models, args.prompt_length, args.teacher_prompt_length),
        platform=Platform(transformer_engine=uses_transformer_engine(config.model)),
    )
    check_request(request)
    for section, shape in {"student": models.student, **models.teachers}.items():
        if shape.num_experts:
            raise ConfigError(
                f"{section} has experts, which are not rehearsed: how many rows each gets depends "
                f"on values that there are none of. tools/plan.py counts their memory."
            )
    return make_plan(config, request)


def ranks_to_rehearse(config: Config, world_size: int, rank: int | None) -> list[int]:
    """The one that was asked for, or the first of each stage of student and separate teachers; of
    each combination, where a colocated teacher has stages of its own."""
    from megatron_eopd.parallel.worlds import ENGINES, STUDENT, colocated_layout, roles_of

    first: dict[Any, int] = {}
    roles = [role for role in roles_of(config, world_size).values() if role.name != ENGINES]
    for role in roles:
        for own in range(role.first_rank, role.first_rank + role.size):
            layout = role.layout(config, own)
            stages = [layout.pp_rank]
            if role.name == STUDENT:
                stages += [
                    colocated_layout(teacher, section, layout).pp_rank
                    for section, teacher in config.all_teachers.items()
                    if teacher.placement == "colocated"
                ]
            first.setdefault((role.name, *stages), own)
    if rank is None:
        return list(first.values())
    if not any(role.holds(rank) for role in roles):
        told = ", ".join(f"{role.describe()} ({role.name})" for role in roles)
        raise ConfigError(f"--rank {rank} is none of student or teachers. Set one of {told}.")
    return [rank]


def rehearse_all(
    config: Config, world_size: int, ranks: Sequence[int], plan: "Plan"
) -> Iterator["Rehearsal"]:
    """Each in a process of its own, which is good for one; as many at a time as there are cores."""
    workers = min(len(ranks), os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    work = partial(_rehearse_alone, config, world_size, plan.request.longest)
    with ProcessPoolExecutor(
        workers, spawn, initializer=_start, initargs=(os.getpid(),), max_tasks_per_child=1
    ) as pool:
        yield from pool.map(work, ranks)


def _rehearse_alone(config: Config, world_size: int, longest: "Lengths", rank: int) -> "Rehearsal":
    from megatron_eopd.rehearsal.rehearse import rehearse

    try:
        return rehearse(config, world_size, rank, longest)
    except ExpectedError:
        raise
    except Exception:  # not every error of PyTorch can travel between processes
        text = traceback.format_exc()
    raise RuntimeError(f"rank {rank} cannot be rehearsed:\n{text}")


def _start(parent: int) -> None:
    """Of a process that rehearses."""
    from megatron_eopd.parallel.processes import die_with

    die_with(parent)


def planned_of(rehearsal: "Rehearsal", plan: "Plan") -> "StageMemory":
    return plan.memory.stages[rehearsal.role][rehearsal.layout.pp_rank]


def as_json(rehearsal: "Rehearsal") -> dict[str, Any]:
    return {
        "rank": rehearsal.rank,
        "role": rehearsal.role,
        "stage": rehearsal.layout.pp_rank,
        "parameters": rehearsal.num_parameters,
        "microbatches": rehearsal.num_microbatches,
        "stretches": {
            name: {
                "peak": tally.peak,
                "kinds": tally.kinds,
                "flops": tally.flops,
                "collectives": [
                    {**what._asdict(), "calls": n, "bytes": tally.bytes_moved[what]}
                    for what, n in tally.collectives.items()
                ],
                "reads": tally.reads,
            }
            for name, tally in rehearsal.tallies.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
