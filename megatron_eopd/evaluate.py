"""Evaluate a model on graded problems: pass@k, majority, diversity, with intervals.

    torchrun --nproc_per_node=2 -m megatron_eopd.evaluate CONFIG.toml section.key=value …
    torchrun --nproc_per_node=2 -m megatron_eopd.evaluate --model DIR --task math500 …
    python -m megatron_eopd.evaluate --compare DIR DIR

With a run's configuration: its newest checkpoint (or checkpoint.load), its student as it came
where there is none. With --model: a Hugging Face directory or a Megatron checkpoint, and no
configuration; --teacher has divergences measured as well. The same command again goes on where it
was stopped.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_eopd.cli import make_parser, positive, run_command, tell
from megatron_eopd.config import Config, config_of, load_config
from megatron_eopd.errors import ConfigError

EXAMPLES = """\
  torchrun --nproc_per_node=2 -m megatron_eopd.evaluate examples/quickstart/eopd.toml
      the newest checkpoint of that run, on its evaluation.tasks
  … -m megatron_eopd.evaluate run.toml checkpoint.load=runs/mine/checkpoints/000050
  … -m megatron_eopd.evaluate --model runs/mine/hf --task math500=math500.jsonl --task gsm8k \\
      --num-samples 8 --temperature 1 --top-p 0.8 --max-response-length 8192 \\
      data.apply_chat_template=true parallel.tensor_model_parallel_size=2
      a model alone, sampled as the paper does
  … -m megatron_eopd.evaluate --model runs/mine/hf --teacher models/Qwen3-8B --task math500
      divergences from that teacher on the model's own answers, too
  python -m megatron_eopd.evaluate --compare evaluations/before evaluations/after
      a paired test on the same problems
"""
OPTIONS = {
    "num_samples": "samples_per_problem",
    "num_problems": "num_problems",
    "temperature": "temperature",
    "top_p": "top_p",
    "max_response_length": "max_response_length",
}
"""Of this command → of [evaluation]."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    summary = __doc__.split("\n\n")[0]
    parser = make_parser("megatron_eopd.evaluate", summary, EXAMPLES, needs_config=False)
    parser.add_argument("--model", type=Path, metavar="DIR", help="in place of CONFIG.toml")
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="teacher.hf_path")
    parser.add_argument(
        *("--task", "-t"),
        action="append",
        metavar="NAME[=FILE]",
        help="may be given several times; see evaluation.tasks below",
    )
    parser.add_argument("--num-samples", type=positive, metavar="N", help="of each problem")
    parser.add_argument("--num-problems", type=positive, metavar="N", help="from the first on")
    parser.add_argument("--temperature", type=float, metavar="T")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--max-response-length", type=positive, metavar="N", help="in tokens")
    parser.add_argument(
        *("--output", "-o"),
        type=Path,
        metavar="DIR",
        help="default RUN_DIR/evaluations/ITERATION, with --model evaluations/NAME",
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar="DIR", help="two such directories")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    if parsed.compare:
        return _compare(parsed)
    overrides = [*parsed.overrides, *_overrides(parsed)]
    if parsed.model is None:
        if parsed.config is None:
            return tell(ConfigError("name a CONFIG.toml, or a model with --model DIR --task NAME."))
        return run_command(lambda: load_config(parsed.config, overrides), _work(parsed.output))
    if parsed.config is not None:  # the first override, in the place of a file
        overrides.insert(0, str(parsed.config))
    tree = model_tree(parsed)
    output = Path(tree["run_dir"])
    return run_command(lambda: _config_of_model(tree, overrides), _work(output))


def _config_of_model(tree: dict[str, Any], overrides: Sequence[str]) -> Config:
    if others := [
        text for text in overrides if text.startswith(("checkpoint.", "student.hf_path"))
    ]:
        raise ConfigError(f"--model names what is evaluated, and {others[0]} something else.")
    return config_of(tree, overrides)


def _work(output: Path | None) -> Callable[[Config], None]:
    def work(config: Config) -> None:
        if not config.evaluation.tasks:
            raise ConfigError(
                "nothing to evaluate on. Set evaluation.tasks, or give --task NAME, for instance "
                "countdown or math500=FILE."
            )
        from megatron_eopd import launch, lone_evaluation

        launch.on_every_rank(config, lone_evaluation.into(output), trains=False)

    return work


def _overrides(parsed: argparse.Namespace) -> list[str]:
    """Of a configuration's options, by the words of this command."""
    given = [f"evaluation.tasks={_toml_list(parsed.task)}"] if parsed.task else []
    if parsed.teacher is not None:
        given.append(f"teacher.hf_path={json.dumps(str(parsed.teacher))}")
    for name, option in OPTIONS.items():
        value = getattr(parsed, name)
        given += [f"evaluation.{option}={value}"] if value is not None else []
    return given


def _toml_list(texts: Sequence[str]) -> str:
    return "[" + ", ".join(map(json.dumps, texts)) + "]"  # TOML's strings have JSON's escapes


def model_tree(parsed: argparse.Namespace) -> dict[str, Any]:
    """The configuration of an evaluation that belongs to no run."""
    name = parsed.model.resolve().name
    return {
        "run_dir": str(parsed.output or Path("evaluations") / name),
        "student": {"hf_path": str(parsed.model)},
        # Nor a checkpoint that happens to be in that directory.
        "checkpoint": {"resume": "none"},
    }


def _compare(parsed: argparse.Namespace) -> int:
    from megatron_eopd.evaluation.comparison import compare

    try:
        if parsed.config is not None or parsed.model is not None or _overrides(parsed):
            raise ConfigError("--compare reads two evaluations that are there, and nothing else.")
        print(compare(*parsed.compare))
    except ConfigError as error:
        return tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
