"""The samples of one task, on the disk as soon as all of a problem are graded. In: Samples. Out:
the same, problem by problem, also after a kill.

TASK.samples.jsonl has how they were drawn in its first line, then one line a sample. Nothing of
them stays in memory but where they stand, and what became of them.
"""

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from megatron_eopd.errors import ConfigError
from megatron_eopd.evaluation.estimators import Outcome
from megatron_eopd.records import Prompt, Rollout

Json = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A response and what it was judged to be; one line of the file."""

    problem: int
    sample: int
    verdict: str
    answer: str
    """The spelling under which equal answers are equal; empty where there is none."""
    second: bool | None
    """What the second grader says."""
    finish_reason: str
    weight_version: int
    text: str
    response_ids: tuple[int, ...]
    detail: str = ""
    """Of the verdict; see Grade."""

    @classmethod
    def of(cls, row: Json) -> "Sample":
        return cls(**row | {"response_ids": tuple(row["response_ids"])})

    def rollout(self, prompt: Prompt) -> Rollout:
        """To be measured; the engine's log-probabilities are not kept, and nothing reads them."""
        return Rollout(
            prompt=prompt,
            sample_index=self.sample,
            response_ids=self.response_ids,
            response_logprobs=(0.0,) * len(self.response_ids),
            finish_reason=self.finish_reason,
            weight_version=self.weight_version,
        )


class SampleFile:
    """Problems are added in any order, each whole."""

    def __init__(self, path: Path, settings: Json, samples_per_problem: int, *, anew: bool) -> None:
        """What is there is gone on with, unless `anew`.

        Raises:
            ConfigError: it was drawn otherwise, and says how; or somebody else writes there.
        """
        self._count = samples_per_problem
        self._places: dict[int, tuple[int, int]] = {}  # problem → (offset, bytes)
        self._outcomes: dict[int, Outcome] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            self._have_alone(path)
            whole = 0 if anew else self._read(path, settings)
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(whole)
        if whole == 0:
            self._append({"settings": settings})

    def _have_alone(self, path: Path) -> None:
        """Until it is closed."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{path}: another evaluation writes there. Wait for it, or set another --output."
            ) from None

    def _read(self, path: Path, settings: Json) -> int:
        """Returns where the last whole problem ends."""
        self._file.seek(0)
        whole = position = 0
        block: list[Sample] = []
        for number, line in enumerate(self._file, start=1):
            row = _row(line)
            if row is None:
                if self._file.readline():  # a kill cuts the last line short, and no other
                    raise ConfigError(
                        f"{path} line {number}: damaged. Remove the file to draw all anew."
                    )
                break
            position += len(line)
            if number == 1:
                _check_same(path, row.get("settings", {}), settings)
                whole = position
                continue
            block.append(_sample(path, number, row))
            if (block[-1].problem, block[-1].sample) != (block[0].problem, len(block) - 1):
                raise ConfigError(
                    f"{path} line {number}: sample {block[-1].sample} of problem "
                    f"{block[-1].problem}, where sample {len(block) - 1} of problem "
                    f"{block[0].problem} is to be. Remove the file to draw all of it anew."
                )
            if len(block) == self._count:
                self._take(block, whole, position - whole)
                whole, block = position, []
        return whole

    def _take(self, samples: Sequence[Sample], begin: int, num_bytes: int) -> None:
        self._places[samples[0].problem] = (begin, num_bytes)
        self._outcomes[samples[0].problem] = outcome_of(samples)

    def _append(self, *rows: Json) -> tuple[int, int]:
        self._file.seek(0, os.SEEK_END)
        begin = self._file.tell()
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        self._file.write(content)
        self._file.flush()
        return begin, len(content)

    def has(self, problem: int) -> bool:
        return problem in self._places

    def add(self, samples: Sequence[Sample]) -> None:
        """All of one problem, in their order."""
        assert len(samples) == self._count, f"{len(samples)} samples of {self._count}"
        begin, num_bytes = self._append(*map(asdict, samples))
        self._take(samples, begin, num_bytes)

    def read(self, problem: int) -> list[Sample]:
        begin, num_bytes = self._places[problem]
        self._file.seek(begin)
        lines = BytesIO(self._file.read(num_bytes))
        return [Sample.of(json.loads(line)) for line in lines]

    def outcomes(self) -> list[Outcome]:
        """By problem, from the first to the last."""
        return [self._outcomes[problem] for problem in sorted(self._outcomes)]

    def close(self) -> None:
        self._file.close()


def _row(line: bytes) -> Json | None:
    """None of a line that is not whole."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _sample(path: Path, number: int, row: Json) -> Sample:
    try:
        return Sample.of(row)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} line {number}: no sample of an evaluation ({error}). Remove the file."
        ) from None


def outcome_of(samples: Sequence[Sample]) -> Outcome:
    return Outcome(
        verdicts=tuple(s.verdict for s in samples),
        canonical=tuple(s.answer for s in samples),
        second=tuple(s.second for s in samples),
        lengths=tuple(len(s.response_ids) for s in samples),
        cut=tuple(s.finish_reason == "length" for s in samples),
        num_right=None,
    )


def _check_same(path: Path, before: Json, now: Json) -> None:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        told = "; ".join(
            f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names
        )
        raise ConfigError(
            f"{path} holds samples that were drawn otherwise: {told}. Set another --output, or "
            f"remove the file to draw them anew."
        )


class Measured:
    """TASK.measured.jsonl: sums over the tokens of each chunk of problems, which teachers made."""

    def __init__(self, path: Path, settings: Json, *, anew: bool) -> None:
        """What was measured otherwise is measured again: no sample is lost by it."""
        rows = [] if anew else _whole_rows(path)
        is_same = bool(rows) and rows[0].get("settings") == settings
        self._sums = {row["chunk"]: row["sums"] for row in rows[1:]} if is_same else {}
        unfinished = path.with_suffix(".unfinished")
        kept = [{"settings": settings}] + [
            {"chunk": chunk, "sums": sums} for chunk, sums in self._sums.items()
        ]
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in kept))
        unfinished.replace(path)
        self._path = path

    def of(self, chunk: int) -> Json | None:
        return self._sums.get(chunk)

    def add(self, chunk: int, sums: Json) -> None:
        self._sums[chunk] = sums
        with self._path.open("a") as file:
            file.write(json.dumps({"chunk": chunk, "sums": sums}) + "\n")

    def sums(self) -> list[Json]:
        return [self._sums[chunk] for chunk in sorted(self._sums)]


def _whole_rows(path: Path) -> list[Json]:
    rows = []
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        if (row := _row(line)) is None:
            break
        rows.append(row)
    return rows
