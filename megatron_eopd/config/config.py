"""The whole configuration."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from megatron_eopd.config.checks import check_across_sections
from megatron_eopd.config.data import DataConfig
from megatron_eopd.config.evaluation import EvaluationConfig
from megatron_eopd.config.models import ModelConfig, ParallelConfig, StudentConfig, TeacherConfig
from megatron_eopd.config.objective import ObjectiveConfig
from megatron_eopd.config.rollout import RolloutConfig, WeightSyncConfig
from megatron_eopd.config.section import Section
from megatron_eopd.config.training import (
    CheckpointConfig,
    LoggingConfig,
    TrainingConfig,
)
from megatron_eopd.errors import ConfigError

SYNC_STEPS = 4
"""Of a weight sync, of those that rank 0 waits for: attach, load, commit, score."""


class Config(Section):
    run_dir: Path
    """Everything the run writes. The same command again resumes from its newest checkpoint."""
    seed: int = 1234
    """Fixes prompt order, sampling and any random initialisation."""
    student: StudentConfig
    teacher: TeacherConfig | None = None
    """Needed to train; an evaluation without one measures no divergences."""
    teachers: dict[str, TeacherConfig] = Field({})
    """More teachers, by name, for prompts that ask for them: `[teachers.NAME]` has the options of
    `[teacher]`."""
    parallel: ParallelConfig = ParallelConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    _missing_inputs: tuple[str, ...] = PrivateAttr(())

    def check_inputs_exist(self) -> None:
        """
        Raises:
            ConfigError: a relative path in the file that was found nowhere; says where it was
                looked for.
        """
        if self._missing_inputs:
            raise ConfigError("\n".join(self._missing_inputs))

    @property
    def optimizer_steps_per_iteration(self) -> int:
        return self.rollout.batch_size // self.training.global_batch_size

    @property
    def optimizer_steps(self) -> int:
        """Of the whole run."""
        return self.training.train_iters * self.optimizer_steps_per_iteration

    def check_has_teacher(self) -> None:
        """
        Raises:
            ConfigError: there is none, and no student learns without.
        """
        if self.teacher is None:
            raise ConfigError(
                "no [teacher]: a run needs one to learn from. Set teacher.hf_path to its Hugging "
                "Face directory or Megatron checkpoint."
            )

    @property
    def longest_wait_s(self) -> float:
        """The longest that the ranks may have to wait for one engine call, in seconds: for all
        starts of an engine, a call, and the steps of a sync that each may take its time-out."""
        rollout = self.rollout
        starts = (1 + rollout.max_restarts) * rollout.start_timeout_s
        return starts + rollout.generate_timeout_s + SYNC_STEPS * self.weight_sync.timeout_s

    @property
    def longest_pause_s(self) -> float:
        """The longest, in seconds, between two things that the student asks of ranks of others: a
        rollout with its weight sync, and the steps of an iteration, each of which has its own
        time-out. Evaluation and checkpoints count as steps."""
        steps = self.optimizer_steps_per_iteration + 4
        return self.longest_wait_s + steps * 60 * self.parallel.distributed_timeout_minutes

    @property
    def needs_samples(self) -> bool:
        """For training or for evaluations; not where all is reference answers."""
        return self.rollout.ever_samples or bool(self.evaluation.tasks)

    @property
    def wants_vllm(self) -> bool:
        """Whether the run takes its samples from vLLM, where that is installed."""
        rollout = self.rollout
        return self.needs_samples and rollout.replay is None and rollout.engine != "megatron"

    @property
    def student_temperature(self) -> float:
        return self.objective.student_temperature or self.rollout.temperature

    @property
    def teacher_temperature(self) -> float:
        return self.objective.teacher_temperature or self.rollout.temperature

    @model_validator(mode="before")
    @classmethod
    def _teachers_are_the_student(cls, tree: Any) -> Any:
        """A teacher that is the student has its files."""
        if not isinstance(tree, dict) or not isinstance(tree.get("student"), dict):
            return tree
        student = {name: tree["student"].get(name) for name in ("hf_path", "tokenizer")}

        def with_files(teacher: Any) -> Any:
            is_student = isinstance(teacher, dict) and teacher.get("source") == "student"
            if not is_student or teacher.get("hf_path") not in (None, "none"):
                return teacher
            return student | {name: value for name, value in teacher.items() if name != "hf_path"}

        tree = dict(tree)
        if "teacher" in tree:
            tree["teacher"] = with_files(tree["teacher"])
        if isinstance(tree.get("teachers"), dict):
            tree["teachers"] = {name: with_files(each) for name, each in tree["teachers"].items()}
        return tree

    @field_validator("teachers")
    @classmethod
    def _have_names_of_their_own(cls, value: dict[str, TeacherConfig]) -> dict[str, TeacherConfig]:
        if "teacher" in value:
            raise ValueError("a teacher named teacher is the one of [teacher]. Name it otherwise.")
        if "all" in value:
            raise ValueError("all stands for every teacher in a line. Name it otherwise.")
        wrong = [name for name in value if not re.fullmatch(r"[\w.-]+", name)]
        if wrong:
            raise ValueError(
                f"{wrong[0]!r} names metrics, too. Write it in letters, digits, _, . and -."
            )
        return value

    @model_validator(mode="after")
    def _sections_fit(self) -> "Config":
        check_across_sections(self)
        return self

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """By the names of their sections, the one of `[teacher]` first."""
        if self.teacher is None:
            return {}
        more = {f"teachers.{name}": teacher for name, teacher in self.teachers.items()}
        return {"teacher": self.teacher, **more}

    @property
    def followers(self) -> dict[str, str]:
        """Section of a teacher that follows the student → how."""
        teachers = self.all_teachers.items()
        return {section: t.way_of_following for section, t in teachers if t.follows}

    @property
    def trained_response_length(self) -> int:
        """Tokens of the longest response, as far as it is trained on."""
        longest, most = self.rollout.max_response_length, self.objective.max_trained_tokens
        return longest if most is None else min(longest, most)

    @property
    def evaluation_temperature(self) -> float:
        own = self.evaluation.temperature
        return self.rollout.temperature if own is None else own

    @property
    def evaluation_response_length(self) -> int:
        return self.evaluation.max_response_length or self.rollout.max_response_length

    @property
    def coarsest_dtype(self) -> Literal["float32", "bfloat16"]:
        """Of trainer and engine: what their log-probabilities can agree to."""
        dtypes = {self.model.dtype, self.dtype_of(self.rollout)}
        return "bfloat16" if "bfloat16" in dtypes else "float32"

    def dtype_of(self, part: "TeacherConfig | RolloutConfig") -> str:
        """Of a teacher's or the engine's weights and activations."""
        return self.model.dtype if part.dtype == "as_model" else part.dtype
