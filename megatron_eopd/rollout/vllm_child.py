"""The process that runs vLLM. In: Requests on a pipe. Out: a Reply to each, after its parts.

A process of its own, because vLLM in a rank of a torchrun job takes that job's RANK and MASTER_PORT
for its own and hangs. Between two steps of vLLM it takes what has come on the pipe, so that new
requests join those that run. It dies with the trainer.

vLLM is imported in functions: its own workers import this module again, and the trainer may.
"""

import argparse
import os
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

from megatron_eopd.parallel.processes import die_with, forks_die_with_their_parents
from megatron_eopd.rollout.messages import Heartbeat, Reply, Request, Sample, SampleRequest

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

RPC_MARGIN_S = 2.0
HEARTBEAT_S = 1.0


class Server:
    """The verbs of the pipe, on top of vLLM's LLM."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # of the requests that run, by vLLM's ids
        self._tokens = 0  # since the last heartbeat
        self._beaten = time.monotonic()
        self._is_asleep = False

    # Starting, and weights.

    def start(self, llm_arguments: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import WeightTransferConfig

        self._llm = LLM(
            **llm_arguments,
            worker_extension_cls="megatron_eopd.weight_sync.receiver.WorkerExtension",
            weight_transfer_config=WeightTransferConfig(backend="eopd"),
        )

    def meet(self, init_info: dict[str, Any], timeout_s: float) -> None:
        """Hear which tensors will come."""
        self._rpc("init_weight_transfer_engine", timeout_s, init_info=init_info)

    def attach(self, addresses: str, timeout_s: float) -> None:
        """Open the memory where the buckets of the next `load` will be."""
        self._rpc("attach_readers", timeout_s, addresses=addresses)

    def load(self, update_info: dict[str, Any]) -> float:
        """Take the buckets; returns the seconds until vLLM had them where they belong. What was
        loaded is served once it is committed.

        Raises:
            RuntimeError: a worker's fault; the weights are then a mixture, see `_require_sound`.
        """
        self._wake("weights")
        begin, timeout_s = time.monotonic(), update_info["timeout_s"]
        self._rpc("start_weight_update", timeout_s)
        self._rpc("update_weights", timeout_s, update_info=update_info)
        self._rpc("finish_weight_update", timeout_s)
        self._require_sound("weight sync failed")
        return time.monotonic() - begin

    def commit(self, version: int) -> None:
        """From now on samples are of this version."""
        self._require_sound("refusing to commit")
        self._wake("kv_cache")
        self._is_asleep = False
        self._forget_prefixes()
        self._llm.update_weight_version(str(version))
        committed = self._llm.get_weight_version()
        assert committed == str(version), f"vLLM reports version {committed}, sent {version}"

    def sleep(self) -> None:
        """Let go of weights and cache, until the next `load` and `commit`. Without a GPU there is
        nothing to let go of, and the engine refuses to serve all the same."""
        self._rpc("forget_weights", None)
        self._is_asleep = True
        if torch.cuda.is_available():
            self._llm.sleep(level=2)

    def _wake(self, what: str) -> None:
        if self._is_asleep and torch.cuda.is_available():
            self._llm.wake_up(tags=[what])

    # Samples and scores.

    def add(self, requests: list[SampleRequest], is_first: bool) -> None:
        """Join those that run. `is_first`: of a call, which starts with an empty prefix cache, so
        that the same call draws the same samples."""
        self._require_sound("refusing to generate")
        if is_first:
            self._forget_prefixes()
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        parameters = [sampling_parameters(request) for request in requests]
        ids = self._llm.enqueue(prompts, parameters, use_tqdm=False)
        # vLLM's own ids: those that the outputs bear, and a suffix that makes them unique.
        names = (full.partition("-")[0] for full in ids)
        self._numbers |= dict(zip(names, (r.number for r in requests), strict=True))

    @property
    def is_busy(self) -> bool:
        return bool(self._numbers)

    def step(self) -> Iterator[Sample | Heartbeat]:
        """One token more for every request that runs; those that have ended, and a heartbeat."""
        for output in self._llm.llm_engine.step():
            if output.finished:
                sample = as_sample(self._numbers.pop(output.request_id), output)
                self._tokens += len(sample.response_ids)
                yield sample
        now = time.monotonic()
        if now - self._beaten > HEARTBEAT_S or not self._numbers:
            yield Heartbeat(self._tokens, len(self._numbers))
            self._tokens, self._beaten = 0, now

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

    def _forget_prefixes(self) -> None:
        """The cached keys and values may be those of the weights before. vLLM keeps them, with a
        warning alone, where it believes that a request still uses one."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")

    @property
    def has_lost_a_worker(self) -> bool:
        """With several workers vLLM notes the death of one, and answers everything with errors."""
        llm = getattr(self, "_llm", None)
        executor = getattr(getattr(llm, "llm_engine", None), "model_executor", None)
        return bool(getattr(executor, "is_failed", False))

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


def serve(connection: Connection, server: Server) -> None:
    """Until it is told to exit, or nobody is there to tell. What comes of requests that run belongs
    to the last `add`."""
    adding = 0
    while True:
        if connection.poll(0 if server.is_busy else None):
            try:
                request: Request = connection.recv()
            except EOFError:
                return
            if request.verb == "exit":
                return
            adding = request.number if request.verb == "add" else adding
            _answer(connection, server, request)
        elif server.is_busy:
            try:
                for part in server.step():
                    connection.send(Reply(adding, part, is_part=True))
            except Exception as error:
                connection.send(_failure(adding, error))
                return  # what an engine does after that is not known


def _answer(connection: Connection, server: Server, request: Request) -> None:
    try:
        reply = Reply(request.number, getattr(server, request.verb)(**request.arguments))
    except Exception as error:
        reply = _failure(request.number, error)
        if server.has_lost_a_worker:
            os._exit(1)  # a death, to whoever asked, and no error of what was asked
    connection.send(reply)


def _failure(number: int, error: Exception) -> Reply:
    traceback.print_exception(error)
    return Reply(number, error=f"{type(error).__name__}: {error}")


def main(server: Server | None = None) -> None:
    parser = argparse.ArgumentParser(description="vLLM behind a pipe; started by the trainer.")
    parser.add_argument("--pipe", type=int, required=True, help="inherited file descriptor")
    parser.add_argument("--parent", type=int, required=True, help="process to die with")
    arguments = parser.parse_args()
    die_with(arguments.parent)
    forks_die_with_their_parents()
    os.set_inheritable(arguments.pipe, False)  # or vLLM's workers would keep the pipe open
    serve(Connection(arguments.pipe), server or Server())


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # in a worker that vLLM has spawned
    die_with(os.getppid())
