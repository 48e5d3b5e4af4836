#!/usr/bin/env python3
"""Turn a data set into a prompt file for data.prompts, or into the problems of an evaluation.

In: files (JSON Lines, a JSON array, both also compressed, or parquet), or data sets of the Hugging
Face hub. Out: a jsonl file with {"prompt": ..., "answer": ...} a line, in the order of the input,
without duplicates, and OUTPUT.stats.json with the options and the counts. A prompt is text, or a
chat up to its last user turn. docs/data.md explains every rule. With --task the file is of a task
of evaluation.tasks: all problems stay, with the answers that its grader reads, each of them graded.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_eopd.cli import add_prompt_options, positive, prompt_options
from megatron_eopd.config import DataConfig, EvaluationConfig
from megatron_eopd.data.chats import read_chat
from megatron_eopd.data.prepare import (
    CUT,
    PRESETS,
    Columns,
    Example,
    Fate,
    Selection,
    appears_whole,
    counts_table,
    held_out_keys,
    prepare,
)
from megatron_eopd.data.sources import RowFile
from megatron_eopd.errors import ConfigError

if TYPE_CHECKING:
    from megatron_eopd.data.encoding import PromptEncoder

EXAMPLES = """examples:
  python tools/prepare_data.py train.jsonl -o prompts.jsonl --preset gsm8k --exclude test.jsonl
      GSM8K, without problems that begin like one of its test problems
  python tools/prepare_data.py dapo-math-17k.parquet -o prompts.jsonl --preset dapo_math \\
      --exclude math=math500.jsonl problem=aime25.parquet \\
      --tokenizer models/Qwen3-8B --max-prompt-length 1024 --apply-chat-template
      DAPO-Math, without MATH-500 and AIME, without prompts over 1,024 tokens
  python tools/prepare_data.py MATH-500/test.jsonl -o data/math500.jsonl --task math500
      an evaluation set, where evaluation.tasks=math500 looks for it
  python tools/prepare_data.py openai/gsm8k:main -o prompts.jsonl --preset gsm8k
      from the hub, NAME[:CONFIG[:SPLIT]]; a directory with such a data set is read alike
  python tools/prepare_data.py chats.json.gz -o prompts.jsonl --prompt-column conversations \\
      --prompts-only --tokenizer models/Qwen3-8B --apply-chat-template \\
      --system-prompt 'Think step by step.' --preview 2
      chats without answers: enough to train on, not to be graded. Shows two of them as a run will
      write them for the model, with their special tokens and ids
"""

ALONE = (
    *("prompt_column", "answer_column", "prompts_only", "single_turn", "drop_system_turns", "keep"),
    *("exclude", "tokenizer", "max_prompt_length", "preview"),
)
"""Options that --task does without."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="file, or NAME[:CONFIG[:SPLIT]]")
    parser.add_argument("-o", "--output", type=Path, required=True, help="jsonl file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--task", metavar="NAME", help="write the problems of this task of evaluation.tasks"
    )
    columns = parser.add_argument_group("columns (dotted for nested ones: reward_model.truth)")
    columns.add_argument(
        "--preset", choices=PRESETS, default="prompts", help="columns of a known data set"
    )
    columns.add_argument("--prompt-column", metavar="NAME", help="in place of the preset's")
    columns.add_argument("--answer-column", metavar="NAME", help="in place of the preset's")
    columns.add_argument("--prompts-only", action="store_true", help="take no answers")
    columns.add_argument(
        "--single-turn", action="store_true", help="leave out chats with several user turns"
    )
    columns.add_argument(
        "--drop-system-turns", action="store_true", help="take chats without their system turns"
    )
    columns.add_argument(
        "--keep",
        nargs="+",
        default=[],
        metavar="[NEW=]NAME",
        help="copy these as well, under another name where one is given: --keep solution=answer "
        "keeps what a teacher may be shown (data.teacher_prompt_template)",
    )
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
    length = parser.add_argument_group(
        "length and looks, with the meaning of a run's data.* options"
    )
    length.add_argument("--tokenizer", type=Path, help="directory, or SentencePiece model file")
    length.add_argument("--max-prompt-length", type=positive, metavar="N", help="in tokens")
    add_prompt_options(length)
    length.add_argument(
        *("--preview", "-p"),
        type=positive,
        metavar="N",
        help="print the first N prompts that are kept, with --tokenizer as the model will see them",
    )
    return parser.parse_intermixed_args(argv)


def columns_of(arguments: argparse.Namespace) -> Columns:
    columns = replace(
        PRESETS[arguments.preset],
        keep=tuple(kept_column(text) for text in arguments.keep),
        single_turn=arguments.single_turn,
        drop_system_turns=arguments.drop_system_turns,
    )
    if arguments.prompt_column:
        columns = replace(columns, prompt=arguments.prompt_column)
    if arguments.answer_column:
        # The preset's last way to get at an answer is its most particular one.
        extract = columns.answers[-1][1]
        columns = replace(columns, answers=((arguments.answer_column, extract),))
    columns = replace(columns, answers=()) if arguments.prompts_only else columns
    for name in ("prompt", "answer") if columns.answers else ("prompt",):
        if name in dict(columns.keep):
            raise ConfigError(
                f"--keep {name}: the output has a {name} of its own, in the place of which it "
                f"would stand. Write --keep NEW={dict(columns.keep)[name]}, or leave it out."
            )
    return columns


def kept_column(text: str) -> tuple[str, str]:
    """(name in the output, column) out of COLUMN or NEW=COLUMN."""
    new, separator, column = text.partition("=")
    return (new, column) if separator and new and column else (text, text)


def excluded_set(text: str, columns: Columns) -> tuple[str, Columns]:
    """The set and its columns out of SET, PRESET=SET or COLUMN=SET."""
    name, separator, source = text.partition("=")
    if not separator or "/" in name or Path(text).exists():  # …/split=test/0.parquet is a path
        return text, columns
    return source, PRESETS.get(name) or replace(columns, prompt=name)


def prompt_encoder(arguments: argparse.Namespace, data: DataConfig) -> "PromptEncoder | None":
    if arguments.tokenizer is None:
        return None
    # Here, not above: transformers takes seconds to import.
    from megatron_eopd.data.encoding import PromptEncoder
    from megatron_eopd.data.probe import check_tokenizer
    from megatron_eopd.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer)
    check_tokenizer(tokenizer, "student")
    return PromptEncoder(data, tokenizer)


def token_counter(encoder: "PromptEncoder") -> Callable[[Example], int]:
    from megatron_eopd.data.prompt_files import Row

    return lambda example: len(encoder.ids(Row.of_chat(example.where, example.chat)))


def print_preview(arguments: argparse.Namespace, encoder: "PromptEncoder | None") -> None:
    """The first prompts of the file that was written."""
    for where, row in islice(RowFile(arguments.output), arguments.preview):
        chat = read_chat(where, row["prompt"])
        print(where)
        if encoder is None:
            for message in chat.turns:
                print(f"  {message.role}:", *message.content.split("\n"), sep="\n  | ")
        else:
            from megatron_eopd.data.preview import render_preview
            from megatron_eopd.data.prompt_files import Row

            ids = encoder.ids(Row.of_chat(where, chat))
            print(render_preview(encoder.tokenizer, ids, "model"))
        print()


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """The data section of a run that has the same options."""
    if arguments.max_prompt_length is not None and arguments.tokenizer is None:
        raise ConfigError("--max-prompt-length counts tokens. Give --tokenizer as well.")
    if arguments.tokenizer is not None and not (arguments.max_prompt_length or arguments.preview):
        raise ConfigError(
            "--tokenizer would be ignored. Give --max-prompt-length or --preview as well."
        )
    return prompt_options(arguments)


def write_stats(arguments: argparse.Namespace, counts: Counter[Fate], num_cut: int) -> Path:
    path = Path(f"{arguments.output}.stats.json")
    stats = {"rows read": counts.total()} | {fate: counts[fate] for fate in Fate} | {CUT: num_cut}
    with appears_whole(path) as file:
        json.dump({"options": vars(arguments), "counts": stats}, file, indent=2, default=str)
        file.write("\n")
    return path


def write_problems(arguments: argparse.Namespace) -> None:
    """Of a task, whose own rules hold: columns, what an answer is, and whether it can be graded."""
    # Here, not above: they bring torch.
    from megatron_eopd.evaluation.grading_pool import GradingPool, check_answers
    from megatron_eopd.records import Turn
    from megatron_eopd.tasks.registry import open_tasks

    given = [name for name in ALONE if getattr(arguments, name)]
    if len(arguments.inputs) > 1 or given:
        raise ConfigError(
            f"--task takes one INPUT and all of its problems as they are: leave out "
            f"{', '.join(f'--{name}'.replace('_', '-') for name in given) or 'the others'}."
        )
    tasks = (f"{arguments.task}={arguments.inputs[0]}",)
    (task,) = open_tasks(EvaluationConfig(tasks=tasks), with_suffix=False)
    problems = list(task.problems())
    with GradingPool([task]) as pool:
        check_answers(task, problems, pool)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with appears_whole(arguments.output) as file:
        for problem in problems:
            turns = [turn._asdict() for turn in (*problem.context, Turn("user", problem.text))]
            prompt = turns if problem.context else problem.text
            row = {"prompt": prompt, "answer": problem.answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(
        f"{len(problems)} problems of {task.name}, each with a gradable answer, written to "
        f"{arguments.output}"
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.output.exists() and not arguments.overwrite:
        raise ConfigError(f"{arguments.output} exists. Pass --overwrite to replace it.")
    if arguments.task is not None:
        write_problems(arguments)
        return
    columns = columns_of(arguments)
    length = arguments.exclude_prefix
    data = data_config(arguments)
    encoder = prompt_encoder(arguments, data)
    held_out = [excluded_set(text, columns) for text in arguments.exclude]
    selection = Selection(
        held_out=set().union(*(held_out_keys(*excluded, length) for excluded in held_out)),
        prefix_length=length,
    )
    if arguments.max_prompt_length is not None:
        selection.max_prompt_length = arguments.max_prompt_length
        selection.count_tokens = token_counter(encoder)
    counts = prepare(arguments.inputs, arguments.output, columns, selection)
    path = write_stats(arguments, counts, selection.num_cut)
    if arguments.preview is not None:
        print_preview(arguments, encoder)
    print(counts_table(counts, selection.num_cut))
    print(f"written to {arguments.output}, counts to {path}")


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
