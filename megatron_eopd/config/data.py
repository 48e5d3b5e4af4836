"""Options of the prompts."""

from pathlib import Path
from string import Formatter
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from megatron_eopd.config.section import Section

BUILT_IN_TASKS = ("countdown",)


def fields_of_template(template: str) -> list[str]:
    """Names of the columns that it asks for.

    Raises:
        ValueError: braces that name no column.
    """
    fields = []
    for _, name, form, conversion in Formatter().parse(template):
        if name is not None and (not name or form or conversion or name[0].isdigit()):
            raise ValueError(
                f"{{{name}{f'!{conversion}' * bool(conversion)}{f':{form}' * bool(form)}}} names "
                f"no column. Write {{column}}, and {{{{ and }}}} for braces."
            )
        fields += [name] if name is not None else []
    return list(dict.fromkeys(fields))


def check_prompt_template(template: str | None, key: str | None) -> None:
    """
    Raises:
        ValueError: it does not parse, asks for nothing, or a column is named beside it.
    """
    if template is None:
        return
    if key is not None:
        raise ValueError(
            f"one source of the teacher's prompt, and the column {key!r}, which the option named "
            f"…key says, is another. Leave one of the two out."
        )
    try:
        fields = fields_of_template(template)
    except ValueError as error:
        raise ValueError(
            f"{template!r} is no template: {error}. Write {{column}} for a column, and {{{{ and "
            f"}}}} for braces."
        ) from None
    if not fields:
        raise ValueError(
            f"{template!r} names no column, so all prompts would be the same. Write {{prompt}} "
            f"where the question goes."
        )


class DataConfig(Section):
    prompts: str = "countdown"
    """A file with `{"prompt": …, "answer": …}` a line, or a built-in task: `countdown`. JSON Lines,
    a JSON array, both also compressed, or parquet. A prompt is text or a chat of messages, whose
    last user turn is answered; what stands behind that is left off."""
    prompt_key: str | None = None
    """Key under which a line of `prompts` holds its prompt. Default: the first of `prompt`,
    `messages`, `conversations` that has a value in the first line."""
    apply_chat_template: bool = False
    """Write each prompt with the student tokenizer's chat template, as a user turn or the chat that
    it is. Without it no prompt may have more than one turn."""
    chat_template_kwargs: dict[str, Any] = Field({})
    """Variables of the chat template, as a table or one by one, for Qwen3
    `data.chat_template_kwargs.enable_thinking=false`. A name that the template does not read is an
    error."""
    chat_template_name: str | None = None
    """Which of the tokenizer's chat templates, where it has several."""
    chat_template_file: Path | None = None
    """A file whose chat template (Jinja) takes the place of the tokenizer's."""
    system_prompt: str | None = None
    """A system turn before every prompt; `""` is an empty one, which is not the same as none. A
    chat that has one of its own is an error that names its line."""
    prompt_suffix: str = ""
    """Appended to every prompt, before the chat template; in a chat to its last turn. In double
    quotes TOML wants `\\\\boxed`; in single quotes it takes `\\boxed`, and no `\\n`."""
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
    teacher_prompt_key: str | None = None
    """Key under which each line of `prompts` holds what a teacher reads in the place of the prompt,
    text or a chat: with the reference solution, a hint, feedback. The teacher then scores the
    student's response behind that. For all teachers that say nothing else in their own `prompt`."""
    teacher_prompt_template: str | None = None
    """What a teacher reads in the place of the question, made of a line's columns by their names in
    braces: `"{prompt}\\n\\nReference solution: {solution}"`, where `{prompt}` is the question.
    Write {{ and }} for braces. For all teachers that say nothing else in their own `prompt`."""

    @field_validator("teacher_prompt_template")
    @classmethod
    def _is_a_template(cls, value: str | None, info: ValidationInfo) -> str | None:
        check_prompt_template(value, info.data.get("teacher_prompt_key"))
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _has_no_words_for_truth(cls, value: dict[str, Any]) -> dict[str, Any]:
        # `False` is a text to TOML, and any text is true to a template. `none` may be meant: some
        # templates have an effort of that name.
        for name, given in value.items():
            if str(given).lower() in ("true", "false") and isinstance(given, str):
                raise ValueError(
                    f"{name}={given!r} is a text, which a template takes for true. Write "
                    f"{given.lower()}, without quotes."
                )
            if given in ("None", "null"):
                raise ValueError(f"{name}={given!r} is a text. Leave it out.")
        return value

    @field_validator(
        "chat_template_kwargs", "chat_template_name", "chat_template_file", "system_prompt"
    )
    @classmethod
    def _has_a_template(cls, value: Any, info: ValidationInfo) -> Any:
        if value not in (None, {}) and not info.data.get("apply_chat_template"):
            raise ValueError(
                "would be ignored with data.apply_chat_template=false. Set it to true."
            )
        return value

    @field_validator("chat_template_file")
    @classmethod
    def _is_the_only_template(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        name = info.data.get("chat_template_name")
        if value is not None and name is not None:
            raise ValueError(
                f"one template, and data.chat_template_name={name} is another. Set one."
            )
        return value

    @field_validator("prompt_suffix", "system_prompt", "teacher_prompt_template")
    @classmethod
    def _is_what_was_meant(cls, value: str | None) -> str | None:
        # In double quotes "\boxed" is a backspace and "oxed" to TOML, "\text" a tab and "ext".
        control = [c for c in value or "" if ord(c) < 32 and c != "\n"]
        if control:
            raise ValueError(
                f"holds the control character {control[0]!r}. Write each backslash twice, or put "
                f"the text in single quotes."
            )
        return value


class TeacherPromptConfig(Section):
    """How one teacher reads a prompt. What is not given is as in `[data]`."""

    key: str | None = None
    """As `data.teacher_prompt_key`, of this teacher alone."""
    template: str | None = None
    """As `data.teacher_prompt_template`, of this teacher alone."""
    apply_chat_template: bool | None = None
    """Write its prompts with its own tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of that template."""
    chat_template_name: str | None = None
    """Which one, where its tokenizer has several."""
    chat_template_file: Path | None = None
    """A file whose chat template takes the place of its tokenizer's."""
    system_prompt: str | None = None
    """A system turn before every prompt."""
    prompt_suffix: str | None = None
    """Appended to every prompt, or to what the template made of it."""

    @field_validator("template")
    @classmethod
    def _is_a_template(cls, value: str | None, info: ValidationInfo) -> str | None:
        check_prompt_template(value, info.data.get("key"))
        return value

    @property
    def has_source(self) -> bool:
        """Whether it says of what the text is made."""
        return self.key is not None or self.template is not None

    def in_place_of(self, data: DataConfig) -> DataConfig:
        """The options by which this teacher's prompts are written.

        Raises:
            ValueError: they contradict each other.
        """
        own = {
            name: getattr(self, name)
            for name in TeacherPromptConfig.model_fields
            if name not in ("key", "template") and getattr(self, name) is not None
        }
        if self.apply_chat_template is False:
            own = {name: DataConfig.model_fields[name].get_default() for name in OF_CHATS} | own
        if self.has_source:
            own |= {"teacher_prompt_key": self.key, "teacher_prompt_template": self.template}
        if "chat_template_name" in own or "chat_template_file" in own:
            own = {"chat_template_name": None, "chat_template_file": None} | own
        return DataConfig.model_validate(data.model_dump() | own)


OF_CHATS = ("chat_template_kwargs", "chat_template_name", "chat_template_file", "system_prompt")
"""Options that only a chat template reads."""
