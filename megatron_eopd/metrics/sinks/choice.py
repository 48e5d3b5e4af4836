"""The sinks by the words of `logging.trackers`. To add one, write a class and give it a row."""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from megatron_eopd.errors import ConfigError
from megatron_eopd.metrics.sinks.background import Background, close_all
from megatron_eopd.metrics.sinks.sink import Sink


class Entry(NamedTuple):
    module: str
    name: str
    """Its class there; imported only by runs that ask for it."""
    packages: tuple[str, ...] = ()
    """What it needs beside the trainer's own, as they are imported and installed."""
    advice: str = ""
    """What helps where the service does not answer."""
    login: str = ""
    """A function beside the class that returns what its login lacks, without the network."""


_HERE = "megatron_eopd.metrics.sinks"
SINKS = {
    "tensorboard": Entry(f"{_HERE}.tensorboard", "TensorBoard"),
    "wandb": Entry(
        f"{_HERE}.wandb",
        "Wandb",
        ("wandb",),
        "Log in (wandb login, or WANDB_API_KEY), or set WANDB_MODE=offline and send it later with "
        "wandb sync.",
        login="missing_login",
    ),
    "mlflow": Entry(
        f"{_HERE}.mlflow",
        "MLflow",
        ("mlflow", "sqlalchemy", "alembic"),
        "See to MLFLOW_TRACKING_URI, or unset it for a database in RUN_DIR/mlflow.",
    ),
}
_INSTALLED_AS = {"mlflow": "mlflow-skinny"}


def check_packages(names: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: a tracker's package is not installed.
    """
    for name in names:
        missing = [package for package in SINKS[name].packages if not _is_installed(package)]
        if missing:
            installs = " ".join(_INSTALLED_AS.get(package, package) for package in missing)
            raise ConfigError(
                f"logging.trackers names {name}, and {', '.join(missing)} is not installed here. "
                f"Run `pip install {installs}`, or take {name} out of the list."
            )


def check_logins(names: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: a tracker would ask for a login, or has one that cannot be right.
    """
    for name in names:
        entry = SINKS[name]
        missing = entry.login and getattr(import_module(entry.module), entry.login)()
        if missing:
            raise ConfigError(
                f"logging.trackers names {name}, and {missing}. {entry.advice} Or take {name} out "
                f"of the list."
            )


def _is_installed(package: str) -> bool:
    """A folder of that name in the working directory, such as wandb leaves there, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def open_sinks(
    names: Sequence[str], run_dir: Path, first: int | None, tell: Callable[[str], None]
) -> list[Background]:
    """A run that begins waits for them. One that resumes does not: what is out of reach then is
    told, and left out.

    Raises:
        ConfigError: a package is missing, or a run that begins cannot open a tracker.
    """
    check_packages(names)
    sinks = [
        Background(name, _maker(name, run_dir, first), tell, SINKS[name].advice) for name in names
    ]
    try:
        for sink in sinks if first == 0 else ():
            sink.wait_until_open()
    except ConfigError:
        close_all(sinks, is_complete=False)
        raise
    return sinks


def _maker(name: str, run_dir: Path, first: int | None) -> Callable[[], Sink]:
    entry = SINKS[name]
    return lambda: getattr(import_module(entry.module), entry.name)(run_dir, first)
