"""Show a run's tokens one by one: both models' entropies, divergences, gate, alternatives.

    python -m megatron_eopd.view RUN [--iteration N | --evaluation N]

A page for the browser from each recording, RUN/view/000120.html, which needs no server and nothing
else, and an index of them; or, with --text, lines for the terminal. It may be asked while the run
goes on.
"""

import argparse
import hashlib
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EROFS
from pathlib import Path

from tqdm import tqdm

from megatron_eopd.cli import positive, run_command, tell
from megatron_eopd.errors import ConfigError, ExpectedError, disk_error
from megatron_eopd.tokens.file import training_file
from megatron_eopd.tokens.record import TokenRecord
from megatron_eopd.viewing.beside import beside
from megatron_eopd.viewing.index import BESIDE, address, index_html, summary_of
from megatron_eopd.viewing.page import COLOURS, Side, page_html
from megatron_eopd.viewing.recordings import (
    Recording,
    choose,
    counterpart,
    neighbours,
)
from megatron_eopd.viewing.terminal import Choice, text_form, wants_colour

EXAMPLES = """\
examples:
  python -m megatron_eopd.view runs/mine
      pages of all recordings that have none yet, and runs/mine/view/index.html
  python -m megatron_eopd.view runs/mine --evaluation 50 --compare runs/other
      with the responses of another run to the same prompts, where they differ marked
  python -m megatron_eopd.view runs/mine --evaluation 120 --compare runs/mine@0
      the same prompts earlier; training iterations share some only where the run saw them twice
  FORCE_COLOR=1 python -m megatron_eopd.view runs/mine --text --signal forward_kl | less -R
  torchrun --nproc_per_node=2 -m megatron_eopd.view runs/mine --iteration 100 --score \\
      logging.record_tokens_samples=128 logging.record_top_tokens=all
      both models score the rollouts that were kept of that iteration (rollout.record=true), with
      the weights that wrote them; then its page

Tokens are recorded by a run with logging.record_tokens_interval=N.
"""
INDEX = "index.html"
PLAIN_NAME = re.compile(r"[\w.+-]+")
"""Of a run: with it a page's name cannot be taken for that of another pair of runs."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_eopd.view",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run_dir of a run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--iteration", type=int, metavar="N", help="this one of training alone")
    which.add_argument("--evaluation", type=int, metavar="N", help="this evaluation alone")
    add(
        "--compare",
        metavar="RUN2[@N]",
        help="another run's responses to the same prompts beside them (default N: the same)",
    )
    add("--output", type=Path, metavar="DIR", help="of the pages (default: RUN/view)")
    add(
        "--text",
        action="store_true",
        help="for the terminal: the newest, unless one is named; in colour on a terminal or with "
        "FORCE_COLOR=1, never with NO_COLOR=1",
    )
    add(
        "--signal",
        choices=COLOURS,
        metavar="NAME",
        help=f"colour tokens by this one first, also on pages that there are: {', '.join(COLOURS)} "
        f"(default: {COLOURS[0]})",
    )
    add(
        "--limit",
        type=positive,
        default=4,
        metavar="N",
        help="responses with --text (default: %(default)s)",
    )
    add(
        "--score",
        action="store_true",
        help="first record tokens of the rollouts that were kept of --iteration N",
    )
    add("--overwrite", action="store_true", help="with --score, what is recorded already")
    overrides = "of the run, with --score"
    # With a default argparse does not call them required.
    add("overrides", nargs="*", default=[], metavar="section.key=value", help=overrides)
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if args.overrides and not args.score:
            raise ConfigError(f"{args.overrides[0]}: options of the run are for --score alone.")
        if args.score and (failed := score_rollouts(args)):
            return failed
        if os.environ.get("RANK", "0") != "0":
            return 0
        print_text(args) if args.text else write_pages(args)
    except ExpectedError as error:
        return tell(error)
    except BrokenPipeError:  # whoever reads has enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        told = disk_error(error, "printing")
        if told is None and error.filename is None:
            raise
        return tell(told or ConfigError(f"{error.filename}: {error.strerror}."))
    return 0


def score_rollouts(args: argparse.Namespace) -> int:
    """The exit code."""
    if args.iteration is None:
        raise ConfigError("--score needs the iteration whose rollouts are scored: --iteration N.")
    from megatron_eopd.scoring import score, scoring_config

    path = training_file(args.run, args.iteration)
    if path.exists() and not args.overwrite:
        raise ConfigError(
            f"{path}: tokens of this iteration are recorded already. --overwrite takes their place "
            f"with those that are scored now."
        )
    return run_command(
        lambda: scoring_config(args.run, args.iteration, args.overrides),
        lambda config: score(config, path, args.iteration),
    )


def print_text(args: argparse.Namespace) -> None:
    """An evaluation's that is named, of all tasks; else the newest of training if there is one."""
    if args.compare is not None:
        raise ConfigError("--text shows one run, and --compare makes pages. Give one of the two.")
    found = choose(args.run, args.iteration, args.evaluation)
    training = [each for each in found if each.kind == "training"]
    recordings = found if args.evaluation is not None else (training or found)[-1:]
    width = shutil.get_terminal_size().columns
    choice = Choice(args.signal or COLOURS[0], wants_colour(sys.stdout), args.limit, width)
    errors = []
    for recording in recordings:
        try:
            record = recording.read()
        except ConfigError as error:
            errors.append(error)
            continue
        for line in text_form(record, args.run.resolve().name, choice):
            print(line)
    raise_all(errors)


def write_pages(args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: of the recordings that could not be shown, after all others were.
    """
    output = args.output or args.run / "view"
    refuse_itself(args)
    all_of_run = choose(args.run)
    chosen = to_show(args, output)
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    errors = []
    for recording in tqdm(chosen, unit="page", disable=None if len(chosen) > 1 else True):
        try:
            record, sides = load(recording, args)
        except ConfigError as error:
            errors.append(error)
            continue
        path = output / f"{page_name(recording, args)}.html"
        links = links_of(recording, args, all_of_run, chosen, output)
        write_whole(path, page_html(record, sides, args.signal or COLOURS[0], links=links))
        tqdm.write(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    write_whole(output / INDEX, index_html(args.run.resolve().name, all_of_run, output))
    print(output / INDEX)
    raise_all(errors)


def raise_all(errors: Sequence[ConfigError]) -> None:
    """As one, if there are any."""
    if errors:
        raise ConfigError("\n".join(map(str, errors)))


def to_show(args: argparse.Namespace, output: Path) -> list[Recording]:
    """What is named; else what both runs have; else what has no page yet, or not in the colours
    that are asked for."""
    chosen = choose(args.run, args.iteration, args.evaluation)
    if args.iteration is not None or args.evaluation is not None:
        return chosen
    if args.compare is None:
        return [each for each in chosen if args.signal or not is_shown(each, output)]
    run_dir, number = other_run(args.compare)
    if number is not None:
        raise ConfigError(
            f"--compare {args.compare} names one recording. Say beside which of {args.run}, with "
            f"--iteration or --evaluation."
        )
    others = {other.name for other in choose(run_dir)}
    both = [each for each in chosen if each.name in others]
    # Of none: say which there are.
    return both or [counterpart(chosen[-1], run_dir, None)]


def refuse_itself(args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: a recording would stand beside itself.
    """
    if args.compare is None:
        return
    run_dir, number = other_run(args.compare)
    named = args.evaluation if args.iteration is None else args.iteration
    if run_dir.resolve() == args.run.resolve() and number in (None, named):
        raise ConfigError(
            f"--compare {args.compare}: the same recordings as those of {args.run} itself. Name "
            f"another run, or another recording of this one: {run_dir}@N beside --iteration or "
            f"--evaluation."
        )


def links_of(
    recording: Recording,
    args: argparse.Namespace,
    all_of_run: Sequence[Recording],
    chosen: Sequence[Recording],
    output: Path,
) -> dict[str, str]:
    """Text → address: the index, and the recordings before and after it that have a page or get
    one now."""
    links = {"all recordings": INDEX}
    texts = ("← previous", "next →")
    for text, other in zip(texts, neighbours(recording, all_of_run), strict=True):
        if other is None:
            continue
        name = f"{page_name(other, args)}.html"
        if other in chosen or (output / name).is_file():
            links[text] = address(name)
    return links


def load(recording: Recording, args: argparse.Namespace) -> tuple[TokenRecord, list[Side]]:
    """What a page shows, and whose it is."""
    record = recording.read()
    if args.compare is None:
        return record, [Side(args.run.resolve().name, record.about, len(record.responses))]
    run_dir, number = other_run(args.compare)
    other = counterpart(recording, run_dir, number).read()
    try:
        both = beside(record, other)
    except ConfigError as error:
        raise ConfigError(f"{args.run} and {run_dir}, {recording.where}: {error}") from None
    added = len(both.responses) - len(record.responses)
    name, other_name = names_of_both(args.run.resolve(), run_dir.resolve())
    own = Side(name, record.about, len(record.responses))
    return both, [own, Side(other_name, other.about, added)]


def names_of_both(run: Path, other: Path) -> tuple[str, str]:
    """With the folders that they are in, where two runs have the same name."""
    if run == other or run.name != other.name:
        return run.name, other.name
    return str(Path(*run.parts[-2:])), str(Path(*other.parts[-2:]))


def other_run(text: str) -> tuple[Path, int | None]:
    """RUN2 and N of RUN2@N."""
    found = re.fullmatch(r"(.+)@(\d+)", text)
    if found is None or Path(text).is_dir():
        return Path(text), None
    return Path(found[1]), int(found[2])


def is_shown(recording: Recording, output: Path) -> bool:
    """Whether it has a page that was made since it was recorded, by this version."""
    page = output / f"{recording.name}.html"
    if summary_of(page) is None:
        return False
    try:
        return page.stat().st_mtime >= recording.path.stat().st_mtime
    except OSError:  # one of them is gone meanwhile; reading it says so
        return False


def page_name(recording: Recording, args: argparse.Namespace) -> str:
    if args.compare is None:
        return recording.name
    run_dir, number = other_run(args.compare)
    at = f"@{number}" if number is not None else ""
    return f"{recording.name}{BESIDE}{name_of_other(args.run.resolve(), run_dir.resolve())}{at}"


def name_of_other(run: Path, other: Path) -> str:
    """One that no other run has: its folder's, if that stands beside `run`; else with a digest of
    the way there, so that it stays when both are moved."""
    if other.parent == run.parent and PLAIN_NAME.fullmatch(other.name):
        return other.name
    way = os.fsencode(os.path.relpath(other, run.parent))
    return f"{other.parent.name}-{other.name}-{hashlib.sha256(way).hexdigest()[:8]}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """
    Raises:
        DiskError, ConfigError: nothing can be written there.
    """
    try:
        yield
    except OSError as error:
        # What is for reading only is no fault of the disk's.
        told = disk_error(error, "writing pages") if error.errno != EROFS else None
        raise told or ConfigError(
            f"{path}: cannot be written ({error.strerror}). Name a folder that can be, with "
            f"--output DIR."
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Whoever opens it meanwhile sees the one before."""
    unfinished = path.with_suffix(".unfinished")
    with writing(path):
        try:
            # Names of files may be no text.
            unfinished.write_text(text, "utf-8", errors="replace")
            unfinished.replace(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            raise


if __name__ == "__main__":
    sys.exit(main())
