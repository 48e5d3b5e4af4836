"""Does the engine hold the trainer's weights? Both score the same probe sequences.

Checksums prove that the bytes arrived; this proves that they ended up in the right parameters, in
the layout that the engine computes with.
"""

from collections.abc import Sequence

import torch

from megatron_eopd.rollout.engine import EngineError

Logprobs = Sequence[Sequence[float]]


def probe_difference(engine_logprobs: Logprobs, trainer_logprobs: Logprobs) -> float:
    """Largest |Δ| in nats over all tokens of all sequences; nan if any value is."""
    differences = [
        (torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)).abs()
        for theirs, ours in zip(engine_logprobs, trainer_logprobs, strict=True)
    ]
    return torch.cat(differences).max().item()


def check_probe(
    engine_logprobs: Logprobs, trainer_logprobs: Logprobs, *, tolerance: float, version: int
) -> float:
    """The largest difference, which is within `tolerance`.

    Raises:
        EngineError: it is not, or it is nan.
    """
    difference = probe_difference(engine_logprobs, trainer_logprobs)
    if not difference <= tolerance:  # nan is not
        raise EngineError(
            f"after the sync of weight version {version} the engine's log-probabilities of the "
            f"probe sequences differ from the trainer's by up to {difference:.3g} nats; "
            f"weight_sync.tolerance is {tolerance:.3g}. The engine does not hold the trainer's "
            "weights, or computes in a coarser type: then set rollout.dtype or a wider tolerance."
        )
    return difference
