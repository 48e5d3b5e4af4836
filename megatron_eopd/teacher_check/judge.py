"""How far two implementations of a teacher are apart, and whether rounding alone may do that.

In: what both say of the same tokens. Out: a Verdict.
"""
# Shapes: N tokens of a response.

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_eopd.teacher_check.reference import Opinion

QUANTITIES = ("log-probability", "entropy")


@dataclass(frozen=True)
class Bounds:
    """In nats, of |Δ| over all tokens of a response, log-probabilities and entropies alike."""

    mean: float
    largest: float


ROUNDING = Bounds(0.2, 2.0)
BOUNDS = {"float32": Bounds(1e-4, 1e-3), "TF32": ROUNDING, "bfloat16": ROUNDING}
"""By what the teacher computes in here; transformers computes in float32. What was measured, and
how much room that leaves: docs/reliability.md. TF32 was not measured, and rounds less than
bfloat16."""


@dataclass(frozen=True)
class Verdict:
    """Of one teacher."""

    bounds: Bounds
    num_tokens: int
    mean: float
    largest: float
    """NaN where either side says no number."""
    quantity: str
    """Of the largest difference; likewise the token, what is said here, and what there."""
    token: int
    ours: float
    theirs: float

    @property
    def agrees(self) -> bool:
        return self.mean <= self.bounds.mean and self.largest <= self.bounds.largest  # NaN does not


def judge(ours: Sequence[np.ndarray], theirs: Opinion, precision: str) -> Verdict:
    """`ours`: log-probabilities and entropies, each [N]; `precision`: one of BOUNDS."""
    expected_2N = np.array([theirs.logprobs, theirs.entropies], np.float64)
    found_2N = np.stack(ours).astype(np.float64)
    assert found_2N.shape == expected_2N.shape, (found_2N.shape, expected_2N.shape)
    apart_2N = np.abs(found_2N - expected_2N)
    # NaN is the worst of all; argmax finds it first.
    place = np.unravel_index(int(apart_2N.argmax()), apart_2N.shape)
    return Verdict(
        bounds=BOUNDS[precision],
        num_tokens=len(theirs.response_ids),
        mean=float(apart_2N.mean(1).max()),
        largest=float(apart_2N.max()),
        quantity=QUANTITIES[place[0]],
        token=int(place[1]),
        ours=float(found_2N[place]),
        theirs=float(expected_2N[place]),
    )
