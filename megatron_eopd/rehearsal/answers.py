"""Who asks the device for a value in an optimizer step, why, and what a rehearsal answers.

The host waits there until the device has done all that is queued. None of these is in a layer, the
loss, the exchange with teachers, or anything else that happens once a microbatch.
"""

from typing import NamedTuple

import torch

from megatron_eopd.metrics.means import Reduced
from megatron_eopd.training.token_loss import NON_FINITE


class Read(NamedTuple):
    reason: str
    answer: bool | int | float | None = None
    """None: by the type, as below."""


READS = {
    "megatron_eopd/metrics/means.py:reduce": Read(
        "all figures and histograms of the step, on the last stage, in one copy"
    ),
    "megatron_eopd/training/guards.py:_sum_of_all": Read(
        "whether gradients are finite, before the update, and weights after it"
    ),
    "megatron_eopd/training/replicas.py:_differ": Read(
        "whether replicas are alike, every training.check_replicas_interval steps", False
    ),
    "megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32": Read(
        "Megatron-Core's gradient norm, to clip; once more with training.skip_grad_norm_factor"
    ),
}
"""By place, `file:function`."""


TOLD = {
    "megatron_eopd/training/step.py:share_from_last_stage": Reduced(
        {"loss/total": (1.0, 1.0)}, {}, {NON_FINITE: [[0, 0]]}
    ),
    "megatron_eopd/parallel/collectives.py:from_rank_zero": (1.0, None),
}
"""What another rank tells all, by who listens: of a step without a fault, and a gradient norm with
no error."""


def answer(tensor: torch.Tensor, place: str) -> bool | int | float:
    """Of a tensor of one element, whose value nobody knows: such that nothing is wrong. Counts of
    what is not finite are 0, a norm or a loss is 1."""
    known = READS.get(place)
    if known is not None and known.answer is not None:
        return known.answer
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 0
