"""Prompts and responses as Markdown, for the trackers. In: Rollouts. Out: text that shows them as
they are.
"""

import re
from collections.abc import Sequence

from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.records import Rollout


def samples_markdown(
    rollouts: Sequence[Rollout], tokenizer: Tokenizer, correct: Sequence[bool] | None = None
) -> str:
    """Prompts and responses as text for the trackers, with what a reader judges them by; `correct`:
    marks, where they were graded."""
    parts = []
    for n, rollout in enumerate(rollouts):
        ending = {"stop": "ended", "length": "cut"}[rollout.finish_reason]
        facts = [f"{len(rollout.response_ids)} tokens, {ending}"]
        if rollout.source == "reference":
            facts.append("a reference answer, not the student's")
        if rollout.prompt.answer:
            facts.append(f"answer: {escape_markdown(rollout.prompt.answer)}")
        if correct is not None:
            facts.append("right" if correct[n] else "wrong")
        text = escape_markdown(tokenizer.decode(rollout.response_ids))
        parts.append(
            f"**{escape_markdown(rollout.prompt.text)}**\n\n{text}\n\n_({'; '.join(facts)})_"
        )
    return "\n\n---\n\n".join(parts)


_SPECIAL = re.compile(r"[\\`*_{}\[\]()<>#+\-.!|~=^:&$]|^ +", re.MULTILINE)


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: `3*4*5` is no emphasis, `# 18` no heading, `|` no table,
    and lines end where they end."""
    # Entities: TensorBoard's Markdown takes a backslash before some of these only.
    escaped = _SPECIAL.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), text)
    return escaped.replace("\n", "  \n")
