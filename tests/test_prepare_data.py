"""Data sets into prompt files: what is taken, what is left out, and that each row is counted."""

import gzip
import json
import random
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eopd.config import DataConfig
from megatron_eopd.data.chats import Chat, Message
from megatron_eopd.data.prepare import (
    COLUMN_CHECK_ROWS,
    CUT,
    DAPO_AFTER,
    DAPO_BEFORE,
    PRESETS,
    Example,
    Fate,
    Selection,
    answer_after_hashes,
    boxed_answer,
    duplicate_key,
    overlap_key,
)
from megatron_eopd.data.preview import render_preview
from megatron_eopd.data.prompts import load_prompts
from megatron_eopd.data.tokenizer import load_tokenizer
from megatron_eopd.errors import ConfigError
from tests.real_data import real_data
from tests.test_preflight import MODELS
from tests.tiny_tokenizers import write
from tools import prepare_data


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet}


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the tool; gives back (rows written, counts), or the error it must end with."""
    output = tmp_path / "out.jsonl"

    def start(*arguments, fails: bool = False):
        before = sorted(tmp_path.iterdir())
        status = prepare_data.main([*map(str, arguments), "-o", str(output)])
        captured = capsys.readouterr()
        if fails:
            assert status == 1 and sorted(tmp_path.iterdir()) == before
            return captured.err
        assert status == 0, captured.err
        stats = json.loads((tmp_path / "out.jsonl.stats.json").read_text())
        assert stats["options"]["inputs"] == [str(a) for a in arguments[:1]]
        assert not list(tmp_path.glob("*.unfinished"))
        # GSM8K has a U+2028 in a prompt, at which splitlines would cut.
        return [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]], stats["counts"]

    return start


# --- columns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_columns_are_mapped_and_the_order_is_kept(run, tmp_path, kind):
    rows = [
        {"text": f" {i} plus {i} ", "gold": {"value": 2 * i}, "level": "easy", "other": 0}
        for i in (5, 3, 8)
    ]
    source = WRITERS[kind](tmp_path / f"in.{kind}", rows)
    written, counts = run(
        *(source, "--prompt-column", "text", "--answer-column", "gold.value"), "--keep", "level"
    )
    assert written == [
        {"level": "easy", "prompt": f"{i} plus {i}", "answer": str(2 * i)} for i in (5, 3, 8)
    ]
    assert counts["rows read"] == counts["kept"] == 3


def chat(*roles: str) -> list[dict]:
    return [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]


CHATS = [
    {"messages": chat("user")},
    {"messages": chat("user", "assistant", "assistant")},
    {"messages": chat("system", "user", "assistant")},
    {"messages": chat("user", "assistant", "user")},
    {"messages": chat("assistant", "user")},
    {"messages": chat("system")},
]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_chat_is_kept_up_to_its_last_question(run, tmp_path, kind):
    source = WRITERS[kind](tmp_path / f"in.{kind}", CHATS)
    written, counts = run(source, "--prompt-column", "messages", "--prompts-only")
    whole = [chat("system", "user"), chat("user", "assistant", "user"), chat("assistant", "user")]
    assert [row["prompt"] for row in written] == ["user 0", *whole]
    # The second row asks what the first does: its answers are no part of the prompt.
    assert (counts[Fate.NO_QUESTION], counts[Fate.DUPLICATE]) == (1, 1)


def test_chats_are_cut_down_to_a_question_on_request(run, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", CHATS)
    options = ["--prompt-column", "messages", "--prompts-only", "--overwrite"]
    written, counts = run(source, *options, "--single-turn")
    assert [row["prompt"] for row in written] == ["user 0", chat("system", "user"), "user 1"]
    assert counts[Fate.SEVERAL_TURNS] == 1
    written, counts = run(source, *options, "--drop-system-turns")
    whole = [chat("user", "assistant", "user"), chat("assistant", "user")]
    assert [row["prompt"] for row in written] == ["user 0", "user 1", *whole]
    written, counts = run(source, *options, "--drop-system-turns", "--single-turn")
    assert [row["prompt"] for row in written] == ["user 0", "user 1"]
    assert (counts[Fate.SEVERAL_TURNS], counts[Fate.DUPLICATE]) == (1, 2)


def test_a_system_turn_beside_a_chat_is_not_lost(run, tmp_path):
    row = {"conversations": [{"from": "human", "value": "a"}], "system": "Be brief."}
    source = write_jsonl(tmp_path / "in.jsonl", [row])
    options = ["--prompt-column", "conversations", "--prompts-only"]
    assert "line 1, column conversations: the column 'system' beside" in run(
        source, *options, fails=True
    )
    assert run(source, *options, "--drop-system-turns")[0] == [{"prompt": "a"}]


@pytest.mark.parametrize("name", ["prompt", "answer"])
def test_a_column_that_would_be_written_over_is_not_kept(run, tmp_path, name):
    row = {"question": "a", "gold": "1", "prompt": "old", "answer": "old"}
    source = write_jsonl(tmp_path / "in.jsonl", [row])
    options = ["--prompt-column", "question", "--answer-column", "gold"]
    assert f"--keep {name}: the output has" in run(source, *options, "--keep", name, fails=True)
    written, _ = run(source, "--prompt-column", "question", "--prompts-only", "--keep", "answer")
    assert written == [{"answer": "old", "prompt": "a"}]


def test_what_was_left_off_is_counted(run, tmp_path):
    options = ["--prompts-only", "--overwrite"]
    source = write_jsonl(tmp_path / "in.jsonl", CHATS)
    written, counts = run(source, "--prompt-column", "messages", *options)
    assert counts[CUT] == 1
    assert run(write_jsonl(tmp_path / "again.jsonl", written), *options)[1][CUT] == 0


def test_every_form_of_a_prompt_is_written_in_one(run, tmp_path):
    """And written again it stays what it is."""
    user = {"role": "user", "content": "a"}
    forms = [
        [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}],
        json.dumps(
            [{"role": "system", "content": "s"}, user, {"role": "assistant", "content": ""}]
        ),
        {"role": ["system", "user"], "content": ["s", "a"]},
        [{"role": "system", "content": [{"type": "text", "text": "s"}]}, user],
    ]
    rows = [{"prompt": form, "answer": str(n)} for n, form in enumerate(forms)]
    written, counts = run(write_jsonl(tmp_path / "in.jsonl", rows))
    assert written == [{"prompt": [{"role": "system", "content": "s"}, user], "answer": "0"}]
    assert counts[Fate.OTHER_ANSWER] == 3
    again = write_jsonl(tmp_path / "again.jsonl", written)
    assert run(again, "--overwrite")[0] == written


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json", ".json.gz"])
def test_files_of_other_forms(run, tmp_path, suffix):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    content = (
        json.dumps(rows)
        if ".json." in f"{suffix}."
        else write_jsonl(tmp_path / "x", rows).read_text()
    )
    path = tmp_path / f"in{suffix}"
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith("gz") else content.encode())
    assert run(path)[0] == rows


def test_rows_without_prompt_or_answer_are_counted_and_left_out(run, tmp_path):
    rows = [
        *({"prompt": ""}, {"prompt": " \n", "answer": "1"}, {"answer": "1"}, {"prompt": None}),
        *({"prompt": "a"}, {"prompt": "b", "answer": None}, {"prompt": "c", "answer": " "}),
        {"prompt": "d", "answer": float("nan")},
        *({"prompt": "\ud800", "answer": "1"}, {"prompt": "e", "answer": 0}),
        *({"prompt": "\u200b \ufeff", "answer": "1"}, {"prompt": float("nan"), "answer": "1"}),
        {"prompt": [{"role": "user", "content": " "}], "answer": "1"},
        {"prompt": [*chat("user"), {"role": "assistant"}, *chat("user")], "answer": "1"},
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"},
        *({"prompt": "f", "answer": "\udfff"}, {"prompt": "g", "answer": "1", "more": "\ud800"}),
        {"prompt": [{"role": "system", "content": "\ud800"}, *chat("user")], "answer": "1"},
    ]
    written, counts = run(write_jsonl(tmp_path / "in.jsonl", rows), "--keep", "more")
    assert written == [{"prompt": "e", "answer": "0"}]
    assert (counts[Fate.NO_PROMPT], counts[Fate.NO_ANSWER], counts[Fate.NOT_UNICODE]) == (8, 4, 4)
    assert counts[Fate.NOT_TEXT] == 1


def test_a_prompt_that_is_all_instruction_is_empty(run, tmp_path):
    rows = [{"prompt": DAPO_BEFORE + " " + DAPO_AFTER}, {"prompt": DAPO_BEFORE + "a"}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    written, counts = run(source, "--preset", "dapo_math", "--prompts-only")
    assert written == [{"prompt": "a"}] and counts[Fate.NO_PROMPT] == 1


# --- presets ------------------------------------------------------------------------------------


def test_gsm8k_answers_stand_behind_the_hashes():
    assert answer_after_hashes("1+1=2\n#### 2").strip() == "2"
    assert answer_after_hashes("a #### 3\n#### -1,234,567").strip() == "-1234567"
    assert answer_after_hashes("no gold") == ""


@pytest.mark.parametrize(
    "solution,expected",
    [
        (r"so $\boxed{5}$.", "5"),
        (r"$\boxed{1}$ then $\boxed{\frac{1}{2}}$ done", r"\frac{1}{2}"),
        (r"$\fbox{7}$", "7"),
        (r"$\boxed 5$ apples", "5"),
        (r"\(\boxed 5 + x\) more", "5 + x"),
        (r"$\boxed {x}$", "x"),
        (r"$\boxed{\{1, 2\}}$", r"\{1, 2\}"),
        (r"$\boxed{\left\{ x \right.}$", r"\left\{ x \right."),
        (r"$\boxed{a \\}$", r"a \\"),
        (r"$\boxed{\text{is \fbox{3}}}$", "3"),
        (r"$\boxed{4}$, and $\boxed{5", ""),
        (r"$\boxedpage{4}$", ""),
        ("none", ""),
        (r"\boxed{ }", ""),
        (r"\boxed", ""),
    ],
)
def test_the_last_box_is_the_answer_if_it_is_closed(solution, expected):
    assert boxed_answer(solution).strip() == expected


@given(st.recursive(st.just("x"), lambda s: st.lists(s).map(lambda p: "{" + "".join(p) + "}")))
def test_any_balanced_content_is_taken_whole(content):
    assert boxed_answer(rf"\boxed{{0}} and \boxed{{{content}}}, }}{{") == content


def test_an_answer_column_wins_over_the_solution(run, tmp_path):
    rows = [
        {"problem": "a", "solution": r"\boxed{1}"},
        {"problem": "b", "solution": r"\boxed{1}", "answer": "2"},
        {"problem": "c", "solution": "no box", "answer": ""},
    ]
    written, counts = run(write_jsonl(tmp_path / "in.jsonl", rows), "--preset", "math")
    assert [row["answer"] for row in written] == ["1", "2"] and counts[Fate.NO_ANSWER] == 1
    # A column of another name keeps the way to get at the answer.
    source = write_jsonl(tmp_path / "other.jsonl", [{"problem": "a", "text": r"\boxed{1}"}])
    written, _ = run(source, "--preset", "math", "--answer-column", "text", "--overwrite")
    assert written == [{"prompt": "a", "answer": "1"}]


def test_dapo_instructions_are_taken_off_and_repetitions_counted(run, tmp_path):
    """The published file holds every problem about a hundred times."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{DAPO_BEFORE}Problem {i}?{DAPO_AFTER}"}],
            "reward_model": {"ground_truth": str(i), "style": "rule"},
        }
        for i in range(50)
    ] * 100
    random.Random(0).shuffle(rows)
    source = write_parquet(tmp_path / "in.parquet", rows)
    written, counts = run(source, "--preset", "dapo_math")
    assert sorted(int(row["answer"]) for row in written) == list(range(50))
    assert all(row["prompt"] == f"Problem {row['answer']}?" for row in written)
    assert counts[Fate.DUPLICATE] == 4950 and counts["kept"] == 50


# --- duplicates and evaluation sets -------------------------------------------------------------


def test_duplicates_with_another_answer_are_counted_apart(run, tmp_path):
    rows = [
        {"prompt": "caf\u00e9 au lait", "answer": "1"},
        {"prompt": "cafe\u0301  au\nlait ", "answer": "1"},
        {"prompt": "caf\u00e9 au lait", "answer": "2"},
        {"prompt": "Caf\u00e9 au lait", "answer": "1"},  # case counts: in mathematics it matters
    ]
    written, counts = run(write_jsonl(tmp_path / "in.jsonl", rows))
    assert written == [rows[0], rows[3]]
    assert (counts[Fate.DUPLICATE], counts[Fate.OTHER_ANSWER]) == (1, 1)


LONG = "In a village of 100 people, each family has three cows and two goats. "


def test_prompts_that_begin_like_an_evaluation_prompt_are_left_out(run, tmp_path):
    rows = [
        {"prompt": f"{LONG}How many cows?", "answer": "1"},
        {"prompt": LONG.upper().replace(" ", "  ").replace(",", " –") + "Anything", "answer": "1"},
        {"prompt": LONG.replace("three", "four").strip(), "answer": "1"},
        {"prompt": "What is 2 + 3?", "answer": "5"},
        {"prompt": "What is 2 - 3?", "answer": "-1"},
        {"prompt": "What is 2 + 3? Explain.", "answer": "5"},
    ]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    first = write_jsonl(tmp_path / "test.jsonl", [{"question": f"{LONG}How many goats?"}])
    second = write_parquet(tmp_path / "test.parquet", [{"q": "what is 2+3?"}])
    exclude = ["--exclude", f"gsm8k={first}", f"q={second}", "--exclude-prefix", 50]
    written, counts = run(source, *exclude)
    assert written == [rows[2], rows[4], rows[5]] and counts[Fate.HELD_OUT] == 3


def test_any_question_of_a_chat_counts_as_an_evaluation_prompt(run, tmp_path):
    """On both sides; what others say does not."""
    rows = [
        {"prompt": chat("user", "assistant", "user")},
        {"prompt": [*chat("user", "assistant"), {"role": "user", "content": "other"}]},
        {"prompt": [{"role": "user", "content": "other"}]},
        {"prompt": [{"role": "user", "content": "another"}]},
    ]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    test = write_jsonl(
        tmp_path / "test.jsonl",
        [
            {"m": [{"role": "system", "content": "another"}, *chat("user")]},
            {"m": [{"role": "user", "content": "x"}, {"role": "user", "content": "other"}]},
        ],
    )
    written, counts = run(source, "--prompts-only", "-x", f"m={test}")
    assert written == [{"prompt": "another"}] and counts[Fate.HELD_OUT] == 3


@given(st.text(), st.text(), st.integers(1, 20))
def test_overlap_is_blind_to_case_and_space_and_never_to_the_first_letters(a, b, length):
    assert overlap_key(a, length) == overlap_key(f" {a}\n", length)
    if a.isascii():
        assert overlap_key(a, length) == overlap_key(a.upper(), length)
    if a.isalnum() and b.isalnum() and a.isascii() and b.isascii():
        same = a[:length].casefold() == b[:length].casefold() and min(len(a), len(b)) >= length
        whole = a.casefold() == b.casefold()
        assert (overlap_key(a, length) == overlap_key(b, length)) == (same or whole)


answers = st.none() | st.text(alphabet="12 ", max_size=2)
texts = st.text(alphabet="aAé. \ud800", min_size=1, max_size=4)
chats = st.builds(
    Chat,
    texts.map(str.strip).filter(bool),
    st.just(()) | st.tuples(st.builds(Message, st.just("system"), texts)),
)
examples = st.builds(
    Example,
    where=st.just("here"),
    chat=chats | st.just(Fate.NO_PROMPT),
    answer=answers.map(lambda answer: (answer or "").strip()),
    kept=st.just({}),
)


@settings(deadline=None)
@given(st.lists(examples, max_size=30))
def test_what_is_kept_is_the_first_of_each_distinct_prompt(rows):
    """Against the obvious quadratic way; and a second pass finds nothing more to leave out."""
    selection = Selection(held_out={overlap_key("aa", 3)}, prefix_length=3)
    selection.count_tokens = lambda example: len(example.chat.text)
    selection.max_prompt_length = 3
    fates = [selection.fate(row) for row in rows]
    kept = [row for row, fate in zip(rows, fates, strict=True) if fate is Fate.KEPT]
    for n, (row, fate) in enumerate(zip(rows, fates, strict=True)):
        if fate in (Fate.DUPLICATE, Fate.OTHER_ANSWER):
            firsts = (r for r in rows[:n] if isinstance(r.chat, Chat) and r.answer)
            sound = (r for r in firsts if "\ud800" not in str(r.line()))
            same = [r for r in sound if duplicate_key(r.chat) == duplicate_key(row.chat)]
            assert (same[0].answer == row.answer) == (fate is Fate.DUPLICATE)
    assert len({duplicate_key(row.chat) for row in kept}) == len(kept)
    again = Selection(held_out=selection.held_out, prefix_length=3)
    assert all(again.fate(row) is Fate.KEPT for row in kept)


# --- length, and what the trainer makes of the file ---------------------------------------------


def test_the_trainer_reads_what_was_written_and_counts_as_it_was_counted(run, tmp_path):
    """With template, options and suffix: nothing written is too long, nothing left out was not."""
    tokenizer = real_data("tokenizer_qwen3")
    rows = [{"prompt": "word " * n + "end", "answer": "1"} for n in range(1, 40)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    options = ["--tokenizer", tokenizer, "--max-prompt-length", 30, "--apply-chat-template"]
    options += ["--chat-template-kwargs", "enable_thinking=false", "--prompt-suffix", " Think."]
    written, counts = run(source, *options)
    data = DataConfig(
        prompts=str(tmp_path / "out.jsonl"),
        apply_chat_template=True,
        chat_template_kwargs={"enable_thinking": False},
        prompt_suffix=" Think.",
        max_prompt_length=30,
    )
    prompts = load_prompts(data, load_tokenizer(tokenizer), seed=1)
    assert len(prompts) == len(written) == counts["kept"] > 0 and prompts.longest == 30
    assert counts[Fate.TOO_LONG] == len(rows) - len(written)
    source.write_text(json.dumps(rows[len(written)]))
    with pytest.raises(ConfigError, match="31 tokens"):
        load_prompts(data.model_copy(update={"prompts": str(source)}), load_tokenizer(tokenizer), 1)


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]"


def test_a_preview_shows_what_a_run_shows_its_model(tmp_path, capsys):
    """System prompt, template, suffix and chat, to the last token."""
    tokenizer = real_data("tokenizer_qwen3")
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    rows = [{"prompt": ""}, {"prompt": chat("user", "assistant", "user")}, {"prompt": "Last"}]
    source = write_jsonl(tmp_path / "in.jsonl", [*rows, {"prompt": "not shown"}])
    output = tmp_path / "out.jsonl"
    options = ["--tokenizer", tokenizer, "--apply-chat-template", "--preview", 2, "-o", output]
    options += ["--chat-template-file", tmp_path / "t.jinja", "--system-prompt", "Be brief."]
    options += ["--prompt-suffix", " Think.", "--prompts-only"]
    assert prepare_data.main([str(source), *map(str, options)]) == 0
    text = capsys.readouterr().out
    whole = "[system]Be brief.[user]user 0[assistant]assistant 1[user]user 2 Think.[answer]"
    assert whole in text and "[user]Last Think.[answer]" in text and "not shown" not in text
    data = DataConfig(
        prompts=str(output),
        apply_chat_template=True,
        chat_template_file=tmp_path / "t.jinja",
        system_prompt="Be brief.",
        prompt_suffix=" Think.",
        shuffle=False,
    )
    loaded = load_tokenizer(tokenizer)
    for prompt in load_prompts(data, loaded, seed=1).batch(0, 2):
        assert render_preview(loaded, prompt.prompt_ids, "model") in text


def test_a_preview_without_a_tokenizer_shows_the_text(tmp_path, capsys):
    rows = [{"prompt": chat("system", "user")}, {"prompt": "one\ntwo"}, {"prompt": "not shown"}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    options = ["-o", str(tmp_path / "out.jsonl"), "--prompts-only", "--preview", "2"]
    assert prepare_data.main([str(source), *options]) == 0
    text = capsys.readouterr().out
    assert "system:\n  | system 0\n  user:\n  | user 1\n" in text and "  | one\n  | two\n" in text
    assert "not shown" not in text


def test_a_preview_says_where_nothing_ends_an_answer(tmp_path, capsys):
    """Rather than fail when all is written."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "two"}])
    tokenizer = write(tmp_path / "tokenizer", eos_token=None)
    options = ["-o", tmp_path / "out.jsonl", "--prompts-only", "-p", 1, "--tokenizer", tokenizer]
    assert prepare_data.main([str(source), *map(str, options)]) == 0
    assert "an answer ends with: nothing yet" in capsys.readouterr().out


def test_the_same_command_writes_the_same_bytes(run, tmp_path):
    rows = [{"prompt": f"{i % 7} é", "answer": str(i)} for i in range(50)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    run(source)
    first = (tmp_path / "out.jsonl").read_bytes()
    run(source, "--overwrite")
    assert (tmp_path / "out.jsonl").read_bytes() == first


@pytest.fixture
def saved(tmp_path):
    """Saves splits with save_to_disk, or one data set."""

    def save(*splits: str) -> Path:
        path = tmp_path / f"saved{'-'.join(splits)}"
        sets = {
            split: datasets.Dataset.from_dict({"prompt": [f"{split} a", "b"], "answer": ["1", "2"]})
            for split in splits or ("only",)
        }
        (datasets.DatasetDict(sets) if splits else sets["only"]).save_to_disk(path)
        return path

    return save


def test_a_data_set_that_was_saved_is_read_split_by_split(run, saved, tmp_path):
    """And not all splits as one, held-out ones among them."""
    assert [row["prompt"] for row in run(saved())[0]] == ["only a", "b"]
    several = saved("test", "train")
    for name, prompt in ((several, "train a"), (f"{several}::test", "test a")):
        assert run(name, "--overwrite")[0][0] == {"prompt": prompt, "answer": "1"}
    for name, problem in (
        (f"{several}::dev", "name one of its splits, as .*::SPLIT. There are test, train"),
        (f"{several}:main", "name one of its splits"),
        (saved("sft", "held_out"), "name one of its splits, as .*::SPLIT. There are sft, held_out"),
        (f"{saved()}::train", "one data set without configs or splits. Give"),
    ):
        message = run(name, "--overwrite", fails=True)
        assert re.search(problem, message) and "cannot be read" not in message


def test_a_directory_with_a_data_set_is_read_like_one_of_the_hub(run, tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    for split, answer in (("train", "1"), ("test", "2")):
        rows = [{"prompt": f"{split} prompt", "answer": answer}]
        write_parquet(tmp_path / f"set/data/{split}-00000-of-00001.parquet", rows)
    assert run(tmp_path / "set")[0] == [{"prompt": "train prompt", "answer": "1"}]
    written, _ = run(f"{tmp_path / 'set'}::test", "--overwrite")
    assert written == [{"prompt": "test prompt", "answer": "2"}]
    (tmp_path / "out.jsonl").unlink()
    assert "cannot be read" in run(f"{tmp_path / 'set'}::dev", fails=True)


def test_gsm8k_as_it_is_published(run, tmp_path):
    """All of it is kept: no problem stands there twice, none begins like a test problem."""
    train, test = real_data("gsm8k/train.jsonl"), real_data("gsm8k/test.jsonl")
    written, counts = run(train, "--preset", "gsm8k", "--exclude", test)
    assert counts["rows read"] == counts["kept"] == len(written) == 7_473
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", row["answer"]) for row in written)
    assert len({overlap_key(row["prompt"], 100) for row in written}) == 7_473
    # The test set against itself: nothing is left.
    (tmp_path / "out.jsonl").unlink()
    message = run(test, "--preset", "gsm8k", "--exclude", test, fails=True)
    assert "nothing is left" in message and "1,319" in message


# --- errors: one message, exit code 1, nothing left behind --------------------------------------


def test_inputs_that_cannot_be_read(run, tmp_path):
    assert "absent.jsonl: no such file" in run(tmp_path / "absent.jsonl", fails=True)
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl: no rows" in run(tmp_path / "empty.jsonl", fails=True)
    (tmp_path / "table.csv").write_text("prompt,answer\n")
    assert "table.csv: neither JSON" in run(tmp_path / "table.csv", fails=True)
    assert "absent.csv: no such file" in run(tmp_path / "absent.csv", fails=True)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    assert "broken.parquet: cannot be read" in run(tmp_path / "broken.parquet", fails=True)


@pytest.mark.parametrize("first", [3, COLUMN_CHECK_ROWS + 3])
@pytest.mark.parametrize(
    "line,problem",
    [(b'{"prompt": ', "not valid JSON"), (b"[1]", "expected a JSON"), (b'"\xff"', "not valid")],
)
def test_a_bad_line_is_named_wherever_it_stands(run, tmp_path, first, line, problem):
    path = tmp_path / "in.jsonl"
    good = b'{"prompt": "a", "answer": "1"}\n'
    path.write_bytes(good * (first - 1) + line + b"\n" + good)
    message = run(path, fails=True)
    assert f"in.jsonl line {first}: " in message and problem in message


@pytest.mark.parametrize("kind", WRITERS)
def test_a_column_that_does_not_exist(run, tmp_path, kind):
    """Those that do are listed, nested ones too."""
    rows = [{"question": "a", "gold": {"value": "1", "kind": "x"}}]
    source = WRITERS[kind](tmp_path / f"in.{kind}", rows)
    columns = "There are gold.kind, gold.value, question"
    assert f"no column prompt. {columns}" in run(source, fails=True)
    options = ["--prompt-column", "question", "--answer-column"]
    assert f"no column gold.val. {columns}" in run(source, *options, "gold.val", fails=True)
    options += ["gold.value"]
    assert "no column level" in run(source, *options, "--keep", "level", fails=True)
    assert "no column problem" in run(source, *options, "-x", f"math={source}", fails=True)
    assert "no column answer or solution" in run(
        *(source, "--preset", "math", "--prompt-column", "question"), fails=True
    )
    message = run(source, "--prompt-column", "gold", "--prompts-only", fails=True)
    assert "column gold: neither text nor chat messages" in message
    message = run(source, "--prompt-column", "question", "--answer-column", "gold", fails=True)
    assert "column gold: neither text nor a number" in message


def test_an_existing_output_is_kept_and_survives_a_failure(run, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a", "answer": "1"}])
    (tmp_path / "out.jsonl").write_text("precious")
    assert "Pass --overwrite" in run(source, fails=True)
    late = source.read_text() * COLUMN_CHECK_ROWS + "broken"
    (tmp_path / "late.jsonl").write_text(late)
    run(tmp_path / "late.jsonl", "--overwrite", fails=True)
    assert (tmp_path / "out.jsonl").read_text() == "precious"


@pytest.mark.parametrize(
    "options,message",
    [
        (["--max-prompt-length", 5], "Give --tokenizer as well"),
        (["--tokenizer", MODELS / "student"], "Give --max-prompt-length or --preview as well"),
        (["--chat-template-name", "a"], "--chat-template-name needs --apply-chat-template"),
        (["--chat-template-file", "a"], "--chat-template-file needs --apply-chat-template"),
        (["--system-prompt", "a"], "--system-prompt needs --apply-chat-template"),
        (["--prompt-suffix", "\t"], "--prompt-suffix: holds the control character"),
        (
            [
                *("--apply-chat-template", "--chat-template-name", "a"),
                *("--chat-template-file", "b"),
            ],
            "--chat-template-file: one template",
        ),
        (["--tokenizer", "/nowhere", "--max-prompt-length", 5], "/nowhere: no such file"),
        (["--chat-template-kwargs", "a=1"], "needs --apply-chat-template"),
        (
            ["--tokenizer", MODELS / "student", "--max-prompt-length", 5, "--apply-chat-template"],
            "no chat template",
        ),
    ],
)
def test_options_that_contradict_each_other(run, tmp_path, options, message):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a", "answer": "1"}])
    assert message in run(source, *options, fails=True)


@pytest.mark.parametrize("option", ["--exclude-prefix", "--max-prompt-length"])
def test_lengths_are_positive(capsys, option):
    with pytest.raises(SystemExit):
        prepare_data.main(["in.jsonl", "-o", "out.jsonl", option, "0"])
    assert "0 is not a positive number" in capsys.readouterr().err


def test_help_names_every_preset(capsys):
    with pytest.raises(SystemExit):
        prepare_data.main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in PRESETS) and "examples:" in text


def test_a_column_is_kept_under_another_name(run, tmp_path):
    """GSM8K's whole solution, of which the answer is the end."""
    row = {"question": "How many?", "answer": "Two and two make 4.\n#### 4"}
    source = write_jsonl(tmp_path / "in.jsonl", [row])
    written, _ = run(source, "--preset", "gsm8k", "--keep", "solution=answer")
    assert written == [{"solution": row["answer"], "prompt": "How many?", "answer": "4"}]
    options = (source, "--overwrite", "--preset", "gsm8k", "--keep")
    assert "Write --keep NEW=answer" in run(*options, "answer", fails=True)
    assert "no column reason" in run(*options, "solution=reason", fails=True)
