"""The memory of a run and the layouts that fit, before any GPU is asked for. Run with --help."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_eopd.cli import add_memory_options, finite, positive
from megatron_eopd.errors import ConfigError, ExpectedError

if TYPE_CHECKING:
    from megatron_eopd.config import Config
    from megatron_eopd.parallel.layout import Layout
    from megatron_eopd.planning.memory import StageMemory
    from megatron_eopd.planning.search import Plan, Request

# Planning is arithmetic. Before torch is imported: then it never meets a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

DESCRIPTION = """\
Print the memory that a configuration needs on N GPUs, part by part, on the fullest rank of the
student and of each teacher with ranks of its own, and whether it fits. With --search list the
layouts that fit, the fewest model-parallel ranks first.

The models' config.json files are enough: no weights, tokenizer or prompts are needed. Weights that
are there are compared with config.json, by the headers of their files. Time is not
predicted. What is counted, and how it was checked: docs/planning.md."""

GIB = 2**30

EXAMPLES = """\
examples:
  python tools/plan.py my.toml --gpus 8 --gpu-memory-gib 80
  python tools/plan.py my.toml --gpus 8 --gpu-memory-gib 80 model.recompute_granularity=full
  python tools/plan.py my.toml --gpus 64 --gpu-memory-gib 80 --search --json plan.json

Exit status: 0 if the configuration fits, or with --search any layout; 1 if not; 2 if the options
are wrong."""


def main(arguments: list[str] | None = None) -> int:
    try:
        return run(parse_args(arguments))
    except ExpectedError as error:
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
    add(
        "--gpus",
        type=positive,
        required=True,
        metavar="N",
        help="ranks, separate teachers' included",
    )
    add("--gpu-memory-gib", type=finite, required=True, metavar="G", help="of one GPU")
    add("--gpus-per-node", type=positive, default=8, metavar="N", help="default: 8")
    add_memory_options(parser)
    add(
        "--expert-imbalance",
        type=finite,
        default=1.2,
        metavar="X",
        help="tokens of the busiest rank's experts over the mean (default: 1.2, an assumption)",
    )
    add("--device", choices=("gpu", "cpu"), default="gpu", help="ranks are (default: gpu)")
    add("--search", action="store_true", help="list the layouts that fit")
    add("--top", type=positive, default=10, metavar="N", help="layouts shown (default: 10)")
    add("--json", type=Path, metavar="FILE", help="everything, for scripts; memory in bytes")
    # Intermixed: overrides may stand behind options.
    return parser.parse_intermixed_args(arguments)


def run(args: argparse.Namespace) -> int:
    # Here, because --help and wrong options answer at once.
    from megatron_eopd.config import load_config
    from megatron_eopd.planning.search import check_request, make_plan, search

    config = load_config(args.config, args.overrides)
    check_models(config)
    request = make_request(args, config)
    check_request(request)
    print_request(request)
    own = None
    try:
        own = make_plan(request.config, request)
        print_plan(own)
    except ConfigError as error:
        if not args.search:
            raise
        print(f"The configuration as it is: {error}")
    plans = search(request) if args.search else []
    if args.search:
        print_search(plans, request, args.top)
    elif not own.fits:
        print("--search lists the layouts that fit.")
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(request, own, plans), indent=2) + "\n")
    return 0 if any(plan.fits for plan in plans or [own] if plan) else 1


def check_models(config: "Config") -> None:
    """As a run would, by config.json, and by the headers of weight files where there are any.

    Raises:
        ConfigError, CheckpointError: in the words of the run.
    """
    from megatron_eopd.models.fit import check_vllm
    from megatron_eopd.models.hf_config import read_hf_config, unknown_keys
    from megatron_eopd.models.load import check_what_is_there

    models = (config.student, *config.all_teachers.values())
    for path in dict.fromkeys(model.hf_path for model in models):
        check_what_is_there(path)
        if (warning := unknown_keys(path)) is not None:
            print(f"warning: {warning}", file=sys.stderr)
    # Whether vLLM is installed here says nothing of where the run will be.
    if config.rollout.engine != "megatron" and config.needs_samples:
        check_vllm(read_hf_config(config.student.hf_path))


def make_request(args: argparse.Namespace, config: "Config") -> "Request":
    from megatron_eopd.planning.activations import Platform
    from megatron_eopd.planning.search import Request, longest_sample
    from megatron_eopd.planning.shapes import Models

    models = Models.of(config)
    return Request(
        config=config,
        models=models,
        num_gpus=args.gpus,
        memory=int((args.gpu_memory_gib - args.reserve_gib) * GIB),
        longest=longest_sample(config, models, args.prompt_length, args.teacher_prompt_length),
        gpus_per_node=args.gpus_per_node,
        platform=Platform(
            on_gpu=args.device == "gpu",
            # `auto` finds TransformerEngine where the run is, which need not be here.
            transformer_engine=config.model.transformer_impl == "transformer_engine",
            expert_imbalance=args.expert_imbalance,
        ),
    )


def print_request(request: "Request") -> None:
    longest = request.longest
    layers = "TransformerEngine's" if request.platform.transformer_engine else "the local"
    print(
        f"samples of at most {longest.prompt} + {longest.response} tokens; layers: {layers} "
        f"specification; {request.memory / GIB:.1f} GiB of each GPU may be filled\n"
    )


def print_plan(plan: "Plan") -> None:
    from megatron_eopd.planning.memory import describe_saving
    from megatron_eopd.planning.search import explain

    print(f"student: {plan.layout.describe()}")
    for section, layout in plan.teachers.items():
        placement = plan.config.all_teachers[section].placement
        print(f"{section}, {placement}: {layout.describe()}")
    print(f"\n{memory_table(plan)}\n")
    saving = describe_saving(plan.memory.checkpoint_share, plan.config.checkpoint)
    print(f"a checkpoint: {saving}\n")
    if plan.fits:
        print(f"It fits: {plan.headroom / GIB:.1f} GiB are left.")
    else:
        print(f"It does NOT fit: {explain(plan)}")


def memory_table(plan: "Plan") -> str:
    """A column for each kind of rank."""
    fullest = {who: max(s, key=lambda stage: stage.peak) for who, s in plan.memory.stages.items()}
    stages = [plan.memory.stages[who].index(stage) for who, stage in fullest.items()]
    lines = [table_line("GiB of the fullest rank", fullest), table_line("  pipeline stage", stages)]
    columns = [memory_rows(stage) for stage in fullest.values()]
    for name in columns[0]:
        sizes = [column[name] for column in columns]
        if any(sizes):
            lines.append(table_line(f"  {name}", [f"{size / GIB:.2f}" for size in sizes]))
    return "\n".join(lines)


def memory_rows(stage: "StageMemory") -> dict[str, int]:
    from megatron_eopd.planning.memory import PHASES

    parts = {name.replace("_", " "): size for name, size in stage.parts.items()}
    sums = {f"= while {phase}": stage.during(phase) for phase in PHASES}
    return parts | sums


def table_line(title: str, values: Any) -> str:
    return f"{title:<24}" + "".join(f"{value!s:>12}" for value in values)


def print_search(plans: list["Plan"], request: "Request", top: int) -> None:
    from megatron_eopd.planning.search import explain

    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        print(
            f"\n{len(fitting)} of {len(plans)} layouts fit, the fewest model-parallel ranks first:"
        )
        print(layout_table(fitting[:top]))
        options = " \\\n  ".join(fitting[0].options) or "none: it is the configuration's own"
        print(f"\nThe first, as options:\n  {options}")
    elif plans:
        closest = max(plans, key=lambda plan: plan.headroom)
        print(f"\nNo layout of {request.num_gpus} GPUs fits. The closest: {explain(closest)}")
    else:
        print(
            f"\nNo layout of {request.num_gpus} GPUs divides the models: see the message above, or "
            f"try another number of GPUs, or a larger training.global_batch_size."
        )


def layout_table(plans: list["Plan"]) -> str:
    titles = ["TP", "PP", "VPP", "CP", "EP", "ETP", "DP", "teachers", "GiB", "free"]
    rows = [titles, *map(layout_row, plans)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[text.rjust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  " + "  ".join(line) for line in lines)


def layout_row(plan: "Plan") -> list[str]:
    x = plan.layout
    return [
        *map(str, (x.tp, x.pp, x.vpp, x.cp, x.ep, x.expert_tp, x.dp)),
        ", ".join(dict.fromkeys(map(teacher_text, plan.teachers.values()))),
        f"{plan.memory.worst[2].peak / GIB:.1f}",
        f"{plan.headroom / GIB:.1f}",
    ]


def teacher_text(layout: "Layout") -> str:
    experts = f"·EP{layout.ep}" if layout.ep > 1 else ""
    return f"TP{layout.tp}·PP{layout.pp}{experts}·DP{layout.dp}"


def as_json(request: "Request", own: "Plan | None", plans: list["Plan"]) -> dict[str, Any]:
    return {
        "gpus": request.num_gpus,
        "usable": request.memory,
        "longest": asdict(request.longest),
        "configuration": plan_as_json(own) if own else None,
        "layouts": [plan_as_json(plan) for plan in plans],
    }


def plan_as_json(plan: "Plan") -> dict[str, Any]:
    return {
        "fits": plan.fits,
        "layout": asdict(plan.layout),
        "teachers": {section: asdict(layout) for section, layout in plan.teachers.items()},
        "options": plan.options,
        "headroom": plan.headroom,
        "checkpoint_share": plan.memory.checkpoint_share,
        "memory": {
            who: [stage.parts | {"peak": stage.peak} for stage in stages]
            for who, stages in plan.memory.stages.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
