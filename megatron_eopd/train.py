"""Train a student by on-policy distillation.

    torchrun --nproc_per_node=2 -m megatron_eopd.train CONFIG.toml section.key=value …

The entry point; the loop is in megatron_eopd.loop.
"""

import sys
from collections.abc import Sequence

from megatron_eopd.cli import make_parser, run_command
from megatron_eopd.config import Config, load_config

EXAMPLES = """\
  torchrun --nproc_per_node=2 -m megatron_eopd.train examples/quickstart/eopd.toml
  torchrun --nproc_per_node=8 -m megatron_eopd.train run.toml objective.entropy_threshold=0.5
  python -m megatron_eopd.train examples/quickstart/eopd.toml --dry-run --world-size 2

The same command again resumes from the newest complete checkpoint of run_dir.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("megatron_eopd.train", __doc__.split("\n\n")[0], EXAMPLES)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything that a run would, print what it would do, and stop",
    )
    parser.add_argument(
        "--show-config", action="store_true", help="in a dry run, also every option's value"
    )
    parser.add_argument(
        "--world-size",
        type=int,
        help="ranks to assume in a dry run; default the fewest that the layouts allow",
    )
    parsed = parser.parse_intermixed_args(arguments)

    def work(config: Config) -> None:
        from megatron_eopd import launch, loop

        if parsed.dry_run:
            launch.dry_run(config, parsed.world_size, parsed.show_config)
        else:
            launch.on_every_rank(config, loop.train)

    return run_command(lambda: load_config(parsed.config, parsed.overrides), work)


if __name__ == "__main__":
    sys.exit(main())
