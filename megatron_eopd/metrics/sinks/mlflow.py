"""MLflow: the server of MLFLOW_TRACKING_URI, or else RUN_DIR/mlflow, a database in SQLite.

The experiment is that of MLFLOW_EXPERIMENT_NAME.
"""

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

# Nothing about a run goes where its owner has not sent it; read when mlflow is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from megatron_eopd.metrics.sinks.ledger import Ledger, place_of
from megatron_eopd.metrics.sinks.sink import Options
from megatron_eopd.records import Histogram

EXPERIMENT = "megatron_eopd"
PARAMS_AT_ONCE = 100
MAX_VALUE_LENGTH = 6000
"""Both are MLflow's limits."""


class MLflow:
    def __init__(self, run_dir: Path, first: int | None) -> None:
        folder = (run_dir / "mlflow").absolute()
        self._ledger = Ledger(folder / "sent.json", begins=first == 0)
        self._client = _client(folder)
        if self._ledger.is_resumed:
            self._id = self._ledger.known.id
            self._client.update_run(self._id, status="RUNNING")
        else:
            experiment = _experiment(self._client, folder)
            self._id = self._client.create_run(experiment, run_name=run_dir.name).info.run_id
            self._ledger.rename(self._id)

    def about(self, options: Options) -> None:
        """Of a resumed run those that are new: MLflow keeps the first value of a parameter."""
        known = self._client.get_run(self._id).data.params
        new = [
            Param(name, str(value)[:MAX_VALUE_LENGTH])
            for name, value in options.items()
            if name not in known
        ]
        for n in range(0, len(new), PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=new[n : n + PARAMS_AT_ONCE])

    def write(
        self, iteration: int, scalars: Mapping[str, float], histograms: Mapping[str, Histogram]
    ) -> None:
        """Without the histograms: MLflow has none."""
        place = place_of(iteration, scalars)
        if self._ledger.is_new(place):
            self._client.log_batch(self._id, metrics=list(_metrics(iteration, scalars)))
            self._ledger.note(place)

    def text(self, iteration: int, name: str, markdown: str) -> None:
        """An artifact."""
        if self._ledger.is_new((iteration, name == "evaluation")):
            self._client.log_text(self._id, markdown, f"{name}/{iteration:06d}.md")

    def close(self, *, is_complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if is_complete else "KILLED")


def _client(folder: Path) -> MlflowClient:
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return MlflowClient()
    folder.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def _experiment(client: MlflowClient, folder: Path) -> str:
    """Its id."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    is_local = not os.environ.get("MLFLOW_TRACKING_URI")
    artifacts = (folder / "artifacts").as_uri() if is_local else None
    return client.create_experiment(name, artifact_location=artifacts)


def _metrics(iteration: int, scalars: Mapping[str, float]) -> Iterator[Metric]:
    now_ms = int(time.time() * 1000)
    for name, value in scalars.items():
        yield Metric(mlflow_name(name), value, now_ms, iteration)


def mlflow_name(name: str) -> str:
    """`pass@8` is `pass_at_8` and `pass^8` is `pass_all_8`: MLflow refuses these letters."""
    name = name.replace("@", "_at_").replace("^", "_all_")
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
