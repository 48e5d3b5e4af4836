"""What is mended in Megatron-Core gives what it gave."""

import pytest
import torch
from megatron.core.utils import local_multi_tensor_l2_norm

from megatron_eopd.models.patches import _l2_norm
from megatron_eopd.parallel.cpu import emulate_cuda


@pytest.mark.parametrize("count", [1, 3, 300])
def test_gradient_norm_is_megatrons_to_the_bit(count):
    emulate_cuda()
    torch.manual_seed(count)
    tensors = [torch.randn(7 + n, 5) * 10.0 ** (n % 5) for n in range(count)]
    arguments = (65536, torch.zeros(1, dtype=torch.int), [tensors], False)
    ours, _ = _l2_norm(*arguments)
    theirs, _ = local_multi_tensor_l2_norm(*arguments)
    assert torch.equal(ours, theirs)
    dense = torch.cat([t.double().flatten() for t in tensors]).norm()
    torch.testing.assert_close(ours.double(), dense.reshape(1), rtol=1e-6, atol=0)
