"""Rollouts on disk, one jsonl file per iteration: to be read by a person, and to be replayed.

A replayed batch lets two layouts be compared on the same samples, and turns a report of a bad step
into a test.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_eopd.config import ConfigError
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.records import Prompt, Rollout


def rollout_file(directory: Path, iteration: int) -> Path:
    return directory / f"{iteration:06d}.jsonl"


def write_rollouts(path: Path, rollouts: Sequence[Rollout], tokenizer: Tokenizer) -> None:
    """The file appears whole or not at all. `response_text` is for the reader; ids are the data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w") as file:
        for rollout in rollouts:
            row = {"response_text": tokenizer.decode(rollout.response_ids)}
            file.write(json.dumps(row | dataclasses.asdict(rollout)) + "\n")
    os.replace(unfinished, path)


def read_rollouts(path: Path) -> list[Rollout]:
    """
    Raises:
        ConfigError: the file is missing, or a line of it is no rollout (which one).
    """
    if not path.is_file():
        raise ConfigError(
            f"{path}: no recorded rollouts for this iteration. Record them with "
            f"rollout.record=true, or lower training.train_iters."
        )
    lines = path.read_text().splitlines()
    return [_rollout(f"{path} line {n}", line) for n, line in enumerate(lines, start=1)]


def _rollout(where: str, line: str) -> Rollout:
    try:
        row = json.loads(line)
        row.pop("response_text", None)
        prompt = row.pop("prompt")
        prompt["prompt_ids"] = tuple(prompt["prompt_ids"])
        row["response_ids"] = tuple(row["response_ids"])
        row["response_logprobs"] = tuple(row["response_logprobs"])
        return Rollout(prompt=Prompt(**prompt), **row)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: not a recorded rollout ({error}): {line[:80]!r}") from None
