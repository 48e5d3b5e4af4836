"""Where a run stands. position.json of a checkpoint ⇄ Position.

Everything that is no tensor and is needed to go on is here, so that a person can read it, and so
that no code of a checkpoint is ever run.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from megatron_eopd.checkpoints.files import DONE
from megatron_eopd.config import Config
from megatron_eopd.errors import CheckpointError
from megatron_eopd.model_paths import is_mcore
from megatron_eopd.parallel.init import ParallelContext

POSITION = "position.json"
FORMAT = 2
"""1: Megatron-Core wrote tensors, RNG and Adam's step (in common.pt); read like 2, which has the
same keys and shapes in other pieces."""


@dataclass(frozen=True)
class Position:
    """Where a run stands, and what must not change when it goes on."""

    iteration: int
    """Iterations finished; also the version of the weights."""
    seed: int
    prompts_digest: str
    layout: dict[str, int]
    """Sizes the checkpoint was written under; RNG states are taken back only under the same."""
    references_digest: str = ""
    """Of the reference answers; empty without any."""
    optimizer_steps: int | None = None
    """Taken in all, with whatever batch sizes; None in checkpoints from before it was counted."""
    train_iters: int | None = None
    """Of the run that wrote it: schedules may stretch over all of them."""
    is_evaluated: bool = True
    """Whether the evaluation that is due at this iteration was made; a run that stops over a
    faulty engine saves before it."""
    steps_done: int = 0
    """Those of them that belong to the next iteration, within which the run was stopped. Its
    rollouts lie beside."""
    adam_step: int | None = None
    """Updates that Adam has made, by which it corrects its moments."""
    tokenizer_digest: str = ""
    """Of the student's; empty in checkpoints of format 1."""
    figures: dict[str, float] = field(default_factory=dict)
    """Of the evaluation at this iteration; empty without one."""
    grad_norms: tuple[float, ...] = ()
    """Of the last optimizer steps, by which the next one is judged; see training/skipping.py."""
    skipped_in_a_row: int = 0
    followers: dict[str, str] = field(default_factory=dict)
    """Teacher → how it follows the student, as TeacherConfig.way_of_following has it."""
    teachers_digest: str = ""
    """Of what teachers read in the place of the prompts; empty where they read the same."""
    format: int = 1

    def steps_of(self, config: Config) -> int:
        """Optimizer steps taken; where nobody counted, as the options have them now."""
        if self.optimizer_steps is not None:
            return self.optimizer_steps
        return self.iteration * config.optimizer_steps_per_iteration


def make_position(
    iteration: int, seed: int, prompts_digest: str, context: ParallelContext, **more: Any
) -> Position:
    """`more`: fields of Position that have defaults."""
    layout = sizes_of(context)
    return Position(iteration, seed, prompts_digest, layout, format=FORMAT, **more)


def sizes_of(context: ParallelContext) -> dict[str, int]:
    layout = context.layout
    sizes = {"tp": layout.tp, "pp": layout.pp, "dp": layout.dp, "cp": layout.cp}
    return sizes | {"vpp": layout.vpp, "ep": layout.ep, "expert_tp": layout.expert_tp}


def write_position(directory: Path, position: Position) -> None:
    (directory / POSITION).write_text(json.dumps(vars(position), indent=2) + "\n")


def best_of(directories: Iterable[Path], figure: str | None) -> Path | None:
    """The checkpoint with the best value of an evaluation's figure, such as `pass@8` or
    `math500/pass@8`, the newest of several; None where none was evaluated so. A damaged one is not.
    """
    best, best_value = None, -inf
    for directory in directories:
        figures: dict[str, float] = {}
        with suppress(CheckpointError):
            figures = read_position(directory).figures
        for name, value in figures.items():
            if not name.endswith(f"/{figure}"):
                continue
            merit = -value if figure.endswith(SMALLER_IS_BETTER) else value
            if merit >= best_value:
                best, best_value = directory, merit
    return best


SMALLER_IS_BETTER = ("_kl", "fraction", "loss")


def read_position(directory: Path) -> Position:
    """
    Raises:
        CheckpointError: no such directory, or one that was not finished, or is damaged.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory. Check checkpoint.load.")
    path = directory / POSITION
    if (directory / DONE).is_file() and not path.is_file():
        raise CheckpointError(f"{path}: missing. The checkpoint is damaged: copy it again.")
    if is_mcore(directory) and not path.is_file():
        raise CheckpointError(
            f"{directory}: holds weights and no optimizer, so no run can go on from it. To start a "
            f"run with these weights set student.hf_path to it, and not checkpoint.load."
        )
    if not (directory / DONE).is_file():
        raise CheckpointError(
            f"{directory}: the checkpoint was never finished (no {DONE} in it). "
            f"Load an earlier one."
        )
    try:
        found = json.loads(path.read_text())
        position = Position(**found | {"grad_norms": tuple(found.get("grad_norms", ()))})
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). It is damaged, or of a newer version."
        ) from None
    if position.format > FORMAT:
        raise CheckpointError(
            f"{path}: format {position.format}, and this version reads up to {FORMAT}. Load it "
            f"with the version of the project that wrote it."
        )
    return position
