"""What the loop does, in which order: with an engine, teachers and a step that only take notes."""

import json
from contextlib import contextmanager, nullcontext
from math import nan
from types import SimpleNamespace

import pytest
import torch

from megatron_eopd import loop, milestones, step_faults
from megatron_eopd.build import Session
from megatron_eopd.config import Config, TrainingConfig
from megatron_eopd.data.prompts import PromptSet
from megatron_eopd.data.tokenizer import load_tokenizer
from megatron_eopd.errors import ConfigError, EngineError, NonFiniteError, ReplicaError, SpikeError
from megatron_eopd.evaluation.evaluate import Evaluation
from megatron_eopd.metrics.rows import read_metrics
from megatron_eopd.metrics.writer import MetricsWriter
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.records import Bins, Histogram, Prompt, Rollout, StepFault, StepReport
from megatron_eopd.rollout.engine import SyncReport
from megatron_eopd.rollout.recording import Recording
from megatron_eopd.run_log import RunLog
from megatron_eopd.training.skipping import StepGuard
from megatron_eopd.unfinished import Unfinished
from megatron_eopd.weight_sync.verify import Probe
from tests.test_preflight import MODELS

PROMPTS = [Prompt(n, f"p{n}", "", (n,)) for n in range(8)]
BATCH, STEP = 4, 2


class NotingEngine:
    """Answers every prompt with three tokens, of the version that it was given last."""

    compares_weights = True

    def __init__(self, events: list, unsound_version: int | None = None):
        self.events, self.unsound, self.version = events, unsound_version, None
        self.probes: list = []

    def update_weights(self, version, probes=()):
        self.events.append(f"push {version}")
        self.version = version
        self.probes.append(probes)
        probe = Probe(1.0, "stop", "not the weights") if version == self.unsound else None
        return SyncReport(version, 0.1, 10, {"gather": 0.01}, probe)

    @contextmanager
    def asleep(self):
        self.events.append("sleep")
        yield

    def metrics(self):
        return {"engine/alive": 1}

    def generate(self, prompts, sampling):
        self.events.append(f"generate {len(prompts) * sampling.samples_per_prompt}")
        return [
            Rollout(prompt, n, (5, 6, 7), (-1.0,) * 3, "stop", self.version)
            for prompt in prompts
            for n in range(sampling.samples_per_prompt)
        ]


class NeverStops:
    """A run's Interruption, of which nobody wants anything."""

    def __getattr__(self, _name):
        return lambda *_args, **_options: nullcontext()


class NotingTeachers:
    """Scores a round when it is asked for the next one, and not before."""

    def __init__(self, events: list):
        self.events = events

    def microbatches(self, rounds, times):
        for packed in rounds:
            self.events.append("score")
            yield packed[0]

    def following(self, *_):
        return nullcontext()


def noting_step(events: list, faults: dict[int, str]):
    """`faults`: kind of a fault by optimizer step."""
    losses, entropies = ("total", "reverse_kl"), ("teacher_mean", "student_mean")
    names = [f"loss/{n}" for n in losses] + [f"entropy/{n}" for n in entropies]
    sums = dict.fromkeys([*names, "gate/fraction"], (3.0, 6.0))

    def train_step(student, token_loss, rounds, context, *, progress, compare_engine, **options):
        taken = [batch for portion in rounds for batch in portion]
        assert len(taken) == STEP, "one sequence to a microbatch"
        step = progress.steps
        compared = " of equal replicas" if options["compare_replicas"] else ""
        compared += " diagnosed" if options["diagnose"] else ""
        events.append(f"step {step}{' beside the engine' if compare_engine else ''}{compared}")
        names = ("entropy/teacher", "entropy/student", "mismatch/logprob_abs")
        counted = dict.fromkeys(names, Histogram(Bins("linear", 0.0, 4.0, 2), (2, 1)))
        if step in faults:
            fault = StepFault(faults[step], f"loss=nan at {step}.", {"not_finite": {}})
            return StepReport(nan, 1e-3, {}, {}, fault)
        return StepReport(1.0, 1e-3, sums, counted)

    return train_step


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the loop; gives back what happened, in order."""

    def run(*, first=0, evaluated=False, unsound=None, faults=None, **sections) -> list[str]:
        events: list[str] = []
        options = {
            "run_dir": tmp_path,
            "student": {"hf_path": MODELS / "student"},
            "teacher": {"hf_path": MODELS / "teacher"},
            "rollout": {"batch_size": BATCH, "samples_per_prompt": 2},
            "training": {
                "train_iters": 3,
                "global_batch_size": STEP,
                "check_replicas_interval": 0,
            },
            "checkpoint": {"save_interval": 2},
            "evaluation": {"interval": 2, "tasks": ["countdown"]},
            "logging": {"record_tokens_interval": 0, "diagnostics_interval": 0},
        }
        for section, own in sections.items():
            options[section] |= own
        config = Config.model_validate(options)
        log = RunLog(tmp_path, rank=0)
        gathering = SimpleNamespace(gather_parameters=lambda: events.append("gather"))
        session = Session(
            config=config,
            context=SimpleNamespace(
                layout=Layout(tp=1, pp=1, dp=1, rank=0),
                cpu_group=None,
                device=torch.device("cpu"),
            ),
            log=log,
            stop=NeverStops(),
            tokenizer=load_tokenizer(MODELS / "student"),
            prompts=PromptSet(PROMPTS, seed=1, shuffle=True),
            problem_sets=[None],
            recording=None,
            chunks=[],
            student=gathering,
            teachers=NotingTeachers(events),
            token_loss=None,
            engine=NotingEngine(events, unsound),
            max_probe_tokens=10,
            vocab_size=112,
            first_iteration=first,
            first_step=first * (BATCH // STEP),
            first_steps_done=0,
            saver=SimpleNamespace(finish=lambda: None, poll=lambda: None, whole_save_s=None),
            resumed_from=None,
            guard=StepGuard(config.training),
            resumes_evaluated=evaluated,
        )
        figures = Evaluation({"eval/countdown/pass@1": 0.5}, [], [])
        monkeypatch.setattr(loop, "train_step", noting_step(events, faults or {}))
        monkeypatch.setattr(loop, "memory_scalars", lambda *_: {"memory/host_peak_gib": 1.0})
        monkeypatch.setattr(step_faults, "from_rank_zero", lambda compute, group: compute())
        monkeypatch.setattr(
            milestones, "evaluate_student", lambda *_, **__: events.append("evaluate") or figures
        )

        def noted_save(session, work):
            events.append(f"save {work.iteration}{'' if work.is_evaluated else ' unevaluated'}")

        monkeypatch.setattr(milestones, "save", noted_save)
        monkeypatch.setattr(loop, "save", noted_save)
        run.events, run.engine = events, session.engine
        loop.iterate(session, MetricsWriter(tmp_path, resumed_at=first))
        return events

    return run


def iteration(n: int) -> list[str]:
    """Each step is scored when the one before is done; the engine sleeps meanwhile, and gets the
    new weights last."""
    first, second = f"step {2 * n} beside the engine", f"step {2 * n + 1}"
    steps = ["score", first, "score", second]
    return [f"generate {BATCH}", "sleep", *steps, "gather", f"push {n + 1}"]


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
    assert rows[1]["weight_sync/gather_s"] == 0.01 and rows[1]["engine/alive"] == 1
    # Four of the six values of two steps lie evenly in [0, 2), and two in [2, 4).
    assert (rows[1]["entropy/teacher_p50"], rows[1]["mismatch/logprob_abs_p99"]) == (1.5, 2.97)


def test_engine_and_trainer_are_compared_on_prompts_and_on_the_newest_rollouts(run):
    """At the first push there are prompts alone, of more than one token each."""
    run(training={"train_iters": 1})
    first, second = run.engine.probes
    assert first == []
    assert {tuple(ids[1:]) for ids in second} == {(5, 6, 7)}


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
    """Those of the step, and no others; nothing is saved or given to the engine after it."""
    with pytest.raises(NonFiniteError, match=r"nonfinite/000001-1.*on_nonfinite=skip"):
        run(faults={3: "gradient"})
    assert run.events[-1] == "step 3" and "push 2" not in run.events
    folder = tmp_path / "nonfinite/000001-1"
    lines = (folder / "000001.jsonl").read_text().splitlines()
    assert len(lines) == STEP
    assert {json.loads(line)["weight_version"] for line in lines} == {1}
    state = json.loads((folder / "state.json").read_text())
    assert (state["iteration"], state["step_of_iteration"], state["optimizer_step"]) == (1, 1, 3)
    assert (state["grad_norm"], state["fault"]) == ("nan", "gradient")


def test_the_batch_of_a_faulty_step_replays_in_every_iteration(run, tmp_path):
    """A run that looks into it starts where it has weights, which is not where the fault was."""
    with pytest.raises(NonFiniteError):
        run(faults={4: "weights"})
    folder = tmp_path / "nonfinite/000002"
    recording = Recording(folder, num_rollouts=STEP, vocab_size=112, max_length=99)
    recording.check_files(range(5))
    assert recording.read(0) == recording.read(2) == recording.read(4)
    assert [r.weight_version for r in recording.read(0)] == [2, 2]
    (folder / "000002.jsonl").unlink()
    with pytest.raises(ConfigError, match="5 of the 5 files"):
        recording.check_files(range(5))


SKIP = {"on_nonfinite": "skip", "max_skipped_steps": 2}


def test_a_skipped_step_is_counted_and_in_no_mean(run, tmp_path):
    """Also an iteration of which no step is left has its line, its push and its checkpoint."""
    events = run(faults={1: "gradient", 2: "gradient", 4: "spike", 5: "gradient"}, training=SKIP)
    assert events[-3:] == ["push 3", "evaluate", "save 3"]
    rows = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "time/total" in r]
    assert [row["optim/skipped_steps"] for row in rows] == [1, 1, 2]
    assert [row.get("loss/total") for row in rows] == [0.5, 0.5, None]
    assert [row.get("optim/grad_norm") for row in rows] == [1, 1, None]
    assert (tmp_path / "spikes/000002").is_dir() and (tmp_path / "nonfinite/000002-1").is_dir()
    log = (tmp_path / "log/rank0.txt").read_text()
    assert "WARNING: skipped, number 2 in a row of at most 2: iteration 1" in log
    assert "| skipped 2 |" in log


@pytest.mark.parametrize(("kind", "error"), [("gradient", NonFiniteError), ("spike", SpikeError)])
def test_too_many_skipped_steps_in_a_row_end_the_run(run, kind, error):
    with pytest.raises(error, match=r"number 3 in a row, and training.max_skipped_steps=2"):
        run(faults=dict.fromkeys((0, 2, 3, 4), kind), training=SKIP)
    assert run.events[-1].startswith("step 4")


def test_an_update_that_was_made_is_never_skipped(run):
    with pytest.raises(NonFiniteError, match="newest checkpoint"):
        run(faults={1: "weights"}, training=SKIP)
    assert run.events[-1] == "step 1"


def test_replicas_are_compared_before_every_nth_step(run):
    events = run(training={"check_replicas_interval": 3})
    compared = [e for e in events if e.endswith("of equal replicas")]
    assert [e.split()[1] for e in compared] == ["0", "3"]


def test_the_first_step_of_every_nth_iteration_is_diagnosed(run):
    for interval, steps in ((2, ["0", "4"]), (1, ["0", "2", "4"]), (0, [])):
        events = run(logging={"diagnostics_interval": interval})
        assert [e.split()[1] for e in events if e.endswith("diagnosed")] == steps


def test_a_disk_that_is_full_loses_neither_run_nor_message(run, tmp_path):
    (tmp_path / "nonfinite").write_text("no folder can be made here")
    run(faults={0: "gradient"}, training=SKIP)
    assert "WARNING" in (log := (tmp_path / "log/rank0.txt").read_text())
    assert "could not be written" in log


def test_samples_of_other_weights_are_not_trained_on(run, monkeypatch):
    stuck = property(lambda self: 7, lambda self, version: None)
    monkeypatch.setattr(NotingEngine, "version", stuck, raising=False)
    with pytest.raises(AssertionError, match="weight version 7 in iteration 0"):
        run()


def test_of_replicas_that_differ_nothing_is_saved(tmp_path, monkeypatch):
    def differ(student, context):
        raise ReplicaError("norm.weight")

    monkeypatch.setattr(milestones, "check_replicas", differ)
    options = SimpleNamespace(run_dir=tmp_path, training=TrainingConfig())
    with pytest.raises(ReplicaError):
        milestones.save(SimpleNamespace(config=options, student=None, context=None), Unfinished(3))
    assert not list(tmp_path.iterdir())
