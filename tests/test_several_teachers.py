"""Several teachers: who scores what, their weights, and the tokens of each in a microbatch."""

import json
from collections.abc import Sequence

import pytest
import torch

from megatron_eopd import preflight
from megatron_eopd.config import load_config
from megatron_eopd.data.packing import join_signals, make_microbatches
from megatron_eopd.errors import ConfigError
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.records import (
    ALL_TEACHERS,
    HiddenStates,
    MicroBatch,
    Prompt,
    Rollout,
    ScoredRollout,
    TeacherSignal,
)
from megatron_eopd.training.several_teachers import own_tokens, pick, spread, weights_of_tokens
from tests.test_preflight import MODELS, QUICKSTART, ROOT

MORE = [f"teachers.more.hf_path={MODELS / 'teacher'}"]


def config(*overrides: str):
    return load_config(QUICKSTART, ["run_dir=unused", *overrides])


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["objective.teacher_mixture=divergences"], "there is only \\[teacher\\]"),
        (
            [*MORE, "objective.teacher_mixture=distributions", "objective.name=eopd_paper"]
            + [f"{t}.payload=topk" for t in ("teacher", "teachers.more")],
            "teacher_mixture=distributions needs the whole distribution",
        ),
        (
            [*MORE, "objective.teacher_mixture=divergences", "objective.inplace_backward=true"],
            "once for each teacher",
        ),
        (
            [*MORE, "objective.teacher_mixture=divergences", "objective.gate=quantile"],
            "several at each",
        ),
        ([f"teachers.all.hf_path={MODELS / 'teacher'}"], "all stands for every teacher"),
        (["teachers.a/b.hf_path=x"], "names metrics, too"),
        ([*MORE, "teacher.weight=0"], "greater than 0"),
        (["teacher.weight=0.5"], "teacher.weight=0.5 .* only \\[teacher\\].* set training.lr"),
    ],
)
def test_options_that_contradict_each_other(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config(*overrides)


@pytest.mark.parametrize("mixture", ["none", "distributions"])
def test_a_line_names_one_teacher_or_all(mixture, monkeypatch, tmp_path):
    """A line without a name has the one of [teacher], or in a mixture all; so have the problems of
    an evaluation."""
    monkeypatch.chdir(ROOT)
    lines = [{"prompt": "1 :"}, {"prompt": "2 :", "teacher": "more"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = [
        *MORE,
        f"run_dir={tmp_path / 'run'}",
        f"data.prompts={tmp_path / 'prompts.jsonl'}",
        "rollout.engine=megatron",
        "evaluation.num_problems=2",
        f"objective.teacher_mixture={mixture}",
    ]
    inputs = preflight.check(load_config(QUICKSTART, options), 2)
    default = "teacher" if mixture == "none" else ALL_TEACHERS
    assert [prompt.teacher for prompt in inputs.prompts] == [default, "more"]
    assert {p.teacher for problems in inputs.problem_sets for p in problems.prompts} == {default}
    named = {"prompt": "1 :", "teacher": "all"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(named))
    if mixture == "none":
        with pytest.raises(ConfigError, match="asks for every teacher, and objective"):
            preflight.check(load_config(QUICKSTART, options), 2)
    else:
        inputs = preflight.check(load_config(QUICKSTART, options), 2)
        assert [prompt.teacher for prompt in inputs.prompts] == [ALL_TEACHERS]


def signal(teacher: str, *numbers: float) -> TeacherSignal:
    return TeacherSignal(teacher, HiddenStates(torch.tensor(numbers).unsqueeze(-1)))


SPOKEN = (
    (signal("a", 1, 2),),
    (signal("b", 30),),
    (signal("a", 4, 5, 6), signal("b", 40, 50, 60)),
)
"""Of three responses of 2, 1 and 3 tokens: a, b, and both."""


def parts():
    return join_signals(SPOKEN)


def make_batch(spoken: Sequence[Sequence[TeacherSignal]]) -> MicroBatch:
    scored = []
    for index, signals in enumerate(spoken):
        ids = tuple(range(10 * index, 10 * index + signals[0].num_tokens))
        rollout = Rollout(Prompt(index, "", "", (7, 8)), 0, ids, (-1.0,) * len(ids), "stop", 0)
        scored.append(ScoredRollout(rollout, tuple(signals)))
    (batch,) = make_microbatches([scored], Layout(tp=1, pp=1, dp=1, rank=0), torch.device("cpu"))
    return batch


def test_signals_of_several_teachers_are_joined_by_teacher():
    a, b = parts()
    assert (a.teacher, a.runs, a.payload[0].flatten().tolist()) == (
        "a",
        (range(0, 2), range(3, 6)),
        [1, 2, 4, 5, 6],
    )
    assert (b.runs, b.payload[0].flatten().tolist()) == (
        (range(2, 3), range(3, 6)),
        [30, 40, 50, 60],
    )
    assert join_signals([[signal("a", 1)], []]) == ()


def test_weights_add_up_over_the_teachers_of_a_token():
    weights = {"a": 0.5, "b": 2.0}
    whole = weights_of_tokens(parts(), slice(None), weights, torch.zeros(6))
    assert whole.tolist() == [0.5, 0.5, 2.0, 2.5, 2.5, 2.5]
    chunk = weights_of_tokens(parts(), slice(1, 4), weights, torch.zeros(3))
    assert chunk.tolist() == [0.5, 2.0, 2.5]


@pytest.mark.parametrize("rows", [slice(None), slice(0, 3), slice(1, 4), slice(2, 3), slice(4, 6)])
@pytest.mark.parametrize("teacher", ["a", "b", "c"])
def test_the_tokens_of_a_teacher_in_a_chunk(teacher, rows):
    """Its own microbatch has them, in order, and they go back to their places."""
    batch = make_batch(SPOKEN)
    own = own_tokens(batch, rows, teacher)
    chunk = list(range(6))[rows]
    mine = [n for part in parts() if part.teacher == teacher for run in part.runs for n in run]
    expected = [n for n in chunk if n in mine]
    targets = batch.target_ids_N
    assert torch.equal(own.batch.target_ids_N[own.rows], targets[expected])
    assert torch.equal(pick(targets[rows], own.runs), targets[expected])
    found = spread(targets[expected], own.runs, len(chunk))
    assert found.tolist() == [int(targets[n]) if n in mine else 0 for n in chunk]
    assert sum(len(r.tokens) for r in own.batch.responses) == len(mine)
    for part in own.batch.teacher:
        assert part.runs[-1].stop == len(mine) and len(part.payload[0]) == len(mine)


def test_a_run_of_a_chunk_is_one_piece_where_the_teacher_has_all_of_it():
    """So that no logits are copied."""
    batch = make_batch([[signal("a", 1, 2)], [signal("a", 3)]])
    own = own_tokens(batch, slice(None), "a")
    assert own.runs == (range(3),) and own.batch.target_ids_N is batch.target_ids_N
    values = torch.zeros(3, 7)
    assert pick(values, own.runs).data_ptr() == values.data_ptr()
