"""Which tokens the loss compares: those that student and teacher both have, by the same id.

In: their tokenizers. Out: how many, or an error that shows the difference. A model's columns past
them are padding, whatever their number: Qwen2.5 has 151,936 columns up to 3B and 152,064 from 7B
on, and 151,665 tokens.
"""

from collections.abc import Iterable, Sequence

from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Prompt


def shared_vocab_size(
    student: Tokenizer,
    teacher: Tokenizer,
    who: str = "teacher",
    swaps: Sequence[tuple[int, int]] = (),
    *,
    exclude_unshared: bool = False,
) -> int:
    """Ids below it are the same tokens in both; they end a response alike, once the teacher's
    `swaps` have traded places. `exclude_unshared`: one tokenizer may have more tokens than the
    other, behind those that they share.

    Raises:
        ConfigError: an id means different tokens, or tokens that a model needs are not shared. The
            loss would still give numbers, and they would mean nothing.
    """
    size = min(student.num_ids, teacher.num_ids)
    if student.digest != teacher.digest:
        _check_extends(student, teacher, who, size, exclude_unshared)
    _check_ends(student, teacher, who, swaps, size)
    return size


def check_fits(tokenizer: Tokenizer, who: str) -> None:
    """Raise ConfigError where its model has no column for an id, or none ends a response: a prompt
    or a stop id without a column must not reach it."""
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


def _check_extends(
    student: Tokenizer, teacher: Tokenizer, who: str, size: int, exclude_unshared: bool
) -> None:
    """Different tokenizers: one must be the other and more, and the user must know it."""
    ours, theirs = tokens_by_id(student), tokens_by_id(teacher)
    both = (
        f"the tokenizers {student.path} (student, {len(student)} tokens) and {teacher.path} "
        f"({who}, {len(teacher)} tokens)"
    )
    differ = [i for i in range(size) if ours.get(i) != theirs.get(i)]
    if differ:
        first = differ[0]
        raise ConfigError(
            f"{both} give tokens different ids, {len(differ)} of {size}: {first} is "
            f"{ours.get(first)!r} to the student and {theirs.get(first)!r} to the {who}. "
            f"{_remedy(student, teacher, who, differ)}"
        )
    if not exclude_unshared:
        longer = max(ours, theirs, key=len)
        more = [longer[i] for i in sorted(longer) if i >= size]
        raise ConfigError(
            f"{both} share their first {size} ids, and one has {len(more)} more: "
            f"{', '.join(more[:8])}{', …' * (len(more) > 8)}. Set "
            f"objective.exclude_unshared_tokens=true to leave these out of both softmaxes and of "
            f"the student's samples, or use models that share a vocabulary."
        )


def _remedy(student: Tokenizer, teacher: Tokenizer, who: str, differ: Iterable[int]) -> str:
    special = {*student.special_tokens().values(), *teacher.special_tokens().values()}
    if not special.issuperset(differ):
        return "Use models that share a vocabulary."
    return (
        f"All of these are special tokens: somebody may have given reserved ones other names. If "
        f"the {who} was trained with the student's ids for all that prompts and answers hold, set "
        f"{who}.tokenizer={student.path}; else use models that share a vocabulary."
    )


def _check_ends(
    student: Tokenizer,
    teacher: Tokenizer,
    who: str,
    swaps: Sequence[tuple[int, int]],
    size: int,
) -> None:
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
    unshared = [i for i in (*student.stop_ids, *place) if i >= size]
    if unshared:
        raise ConfigError(
            f"id {unshared[0]} ends a response and is none of the {size} tokens that student and "
            f"{who} share. Set rollout.stop_token_ids to shared ones."
        )


def tokens_by_id(tokenizer: Tokenizer) -> dict[int, str]:
    return {i: token for token, i in tokenizer.vocabulary().items()}


def check_shared(
    sequences: Iterable[tuple[Prompt, Sequence[int]]], vocab_size: int, tokenizer: Tokenizer
) -> None:
    """Raise ConfigError for a token that the models do not share, in the ids of a prompt or of a
    reference answer to it."""
    if vocab_size == tokenizer.num_ids:
        return
    for prompt, ids in sequences:
        unshared = [i for i in ids if i >= vocab_size]
        if unshared:
            raise ConfigError(
                f"prompt {prompt.index}, {prompt.text[:60]!r}: "
                f"{tokens_by_id(tokenizer)[unshared[0]]!r} (id {unshared[0]}) is none of the "
                f"{vocab_size} tokens that student and teachers share. Take it out of the prompt, "
                f"of its reference answers, or of the chat template."
            )
