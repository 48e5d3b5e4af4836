"""What a teacher reads in the place of the student's prompt. In: rows. Out: token ids, or none
where it reads the same as the student.

A teacher may be shown more than the student: the solution, a hint, feedback; or the same question
by another chat template. Its prompt comes from a column of the line or from a template over all of
them, and is written with the teacher's own tokenizer. The response behind it is the student's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from string import Formatter
from typing import Any, TypeVar

from megatron_eopd.config import Config, DataConfig
from megatron_eopd.config.data import fields_of_template
from megatron_eopd.data.chats import is_blank, is_unicode
from megatron_eopd.data.columns import ABSENT, look_up
from megatron_eopd.data.encoding import PromptEncoder, TokenIds
from megatron_eopd.data.prompt_files import Row, places, read_prompt
from megatron_eopd.data.prompt_warnings import SpecialTexts, clock_warnings
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import ALL_TEACHERS, DEFAULT_TEACHER, Turn, teacher_name

Found = TypeVar("Found")

QUESTION = "prompt"
"""What a template calls the text of the question, whatever its column is called."""
TEACHER_PROMPT = "teacher_prompt"
"""A column of this name that no option reads is told."""


class TeacherPrompts:
    """Of one teacher."""

    def __init__(
        self,
        section: str,
        data: DataConfig,
        tokenizer: Tokenizer,
        source: str = "data.teacher_prompt_",
    ) -> None:
        """`data`: the options by which this teacher's prompts are written; `tokenizer`: its own;
        `source`: what the options of its text begin with, for messages."""
        self._section, self._data, self._source = section, data, source
        self._encoder = self._told(lambda: PromptEncoder(data, tokenizer))
        self._template = data.teacher_prompt_template
        key = data.teacher_prompt_key
        self._names = [key] if key else fields_of_template(self._template or f"{{{QUESTION}}}")
        self._special = SpecialTexts(tokenizer)
        self._num_cut = 0
        self._last: tuple[Turn, ...] | None = None
        """Of the prompts, which stands for all."""
        self._missing: dict[str, list[str]] = {}
        """Column → the rows that lack it."""
        self._known: set[str] = set()

    def lacking(self, row: Row) -> list[str]:
        """The columns that this teacher's prompt is made of and the row has not."""
        return [name for name in self._names if self._text(row, name) is None]

    def ids(self, row: Row) -> TokenIds | None:
        """None where a column is missing, which `check` then tells.

        Raises:
            ConfigError: as PromptEncoder.ids.
        """
        lacking = self.lacking(row)
        self._known.update(row.columns)
        for name in lacking:
            self._missing.setdefault(name, []).append(row.where)
        return None if lacking else self._told(lambda: self._ids(self._as_read(row)))

    def plain_ids(self, row: Row) -> TokenIds:
        """Of the question alone, as this teacher's template writes it."""
        return self._told(lambda: self._ids(row))

    def _ids(self, row: Row) -> TokenIds:
        self._last = self._encoder.turns(row)
        self._special.look_at(row.where, (turn.content for turn in self._last))
        ids = self._encoder.encode(row.where, self._last)
        if not ids:  # then no token would predict the first one of a response
            raise ConfigError(f"{row.where}: the teacher's prompt comes out as no token at all.")
        return self._encoder.share(ids)

    def check(self) -> None:
        """
        Raises:
            ConfigError: rows that lack a column; all of them.
        """
        if not self._missing:
            return
        told = [f"{name} in {places(wheres)}" for name, wheres in self._missing.items()]
        option = f"{self._source}template={self._template!r}"
        if self._template is None:
            option = f"{self._source}key={self._data.teacher_prompt_key}"
        known = {*self._known, QUESTION}
        near = {name: get_close_matches(name, known, 1) for name in self._missing}
        guess = "".join(f" Did you mean {match[0]}?" for match in near.values() if match)
        raise ConfigError(
            f"[{self._section}] {option}: there is no text for {'; '.join(told)}. Columns are "
            f"{', '.join(sorted(self._known)) or 'none'}, and {{{QUESTION}}} is the question."
            f"{guess} Correct the name, add what is missing, or take these lines out; "
            f"tools/prepare_data.py --keep copies a column."
        )

    def warnings(self) -> list[str]:
        """What a person should look at."""
        found = self._special.warnings(f"prompts of [{self._section}]")
        if self._template is not None and QUESTION not in self._names:
            found.append(
                f"[{self._section}] reads {self._template!r}, in which the question is not. Write "
                f"{{{QUESTION}}} where it goes; in a shell put the whole option in single quotes."
            )
        if "\\n" in (self._template or ""):
            found.append(
                f"[{self._section}] reads {self._template!r} with a backslash and an n in it, "
                f"which is no line feed. Write it in a TOML file in double quotes, or as $'…' in a "
                f"shell."
            )
        if self._last is not None and self._data.apply_chat_template:
            options = self._data.chat_template_kwargs
            found += clock_warnings(self._encoder.tokenizer, self._last, **options)
        if self._num_cut:
            found.append(
                f"{self._num_cut} chats of [{self._section}] went on behind the question, and were "
                f"cut there: the student's response follows it."
            )
        return found

    def _text(self, row: Row, name: str) -> Any:
        """What a column says; None where it says nothing."""
        if name == QUESTION and self._data.teacher_prompt_key is None:
            return row.text
        value = look_up(row.columns, name)
        if value is ABSENT or value is None or value != value:  # parquet has NaN for nothing
            return None
        if self._data.teacher_prompt_key is None and not isinstance(value, str | int | float):
            return None
        return None if isinstance(value, str) and is_blank(value) else value

    def _as_read(self, row: Row) -> Row:
        """The row with the teacher's question in the place of the student's."""
        key = self._data.teacher_prompt_key
        if key is not None:
            chat = read_prompt(row.where, {**row.columns, key: self._text(row, key)}, key)
            self._num_cut += chat.is_cut
            row = row._replace(text=chat.text, context=tuple(Turn(*t) for t in chat.context))
        elif self._template is not None:
            texts = {name: self._text(row, name) for name in self._names}
            row = row._replace(text=_Filling().vformat(self._template, (), texts))
        if not all(is_unicode(turn.content) for turn in (*row.context, Turn("user", row.text))):
            raise ConfigError(f"{row.where}: the teacher's prompt is not valid Unicode.")
        return row

    def _told(self, work: Callable[[], Found]) -> Found:
        try:
            return work()
        except ConfigError as error:
            raise ConfigError(
                f"[{self._section}] its prompts, by data.* and, in their place, "
                f"{self._section}.prompt.*: {error}"
            ) from None


class _Filling(Formatter):
    """As str.format, but that a dot is a part of a name."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[field_name], field_name


def prompts_of_teachers(config: Config, tokenizers: Mapping[str, Tokenizer]) -> "PromptsOfTeachers":
    """`tokenizers` by section."""
    data, found = config.data, {}
    for section, teacher in config.all_teachers.items():
        if teacher_name(section) in shown_more(config):
            own = teacher.prompt.in_place_of(data) if teacher.prompt else data
            is_own = teacher.prompt is not None and teacher.prompt.has_source
            source = f"{section}.prompt." if is_own else "data.teacher_prompt_"
            tokenizer = tokenizers[section]
            found[teacher_name(section)] = TeacherPrompts(section, own, tokenizer, source)
    return PromptsOfTeachers(found)


def default_teacher(config: Config) -> str:
    """Who scores the prompts that name no teacher."""
    return DEFAULT_TEACHER if config.objective.teacher_mixture == "none" else ALL_TEACHERS


def names_of_teachers(config: Config) -> list[str]:
    """What a prompt may name, the default first."""
    names = [DEFAULT_TEACHER, *config.teachers]
    return names if default_teacher(config) in names else [ALL_TEACHERS, *names]


def shown_more(config: Config) -> list[str]:
    """Teachers whose prompts are written for them, whether or not they come out as the student's
    do."""
    data = config.data
    is_for_all = data.teacher_prompt_key is not None or data.teacher_prompt_template is not None
    return [
        teacher_name(section)
        for section, teacher in config.all_teachers.items()
        if teacher.prompt is not None or is_for_all
    ]


@dataclass
class PromptsOfTeachers:
    """Of all teachers that read another prompt than the student; the others are not in it."""

    by_name: Mapping[str, TeacherPrompts] = field(default_factory=dict)
    num_unread: int = 0
    """Rows with a column for teachers that no option reads."""
    plain: list[str] = field(default_factory=list)
    """What is to be said of evaluations whose problems a teacher reads without that."""

    def ids(self, row: Row) -> dict[str, TokenIds]:
        """Of the teachers that score the row's responses."""
        self.num_unread += TEACHER_PROMPT in row.columns and not self.by_name
        read = {name: own.ids(row) for name, own in self._of(row).items()}
        return {name: ids for name, ids in read.items() if ids is not None}

    def _of(self, row: Row) -> dict[str, TeacherPrompts]:
        return {
            name: own for name, own in self.by_name.items() if row.teacher in (name, ALL_TEACHERS)
        }

    def of_problems(self, task: str, rows: Sequence[Row]) -> list[dict[str, TokenIds]]:
        """As `ids` of an evaluation's problems. Where they have not all that a prompt is made of,
        the teacher reads the question alone, by its own template."""
        lacking = {
            name: sorted({column for row in rows for column in own.lacking(row)})
            for name, own in self.by_name.items()
        }
        for name, columns in lacking.items():
            if columns:
                self.plain.append(
                    f"evaluation on {task}: not all of its problems have {', '.join(columns)}, so "
                    f"the teacher {name!r} reads the questions alone, and divergences are to that."
                )
        return [
            {
                name: own.plain_ids(row) if lacking[name] else own.ids(row)
                for name, own in self._of(row).items()
            }
            for row in rows
        ]

    def check(self) -> None:
        """
        Raises:
            ConfigError: rows that lack what the first such teacher's prompt is made of.
        """
        for own in self.by_name.values():
            own.check()

    def warnings(self) -> list[str]:
        """What nobody can tell to be wrong, and a person should look at."""
        found = [*self.plain, *(text for own in self.by_name.values() for text in own.warnings())]
        if self.num_unread:
            found.append(
                f"{self.num_unread} lines have a {TEACHER_PROMPT}, and no option reads it: "
                f"teachers see the student's prompt. Set data.teacher_prompt_key={TEACHER_PROMPT}."
            )
        return found
