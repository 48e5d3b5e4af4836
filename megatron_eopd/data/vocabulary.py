"""Whether student and teacher speak of the same tokens.

In: both tokenizers. Out: nothing, or an error that shows the difference.
"""

from collections.abc import Sequence

from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.errors import ConfigError


def check_same_vocabulary(
    student: Tokenizer,
    teacher: Tokenizer,
    who: str = "teacher",
    swaps: Sequence[tuple[int, int]] = (),
) -> None:
    """Raise ConfigError unless teacher and student give every token the same id, have columns for
    all of them, and end a response alike, once the teacher's `swaps` have traded places.

    The loss compares the two distributions column by column; with different vocabularies it would
    still give numbers, and they would mean nothing.
    """
    if student.vocab_size != teacher.vocab_size:
        raise ConfigError(
            f"vocab_size is {student.vocab_size} in {student.model_path} (student) and "
            f"{teacher.vocab_size} in {teacher.model_path} ({who}). Distillation compares them "
            f"column by column: use models that share a vocabulary."
        )
    for model, tokenizer in (("student", student), (who, teacher)):
        _check_fits(model, tokenizer)
    if student.digest != teacher.digest:
        raise ConfigError(
            f"the tokenizers {student.path} (student, {len(student)} tokens) and {teacher.path} "
            f"({who}, {len(teacher)} tokens) give tokens different ids. Use models that share a "
            f"vocabulary."
        )
    place = {a: b for pair in swaps for a, b in (pair, pair[::-1])}
    ends = {place.get(token, token) for token in student.stop_ids}
    never = ends - set(teacher.stop_ids) if swaps else ends ^ set(teacher.stop_ids)
    if never:
        raise ConfigError(
            f"the student ends a response with ids {student.stop_ids}, the {who} with "
            f"{teacher.stop_ids}{f' (traded places: {place})' if swaps else ''}: at every end of a "
            f"response the teacher would score a token it never writes. "
            f"{'Correct' if swaps else 'Set'} {who}.eos_token_map to what the teacher writes "
            f"instead, or set rollout.stop_token_ids to what shall end a response of both."
        )


def _check_fits(who: str, tokenizer: Tokenizer) -> None:
    """A prompt or a stop id that the model has no column for must not reach it."""
    if tokenizer.num_ids > tokenizer.vocab_size:
        raise ConfigError(
            f"the ids of the {who}'s tokenizer {tokenizer.path} go up to {tokenizer.num_ids - 1}, "
            f"but vocab_size is {tokenizer.vocab_size} in {tokenizer.model_path}/config.json. Set "
            f"{who}.tokenizer to the one that the model was trained with."
        )
    outside = [i for i in tokenizer.stop_ids if not 0 <= i < tokenizer.num_ids]
    if outside:
        raise ConfigError(
            f"a response of the {who} would end with id {outside[0]}, but the ids of "
            f"{tokenizer.path} are 0 to {tokenizer.num_ids - 1}. Set rollout.stop_token_ids."
        )
