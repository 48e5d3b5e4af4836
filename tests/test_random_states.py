"""Random states of a checkpoint: taken back as they were, or left where the device is another."""

import io
import random

import numpy as np
import torch

from megatron_eopd.checkpoints import contents
from megatron_eopd.parallel.init import choose_device


def draw() -> list[float]:
    return [random.random(), np.random.random(), torch.rand(()).item()]


def test_what_was_drawn_is_drawn_again():
    choose_device()
    state = contents.rng_state()
    first = draw()
    assert draw() != first
    contents.restore_rng(state)
    assert draw() == first


def test_another_kind_of_device_keeps_its_own(monkeypatch):
    choose_device()
    state = torch.load(io.BytesIO(contents.rng_state()), weights_only=True)
    state |= {"kind": "cuda", "device": torch.zeros(16, dtype=torch.uint8)}
    stream = io.BytesIO()
    torch.save(state, stream)
    contents.restore_rng(stream.getvalue())  # a CPU's generator refuses a state of 16 bytes
