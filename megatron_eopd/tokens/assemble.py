"""A TokenRecord from what all ranks have taken down. In: columns in no order, their rollouts."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_eopd.config import Config
from megatron_eopd.records import ALL_TEACHERS, DEFAULT_TEACHER, LOWEST, Rollout
from megatron_eopd.tokens.file import unfinished_of, write_tokens
from megatron_eopd.tokens.notes import Columns
from megatron_eopd.tokens.record import (
    NOTABLE_KL,
    SIGNALS,
    About,
    Piece,
    RecordedPrompt,
    RecordedResponse,
    TokenRecord,
)

IMPOSSIBLE = LOWEST / 1e6
"""A log-probability below it is that of a token which a model cannot write."""


def assemble(
    about: About,
    rollouts: Sequence[Rollout],
    columns: Columns,
    piece: Callable[[int], tuple[bytes, bool]],
    *,
    steps: Sequence[int],
    verdicts: Sequence[str] = (),
) -> TokenRecord:
    """`rollouts`: the chosen ones, whose numbers the columns have; `piece`: of the tokenizer;
    `steps`, `verdicts`: of each rollout."""
    starts = np.cumsum([0, *(len(r.response_ids) for r in rollouts)])
    places = starts[columns["response"]] + columns["token"]
    order = np.argsort(places)
    missing = starts[-1] - len(order)
    assert not missing and (places[order] == np.arange(starts[-1])).all(), f"{missing} missing"
    sorted_columns = {name: values[order] for name, values in columns.items()}
    prompts, numbers = _prompts(rollouts, piece)
    has_top = np.ones(len(order), bool)
    if about.top_tokens == "notable":
        has_top = sorted_columns["teacher_entropy"] >= sorted_columns["threshold"]
        has_top |= sorted_columns["reverse_kl"] >= NOTABLE_KL
    ids_T = np.array([i for r in rollouts for i in r.response_ids], np.int32)
    top_ids_GK = sorted_columns["top_ids_NK"][has_top].astype(np.int32)
    known = {*ids_T.tolist(), *top_ids_GK.flatten().tolist()} - {-1}
    known |= {i for prompt in prompts for i in prompt.ids}
    verdicts = verdicts or [""] * len(rollouts)
    return TokenRecord(
        about=about,
        prompts=prompts,
        responses=tuple(
            RecordedResponse(
                prompt=number,
                sample_index=rollout.sample_index,
                length=len(rollout.response_ids),
                finish_reason=rollout.finish_reason,
                source=rollout.source,
                step=step,
                verdict=verdict,
            )
            for rollout, number, step, verdict in zip(
                rollouts, numbers, steps, verdicts, strict=True
            )
        ),
        ids_T=ids_T,
        signals={name: _float32(sorted_columns[name]) for name in SIGNALS},
        student_rank_T=sorted_columns["student_rank_N"].astype(np.int32),
        teacher_rank_T=sorted_columns["teacher_rank_N"].astype(np.int32),
        top_rows_G=np.flatnonzero(has_top).astype(np.int32),
        top_ids_GK=top_ids_GK,
        top_student_logprobs_GK=_float32(sorted_columns["top_student_logprobs_NK"][has_top]),
        top_teacher_logprobs_GK=_float32(sorted_columns["top_teacher_logprobs_NK"][has_top]),
        pieces={i: Piece(*piece(i)) for i in sorted(known)},
    )


def keep_record(path: Path, make: Callable[[], TokenRecord], tell: Callable[[str], None]) -> None:
    """Onto the disk. Whatever is wrong with a recording is told, and costs the run nothing else."""
    try:
        write_tokens(path, make())
    except Exception as error:
        with suppress(OSError):
            unfinished_of(path).unlink(missing_ok=True)
        tell(f"WARNING: {path} could not be written ({type(error).__name__}: {error}).")


def about(
    config: Config,
    kind: Literal["training", "evaluation"],
    iteration: int,
    columns: Columns,
    task: str = "",
) -> About:
    objective, in_training = config.objective, kind == "training"
    return About(
        kind=kind,
        iteration=iteration,
        task=task,
        objective=objective.name,
        threshold=float(np.median(columns["threshold"])),
        gate=objective.formula.gate,
        student=str(config.student.hf_path),
        teachers={name: str(each.hf_path) for name, each in config.all_teachers.items()},
        temperature=config.rollout.temperature if in_training else config.evaluation_temperature,
        payload=config.teacher.payload,
        top_tokens=config.logging.record_top_tokens,
    )


def _prompts(
    rollouts: Sequence[Rollout], piece: Callable[[int], tuple[bytes, bool]]
) -> tuple[tuple[RecordedPrompt, ...], list[int]]:
    """Each once, and which of them each rollout answers."""
    found: dict[tuple[int, tuple[int, ...]], RecordedPrompt] = {}
    keys = []
    for rollout in rollouts:
        prompt = rollout.prompt
        key = (prompt.index, prompt.prompt_ids)
        # Of several teachers the first one is taken down.
        noted = DEFAULT_TEACHER if prompt.teacher == ALL_TEACHERS else prompt.teacher
        read = b"".join(piece(i)[0] for i in prompt.teacher_ids.get(noted, ()))
        found[key] = RecordedPrompt(
            prompt.index,
            prompt.text,
            prompt.prompt_ids,
            prompt.answer,
            prompt.teacher,
            read.decode(errors="replace"),
        )
        keys.append(key)
    numbers = {key: n for n, key in enumerate(found)}
    return tuple(found.values()), [numbers[key] for key in keys]


def _float32(values: np.ndarray) -> np.ndarray:
    """With −∞ for what cannot be written."""
    return np.where(values < IMPOSSIBLE, -np.inf, values).astype(np.float32)
