"""Options of the prompts."""

from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from megatron_eopd.config.section import Section

BUILT_IN_TASKS = ("countdown",)


class DataConfig(Section):
    prompts: str = "countdown"
    """A jsonl file with `{"prompt": …, "answer": …}` a line, or a built-in task: `countdown`."""
    apply_chat_template: bool = False
    """Wrap each prompt as a user turn of the student tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] = Field({})
    """Variables of the chat template, as a table or one by one, for Qwen3
    `data.chat_template_kwargs.enable_thinking=false`. A name that the template does not read is an
    error."""
    prompt_suffix: str = ""
    """Appended to every prompt, before the chat template. In double quotes TOML wants `\\\\boxed`;
    in single quotes it takes `\\boxed`, and no `\\n`."""
    max_prompt_length: int = Field(1024, gt=0)
    """In tokens; a longer prompt is an error that names its line."""
    shuffle: bool = True
    """Draw prompts in a seeded random order, anew each epoch."""
    response_key: str | None = None
    """Key under which a line of `prompts` holds a reference answer, or a list of several, for
    `rollout.reference_fraction`. tools/generate.py has a teacher write them."""
    teacher_key: str = "teacher"
    """Key under which a line of `prompts` names its teacher, one of `[teachers.NAME]`. A line
    without it has the one of `[teacher]`."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _has_a_template(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and not info.data.get("apply_chat_template"):
            raise ValueError(
                "would be ignored with data.apply_chat_template=false. Set it to true."
            )
        return value

    @field_validator("prompt_suffix")
    @classmethod
    def _is_what_was_meant(cls, value: str) -> str:
        # In double quotes "\boxed" is a backspace and "oxed" to TOML, "\text" a tab and "ext".
        control = [c for c in value if ord(c) < 32 and c != "\n"]
        if control:
            raise ValueError(
                f"holds the control character {control[0]!r}. Write each backslash twice, or put "
                f"the text in single quotes."
            )
        return value
