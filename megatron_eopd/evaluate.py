"""Evaluate a student on held-out problems: pass@k, diversity, divergences from the teacher.

    torchrun --nproc_per_node=2 -m megatron_eopd.evaluate CONFIG.toml section.key=value …

Takes the newest checkpoint of run_dir (or checkpoint.load), and the student as it came where there
is none. The figures and their names are those of the evaluations during training.
"""

import sys
from collections.abc import Sequence

from megatron_eopd.cli import make_parser, run_command
from megatron_eopd.config import Config
from megatron_eopd.errors import ConfigError

EXAMPLES = """\
  torchrun --nproc_per_node=2 -m megatron_eopd.evaluate examples/quickstart/eopd.toml
  … -m megatron_eopd.evaluate examples/quickstart/eopd.toml evaluation.num_problems=1559
  … -m megatron_eopd.evaluate run.toml checkpoint.load=runs/mine/checkpoints/000050
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("megatron_eopd.evaluate", __doc__.split("\n\n")[0], EXAMPLES)
    parsed = parser.parse_intermixed_args(arguments)

    def work(config: Config) -> None:
        if config.evaluation.name is None:
            raise ConfigError(
                "nothing to evaluate on. Set evaluation.prompts to a file of held-out problems, or "
                "evaluation.task=countdown."
            )
        from megatron_eopd import launch, loop

        launch.on_every_rank(config, loop.evaluate, trains=False)

    return run_command(parsed.config, parsed.overrides, work)


if __name__ == "__main__":
    sys.exit(main())
