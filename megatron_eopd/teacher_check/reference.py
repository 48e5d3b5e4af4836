"""A teacher as transformers computes it: on the CPU, in float32. In: token ids. Out: Opinion.

Of the logits only what the loss reads is looked at: the tokens that are compared, after those that
trade places, at the teacher's temperature.
"""
# Shapes: N tokens of a response, V the model's columns, C the tokens that are compared.

import ctypes
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.tensor_shapes import tensor_shapes
from megatron_eopd.teacher.model import Swaps


@dataclass(frozen=True)
class Reading:
    """What the loss reads of a teacher's logits."""

    swaps: Swaps
    vocab_size: int
    """Tokens that are compared."""
    temperature: float

    def of(self, logits_NV: torch.Tensor) -> torch.Tensor:
        """float64 [N, C], divided by the temperature."""
        columns = list(range(logits_NV.shape[-1]))
        for a, b in self.swaps:
            columns[a], columns[b] = columns[b], columns[a]
        return logits_NV[:, columns[: self.vocab_size]].double() / self.temperature


@dataclass(frozen=True)
class Opinion:
    """Of each token of a response, in nats."""

    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    """Of the distribution that the token was drawn from."""


@dataclass(frozen=True)
class Answer:
    """What follows the prompt: given tokens, or as many as the model writes, and then the end. That
    one is always there, so that tokens which trade places are seen to do so."""

    given: tuple[int, ...] | None
    count: int
    """Tokens to write before the end, where none are given."""
    stop_ids: tuple[int, ...]
    """None of them is written."""
    end_id: int


def float32_bytes(path: Path) -> int:
    """Of a model's weights, by its config.json alone."""
    return 4 * sum(prod(shape) for shape in tensor_shapes(read_hf_config(path)).values())


def opinion(
    path: Path, prompt_ids: Sequence[int], answer: Answer, reading: Reading, num_threads: int
) -> Opinion:
    """Loads the model, and lets go of it. torch's random state and number of threads are
    afterwards what they were."""
    with _threads(num_threads), torch.random.fork_rng(devices=[]), torch.no_grad():
        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, local_files_only=True, trust_remote_code=False
            ).eval()
        written = answer.given
        if written is None:
            written = _write(model, prompt_ids, answer, reading)
        found = _score(model, prompt_ids, (*written, answer.end_id), reading)
    del model
    _give_back_memory()
    return found


def _give_back_memory() -> None:
    gc.collect()  # a model's modules name each other: its weights would stay for a while
    # glibc keeps what was freed in pieces below 32 MiB, which of a small model is all.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _write(
    model: PreTrainedModel, prompt_ids: Sequence[int], answer: Answer, reading: Reading
) -> tuple[int, ...]:
    """The likeliest tokens, one by one."""
    written: list[int] = []
    ids, cache = torch.tensor([list(prompt_ids)]), None
    for _ in range(answer.count):
        said = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_C = reading.of(said.logits[0])[-1]
        logits_C[list(answer.stop_ids)] = -torch.inf
        written.append(int(logits_C.argmax()))
        ids, cache = torch.tensor([written[-1:]]), said.past_key_values
    return tuple(written)


def _score(
    model: PreTrainedModel, prompt_ids: Sequence[int], response_ids: Sequence[int], reading: Reading
) -> Opinion:
    ids = torch.tensor([[*prompt_ids, *response_ids]])
    logits = model(ids, use_cache=False, logits_to_keep=len(response_ids) + 1).logits
    logprobs_NC = reading.of(logits[0, :-1]).log_softmax(-1)
    logprobs_N = logprobs_NC[range(len(response_ids)), list(response_ids)]
    entropies_N = torch.special.entr(logprobs_NC.exp()).sum(-1)
    return Opinion(tuple(response_ids), tuple(logprobs_N.tolist()), tuple(entropies_N.tolist()))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_bars() -> Iterator[None]:
    """The run's log has a line for it."""
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
