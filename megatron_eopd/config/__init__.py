"""Every option of a run. In: a TOML file and `section.key=value` overrides. Out: a frozen Config.

An option exists once, in the file of its section, with its docstring, its default and its check;
the code reads `config.section.key` and nothing else. Model shapes are not options: they come from
the Hugging Face config.json of the model. Options that Megatron-Core has carry Megatron's names. No
torch is imported here: --help and a mistyped option answer at once.
"""

from megatron_eopd.config.config import Config
from megatron_eopd.config.data import BUILT_IN_TASKS, DataConfig
from megatron_eopd.config.describe import Option, changed_options, describe_options
from megatron_eopd.config.evaluation import EvaluationConfig, task_parts
from megatron_eopd.config.load import config_of, load_config, parse_value
from megatron_eopd.config.models import (
    ModelConfig,
    ParallelConfig,
    ParallelSizes,
    StudentConfig,
    TeacherConfig,
)
from megatron_eopd.config.objective import ObjectiveConfig
from megatron_eopd.config.rollout import RolloutConfig, WeightSyncConfig
from megatron_eopd.config.section import Section
from megatron_eopd.config.training import (
    CheckpointConfig,
    LoggingConfig,
    TrainingConfig,
)

__all__ = [
    "BUILT_IN_TASKS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "Option",
    "ParallelConfig",
    "ParallelSizes",
    "RolloutConfig",
    "Section",
    "StudentConfig",
    "TeacherConfig",
    "TrainingConfig",
    "WeightSyncConfig",
    "changed_options",
    "config_of",
    "describe_options",
    "load_config",
    "parse_value",
    "task_parts",
]
