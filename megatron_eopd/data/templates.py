"""Chat templates: where a tokenizer's directory keeps them, and turns into text.

In: a directory, and a name or a file that was chosen. Out: text in which every turn's words stand,
or an error: a template that leaves out the question would still give prompts.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

# The first is private, and the only reading of a template that knows every tag and function which
# transformers adds to Jinja. It is jinja2.meta.find_undeclared_variables in that environment.
from transformers.utils.chat_template_utils import _get_template_variables, render_jinja_template

from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Turn
from megatron_eopd.text_files import read_json_object, read_text

DEFAULT = "default"
_THOUGHT_ENDS = re.compile(r"</(?:\w+:)?(?:think(?:ing)?|thought)>|\[/THINK\]")
"""Behind what an earlier answer thought, in the spellings of several models."""
_SWITCHES = re.compile(r"/(?:no_)?think\b")
"""What SmolLM3's and Nemotron's templates read in a turn, and take out of it."""
_SET_BY_RUN = {"messages", "add_generation_prompt", "continue_final_message"}
_SHOWN = 400
"""Characters of a rendering that an error shows."""


class ChatTemplate:
    def __init__(self, source: str, text: str) -> None:
        """`source`: the file, and the name in it if there are several."""
        self.source = source
        self.text = text
        self._forms: dict[str, Callable[[str], Any]] = {}

    def render(
        self,
        turns: Sequence[Turn],
        special_tokens: Mapping[str, str],
        options: Mapping[str, Any],
        *,
        begin_answer: bool = True,
    ) -> str:
        """`special_tokens`: what the template may call them, `bos_token` and the like; `options`:
        its other variables; `begin_answer`: up to where the assistant is to go on.

        Raises:
            ConfigError: the template does not parse, refuses, leaves out the text of a turn, or
                reads no variable of an option's name.
        """
        self._check_names(special_tokens, options)
        variables = {**special_tokens, **options, "add_generation_prompt": begin_answer}
        content = self._form_for([turn.role for turn in turns], variables)
        rendered = self._render(turns, content, variables)
        self._check_complete(turns, rendered)
        return rendered

    @cached_property
    def variables(self) -> frozenset[str]:
        """All that the template reads, those with a default too."""
        try:
            return _get_template_variables(self.text)
        except TemplateSyntaxError as error:
            lines = self.text.splitlines() or [""]
            raise ConfigError(
                f"{self.source}: the chat template does not parse. Line {error.lineno} of it, "
                f"{lines[min(error.lineno, len(lines)) - 1].strip()[:80]!r}: {error.message} Mend "
                f"it, or choose another with data.chat_template_name or data.chat_template_file."
            ) from None

    def _check_names(self, special_tokens: Mapping[str, str], options: Mapping[str, Any]) -> None:
        """Jinja ignores a variable that no template reads: a typo would be a different run."""
        set_by_run = {*_SET_BY_RUN, *special_tokens}
        if "chat_template" in options:
            raise ConfigError(
                "data.chat_template_kwargs.chat_template: no variable of a template. Choose "
                "another with data.chat_template_name or data.chat_template_file."
            )
        if taken := options.keys() & set_by_run:
            raise ConfigError(
                f"data.chat_template_kwargs.{min(taken)}: the run itself sets this variable of the "
                f"chat template. Leave it out."
            )
        known = self.variables - set_by_run
        # A configuration holds no functions: one stands in for a global of the template's.
        unknown = {name for name, value in options.items() if not callable(value)} - known
        if unknown:
            raise ConfigError(
                f"data.chat_template_kwargs.{min(unknown)}: the chat template of {self.source} "
                f"reads no such variable. It reads {', '.join(sorted(known)) or 'none'}."
            )

    def _form_for(self, roles: Sequence[str], variables: Mapping[str, Any]) -> Callable[[str], Any]:
        """How the template takes a turn's text: as such, or as a list of parts, which is how those
        of models that see images take it. Found with words that no template has of its own: a
        short question may stand in the frame by chance."""
        key = json.dumps([roles, variables], default=str, sort_keys=True)
        if key not in self._forms:
            self._forms[key] = self._find_form(roles, variables)
        return self._forms[key]

    def _find_form(self, roles: Sequence[str], variables: Mapping[str, Any]) -> Callable:
        turns = [Turn(role, f"text-of-message-{i}") for i, role in enumerate(roles)]
        failures = []
        for content in (str, _as_parts):
            try:
                self._check_complete(turns, self._render(turns, content, variables))
            except ConfigError as error:
                failures.append(error)
            else:
                return content
        raise failures[0]

    def _render(
        self, turns: Sequence[Turn], content: Callable[[str], Any], variables: Mapping[str, Any]
    ) -> str:
        messages = [{"role": turn.role, "content": content(turn.content)} for turn in turns]
        try:
            (rendered,), _ = render_jinja_template([messages], chat_template=self.text, **variables)
        # Whatever Python raises inside a template: TypeError, ZeroDivisionError, …
        except Exception as error:
            said = " ".join(str(error).split()) if isinstance(error, TemplateError) else repr(error)
            has_system = any(turn.role == "system" for turn in turns)
            remedy = (
                "Leave out data.system_prompt, or take such turns out with tools/prepare_data.py "
                "--drop-system-turns"
                if has_system and "system" in said.lower()
                else "Set what it asks for in data.chat_template_kwargs"
            )
            raise ConfigError(
                f"{self.source}: the chat template refuses a chat of {_roles(turns)}: {said}. "
                f"{remedy}, or choose another template with data.chat_template_name or "
                f"data.chat_template_file."
            ) from None
        return rendered

    def _check_complete(self, turns: Sequence[Turn], rendered: str) -> None:
        rendered_lines = _with_line_feeds(rendered)
        for number, turn in enumerate(turns, start=1):
            text = turn.content
            if turn.role == "assistant":  # templates of reasoning models drop earlier thoughts
                text = _THOUGHT_ENDS.split(text)[-1]
            parts = _SWITCHES.split(_with_line_feeds(text))
            if not all(_stands_in(rendered_lines, part.strip()) for part in parts):
                raise ConfigError(
                    f"{self.source}: the chat template leaves out the text of message {number} of "
                    f"{len(turns)} ({turn.role}), {text.strip()[:80]!r}. It renders "
                    f"{shorten(rendered, _SHOWN)!r}. Choose another template with "
                    f"data.chat_template_name or data.chat_template_file."
                )


def choose_template(
    directory: Path, name: str | None = None, file: Path | None = None
) -> ChatTemplate:
    """That of `file`; else the directory's of that name; else its default one.

    Raises:
        ConfigError: there is none such, with the names that there are; or a file is damaged.
    """
    if name is not None and file is not None:
        raise ConfigError(
            f"data.chat_template_name={name} and data.chat_template_file={file} both choose a chat "
            f"template. Set one of them."
        )
    if file is not None:
        if not file.is_file():
            raise ConfigError(f"data.chat_template_file={file}: no such file.")
        return ChatTemplate(str(file), read_text(file))
    templates = find_templates(directory)
    if not templates:
        raise ConfigError(
            f"data.apply_chat_template=true, but {directory} has no chat template. Set "
            f"data.apply_chat_template=false, or data.chat_template_file to a template."
        )
    names = ", ".join(sorted(templates))
    if name is not None and name not in templates:
        raise ConfigError(
            f"data.chat_template_name={name}: {directory} has no chat template of that name. It "
            f"has {names}."
        )
    if name is None and DEFAULT not in templates:
        raise ConfigError(
            f"{directory} has chat templates of several names and no default one. Set "
            f"data.chat_template_name to one of {names}."
        )
    return templates[name or DEFAULT]


def find_templates(directory: Path) -> dict[str, ChatTemplate]:
    """Name → template. As in transformers, files of their own come before what stands in
    tokenizer_config.json; a processor's chat_template.json counts where neither is."""
    found: dict[str, ChatTemplate] = {}
    for file in ("chat_template.json", "tokenizer_config.json"):
        path = directory / file
        if path.is_file():
            found |= _in_json(path)
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = ChatTemplate(str(path), read_text(path))
    path = directory / "chat_template.jinja"
    if path.is_file():
        found[DEFAULT] = ChatTemplate(str(path), read_text(path))
    return found


def _in_json(path: Path) -> dict[str, ChatTemplate]:
    value = read_json_object(path).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: ChatTemplate(str(path), value)}
    try:
        # A dict from name to text is how transformers keeps them in memory.
        pairs = (
            value.items()
            if isinstance(value, dict)
            else [(entry["name"], entry["template"]) for entry in value]
        )
        named = {str(name): str(text) for name, text in pairs}
    except (TypeError, KeyError):
        raise ConfigError(
            f"{path}: chat_template is neither a text nor a list of {{name, template}}, but "
            f"{str(value)[:80]}."
        ) from None
    return {name: ChatTemplate(f"{path} ({name})", text) for name, text in named.items()}


def _with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _stands_in(rendered: str, text: str) -> bool:
    """As it is, or as JSON escapes it: some templates write messages so."""
    return text in rendered or any(
        json.dumps(text, ensure_ascii=ascii_only)[1:-1] in rendered for ascii_only in (False, True)
    )


def shorten(text: str, length: int) -> str:
    """Its beginning and end."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]} … {text[-half:]}"


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _roles(turns: Sequence[Turn]) -> str:
    return ", ".join(turn.role for turn in turns)
