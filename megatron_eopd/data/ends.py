"""Whether answers will end where the models end them. In: tokenizers. Out: warnings, for people.

None of this is wrong for certain, and none shows in the loss: an answer that does not end runs on
to its greatest length, and the models are compared on what they write there.
"""

from collections.abc import Iterable
from typing import Any

from megatron_eopd.data.tokenizer_base import Tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Turn

_QUESTION, _ANSWER, _NEXT = "text-of-question", "text-of-answer", "text-of-next-question"


def end_of_turn_warnings(tokenizer: Tokenizer, **options: Any) -> list[str]:
    """What its chat template puts behind an answer should end one; `options` as `encode_chat`'s.

    Base models are the usual case: `eos_token_id` is <|endoftext|>, and the template, which came
    with the tokenizer of the instructed model, ends turns with <|im_end|>.
    """
    try:
        behind = _behind_an_answer(tokenizer, options)
    except ConfigError as error:
        return [f"whether its chat template ends an answer as the run does is not known: {error}"]
    ids = tokenizer.encode_response(behind)
    if not ids or set(ids) & set(tokenizer.stop_ids):
        return []
    is_special = not tokenizer.decode(ids[:1])
    remedy = (
        f"Set rollout.stop_token_ids={[*tokenizer.stop_ids, ids[0]]}."
        if is_special
        else "That is no token of its own: choose another template with data.chat_template_file."
    )
    return [
        f"the chat template of {tokenizer.path} ends an answer with "
        f"{name_tokens(tokenizer, ids[:1]) if is_special else repr(behind[:40])}, and a response "
        f"ends with {name_tokens(tokenizer, tokenizer.stop_ids)} alone: a model that writes what "
        f"the template has there goes on behind it, up to rollout.max_response_length. {remedy}"
    ]


def _behind_an_answer(tokenizer: Tokenizer, options: dict[str, Any]) -> str:
    """What the template writes there, before a next turn where it takes no answer for the last."""
    turns = [Turn("user", _QUESTION), Turn("assistant", _ANSWER), Turn("user", _NEXT)]

    def render(shown: list[Turn]) -> str:
        rendered = tokenizer.render_chat(shown, begin_answer=False, **options)
        return rendered.rpartition(_ANSWER)[2].partition(_NEXT)[0].strip()

    try:
        return render(turns[:2])
    except ConfigError as refusal:
        try:
            return render(turns)
        except ConfigError:
            raise refusal from None


def stop_id_warnings(student: Tokenizer, teacher: Tokenizer, who: str = "teacher") -> list[str]:
    """Where rollout.stop_token_ids and the models' own files differ. With `eos_token_map` the
    comparison of vocabularies has seen to it, and this is not asked."""
    warnings = []
    stop_ids = student.stop_ids
    never = [i for i in stop_ids if i not in teacher.own_stop_ids]
    if never and teacher.own_stop_ids:
        warnings.append(
            f"a response may end with {name_tokens(student, never)}, and by its own files the "
            f"{who} {teacher.model_path} ends with {name_tokens(teacher, teacher.own_stop_ids)} "
            f"alone: it may never write the former, and would score every such end wrongly. If "
            f"both mean the same, set {who}.eos_token_map; else take it out of "
            f"rollout.stop_token_ids."
        )
    for name, model in (("student", student), (who, teacher)):
        other = [i for i in model.own_stop_ids if i not in stop_ids]
        if other:
            warnings.append(
                f"the {name} {model.model_path} ends a text with {name_tokens(model, other)}, "
                f"which is not among rollout.stop_token_ids={list(stop_ids)}: a response goes on "
                f"behind it. Set rollout.stop_token_ids={[*stop_ids, *other]}."
            )
    return warnings


def name_tokens(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """`151645 <|im_end|>, …`."""
    return ", ".join(f"{i} {tokenizer.show([i])}" for i in ids)
