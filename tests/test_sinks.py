"""What is shown beside metrics.jsonl: with the real packages, and none of it costs a run its life.

Of Weights & Biases the files are read that it would send; of MLflow and TensorBoard what their own
readers find.
"""

import dataclasses
import json
import math
import os
import pty
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from megatron_eopd.errors import ConfigError
from megatron_eopd.metrics import names
from megatron_eopd.metrics.sinks import background, choice
from megatron_eopd.metrics.sinks.background import MOST_WAITING, Background
from megatron_eopd.metrics.sinks.ledger import Ledger
from megatron_eopd.metrics.writer import MetricsWriter, simple_options
from megatron_eopd.records import Bins, Histogram

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "seed": 7,
    "objective.name": "eopd",
    "model.tied": True,
    "data.prompt_suffix": "a|`b`\nc",
}
HISTOGRAM = Histogram(Bins("linear", 0.0, 8.0, 8), (0, 1, 0, 3, 0, 0, 0, 0))


@pytest.fixture
def offline(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


@pytest.fixture
def silent_url():
    """Of a host that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def start(run_dir: Path, resumed_at: int | None, trackers: tuple[str, ...], iterations, **more):
    """One start of a run: value 10 · iteration, and an evaluation behind each even iteration."""
    writer = MetricsWriter(run_dir, resumed_at, trackers, options=OPTIONS, **more)
    for n in iterations:
        scalars = {"loss/total": 10.0 * n, "optim/lr": math.nan}
        writer.write(n, scalars, {"entropy/teacher": HISTOGRAM})
        writer.text(n, "rollouts", f"<b>sample</b> of {n}")
        if n % 2 == 0:
            writer.write(n, {"eval/t/pass@4": n / 8, "eval/t/avg@4": n / 16})
            writer.text(n, "evaluation", f"sample of {n}")
    return writer


def records_of(path: Path) -> Iterator[bytes]:
    """Of a .wandb file: a header of 7 bytes, then LevelDB's log of blocks of 32 KiB, in which a
    part of a record has 4 bytes of checksum, 2 of length and 1 of kind (1 whole, 4 its last)."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def rows_for_wandb(run_dir: Path) -> list[dict]:
    """Every row of all starts, as it would be sent."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = run_dir.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for path in sorted(files, key=lambda file: file.stat().st_mtime):
        for record in map(Record.FromString, records_of(path)):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                names = [item.key or ".".join(item.nested_key) for item in items]
                values = [json.loads(item.value_json) for item in items]
                rows.append(dict(zip(names, values, strict=True)))
    return rows


def mlflow_run(run_dir: Path):
    """(client, the only run that there is)."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{run_dir}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("megatron_eopd")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def string_in(events: EventAccumulator, tag: str) -> bytes:
    """The first value of it."""
    return events.Tensors(tag)[0].tensor_proto.string_val[0]


def start_again(run_dir: Path, tracker: str, *starts: tuple[int | None, int]) -> list[str]:
    """(Checkpoint that it resumes from, iteration behind which it is broken off) of each; the
    values are made again as they were. At 6 the run is complete. Returns what was told."""
    told: list[str] = []
    for resumed_at, last in starts:
        iterations = range((resumed_at or 0) + 1, last + 1)
        writer = start(run_dir, resumed_at, (tracker,), iterations, tell=told.append)
        if last == 6:
            writer.complete()
        writer.close()
    return told


def test_wandb_has_each_row_once_over_restarts(tmp_path, offline):
    """One id; its own steps and the iterations rise; nothing is left running."""
    starts = (None, 4), (2, 3), (2, 4), (4, 4), (4, 6)
    assert start_again(tmp_path, "wandb", *starts) == []
    starts = list(tmp_path.glob("wandb/offline-run-*"))
    (one,) = {path.name.rpartition("-")[2] for path in starts if path.name.count("-") == 3}
    assert one == json.loads((tmp_path / "wandb/sent.json").read_text())["id"]
    rows = rows_for_wandb(tmp_path)
    loss = [(row["iteration"], row["loss/total"]) for row in rows if "loss/total" in row]
    assert loss == [(n, 10.0 * n) for n in range(1, 7)]
    evaluated = [(r["iteration"], r["eval/t/pass@4"]) for r in rows if "eval/t/pass@4" in r]
    assert evaluated == [(2, 0.25), (4, 0.5), (6, 0.75)]
    steps = [row["_step"] for row in rows]
    assert steps == sorted(set(steps))
    assert len(rows) == 6 + 3 + 6 + 3  # the pages about the run are in its first row
    assert "about/metrics._type" in rows[0] and rows[0]["loss/total"] == 10
    (row,) = [row for row in rows if row.get("loss/total") == 50]
    assert row["entropy/teacher.values"] == [1, 0, 3]
    assert row["entropy/teacher.bins"] == [1, 2, 3, 4]
    html = "".join(p.read_text() for p in tmp_path.glob("wandb/*/files/media/html/*.html"))
    assert "&lt;b&gt;sample&lt;/b&gt; of 5" in html and "<b>sample" not in html
    left = [child.name() for child in psutil.Process().children(recursive=True)]
    assert not [name for name in left if "wandb" in name]


def test_what_wandb_is_sent_again_after_a_kill_has_the_steps_that_it_had(tmp_path, offline):
    """And what is new has higher ones: of others W&B takes no notice."""
    start(tmp_path, None, ("wandb",), range(1, 4)).close()
    sent = tmp_path / "wandb/sent.json"
    before = rows_for_wandb(tmp_path)
    # As SIGKILL leaves it: what was sent in the last seconds was not noted.
    sent.write_text(json.dumps(json.loads(sent.read_text()) | {"place": [-1, False], "rows": 0}))
    start(tmp_path, 2, ("wandb",), range(3, 7)).close()
    again = rows_for_wandb(tmp_path)[len(before) :]
    step_of = {(row["iteration"], "loss/total" in row): row["_step"] for row in before}
    assert again[0]["_step"] == step_of[3, True] and again[0]["loss/total"] == 30
    new = [row["_step"] for row in again if row["iteration"] > 3]
    assert len(new) == 3 + 2 + 3 + 2 and min(new) > max(row["_step"] for row in before)
    assert new == sorted(set(new))


def test_mlflow_has_each_row_once_over_restarts(tmp_path, offline):
    told = start_again(tmp_path, "mlflow", (None, 4))
    assert mlflow_run(tmp_path)[1].info.status == "KILLED"
    assert not told + start_again(tmp_path, "mlflow", (2, 6))
    client, run = mlflow_run(tmp_path)
    assert run.info.run_id == json.loads((tmp_path / "mlflow/sent.json").read_text())["id"]
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    history = client.get_metric_history(run.info.run_id, "loss/total")
    assert sorted((m.step, m.value) for m in history) == [(n, 10.0 * n) for n in range(1, 7)]
    history = client.get_metric_history(run.info.run_id, "eval/t/pass_at_4")
    assert sorted((m.step, m.value) for m in history) == [(2, 0.25), (4, 0.5), (6, 0.75)]
    assert run.data.params["objective.name"] == "eopd"
    texts = {path.name for path in tmp_path.glob("mlflow/artifacts/*/artifacts/rollouts/*.md")}
    assert texts == {f"{n:06d}.md" for n in range(1, 7)}


def test_a_run_that_begins_is_another_one_for_a_service(tmp_path):
    first = Ledger(tmp_path / "sent.json", begins=True)
    first.note((3, False))
    resumed, anew = (Ledger(tmp_path / "sent.json", begins=begins) for begins in (False, True))
    assert resumed.known.id == first.known.id != anew.known.id
    assert not resumed.is_new((3, False)) and resumed.is_new((3, True)) and anew.is_new((0, False))


def test_what_a_kill_may_have_lost_is_sent_again(tmp_path):
    """Until it has settled, or the service was closed."""
    killed = Ledger(tmp_path / "sent.json", begins=True, settles_s=100.0)
    killed.save()
    killed.note((1, False))
    again = Ledger(tmp_path / "sent.json", begins=False, settles_s=100.0)
    assert again.known == dataclasses.replace(killed.known, place=(-1, False))
    assert again.is_new((1, False))
    again.note((1, False))
    again.save()
    assert not Ledger(tmp_path / "sent.json", begins=False).is_new((1, False))


def test_tensorboard_says_what_its_curves_are(tmp_path):
    """Unit and meaning of each tag, charts, hyperparameters and pages, in one run alone; and an
    unknown name is shown all the same."""
    writer = start(tmp_path, None, ("tensorboard",), range(0, 3))
    writer.write(3, {"loss/total": 30.0, "my/own": 1.0})
    writer.complete()
    writer.close()
    folder = tmp_path / "tensorboard"
    assert not [path for path in folder.iterdir() if path.is_dir()]
    events = EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [
        (n, 10.0 * n) for n in range(4)
    ]
    about = events.SummaryMetadata("eval/t/pass@4")
    assert about.display_name == "eval/t/pass@4 [share]"
    assert about.summary_description == names.find("eval/t/pass@4").text
    # Without it TensorBoard's own server, which is not this reader, shows neither.
    assert about.data_class == DATA_CLASS_SCALAR
    assert [e.value for e in events.Scalars("my/own")] == [1.0]
    layout = Layout.FromString(string_in(events, "custom_scalars__config__"))
    assert "gate" in [chart.title for category in layout.category for chart in category.chart]
    content = events.PluginTagToContent("hparams")
    assert set(content) == {EXPERIMENT_TAG, SESSION_START_INFO_TAG, SESSION_END_INFO_TAG}
    session = HParamsPluginData.FromString(content[SESSION_START_INFO_TAG]).session_start_info
    assert session.hparams["seed"].number_value == 7
    assert session.hparams["model.tied"].string_value == "true"
    experiment = HParamsPluginData.FromString(content[EXPERIMENT_TAG]).experiment
    assert "loss/total" in [info.name.tag for info in experiment.metric_infos]
    for page, line in (
        ("run", "| `data.prompt_suffix` | `a/'b'↵c` |"),
        ("first_50_steps", "| `gate/fraction` |"),
        ("metrics", "| `eval/<task>/pass@k` | share |"),
    ):
        assert line in string_in(events, f"about/{page}/text_summary").decode()


def test_a_broken_off_run_is_not_shown_as_a_finished_one(tmp_path):
    start(tmp_path, None, ("tensorboard",), range(1, 3)).close()
    content = EventAccumulator(str(tmp_path / "tensorboard")).Reload().PluginTagToContent("hparams")
    assert SESSION_START_INFO_TAG in content and SESSION_END_INFO_TAG not in content


class Recorder:
    """A sink that fails from a given iteration on, or waits there until it may go on."""

    def __init__(self, fails_at: int | None = None, hangs: threading.Event | None = None):
        self.fails_at, self.hangs = fails_at, hangs
        self.iterations: list[int] = []
        self.closed: list[bool] = []

    def about(self, options): ...

    def write(self, iteration, scalars, histograms):
        if self.hangs is not None:
            self.hangs.wait()
        if iteration == self.fails_at:
            raise ConnectionError("network gone")
        self.iterations.append(iteration)

    def text(self, iteration, name, markdown): ...

    def close(self, *, is_complete):
        self.closed.append(is_complete)


def test_a_sink_that_fails_is_told_once_and_left_out():
    told: list[str] = []
    sink = Recorder(fails_at=3)
    shown = Background("wandb", lambda: sink, told.append)
    for n in range(1, 6):
        shown.write(n, {}, {})
        shown.text(n, "rollouts", "")
    shown.close(is_complete=True)
    shown.join(10.0)
    assert sink.iterations == [1, 2] and sink.closed == [False]
    (line,) = told
    assert "wandb" in line and "ConnectionError: network gone" in line


def test_a_sink_without_faults_has_everything_in_order():
    told: list[str] = []
    sink = Recorder()
    shown = Background("wandb", lambda: sink, told.append)
    for n in range(100):
        shown.write(n, {}, {})
    shown.close(is_complete=True)
    assert sink.iterations == list(range(100)) and sink.closed == [True] and not told


@pytest.mark.parametrize("calls", [1, MOST_WAITING + 5])
def test_a_sink_that_hangs_holds_nobody_up(calls, monkeypatch):
    """Neither while the run goes on nor at its end; once it moves again, it is closed."""
    monkeypatch.setattr(background, "COMPLETE_S", 0.1)
    told: list[str] = []
    sink = Recorder(hangs=threading.Event())
    shown = Background("mlflow", lambda: sink, told.append)
    for n in range(calls):
        shown.write(n, {}, {})
    shown.close(is_complete=True)
    assert len(told) == 1 and "mlflow" in told[0]
    sink.hangs.set()
    shown.join(10.0)
    assert sink.closed == [False]


@pytest.mark.parametrize("is_complete,deadline_s", [(False, 0.4), (True, 0.8)])
def test_all_sinks_close_within_one_deadline(is_complete, deadline_s, tmp_path, monkeypatch):
    """A short one of a run that was broken off, a longer one of a complete run."""
    monkeypatch.setattr(background, "BROKEN_OFF_S", 0.4)
    monkeypatch.setattr(background, "COMPLETE_S", 0.8)
    released = threading.Event()
    monkeypatch.setattr(
        f"{choice.SINKS['tensorboard'].module}.TensorBoard", lambda *_: Recorder(hangs=released)
    )
    names = [f"hangs_{n}" for n in range(4)]
    for name in names:
        monkeypatch.setitem(choice.SINKS, name, choice.SINKS["tensorboard"])
    told: list[str] = []
    writer = MetricsWriter(tmp_path, None, names, tell=told.append)
    writer.write(1, {"loss/total": 1.0})
    if is_complete:
        writer.complete()
    began = time.monotonic()
    writer.close()
    assert deadline_s <= time.monotonic() - began < 3 * deadline_s
    released.set()
    assert [line.split()[1] for line in told] == names


def test_a_package_that_is_missing_is_told_before_the_run(monkeypatch, tmp_path):
    """Also where the working directory has a folder of its name."""
    entry = choice.SINKS["wandb"]._replace(packages=("absent_package",))
    monkeypatch.setitem(choice.SINKS, "wandb", entry)
    (tmp_path / "absent_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="pip install absent_package"):
        choice.check_packages(["tensorboard", "wandb"])
    choice.check_packages(["tensorboard", "mlflow"])


def test_a_service_out_of_reach_ends_a_run_only_where_it_begins(tmp_path, offline, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    others = set(threading.enumerate())
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        MetricsWriter(tmp_path, None, ("tensorboard", "mlflow"))
    new = {thread for thread in threading.enumerate() if thread.name == "sink-tensorboard"}
    assert not new - others
    told: list[str] = []
    writer = MetricsWriter(tmp_path, 4, ("mlflow",), tell=told.append)
    writer.write(5, {"loss/total": 1.0})
    writer.close()
    assert len(told) == 1 and "mlflow" in told[0] and "MLFLOW_TRACKING_URI" in told[0]


def test_a_service_that_never_answers_holds_no_run_up(tmp_path, offline, monkeypatch, silent_url):
    """One that begins is refused when the time to open is over; one that resumes does not wait."""
    monkeypatch.setattr(background, "OPEN_S", 1.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"not open after 1 s.*MLFLOW_TRACKING_URI"):
        MetricsWriter(tmp_path, None, ("mlflow",))
    assert time.monotonic() - began < 3
    told: list[str] = []
    began = time.monotonic()
    writer = MetricsWriter(tmp_path, 4, ("mlflow",), tell=told.append)
    writer.write(5, {"loss/total": 1.0})
    assert time.monotonic() - began < 0.9 and not told
    time.sleep(1.0)
    writer.write(6, {"loss/total": 1.0})
    writer.close()
    assert len(told) == 1 and "not open after 1 s" in told[0]


@pytest.mark.parametrize(
    "environment,refusal",
    [
        ({}, "no login for https://wandb.invalid.*WANDB_API_KEY"),
        ({"WANDB_MODE": "offline"}, None),
        ({"WANDB_MODE": "disabled"}, None),
        ({"WANDB_API_KEY": 40 * "a"}, None),
        ({"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid"),
        ({"NETRC": "netrc"}, None),
    ],
)
def test_a_login_is_looked_for_without_the_network(
    environment, refusal, tmp_path, offline, monkeypatch
):
    import wandb

    wandb.teardown()  # else it keeps what it has read from the environment
    monkeypatch.chdir(tmp_path)
    Path("netrc").write_text(f"machine wandb.invalid login user password {40 * 'a'}")
    monkeypatch.delenv("WANDB_MODE")
    environment = {"HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.invalid"} | environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with nullcontext() if refusal is None else pytest.raises(ConfigError, match=refusal):
        choice.check_logins(["tensorboard", "wandb"])
    wandb.teardown()


ON_A_TERMINAL = """
import os, sys, time
from pathlib import Path
import wandb
from megatron_eopd.errors import ConfigError
from megatron_eopd.metrics.sinks import background
from megatron_eopd.metrics.writer import MetricsWriter

try:
    MetricsWriter(Path(sys.argv[1]), None, ("wandb",))
except ConfigError as error:
    print("refused:", error)
wandb.teardown()  # else it keeps what it has read from the environment
os.environ["WANDB_API_KEY"] = 40 * "a"
background.BROKEN_OFF_S = 3.0
writer = MetricsWriter(Path(sys.argv[1]), 4, ("wandb",))
writer.write(5, {"loss/total": 1.0})
writer.close()
print("left at", time.time())
sys.exit(3)
"""


def test_wandb_asks_for_nothing_and_holds_no_process_up(tmp_path, silent_url):
    """On a terminal it would ask for a login; and at the end of a process it would wait for its
    own, which waits for its service."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "WANDB_BASE_URL": silent_url,
        "WANDB_ERROR_REPORTING": "false",
    }
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, tmp_path],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
    )
    os.close(theirs)
    try:
        code = child.wait(timeout=60)
        ended = time.time()
    finally:
        child.kill()
        said = os.read(ours, 100_000).decode()
        os.close(ours)
    assert code == 3 and "choice" not in said and "Traceback" not in said, said
    assert said.count("refused: logging.trackers names wandb") == said.count("no login for") == 1
    assert "wandb shows no more of this run" in said
    assert ended - float(said.split("left at ")[1].split()[0]) < 5


def test_options_are_flat_and_simple():
    values = {
        "run_dir": "r",
        "model": {"tied": True, "dtype": None},
        "tasks": ["a"],
        "a": {"b": {}},
    }
    assert simple_options(values | {"teachers": {"m": {"lr": 0.5}}}) == {
        "run_dir": "r",
        "model.tied": True,
        "teachers.m.lr": 0.5,
    }
