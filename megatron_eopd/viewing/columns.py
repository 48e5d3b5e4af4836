"""Columns of numbers as text that a page can hold. In: numpy arrays. Out: base64.

A value is a whole number of steps, a step is fine enough for the eye, and equal bytes of
neighbours stand together, where deflate finds that they are alike. data.js reads it back.
"""

import base64
import zlib
from typing import Any

import numpy as np

NATS = 1e-4
"""A step, of what is told in nats: no value is moved by more than half of it."""
FARTHEST = 2**30
"""Steps from zero; what is there or beyond, data.js reads as infinite."""


def encode(values: np.ndarray, step: float = 1.0) -> dict[str, Any]:
    """`values`: any shape, read in C order; NaN is kept apart from all numbers.

    A number's code is 1 + 2n for n ≥ 0 steps and 2|n| below, and 0 for NaN. Of all codes the lowest
    byte comes first, then the next one, for as many planes as the largest code needs.
    """
    flat = np.asarray(values, np.float64).ravel()
    unknown = np.isnan(flat)
    steps = np.rint(np.where(unknown, 0, flat) / step).clip(-FARTHEST, FARTHEST).astype(np.int64)
    codes = np.where(unknown, 0, np.where(steps >= 0, 1 + 2 * steps, -2 * steps)).astype("<u4")
    largest = int(codes.max(initial=1))
    planes = (largest.bit_length() + 7) // 8
    in_planes = np.ascontiguousarray(codes.view(np.uint8).reshape(-1, 4)[:, :planes].T)
    packed = base64.b64encode(zlib.compress(in_planes.tobytes(), 6)).decode()
    return {"step": step, "planes": planes, "data": packed}
