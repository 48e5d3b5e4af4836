"""Plan a run: memory, time and layouts, before any GPU is asked for. Run with --help."""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eopd.cli import finite

if TYPE_CHECKING:
    from megatron_eopd.config import Config
    from megatron_eopd.parallel.layout import Layout
    from megatron_eopd.planning.memory import StageMemory
    from megatron_eopd.planning.search import Found, Plan, Request
    from megatron_eopd.planning.shapes import Models
    from megatron_eopd.planning.time import IterationTime

# Planning is arithmetic. Before torch is imported: then it never meets a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

DESCRIPTION = """\
Print what a configuration needs on N GPUs: memory of the fullest rank of each pipeline stage, and
an estimate of an iteration's time. Then rank the layouts (tensor, pipeline, interleaving, context,
sequence, expert and data parallelism, recomputation, the teacher's own sizes) that fit.

Only the models' config.json files are read: no weights, tokenizer or prompts. Times rest on
assumptions, which are options below; --calibrate replaces them by what a run measured. How far to
trust the numbers: docs/planning.md."""

GIB = 2**30

EXAMPLES = """\
examples:
  python tools/plan.py my.toml --gpus 64 --gpu-memory-gib 80
  python tools/plan.py my.toml --gpus 8 --gpu-memory-gib 141 teacher.offload=true
  python tools/plan.py my.toml --gpus 64 --gpu-memory-gib 80 --mean-response-length 1500 \\
      --calibrate runs/mine --json plan.json

Exit status: 0 if a layout fits, 1 if none does, 2 if the options are wrong."""


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    # After the arguments: --help and wrong options answer at once.
    from megatron_eopd.config import ConfigError

    try:
        return run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG.toml")
    add("overrides", nargs="*", metavar="section.key=value", help="win over the file")
    add("--gpus", type=int, required=True, metavar="N", help="ranks, separate teachers' included")
    add("--gpu-memory-gib", type=finite, required=True, metavar="G", help="of one GPU")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    add(
        "--reserve-gib",
        type=finite,
        default=5.0,
        metavar="G",
        help="left for CUDA's context, NCCL's buffers, the optimizer's temporaries and "
        "fragmentation (default: 5, an assumption)",
    )
    add("--top", type=int, default=10, metavar="N", help="layouts shown (default: 10)")
    add("--json", type=Path, metavar="FILE", help="everything, for scripts")
    add("--calibrate", type=Path, metavar="RUN_DIR", help="scale by what this run measured")
    add("--device", choices=("gpu", "cpu"), default="gpu", help="ranks are (default: gpu)")
    lengths = parser.add_argument_group(
        "tokens: memory is for the longest sample, time for the mean"
    )
    lengths.add_argument(
        "--prompt-length", type=int, metavar="N", help="longest (default: data.max_prompt_length)"
    )
    lengths.add_argument("--mean-prompt-length", type=int, metavar="N", help="default: the longest")
    lengths.add_argument(
        "--mean-response-length",
        type=int,
        metavar="N",
        help="default: rollout.max_response_length, or the calibrating run's mean",
    )
    add_assumptions(parser)
    # Intermixed: overrides may stand behind options.
    return parser.parse_intermixed_args(arguments)


def add_assumptions(parser: argparse.ArgumentParser) -> None:
    """An option for each speed that is taken for granted."""
    from megatron_eopd.planning.assumptions import describe_assumptions

    group = parser.add_argument_group("assumptions, for an H100 SXM node; none was measured")
    for name, default, text in describe_assumptions():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=finite,
            default=default,
            metavar="X",
            help=f"{text} (default: {default:g})",
        )


def run(args: argparse.Namespace) -> int:
    from megatron_eopd.config import ConfigError, load_config
    from megatron_eopd.planning.search import check_request, explain, make_plan, search

    request = make_request(args, load_config(args.config, args.overrides))
    check_request(request)
    print_request(request)
    try:
        own = make_plan(request.config, request)
        print_plan(own)
        if not own.fits:
            print(f"It does NOT fit. {explain(own)}\n")
    except ConfigError as error:
        own = None
        print(f"The configuration as it is: {error}\n")
    found = search(request)
    print_found(found, request, args.top)
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(args, request, own, found), indent=2) + "\n")
    return 0 if found.plans else 1


def make_request(args: argparse.Namespace, config: "Config") -> "Request":
    """What was asked, with the lengths and speeds to plan by."""
    from megatron_eopd.planning.activations import Lengths, Platform
    from megatron_eopd.planning.assumptions import Assumptions
    from megatron_eopd.planning.calibration import MeasuredRun, calibrate
    from megatron_eopd.planning.search import Request
    from megatron_eopd.planning.shapes import Models
    from megatron_eopd.planning.time import Machine

    models = Models.of(config)
    response = config.rollout.max_response_length
    prompt = args.prompt_length or longest_prompt(config, models)
    run = MeasuredRun.read(args.calibrate) if args.calibrate else None
    mean_response = args.mean_response_length or (run and round(run.response_length)) or response
    names = Assumptions.model_fields
    assumptions = Assumptions(**{name: getattr(args, name) for name in names})
    request = Request(
        config=config,
        models=models,
        num_gpus=args.gpus,
        memory=int((args.gpu_memory_gib - args.reserve_gib) * 2**30),
        longest=Lengths(prompt, response),
        mean=Lengths(args.mean_prompt_length or prompt, mean_response),
        machine=Machine(assumptions, args.gpus_per_node),
        platform=Platform(
            on_gpu=args.device == "gpu",
            # `auto` finds TransformerEngine where the run is, which need not be here.
            transformer_engine=config.model.transformer_impl == "transformer_engine",
            expert_imbalance=assumptions.expert_imbalance,
        ),
    )
    return replace(request, calibration=calibrate(run, request)) if run else request


def longest_prompt(config: "Config", models: "Models") -> int:
    """As configured, or what the models leave of their positions."""
    shapes = [models.student, *models.teachers.values()]
    positions = min(shape.hf_config.max_position_embeddings for shape in shapes)
    room = positions - config.rollout.max_response_length
    return max(1, min(config.data.max_prompt_length, room))


def print_request(request: "Request") -> None:
    longest, mean = request.longest, request.mean
    layers = "TransformerEngine's" if request.platform.transformer_engine else "the local"
    print(
        f"samples: at most {longest.prompt} + {longest.response} tokens, mean {mean.prompt} + "
        f"{mean.response}; layers: {layers} specification; {request.memory / GIB:.1f} GiB of each "
        f"rank may be filled"
    )
    calibration = request.calibration
    if calibration.seconds:
        factors = ", ".join(f"{name} × {x:.3g}" for name, x in calibration.seconds.items())
        print(f"calibrated: {factors}; activations × {calibration.memory:.3g}")
    print()


def print_plan(plan: "Plan") -> None:
    from megatron_eopd.planning.time import sequences_at_once

    print(f"The configuration as it is: {plan.layout.describe()}")
    for who, stages in plan.memory.stages.items():
        print(f"\nGiB of the fullest rank of each pipeline stage of the {who}:")
        print(memory_table(stages))
    print(f"\nseconds of an iteration: {time_text(plan.time)}")
    rollout = plan.config.rollout
    if rollout.engine != "megatron" and rollout.replay is None:
        print(
            f"vLLM generates on {rollout.tensor_model_parallel_size} GPUs, "
            f"{sequences_at_once(plan.setup_of_mean)} of {rollout.batch_size} samples at a time "
            f"(rollout.max_num_seqs={rollout.max_num_seqs}, rollout.kv_cache_gib="
            f"{rollout.kv_cache_gib:g})"
        )
    print()


def memory_table(stages: list["StageMemory"]) -> str:
    names = [name for name in stages[0].parts if any(stage.parts[name] for stage in stages)]
    rows = [(name, [stage.parts[name] for stage in stages]) for name in names]
    rows += [
        (f"= {name}", [getattr(stage, name) for stage in stages])
        for name in ("while_training", "while_scoring")
    ]
    lines = [f"  {'stage':<22}" + "".join(f"{n:>9}" for n in range(len(stages)))]
    for name, sizes in rows:
        numbers = "".join(f"{size / GIB:9.3f}" for size in sizes)
        lines.append(f"  {name.replace('_', ' '):<22}{numbers}")
    return "\n".join(lines)


def time_text(time: "IterationTime") -> str:
    parts = " + ".join(f"{name} {seconds:.3g}" for name, seconds in time.stages.items())
    return f"{parts} = {time.total:.3g}"


def print_found(found: "Found", request: "Request", top: int) -> None:
    from megatron_eopd.planning.search import explain

    if not found.plans:
        print(f"No layout of {request.num_gpus} GPUs fits.")
        if found.closest is None:
            print(
                "None divides the models either: see the message above, or try another number of "
                "GPUs, or a larger training.global_batch_size."
            )
        else:
            print(f"The closest: {explain(found.closest)}")
        return
    plans = found.distinct
    print(
        f"{len(found.plans)} layouts fit, {len(plans)} of them cut the models differently. The "
        f"fastest by these estimates:"
    )
    print(layout_table(plans[:top]))
    print("\nThe first, as options:\n  " + " \\\n  ".join(plans[0].options))


def layout_table(plans: list["Plan"]) -> str:
    titles = ["TP", "PP", "VPP", "CP", "SP", "EP", "ETP", "DP", "recompute", "teachers"]
    titles += ["s/iter", "rollout", "score", "train", "sync", "GiB", "free"]
    rows = [titles, *map(layout_row, plans)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[text.rjust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  " + "  ".join(line) for line in lines)


def layout_row(plan: "Plan") -> list[str]:
    x = plan.layout
    sizes = (x.tp, x.pp, x.vpp, x.cp, "yes" if x.sequence_parallel else "no", x.ep, x.expert_tp)
    return [
        *map(str, (*sizes, x.dp)),
        plan.config.model.recompute_granularity or "none",
        ", ".join(dict.fromkeys(map(teacher_text, plan.teachers.values()))),
        *(f"{seconds:.1f}" for seconds in (plan.time.total, *plan.time.stages.values())),
        f"{plan.memory.worst[2].peak / GIB:.1f}",
        f"{plan.headroom / GIB:.1f}",
    ]


def teacher_text(layout: "Layout") -> str:
    experts = f"·EP{layout.ep}" if layout.ep > 1 else ""
    return f"TP{layout.tp}·PP{layout.pp}{experts}·DP{layout.dp}"


def as_json(
    args: argparse.Namespace, request: "Request", own: "Plan | None", found: "Found"
) -> dict[str, Any]:
    return {
        "gpus": args.gpus,
        "usable_gib": request.memory / GIB,
        "longest": asdict(request.longest),
        "mean": asdict(request.mean),
        "assumptions": request.machine.assumptions.model_dump(),
        "calibration": asdict(request.calibration),
        "configuration": plan_as_json(own) if own else None,
        "plans": [plan_as_json(plan) for plan in found.plans],
        "closest": plan_as_json(found.closest) if found.closest else None,
    }


def plan_as_json(plan: "Plan") -> dict[str, Any]:
    """Memory in bytes, time in seconds."""
    return {
        "fits": plan.fits,
        "layout": asdict(plan.layout),
        "teachers": {section: asdict(layout) for section, layout in plan.teachers.items()},
        "recompute_granularity": plan.config.model.recompute_granularity,
        "options": plan.options,
        "seconds": plan.time.stages | {"total": plan.time.total},
        "headroom": plan.headroom,
        "memory": {
            who: [stage.parts | {"peak": stage.peak} for stage in stages]
            for who, stages in plan.memory.stages.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
