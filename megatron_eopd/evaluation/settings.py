"""What the figures of an evaluation depend on beside the weights. In: Config, problems. Out: names
and values, which reports and sample files carry and comparisons hold against each other.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_eopd.checkpoints.files import CHECKSUMS, DONE
from megatron_eopd.config import Config, TeacherConfig
from megatron_eopd.data.encoding import PromptEncoder
from megatron_eopd.data.prompt_files import Row
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.evaluation.problems import ProblemSet
from megatron_eopd.model_paths import resolve_checkpoint
from megatron_eopd.models.megatron_config import uses_transformer_engine
from megatron_eopd.records import teacher_name

Json = dict[str, Any]
NUM_PIECES, PIECE_BYTES = 64, 16 * 2**10
OF_MEMORY_ALONE = {"head", "head_chunk_size", "inplace_backward"}
"""Options of the loss that change no figure."""
WHERE_IT_SITS = {
    "placement",
    "world_size",
    "parallel",
    "microbatches_per_exchange",
    "offload",
    "check",
}
"""Options of a teacher that change no figure."""
TOLD_APART = {"hf_path", "dtype", "prompt"}
"""Those for which there is something surer: files, the type that is meant, tokens."""


def sampling_settings(
    problems: ProblemSet, config: Config, tokenizer: Tokenizer, engine: str
) -> Json:
    options = config.evaluation
    return {
        "task": problems.name,
        "num_problems": len(problems.problems),
        "num_samples": options.samples_per_problem,
        "temperature": config.evaluation_temperature,
        "top_p": options.top_p,
        "max_response_length": config.evaluation_response_length,
        "seed": options.seed,
        "prompts": problems.digest,
        "chat_template": template_digest(config, tokenizer),
        "tokenizer": tokenizer.digest,
        "stop_ids": list(tokenizer.stop_ids),
        "engine": engine,
        "dtype": config.dtype_of(config.rollout),
        "graders": problems.task.graders(),
        "grading_timeout_s": options.grading_timeout_s,
    }


def measuring_settings(
    problems: ProblemSet, config: Config, chunk_size: int, checkpoint: Path | None
) -> Json:
    """Of divergences. `checkpoint`: which holds the teachers that follow the student; None where
    they are as they began, or as a run that goes on has them."""
    follows = any(teacher.follows for teacher in config.all_teachers.values())
    return {
        "teachers": {
            section: _teacher(teacher, config) | {"prompts": _prompts_digest(problems, section)}
            for section, teacher in config.all_teachers.items()
        },
        "followers": model_identity(checkpoint)["digest"] if follows and checkpoint else None,
        "objective": config.objective.model_dump(mode="json", exclude=OF_MEMORY_ALONE),
        "student_temperature": config.student_temperature,
        "teacher_temperature": config.teacher_temperature,
        "dtype": config.model.dtype,
        "transformer_engine": uses_transformer_engine(config.model),
        "problems_at_once": chunk_size,
    }


def _teacher(teacher: TeacherConfig, config: Config) -> Json:
    return {
        **teacher.model_dump(mode="json", exclude=WHERE_IT_SITS | TOLD_APART),
        "model": model_identity(teacher.hf_path),
        "dtype": config.dtype_of(teacher),
    }


def _prompts_digest(problems: ProblemSet, section: str) -> str:
    """Of the tokens that a teacher reads, and of which problems it scores."""
    name = teacher_name(section)
    read = [p.ids_for(name) if p.is_scored_by(name) else None for p in problems.prompts]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def template_digest(config: Config, tokenizer: Tokenizer) -> str:
    """Of a question as a model reads it, in text: equal for models of one family."""
    encoder = PromptEncoder(config.data, tokenizer)
    turns = encoder.turns(Row("", "QUESTION"))
    text = turns[-1].content
    if config.data.apply_chat_template:
        text = encoder.tokenizer.render_chat(turns, **config.data.chat_template_kwargs)
    return hashlib.sha256(text.encode()).hexdigest()


def model_identity(path: Path) -> Json:
    """Where it is, and what changes when its weights do, but not when it is copied: a checkpoint's
    own sums, of other models what a look at each file finds."""
    directory = resolve_checkpoint(path)
    told, sums = {"path": str(path.resolve())}, directory / CHECKSUMS
    if (directory / DONE).is_file() and sums.is_file():
        return told | {"digest": hashlib.sha256(sums.read_bytes()).hexdigest()}
    digest = hashlib.sha256()
    for file in sorted(path for path in directory.iterdir() if path.is_file()):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for piece in _spread_pieces(file):
            digest.update(piece)
    return told | {"digest": digest.hexdigest()}


def _spread_pieces(path: Path) -> Iterator[bytes]:
    """A file of gigabytes is not read for its name; training changes nearly every byte of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(NUM_PIECES):
            file.seek(max(0, size - PIECE_BYTES) * number // (NUM_PIECES - 1))
            yield file.read(PIECE_BYTES)
