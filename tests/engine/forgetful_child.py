"""An engine process that keeps its prefix cache over weight updates, as others have shipped it."""

from vllm import LLM

from megatron_eopd.rollout import vllm_child

if __name__ == "__main__":
    LLM.reset_prefix_cache = lambda self: True
    vllm_child.main()
