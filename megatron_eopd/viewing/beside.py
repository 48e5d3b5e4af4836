"""Two recordings as one, in which the responses to the same prompts stand together."""

from dataclasses import replace

import numpy as np

from megatron_eopd.errors import ConfigError
from megatron_eopd.tokens.record import TokenRecord


def beside(a: TokenRecord, b: TokenRecord) -> TokenRecord:
    """The responses of `a`, and behind them those of `b` to prompts that `a` has too. What it is
    about, and each prompt's answer, are those of `a`.

    Raises:
        ConfigError: they are of different tasks, or share no prompt.
    """
    if a.about.task != b.about.task:
        raise ConfigError(
            f"of different tasks, {a.about.task or 'training'} and {b.about.task or 'training'}: "
            f"nothing to compare."
        )
    places = {prompt.ids: place for place, prompt in enumerate(a.prompts)}
    new_places = [places.get(b.prompts[r.prompt].ids) for r in b.responses]
    is_kept = np.array([place is not None for place in new_places], bool)
    if not is_kept.any():
        raise ConfigError(
            f"the recordings share no prompt, of {len(a.prompts)} and {len(b.prompts)}. Compare "
            f"runs with the same data.prompts, templates and seed at the same iteration, or "
            f"evaluations on the same task."
        )
    is_kept_T = np.repeat(is_kept, [r.length for r in b.responses])
    is_kept_G = is_kept_T[b.top_rows_G]
    new_rows_T = (len(a.ids_T) + is_kept_T.cumsum() - 1).astype(np.int32)

    def of_tokens(first_T: np.ndarray, second_T: np.ndarray) -> np.ndarray:
        return np.concatenate([first_T, second_T[is_kept_T]])

    def of_rows(name: str) -> np.ndarray:
        return np.concatenate([getattr(a, name), getattr(b, name)[is_kept_G]])

    both = zip(b.responses, new_places, strict=True)
    return replace(
        a,
        responses=(*a.responses, *(r._replace(prompt=p) for r, p in both if p is not None)),
        ids_T=of_tokens(a.ids_T, b.ids_T),
        signals={name: of_tokens(v, b.signals[name]) for name, v in a.signals.items()},
        student_rank_T=of_tokens(a.student_rank_T, b.student_rank_T),
        teacher_rank_T=of_tokens(a.teacher_rank_T, b.teacher_rank_T),
        top_rows_G=np.concatenate([a.top_rows_G, new_rows_T[b.top_rows_G[is_kept_G]]]),
        top_ids_GK=of_rows("top_ids_GK"),
        top_student_logprobs_GK=of_rows("top_student_logprobs_GK"),
        top_teacher_logprobs_GK=of_rows("top_teacher_logprobs_GK"),
        pieces=b.pieces | a.pieces,
    )
