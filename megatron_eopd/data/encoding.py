"""Prompts in tokens, as a model reads them. In: rows of text. Out: Prompt."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from megatron_eopd.config import DataConfig
from megatron_eopd.data.prompt_files import Row
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Prompt, Turn

TokenIds = tuple[int, ...]


class PromptEncoder:
    """What makes prompts of rows: one path for training, evaluation and tools."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer) -> None:
        """
        Raises:
            ConfigError: there is no such chat template.
        """
        self._data = data
        self.tokenizer = tokenizer
        """With the chat template that was chosen."""
        if data.apply_chat_template:
            self.tokenizer = tokenizer.with_template(
                data.chat_template_name, data.chat_template_file
            )
        self.share = shared_ids(tokenizer)

    def turns(self, row: Row) -> tuple[Turn, ...]:
        """The whole chat as the model is shown it, the user's question with its suffix last.

        Raises:
            ConfigError: two system turns, or a chat and no template to write it with.
        """
        turns = (*row.context, Turn("user", row.text + self._data.prompt_suffix))
        if self._data.system_prompt is not None:
            if any(turn.role == "system" for turn in row.context):
                raise ConfigError(
                    f"{row.where}: has a system turn, and data.system_prompt is another. Leave the "
                    f"option out, or take such turns out with tools/prepare_data.py "
                    f"--drop-system-turns."
                )
            turns = (Turn("system", self._data.system_prompt), *turns)
        if len(turns) > 1 and not self._data.apply_chat_template:
            raise ConfigError(
                f"{row.where}: a chat ({', '.join(turn.role for turn in turns)}), which only a "
                f"chat template can write. Set data.apply_chat_template=true, or leave out what is "
                f"more than a question: tools/prepare_data.py --single-turn --drop-system-turns."
            )
        return turns

    def ids(self, row: Row) -> TokenIds:
        """
        Raises:
            ConfigError: as `turns`; or the template refuses the chat.
        """
        return self.encode(row.where, self.turns(row))

    def encode(self, where: str, turns: Sequence[Turn]) -> TokenIds:
        """Of what `turns` made, for those who look at the turns themselves.

        Raises:
            ConfigError: the template refuses the chat.
        """
        if not self._data.apply_chat_template:
            return self.tokenizer.encode(turns[-1].content)
        try:
            return self.tokenizer.encode_chat(turns, **self._data.chat_template_kwargs)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def prompt(
        self, index: int, row: Row, teacher_ids: Mapping[str, TokenIds] | None = None
    ) -> Prompt:
        """`text` is the last user turn, with the suffix and without the template; `teacher_ids`:
        what teachers read in its place.

        Raises:
            ConfigError: as `ids`; or nothing is left of the row, or too much.
        """
        turns = self.turns(row)
        prompt_ids = self.share(self.encode(row.where, turns))
        if not 0 < len(prompt_ids) <= self._data.max_prompt_length:
            raise ConfigError(
                f"{row.where}: {len(prompt_ids)} tokens, allowed are 1 to data.max_prompt_length="
                f"{self._data.max_prompt_length}. Shorten the prompt or raise the option."
            )
        text = turns[-1].content
        read = dict(teacher_ids or {})
        return Prompt(index, text, row.answer, prompt_ids, row.teacher, turns[:-1], read)


def shared_ids(tokenizer: Tokenizer) -> Callable[[TokenIds], TokenIds]:
    """The same ids, with one object for each however often it comes: a fresh one takes 28 bytes
    beside the 8 of its place, and a million prompts have a hundred million."""
    objects = list(range(tokenizer.num_ids))
    return lambda ids: tuple(map(objects.__getitem__, ids))


def encode_prompts(rows: Iterable[Row], data: DataConfig, tokenizer: Tokenizer) -> Iterator[Prompt]:
    """Prompts as the model sees them."""
    encoder = PromptEncoder(data, tokenizer)
    for index, row in enumerate(rows):
        yield encoder.prompt(index, row)
