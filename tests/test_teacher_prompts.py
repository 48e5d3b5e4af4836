"""What a teacher reads in the place of the student's prompt: from a column, a template, or its own
chat template. Bad input ends before a run begins."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from megatron_eopd import preflight
from megatron_eopd.config import DataConfig, load_config
from megatron_eopd.config.data import fields_of_template
from megatron_eopd.data.packing import Limits
from megatron_eopd.data.prompt_files import Row
from megatron_eopd.data.teacher_prompts import TeacherPrompts
from megatron_eopd.data.tokenizer import load_tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.records import Prompt, Rollout
from megatron_eopd.rollout.recording import Recording, write_rollouts
from megatron_eopd.teacher.assignment import as_read, items_of, plan_locally
from tests.test_preflight import MODELS, QUICKSTART, ROOT, edit_json, refused

__all__ = ["refused"]

HINT = "data.teacher_prompt_template={prompt} {hint}"
QUESTION = "1 2 3 4 -> 10 :"
LINES = [{"prompt": QUESTION, "hint": f"{n} + 1"} for n in range(6)]


def prompt_file(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def inputs(monkeypatch, tmp_path):
    """What a run with these lines and options would start from."""
    monkeypatch.chdir(ROOT)

    def read(*overrides: str, lines: list[dict] = LINES) -> preflight.Inputs:
        file = prompt_file(tmp_path / "prompts.jsonl", lines)
        more = ["data.max_prompt_length=24", "rollout.engine=megatron", f"data.prompts={file}"]
        config = load_config(QUICKSTART, [f"run_dir={tmp_path / 'run'}", *more, *overrides])
        return preflight.check(config, 2)

    return read


def texts(inputs: preflight.Inputs, teacher: str = "teacher") -> list[str]:
    return [inputs.tokenizers.student.show(p.ids_for(teacher)) for p in inputs.prompts]


def test_a_template_is_filled_from_the_columns_of_each_line(inputs):
    found = inputs(HINT)
    assert texts(found) == [f"1 2 3 4 -> 10 : {n} + 1" for n in range(6)]
    student = found.tokenizers.student
    assert {student.show(p.prompt_ids) for p in found.prompts} == {"1 2 3 4 -> 10 :"}
    assert found.prompts.longest == 7 and found.prompts.longest_for("teacher") == 10
    assert found.prompts.digest == inputs().prompts.digest
    digests = {found.prompts.teachers_digest, inputs().prompts.teachers_digest, ""}
    other = inputs("data.teacher_prompt_template={hint} {prompt}").prompts.teachers_digest
    assert len(digests | {other}) == 3


def test_dotted_columns_numbers_and_braces(inputs):
    lines = [{"prompt": "7 :", "more": {"gold": 5}}]
    template = "data.teacher_prompt_template={more.gold} {prompt} {more.gold}"
    assert texts(inputs(template, lines=lines)) == ["5 7 : 5"]
    rows = [Row("a line 1", "7 :", columns=lines[0])]
    for template, expected in (
        (r"\boxed{{{more.gold}}} {{prompt}} {prompt}", r"\boxed{5} {prompt} 7 :"),
        ("{{{{}}}}{prompt}", "{{}}7 :"),
    ):
        data = DataConfig(teacher_prompt_template=template)
        own = TeacherPrompts("teacher", data, load_tokenizer(MODELS / "student"))
        assert own._as_read(rows[0]).text == expected
    assert fields_of_template(r"\boxed{{{a.b}}} {a.b} {c}") == ["a.b", "c"]


def test_a_column_is_read_in_the_place_of_the_prompt(inputs):
    lines = [{"prompt": "1 :", "teacher_prompt": f"{n} 1 :"} for n in range(3)]
    found = inputs("data.teacher_prompt_key=teacher_prompt", lines=lines)
    assert texts(found) == ["0 1 :", "1 1 :", "2 1 :"]
    asked, said = {"role": "user", "content": "9 :"}, {"role": "assistant", "content": "8"}
    chats = [{"prompt": "1 :", "told": [asked, said]}]
    found = inputs("data.teacher_prompt_key=told", lines=chats)
    assert texts(found) == ["9 :"]
    assert "1 chats of [teacher] went on behind the question, and were cut" in found.warnings[-1]
    empty = [{"prompt": "1 :", "told": [{"role": "user", "content": " "}]}]
    with pytest.raises(ConfigError, match="line 1: the prompt is empty"):
        inputs("data.teacher_prompt_key=told", lines=empty)


def test_each_teacher_may_read_its_own(inputs):
    """And only for the lines that name it."""
    lines = [LINES[0], LINES[1] | {"teacher": "more"}]
    options = [f"teachers.more.hf_path={MODELS / 'teacher'}", "teachers.more.payload=hidden"]
    own = ["teachers.more.prompt.template={hint} :", "teachers.more.prompt.prompt_suffix= 5 +"]
    found = inputs(*options, *own, lines=lines)
    assert [p.teacher_ids.keys() for p in found.prompts] == [set(), {"more"}]
    assert texts(found, "more")[1] == "1 + 1 : 5 +"


def chat_model(path: Path, template: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(MODELS / "teacher", path))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


def test_a_teacher_has_a_chat_template_of_its_own(inputs, tmp_path):
    """A base student reads the plain question, and an instructed teacher its turns."""
    template = "{% for m in messages %}{{ m.content }} ; {% endfor %}{{ effort }} :"
    model = chat_model(tmp_path / "teacher", template)
    own = ["teacher.prompt.apply_chat_template=true", "teacher.prompt.system_prompt=8 8"]
    chat = [f"teacher.hf_path={model}", *own, "teacher.prompt.chat_template_kwargs.effort=3"]
    found = inputs(*chat)
    assert set(texts(found)) == {"8 8 ; 1 2 3 4 -> 10 : ; 3 :"}
    assert {found.tokenizers.student.show(p.prompt_ids) for p in found.prompts} == {
        LINES[0]["prompt"]
    }
    assert set(texts(inputs(*chat, HINT))) == {
        f"8 8 ; 1 2 3 4 -> 10 : {n} + 1 ; 3 :" for n in range(6)
    }
    with pytest.raises(ConfigError, match=r"\[teacher\] its prompts.*reads no such variable"):
        inputs(*chat, "teacher.prompt.chat_template_kwargs.effrt=3")


def test_a_teacher_may_have_tokens_that_the_student_lacks(inputs, tmp_path):
    """In its prompt; a response has shared ones alone."""
    model = chat_model(
        tmp_path / "teacher", "{% for m in messages %}<think> {{ m.content }}{% endfor %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(model)
    edit_json(model / "config.json", vocab_size=128)
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        if weight.shape[0] == 112:
            weights[name] = torch.cat([weight, weight[:16]])
    save_file(weights, model / "model.safetensors")
    options = [f"teacher.hf_path={model}", "teacher.prompt.apply_chat_template=true"]
    found = inputs(*options, "objective.exclude_unshared_tokens=true")
    assert {p.ids_for("teacher")[0] for p in found.prompts} == {112}
    assert found.tokenizers.vocab_size == 112


def test_a_template_file_is_looked_for_beside_the_configuration(tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (tmp_path / "run.toml").write_text(
        'run_dir = "r"\n[student]\nhf_path = "s"\n[teacher]\nhf_path = "t"\n[teacher.prompt]\n'
        'apply_chat_template = true\nchat_template_file = "t.jinja"\n'
    )
    own = load_config(tmp_path / "run.toml").teacher.prompt
    assert own.chat_template_file == tmp_path / "t.jinja"


def test_a_recording_is_not_replayed_with_other_prompts_of_teachers(refused, tmp_path):
    """It holds what they were shown."""
    folder = tmp_path / "recorded/rollouts"
    folder.mkdir(parents=True)
    before = load_config(QUICKSTART, ["run_dir=x", "data.teacher_prompt_template={prompt} 7"])
    (folder.parent / "config.json").write_text(before.model_dump_json())
    message = refused(f"rollout.replay={folder}", "data.teacher_prompt_template={prompt} 8")
    assert "it was recorded with data.teacher_prompt_template={prompt} 7" in message
    more = [f"teachers.more.hf_path={MODELS / 'teacher'}", "objective.teacher_mixture=divergences"]
    message = refused(f"rollout.replay={folder}", "data.teacher_prompt_template={prompt} 7", *more)
    assert "it was recorded with objective.teacher_mixture=none" in message


def test_a_prompt_that_comes_out_the_same_is_the_same(inputs):
    found = inputs("data.teacher_prompt_template={prompt}")
    assert all(p.ids_for("teacher") == p.prompt_ids for p in found.prompts)


def test_problems_of_an_evaluation_are_shown_what_they_have(inputs):
    """Countdown's have a solution, and no hint: then the teacher reads the question alone."""
    options = ["evaluation.tasks=countdown", "evaluation.num_problems=3"]
    with_solution = inputs(
        *options, "data.prompts=countdown", "data.teacher_prompt_template={solution} {prompt}"
    )
    (problems,) = with_solution.problem_sets
    for prompt, problem in zip(problems.prompts, problems.problems, strict=True):
        text = with_solution.tokenizers.student.show(prompt.ids_for("teacher"))
        assert text == f"{problem.columns['solution']} {problem.text}"
        assert problems.task.grade(problem.answer, problem.columns["solution"]).verdict == "right"
    assert with_solution.warnings == []
    without = inputs(*options, HINT)
    (problems,) = without.problem_sets
    assert all(p.ids_for("teacher") == p.prompt_ids for p in problems.prompts)
    (told,) = without.warnings
    assert "on countdown: not all of its problems have hint, so the teacher" in told


def test_every_line_that_lacks_a_column_is_named(inputs):
    lines = [
        LINES[0],
        {"prompt": "1 :"},
        {"prompt": "2 :", "hint": " "},
        {"prompt": "3 :", "hint": None},
    ]
    with pytest.raises(
        ConfigError, match=r"no text for hint in .*prompts.jsonl lines 2-4; .*|lines 2-4"
    ):
        inputs(HINT, lines=lines)
    with pytest.raises(ConfigError) as caught:
        inputs("data.teacher_prompt_template={prompt} {hnt}")
    assert "hnt in" in str(caught.value) and "lines 1-6. Columns are hint, prompt" in str(
        caught.value
    )


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["data.teacher_prompt_template=the same for all"], "names no column"),
        (["data.teacher_prompt_template={prompt} {}"], r"\{\} names no column"),
        (["data.teacher_prompt_template={prompt"], "expected '}' before end of string"),
        (["data.teacher_prompt_template={prompt!r}"], "names no column"),
        ([HINT, "data.teacher_prompt_key=hint"], "one source of the teacher's prompt"),
        (
            ["teacher.prompt.system_prompt=a"],
            r"teacher.prompt, in the place of data: system_prompt",
        ),
    ],
)
def test_options_that_contradict_each_other(overrides, message, inputs):
    with pytest.raises(ConfigError, match=message):
        inputs(*overrides)


def test_a_prompt_too_long_for_the_teacher(inputs):
    lines = [{"prompt": "1 :", "hint": "1 + " * 60}]
    with pytest.raises(
        ConfigError, match=r"that the teacher reads has 122 tokens.*is 64. Ask less"
    ):
        inputs(HINT, lines=lines)
    budget = ["training.micro_batch_size=none", "training.max_tokens_per_microbatch=30"]
    lines = [{"prompt": "1 :", "hint": "1 + " * 8}]
    with pytest.raises(ConfigError, match=r"cannot hold the longest prompt of 18 .*\[teacher\]"):
        inputs(HINT, *budget, lines=lines)


def test_a_column_for_teachers_that_no_option_reads_is_told(inputs):
    lines = [{"prompt": "1 :", "teacher_prompt": "2 :"}] * 2
    (told,) = inputs(lines=lines).warnings
    assert "2 lines have a teacher_prompt, and no option reads it" in told


def test_what_a_shell_makes_of_a_template_is_told(inputs):
    """The question lost at a semicolon, and a line feed that is none."""
    told = "\n".join(inputs("data.teacher_prompt_template={hint}").warnings)
    assert "reads '{hint}', in which the question is not" in told
    told = "\n".join(inputs(r"data.teacher_prompt_template={prompt}\n{hint}").warnings)
    assert "with a backslash and an n in it" in told
    own = ["teacher.prompt.template={prompt} {hnt}"]
    with pytest.raises(ConfigError, match=r"\[teacher\] teacher.prompt.template='{prompt} {hnt}'"):
        inputs(*own)


def test_special_tokens_in_what_a_teacher_reads_are_told(inputs):
    lines = [{"prompt": "1 :", "hint": "2 <eos> 3"}]
    told = "\n".join(inputs(HINT, lines=lines).warnings)
    assert "1 prompts of [teacher] hold special tokens in their text" in told


def test_a_clock_in_the_teachers_template_is_told(inputs, tmp_path):
    template = "{{ strftime_now('%d') | int }} {% for m in messages %}{{ m.content }}{% endfor %}"
    model = chat_model(tmp_path / "teacher", template)
    (told,) = inputs(f"teacher.hf_path={model}", "teacher.prompt.apply_chat_template=true").warnings
    assert "writes the day on which it is read into the prompts" in told


def test_the_preview_shows_both(inputs):
    found = inputs(HINT)
    shown = preflight.preview(found)
    assert (
        "what the student reads, 7 tokens" in shown and "what the teacher reads, 10 tokens" in shown
    )


# --- recordings and packing ---------------------------------------------------------------------


def rollout(index: int, own: tuple[int, ...] | None) -> Rollout:
    prompt = Prompt(index, "1", "", (1, 2), teacher_ids={} if own is None else {"teacher": own})
    return Rollout(prompt, 0, (3, 4, 5), (-1.0,) * 3, "stop", 0)


def test_a_recording_holds_what_the_teacher_read(tmp_path):
    rollouts, tokenizer = (
        [rollout(0, (7, 8, 9)), rollout(1, (6,))],
        load_tokenizer(MODELS / "student"),
    )
    write_rollouts(tmp_path / "000000.jsonl", rollouts, tokenizer)
    recording = Recording(tmp_path, 2, vocab_size=100, max_length=6, shown_more={"teacher": 100})
    assert recording.read(0) == rollouts
    with pytest.raises(ConfigError, match="line 1: 6 tokens, and at most 5 fit"):
        replace(recording, max_length=5).read(0)
    with pytest.raises(ConfigError, match=r"line 1: teacher_ids.teacher has the token 8"):
        replace(recording, shown_more={"teacher": 8}).read(0)
    # A teacher may have more tokens than the student.
    assert replace(recording, vocab_size=6).read(0) == rollouts
    with pytest.raises(ConfigError, match="a prompt of the teacher 'teacher', which by the option"):
        replace(recording, shown_more={}).read(0)
    write_rollouts(
        tmp_path / "000000.jsonl", [rollout(0, None)] * 2, load_tokenizer(MODELS / "student")
    )
    with pytest.raises(ConfigError, match="line 1: no prompt in it of the teacher 'teacher'"):
        recording.read(0)


def test_longer_prompts_of_a_teacher_are_packed_within_the_budget():
    """Each score on the data-parallel rank that needs it, in as many microbatches on each."""
    packed = [[[rollout(0, (0,) * 20), rollout(1, (0,) * 20)]], [[rollout(2, (0,) * 3)]]]
    layout, limits = Layout(tp=1, pp=1, dp=2, rank=0), Limits(None, 30)
    plan = plan_locally(as_read(dict(enumerate(items_of(packed))), "teacher"), limits, layout)
    assert plan == [[[0], [1]], [[2], []]]
    alike = plan_locally(dict(enumerate(items_of(packed))), limits, layout)
    assert alike == [[[0, 1]], [[2]]]


def test_the_first_tokens_of_a_response_know_its_length():
    whole = rollout(0, None)
    cut = whole.first_tokens(2)
    assert (cut.response_ids, cut.response_logprobs) == ((3, 4), (-1.0, -1.0))
    assert cut.whole_length == 3 and cut.first_tokens(1).whole_length == 3
    assert whole.first_tokens(3) is whole and whole.first_tokens(None) is whole
