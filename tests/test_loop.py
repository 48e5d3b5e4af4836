"""What the loop does, in which order: with an engine, teachers and a step that only take notes."""

import json
from types import SimpleNamespace

import pytest

from megatron_eopd import loop
from megatron_eopd.build import Session
from megatron_eopd.config import Config
from megatron_eopd.data.prompts import PromptSet
from megatron_eopd.data.tokenizer import load_tokenizer
from megatron_eopd.errors import EngineError, NonFiniteError
from megatron_eopd.metrics.writer import MetricsWriter, read_metrics
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.records import Prompt, Rollout, StepReport
from megatron_eopd.rollout.engine import SyncReport
from megatron_eopd.run_log import RunLog
from megatron_eopd.weight_sync.verify import Probe
from tests.test_preflight import MODELS

PROMPTS = [Prompt(n, f"p{n}", "", (n,)) for n in range(8)]
BATCH, STEP = 4, 2


class NotingEngine:
    """Answers every prompt with three tokens, of the version that it was given last."""

    def __init__(self, events: list, unsound_version: int | None = None):
        self.events, self.unsound, self.version = events, unsound_version, None

    def update_weights(self, version):
        self.events.append(f"push {version}")
        self.version = version
        probe = Probe(1.0, "stop", "not the weights") if version == self.unsound else None
        return SyncReport(version, 0.1, 10, probe)

    def generate(self, prompts, sampling):
        self.events.append(f"generate {len(prompts) * sampling.samples_per_prompt}")
        return [
            Rollout(prompt, n, (5, 6, 7), (-1.0,) * 3, "stop", self.version)
            for prompt in prompts
            for n in range(sampling.samples_per_prompt)
        ]


class NotingTeachers:
    """Scores a round when it is asked for the next one, and not before."""

    def __init__(self, events: list):
        self.events = events

    def microbatches(self, rounds):
        for packed in rounds:
            self.events.append("score")
            yield packed[0]


def noting_step(events: list, fails_at: int | None = None):
    losses, entropies = ("total", "reverse_kl"), ("teacher_mean", "student_mean")
    names = [f"loss/{n}" for n in losses] + [f"entropy/{n}" for n in entropies]
    sums = dict.fromkeys([*names, "gate/fraction"], (3.0, 6.0))

    def train_step(student, token_loss, rounds, context, *, num_rounds, progress, compare_engine):
        taken = [batch for portion in rounds for batch in portion]
        assert len(taken) == STEP, "one sequence to a microbatch"
        step = progress.steps
        events.append(f"step {step}{' beside the engine' if compare_engine else ''}")
        if step == fails_at:
            raise NonFiniteError("loss=nan")
        values = {"entropy/teacher": [0.5], "entropy/student": [0.5], "mismatch/logprob_abs": [0.0]}
        return StepReport(1.0, 1e-3, sums, values)

    return train_step


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the loop; gives back what happened, in order."""

    def run(*, first=0, evaluated=False, unsound=None, fails_at=None, **sections) -> list[str]:
        events: list[str] = []
        options = {
            "run_dir": tmp_path,
            "student": {"hf_path": MODELS / "student"},
            "teacher": {"hf_path": MODELS / "teacher"},
            "rollout": {"batch_size": BATCH, "samples_per_prompt": 2},
            "training": {"train_iters": 3, "global_batch_size": STEP},
            "checkpoint": {"save_interval": 2},
            "evaluation": {"interval": 2, "task": "countdown"},
        }
        for section, own in sections.items():
            options[section] |= own
        config = Config.model_validate(options)
        log = RunLog(tmp_path, rank=0)
        gathering = SimpleNamespace(gather_parameters=lambda: events.append("gather"))
        session = Session(
            config=config,
            context=SimpleNamespace(layout=Layout(tp=1, pp=1, dp=1, rank=0)),
            log=log,
            tokenizer=load_tokenizer(MODELS / "student"),
            prompts=PromptSet(PROMPTS, seed=1, shuffle=True),
            held_out=PROMPTS[:2],
            recording=None,
            student=gathering,
            teachers=NotingTeachers(events),
            token_loss=None,
            engine=NotingEngine(events, unsound),
            sync_check=None,
            max_probe_tokens=10,
            vocab_size=112,
            first_iteration=first,
            first_step=first * (BATCH // STEP),
            resumed_from=None,
            resumes_evaluated=evaluated,
        )
        figures = SimpleNamespace(figures={"eval/countdown/pass@1": 0.5}, samples=[], correct=[])
        monkeypatch.setattr(loop, "train_step", noting_step(events, fails_at))
        monkeypatch.setattr(
            loop, "evaluate_student", lambda session: events.append("evaluate") or figures
        )
        monkeypatch.setattr(
            loop,
            "save",
            lambda session, iteration, is_evaluated=True: events.append(
                f"save {iteration}{'' if is_evaluated else ' unevaluated'}"
            ),
        )
        run.events = events
        loop.iterate(session, MetricsWriter(tmp_path, resumed_at=first))
        return events

    return run


def iteration(n: int) -> list[str]:
    """Each step is scored when the one before is done; the new weights go to the engine last."""
    first, second = f"step {2 * n} beside the engine", f"step {2 * n + 1}"
    return [f"generate {BATCH}", "score", first, "score", second, "gather", f"push {n + 1}"]


def test_a_run_from_first_to_last(run, tmp_path):
    """Weights are pushed before the first rollout; evaluations and checkpoints come where they are
    due, at both ends too, and the last ones take the way of all others."""
    assert run() == [
        *("push 0", "evaluate"),
        *iteration(0),
        *iteration(1),
        *("evaluate", "save 2"),
        *iteration(2),
        *("evaluate", "save 3"),
    ]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2, 2, 3, 3]
    assert [row["throughput/tokens_total"] for row in rows if "loss/total" in row] == [12, 24, 36]
    assert rows[1]["loss/total"] == 0.5 and rows[1]["weight_sync/version"] == 1


def test_a_run_that_goes_on_makes_no_evaluation_twice(run):
    """With its checkpoint's evaluation made, or, after a stop, still to be made."""
    last = [*iteration(2), "evaluate", "save 3"]
    assert run(first=2, evaluated=True) == ["push 2", *last]
    assert run(first=2, evaluated=False) == ["push 2", "evaluate", "save 2", *last]


def test_a_finished_run_does_nothing(run):
    assert run(first=3, evaluated=True) == []


def test_an_engine_without_the_weights_ends_the_run_with_everything_written(run, tmp_path):
    with pytest.raises(EngineError, match="not the weights"):
        run(unsound=2)
    assert run.events[-2:] == ["push 2", "save 2 unevaluated"]
    assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_the_first_push_must_be_sound(run):
    with pytest.raises(EngineError, match="not the weights"):
        run(unsound=0)
    assert run.events == ["push 0"]


def test_a_step_that_is_not_finite_leaves_its_rollouts(run, tmp_path):
    """Those of the step, and no others."""
    with pytest.raises(NonFiniteError):
        run(fails_at=3)
    assert run.events[-1] == "step 3" and "push 2" not in run.events
    lines = (tmp_path / "rollouts/000001-nonfinite.jsonl").read_text().splitlines()
    assert len(lines) == STEP
    assert {json.loads(line)["weight_version"] for line in lines} == {1}


def test_samples_of_other_weights_are_not_trained_on(run, monkeypatch):
    stuck = property(lambda self: 7, lambda self, version: None)
    monkeypatch.setattr(NotingEngine, "version", stuck, raising=False)
    with pytest.raises(AssertionError, match="weight version 7 in iteration 0"):
        run()
