"""What a teacher and the student have in common, for people to read: tokens, ends, templates."""

from collections.abc import Iterator

from megatron_eopd.config import Config, DataConfig
from megatron_eopd.data.ends import name_tokens
from megatron_eopd.data.run_tokenizers import RunTokenizers
from megatron_eopd.data.templates import choose_template
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.errors import ConfigError


def lines_about(section: str, config: Config, tokenizers: RunTokenizers) -> Iterator[str]:
    """Two lines about the teacher of a section."""
    student, teacher = tokenizers.student, tokenizers.teachers[section]
    yield (
        f"[{section}] has {_size(teacher)}, the student {_size(student)}; the first "
        f"{tokenizers.vocab_size:,} are compared. {_templates(student, teacher, config.data)}"
    )
    swaps = [
        f"{name_tokens(student, [a])} ↔ {name_tokens(student, [b])}"
        for a, b in tokenizers.swaps[section]
    ]
    yield (
        f"[{section}] ends a response with {name_tokens(teacher, teacher.stop_ids)}, the student "
        f"with {name_tokens(student, student.stop_ids)}"
        f"{'; in what the teacher says these trade places: ' if swaps else ''}{', '.join(swaps)}"
    )


def _size(tokenizer: Tokenizer) -> str:
    return f"{len(tokenizer):,} tokens in {tokenizer.vocab_size:,} columns"


def _templates(student: Tokenizer, teacher: Tokenizer, data: DataConfig) -> str:
    if not data.apply_chat_template:
        return "No chat template writes the prompts"
    ours = choose_template(student.path, data.chat_template_name, data.chat_template_file)
    try:
        theirs = choose_template(teacher.path)
    except ConfigError:  # it has none, or none by the usual name
        return "The teacher has no chat template to compare with the student's"
    if ours.text == theirs.text:
        return "Its chat template is the student's"
    return f"Its chat template ({theirs.source}) is another text than the student's ({ours.source})"
