"""An engine process that can also answer as vLLM alone does, for bench_rollout."""

import time

from megatron_eopd.rollout import vllm_child
from megatron_eopd.rollout.messages import SampleRequest


class PlainServer(vllm_child.Server):
    def time_generate(self, requests: list[SampleRequest]) -> float:
        """Seconds of LLM.generate for these requests."""
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        parameters = [vllm_child.sampling_parameters(request) for request in requests]
        begin = time.perf_counter()
        self._llm.generate(prompts, parameters, use_tqdm=False)
        return time.perf_counter() - begin


if __name__ == "__main__":
    vllm_child.main(PlainServer())
