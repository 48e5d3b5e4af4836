"""Which recordings of tokens a run has. In: its directory. Out: where each is, and of what."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from megatron_eopd.checkpoints.files import EVALUATIONS, place_of
from megatron_eopd.errors import ConfigError
from megatron_eopd.tokens.file import SUFFIX, TOKENS, read_tokens
from megatron_eopd.tokens.record import TokenRecord

HOW = (
    "Tokens are recorded by a run with logging.record_tokens_interval=N, every N iterations and at "
    "its evaluations."
)


class Recording(NamedTuple):
    path: Path
    kind: Literal["training", "evaluation"]
    place: str
    """As the checkpoint of the same weights is named: 000120, or 000120-3 within an iteration."""
    task: str
    """Empty for training."""

    @property
    def iteration(self) -> int:
        return int(self.place.partition("-")[0])

    @property
    def name(self) -> str:
        """Of its page, without .html."""
        return f"evaluation-{self.place}-{self.task}" if self.task else self.place

    @property
    def where(self) -> str:
        number, dash, steps = self.place.partition("-")
        place = f"{int(number)}{dash}{steps}"
        return f"evaluation {place}, {self.task}" if self.task else f"iteration {place}"

    def read(self) -> TokenRecord:
        """
        Raises:
            ConfigError: as tokens.file.read_tokens.
        """
        return read_tokens(self.path)


def recordings_of(run_dir: Path) -> list[Recording]:
    """Training first, each kind in the order of iterations. A file that is still being written has
    another name.

    Raises:
        ConfigError: there is no such directory, or it cannot be read.
    """
    try:
        if not run_dir.is_dir():
            raise ConfigError(f"{run_dir}: no such directory. Name the run_dir of a run.")
        training = [
            Recording(path, "training", path.stem, "")
            for path in _files(run_dir / TOKENS)
            if path.suffix == ".npz" and path.stem.isdecimal()
        ]
        evaluations = [
            Recording(path, "evaluation", directory.name, path.name.removesuffix(SUFFIX))
            for directory in _files(run_dir / EVALUATIONS)
            if place_of(directory)
            for path in _files(directory)
            if path.name.endswith(SUFFIX)
        ]
    except OSError as error:
        raise ConfigError(
            f"{error.filename or run_dir}: cannot be read ({error.strerror}). Ask for the right to "
            f"read it, or see to the disk."
        ) from None
    in_order = sorted(evaluations, key=lambda each: (place_of(each.path.parent), each.task))
    return sorted(training, key=lambda each: each.iteration) + in_order


def _files(directory: Path) -> list[Path]:
    """None of what is no directory. Unlike glob it raises where the directory may not be read."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return list(directory.iterdir())
    return []


def choose(
    run_dir: Path, iteration: int | None = None, evaluation: int | None = None
) -> list[Recording]:
    """All of a run, that of one training iteration, or those of the tasks of one evaluation.

    Raises:
        ConfigError: there is none; says which there are.
    """
    found = recordings_of(run_dir)
    if not found and not (run_dir / "config.json").is_file():
        raise ConfigError(
            f"{run_dir}: has neither config.json nor recordings of tokens, so it is no run's. Name "
            f"the run_dir of a run."
        )
    if iteration is not None:
        kind, number = "training", iteration
    elif evaluation is not None:
        kind, number = "evaluation", evaluation
    else:
        if not found:
            raise ConfigError(f"{run_dir}: no tokens were recorded. {HOW}")
        return found
    chosen = [each for each in found if each.kind == kind and each.iteration == number]
    if not chosen:
        raise ConfigError(
            f"{run_dir}: no tokens were recorded at {kind} {number}. There are: training "
            f"{_numbers(found, 'training')}; evaluations {_numbers(found, 'evaluation')}. {HOW}"
        )
    return chosen


def neighbours(
    recording: Recording, all_of_run: Sequence[Recording]
) -> tuple[Recording | None, Recording | None]:
    """Of the same kind and task, the one before it and the one after it."""

    def order(each: Recording) -> tuple[int, str]:
        return each.iteration, each.place

    alike = [
        each for each in all_of_run if (each.kind, each.task) == (recording.kind, recording.task)
    ]
    before = [each for each in alike if order(each) < order(recording)]
    after = [each for each in alike if order(each) > order(recording)]
    return max(before, key=order, default=None), min(after, key=order, default=None)


def counterpart(recording: Recording, run_dir: Path, number: int | None) -> Recording:
    """Of the same kind and task in another run; `number`: of its iteration, if not the same.

    Raises:
        ConfigError: there is none; says which there are.
    """
    number = recording.iteration if number is None else number
    kind = "iteration" if recording.kind == "training" else "evaluation"
    for other in choose(run_dir, **{kind: number}):
        if other.task == recording.task:
            return other
    tasks = ", ".join(each.task for each in choose(run_dir, evaluation=number))
    raise ConfigError(
        f"{run_dir}: evaluation {number} has no recording of the task {recording.task}, but of "
        f"{tasks}."
    )


def _numbers(found: Sequence[Recording], kind: str) -> str:
    numbers = sorted({each.iteration for each in found if each.kind == kind})
    return ", ".join(map(str, numbers)) or "none"
