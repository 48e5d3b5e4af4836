#!/usr/bin/env python3
"""Turn a data set into a prompt file for data.prompts.

In: jsonl or parquet files, or data sets of the Hugging Face hub. Out: a jsonl file with
{"prompt": ..., "answer": ...} a line, in the order of the input, without duplicates, and
OUTPUT.stats.json with the options and the counts. docs/data.md explains every rule.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_eopd.cli import positive
from megatron_eopd.config import DataConfig, parse_value
from megatron_eopd.data.prepare import (
    PRESETS,
    Columns,
    Fate,
    Selection,
    appears_whole,
    counts_table,
    overlap_keys,
    prepare,
)
from megatron_eopd.errors import ConfigError

EXAMPLES = """examples:
  python tools/prepare_data.py train.jsonl -o prompts.jsonl --preset gsm8k --exclude test.jsonl
      GSM8K, without problems that begin like one of its test problems
  python tools/prepare_data.py dapo-math-17k.parquet -o prompts.jsonl --preset dapo_math \\
      --exclude math=math500.jsonl problem=aime25.parquet \\
      --tokenizer models/Qwen3-8B --max-prompt-length 1024 --apply-chat-template
      DAPO-Math, without MATH-500 and AIME, without prompts over 1,024 tokens
  python tools/prepare_data.py openai/gsm8k:main -o prompts.jsonl --preset gsm8k
      from the hub, NAME[:CONFIG[:SPLIT]]; a directory with such a data set is read alike
  python tools/prepare_data.py mine.jsonl -o prompts.jsonl --prompt-column messages --prompts-only
      chats without answers: enough to train on, not to be graded
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, or NAME[:CONFIG[:SPLIT]]")
    parser.add_argument("-o", "--output", type=Path, required=True, help="jsonl file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    columns = parser.add_argument_group("columns (dotted for nested ones: reward_model.truth)")
    columns.add_argument(
        "--preset", choices=PRESETS, default="prompts", help="columns of a known data set"
    )
    columns.add_argument("--prompt-column", metavar="NAME", help="in place of the preset's")
    columns.add_argument("--answer-column", metavar="NAME", help="in place of the preset's")
    columns.add_argument("--prompts-only", action="store_true", help="take no answers")
    columns.add_argument("--keep", nargs="+", default=[], metavar="NAME", help="copy these as well")
    exclude = parser.add_argument_group("evaluation sets")
    exclude.add_argument(
        *("--exclude", "-x"),
        nargs="+",
        default=[],
        metavar="[PRESET=|COLUMN=]SET",
        help="leave out what begins like a prompt of these; columns as the input's by default",
    )
    exclude.add_argument(
        "--exclude-prefix",
        type=positive,
        default=Selection.prefix_length,
        metavar="N",
        help="compare so many letters and digits (default %(default)s)",
    )
    length = parser.add_argument_group("length, counted as a run with these options would")
    length.add_argument("--tokenizer", type=Path, help="directory, or SentencePiece model file")
    length.add_argument("--max-prompt-length", type=positive, metavar="N", help="in tokens")
    length.add_argument("--apply-chat-template", action="store_true")
    length.add_argument("--chat-template-kwargs", nargs="+", default=[], metavar="NAME=VALUE")
    length.add_argument("--prompt-suffix", default="", metavar="TEXT")
    return parser.parse_intermixed_args(argv)


def columns_of(arguments: argparse.Namespace) -> Columns:
    columns = replace(PRESETS[arguments.preset], keep=tuple(arguments.keep))
    if arguments.prompt_column:
        columns = replace(columns, prompt=arguments.prompt_column)
    if arguments.answer_column:
        # The preset's last way to get at an answer is its most particular one.
        extract = columns.answers[-1][1]
        columns = replace(columns, answers=((arguments.answer_column, extract),))
    return replace(columns, answers=()) if arguments.prompts_only else columns


def excluded_set(text: str, columns: Columns) -> tuple[str, Columns]:
    """The set and its columns out of SET, PRESET=SET or COLUMN=SET."""
    name, separator, source = text.partition("=")
    if not separator or "/" in name or Path(text).exists():  # …/split=test/0.parquet is a path
        return text, columns
    return source, PRESETS.get(name) or replace(columns, prompt=name)


def token_counter(arguments: argparse.Namespace) -> Callable[[str], int] | None:
    data = data_config(arguments)
    if arguments.tokenizer is None:
        return None
    # Here, not above: transformers takes seconds to import.
    from megatron_eopd.data.prompts import prompt_encoder
    from megatron_eopd.data.tokenizer import load_tokenizer

    encode = prompt_encoder(data, load_tokenizer(arguments.tokenizer))
    return lambda prompt: len(encode(prompt + data.prompt_suffix))


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """The data section of a run that has the same options."""
    if (arguments.tokenizer is None) != (arguments.max_prompt_length is None):
        raise ConfigError("--tokenizer and --max-prompt-length need each other. Give both.")
    if arguments.chat_template_kwargs and not arguments.apply_chat_template:
        raise ConfigError("--chat-template-kwargs needs --apply-chat-template. Give both.")
    pairs = (text.partition("=")[::2] for text in arguments.chat_template_kwargs)
    return DataConfig(
        apply_chat_template=arguments.apply_chat_template,
        chat_template_kwargs={name: parse_value(value) for name, value in pairs},
        prompt_suffix=arguments.prompt_suffix,
    )


def write_stats(arguments: argparse.Namespace, counts: Counter[Fate]) -> Path:
    path = Path(f"{arguments.output}.stats.json")
    stats = {"rows read": counts.total()} | {fate: counts[fate] for fate in Fate}
    with appears_whole(path) as file:
        json.dump({"options": vars(arguments), "counts": stats}, file, indent=2, default=str)
        file.write("\n")
    return path


def run(arguments: argparse.Namespace) -> None:
    if arguments.output.exists() and not arguments.overwrite:
        raise ConfigError(f"{arguments.output} exists. Pass --overwrite to replace it.")
    columns = columns_of(arguments)
    length = arguments.exclude_prefix
    count_tokens = token_counter(arguments)
    held_out = [excluded_set(text, columns) for text in arguments.exclude]
    selection = Selection(
        held_out=set().union(*(overlap_keys(*excluded, length) for excluded in held_out)),
        prefix_length=length,
        count_tokens=count_tokens,
        max_prompt_length=arguments.max_prompt_length or 0,
    )
    counts = prepare(arguments.inputs, arguments.output, columns, selection)
    print(counts_table(counts))
    print(f"written to {arguments.output}, counts to {write_stats(arguments, counts)}")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except (ValueError, OSError) as error:  # a ConfigError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
