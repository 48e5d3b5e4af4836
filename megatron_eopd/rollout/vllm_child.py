"""The process that runs vLLM. In: Requests on a pipe. Out: a Reply to each, after its parts.

A process of its own, because vLLM in a rank of a torchrun job takes that job's RANK and MASTER_PORT
for its own and hangs. It serves one request at a time, and dies with the trainer.

vLLM is imported in functions: its own workers import this module again, and the trainer may.
"""

import argparse
import os
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from types import GeneratorType
from typing import TYPE_CHECKING, Any

from megatron_eopd.parallel.processes import die_with, forks_die_with_their_parents
from megatron_eopd.rollout.messages import Reply, Request, Sample, SampleRequest

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

RPC_MARGIN_S = 2.0


class Server:
    """The verbs of the pipe, on top of vLLM's LLM. One that yields answers in parts."""

    def start(self, llm_arguments: dict[str, Any], backend: str) -> None:
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        self._llm = LLM(
            **llm_arguments,
            worker_extension_cls="megatron_eopd.weight_sync.receiver.WorkerExtension",
            weight_transfer_config=WeightTransferConfig(backend=f"eopd_{backend}"),
        )

    def connect(self, init_info: dict[str, Any]) -> None:
        """Join the transfer groups, while the stage leaders do."""
        self._rpc("init_weight_transfer_engine", init_info["timeout_s"], init_info=init_info)

    def begin_update(self, timeout_s: float) -> None:
        self._rpc("start_weight_update", timeout_s)

    def receive_update(self, version: int, update_info: dict[str, Any]) -> None:
        """Take the buckets while the leaders send them, and commit `version`.

        Raises:
            RuntimeError: a worker's fault; the weights are then a mixture, see `_require_sound`.
        """
        timeout_s = update_info["timeout_s"]
        self._rpc("update_weights", timeout_s, update_info=update_info)
        self._rpc("finish_weight_update", timeout_s)
        self._require_sound("weight sync failed")
        # The cached keys and values are those of the weights before.
        self._llm.reset_prefix_cache()
        self._llm.update_weight_version(str(version))
        committed = self._llm.get_weight_version()
        assert committed == str(version), f"vLLM reports version {committed}, sent {version}"

    def generate(self, requests: list[SampleRequest]) -> Iterator[Sample]:
        """Each as soon as it has ended, in any order. Otherwise as LLM.generate does it, which
        returns all of them at the end."""
        self._require_sound("refusing to generate")
        # A hit in the prefix cache changes the last bit of a logprob, and with it, rarely, a
        # draw. Each call starts cold, so that the same call draws the same samples.
        self._llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        parameters = [sampling_parameters(request) for request in requests]
        ids = self._llm.enqueue(prompts, parameters, use_tqdm=False)
        # vLLM's own ids: those that the outputs bear, and a suffix that makes them unique.
        numbers = {full.partition("-")[0]: number for number, full in enumerate(ids)}
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    yield as_sample(numbers[output.request_id], output)

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        from vllm import SamplingParams

        self._require_sound("refusing to score")
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in sequences]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [
            [at[token].logprob for token, at in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
            for ids, out in zip(sequences, outputs, strict=True)
        ]

    def _require_sound(self, doing: str) -> None:
        faults = [fault for fault in self._rpc("weights_fault", None) if fault is not None]
        if faults:
            raise RuntimeError(f"{doing}: {'; '.join(dict.fromkeys(faults))}")

    def _rpc(self, method: str, timeout_s: float | None, **arguments: Any) -> list:
        # A worker that misses the deadline says why, if it is given a moment more than that.
        timeout_s = None if timeout_s is None else timeout_s + RPC_MARGIN_S
        return self._llm.collective_rpc(method, timeout=timeout_s, kwargs=arguments)


def sampling_parameters(request: SampleRequest) -> "SamplingParams":
    from vllm import SamplingParams

    return SamplingParams(
        seed=request.seed,
        temperature=request.temperature,
        top_p=request.top_p,
        max_tokens=request.max_tokens,
        stop_token_ids=request.stop_ids,
        # Only the caller's stop ids end a response, not those of a generation_config.
        ignore_eos=True,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
    )


def as_sample(number: int, output: "RequestOutput") -> Sample:
    (completion,) = output.outputs
    ids = list(completion.token_ids)
    logprobs = [at[token].logprob for token, at in zip(ids, completion.logprobs, strict=True)]
    versions = [span.version for span in completion.weight_versions or []]
    return Sample(number, ids, logprobs, completion.finish_reason, versions)


def serve(connection: Connection) -> None:
    server = Server()
    while True:
        try:
            request: Request = connection.recv()
        except EOFError:
            return
        if request.verb == "exit":
            return
        try:
            reply = Reply(value=_work(connection, server, request))
        except Exception as error:
            traceback.print_exc()
            reply = Reply(error=f"{type(error).__name__}: {error}")
        connection.send(reply)


def _work(connection: Connection, server: Server, request: Request) -> Any:
    """What the last reply brings, after the parts have been sent."""
    value = getattr(server, request.verb)(**request.arguments)
    if not isinstance(value, GeneratorType):
        return value
    for part in value:
        connection.send(Reply(value=part, is_part=True))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description="vLLM behind a pipe; started by the trainer.")
    parser.add_argument("--pipe", type=int, required=True, help="inherited file descriptor")
    parser.add_argument("--parent", type=int, required=True, help="process to die with")
    arguments = parser.parse_args()
    die_with(arguments.parent)
    forks_die_with_their_parents()
    os.set_inheritable(arguments.pipe, False)  # or vLLM's workers would keep the pipe open
    serve(Connection(arguments.pipe))


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # in a worker that vLLM has spawned
    die_with(os.getppid())
