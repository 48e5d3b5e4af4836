"""The tokenizers of a run. In: Config. Out: those of all models, and the tokens that they share."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_eopd.config import Config, DataConfig, StudentConfig, TeacherConfig
from megatron_eopd.data.ends import end_of_turn_warnings, stop_id_warnings
from megatron_eopd.data.probe import check_tokenizer
from megatron_eopd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_eopd.data.vocabulary import check_fits, shared_vocab_size
from megatron_eopd.errors import ConfigError
from megatron_eopd.models.hf_config import read_hf_config


@dataclass(frozen=True)
class RunTokenizers:
    student: Tokenizer
    teachers: dict[str, Tokenizer]
    """By section; each ends a response as that model does."""
    swaps: dict[str, list[tuple[int, int]]]
    """Section → pairs of token ids that trade places in the teacher's distribution."""
    vocab_size: int
    """Tokens that all models share."""
    warnings: list[str]
    """Nothing wrong for certain: how answers may fail to end."""


def load_run_tokenizers(config: Config) -> RunTokenizers:
    """
    Raises:
        ConfigError: a tokenizer is not what its file says, or two do not fit together.
    """
    given = config.rollout.stop_token_ids
    student = _load(config.student, "student", given)
    teachers, all_swaps, vocab_size = {}, {}, student.num_ids
    warnings = _end_warnings(config.data, student)
    for section, options in config.all_teachers.items():
        swaps = _swaps(options, section, student)
        # Ids that were given are the student's: with a map the teacher ends as it says itself.
        teacher = _load(options, section, () if swaps else given)
        shared = shared_vocab_size(
            student,
            teacher,
            section,
            swaps,
            exclude_unshared=config.objective.exclude_unshared_tokens,
        )
        vocab_size = min(vocab_size, shared)
        teachers[section], all_swaps[section] = teacher, swaps
        if given and not swaps:
            warnings += stop_id_warnings(student, teacher, section)
    return RunTokenizers(student, teachers, all_swaps, vocab_size, warnings)


def _load(model: StudentConfig | TeacherConfig, section: str, stop_ids: Sequence[int]) -> Tokenizer:
    tokenizer = load_tokenizer(
        model.tokenizer or model.hf_path,
        model_path=model.hf_path,
        vocab_size=read_hf_config(model.hf_path).vocab_size,
        stop_ids=stop_ids,
    )
    check_fits(tokenizer, section)
    check_tokenizer(tokenizer, section)
    return tokenizer


def _end_warnings(data: DataConfig, student: Tokenizer) -> list[str]:
    if not data.apply_chat_template:
        return []
    chat = student.with_template(data.chat_template_name, data.chat_template_file)
    return end_of_turn_warnings(chat, **data.chat_template_kwargs)


def _swaps(teacher: TeacherConfig, section: str, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Pairs of ids that trade places, by `eos_token_map`."""
    swaps = []
    for pair in teacher.eos_token_map.items():
        ids = [tokenizer.token_id(token) for token in pair]
        if None in ids:
            raise ConfigError(
                f"{section}.eos_token_map: {pair[ids.index(None)]!r} is no token of "
                f"{tokenizer.path}. Write tokens as the tokenizer spells them."
            )
        swaps.append(tuple(ids))
    named = [token for pair in swaps for token in pair]
    if len(set(named)) < len(named):
        raise ConfigError(
            f"{section}.eos_token_map={teacher.eos_token_map} names a token twice. Each can trade "
            f"places with one other."
        )
    return swaps
