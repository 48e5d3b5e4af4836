"""python -m megatron_eopd.report RUN …: what runs have come to, with pictures.

Writes report.md and report.html. Of one run into its folder, as the run itself does at its end, and
also while it goes on; of several side by side. Nothing else in a run's folder is touched.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_eopd.cli import tell
from megatron_eopd.errors import ConfigError

EXAMPLES = """\
examples:
  python -m megatron_eopd.report runs/mine
      runs/mine/report.md, and runs/mine/report.html, which holds its pictures
  python -m megatron_eopd.report runs/eopd runs/opd --output runs/eopd-against-opd
      figures, curves and paired tests of both, side by side
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_eopd.report",
        description=__doc__.split(": ", 1)[1],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run_dir of a training")
    parser.add_argument(
        *("--output", "-o"),
        type=Path,
        metavar="DIR",
        help="where the report goes (default: RUN; with several runs comparison)",
    )
    parser.add_argument(
        "--title", metavar="TEXT", help="default: objective and models, or the runs"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    default = parsed.runs[0] if len(parsed.runs) == 1 else Path("comparison")
    try:
        for path in _report(parsed.runs, parsed.output or default, parsed.title):
            print(path)
    except ConfigError as error:
        return tell(error)
    return 0


def _report(paths: Sequence[Path], output: Path, title: str | None) -> list[Path]:
    from megatron_eopd.reporting.run_records import read_runs
    from megatron_eopd.reporting.run_report import write_reports

    runs = read_runs(paths)
    try:
        return write_reports(runs, output, title)
    except OSError as error:
        raise ConfigError(
            f"{output}: the report cannot be written ({error}). Name another folder with --output."
        ) from None


if __name__ == "__main__":
    sys.exit(main())
