"""An engine process that can also wait for all responses of a call, as vLLM's own LLM.generate."""

from megatron_eopd.rollout import vllm_child
from megatron_eopd.rollout.messages import Sample, SampleRequest


class PatientServer(vllm_child.Server):
    def generate_whole(self, requests: list[SampleRequest]) -> list[Sample]:
        self._llm.reset_prefix_cache()
        outputs = self._llm.generate(
            [{"prompt_token_ids": request.prompt_ids} for request in requests],
            [vllm_child.sampling_parameters(request) for request in requests],
            use_tqdm=False,
        )
        return [vllm_child.as_sample(number, output) for number, output in enumerate(outputs)]


if __name__ == "__main__":
    vllm_child.main(PatientServer())
