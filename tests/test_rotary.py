"""Rotary embeddings of packed rows, against Megatron's own, and what a layer may ask for."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_eopd.models.packed_sequences import describe_sequences, unpacking_of
from megatron_eopd.models.rope import rotate, rotation_of

# Shapes: S tokens of a rank, A heads, D head dim, F frequencies.
LENGTHS = [24, 8, 40, 16]
A, D = 3, 16


def of_megatron(x_SAD, frequencies_F, packed, cp, cp_rank):
    """The way of Megatron without TransformerEngine."""
    angles = torch.outer(torch.arange(max(LENGTHS), dtype=torch.float32), frequencies_F)
    return apply_rotary_pos_emb(
        x_SAD,
        torch.cat((angles, angles), dim=-1)[:, None, None, :],
        SimpleNamespace(
            apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False
        ),
        cu_seqlens=packed.cu_seqlens_q,
        cp_group=SimpleNamespace(size=lambda: cp, rank=lambda: cp_rank),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cp", "cp_rank"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 2), (4, 3)])
def test_turned_heads_and_gradients_are_those_of_megatron(cp, cp_rank, dtype):
    """Bit for bit, whichever chunks of the sequences a context-parallel rank holds."""
    torch.manual_seed(0)
    packed = describe_sequences(LENGTHS, cp, cp_rank, torch.device("cpu"))
    frequencies_F = 1e6 ** -(torch.arange(0, D, 2) / D)
    x_SAD = torch.randn(sum(LENGTHS) // cp, A, D, dtype=dtype)
    upstream_SAD = torch.randn_like(x_SAD)
    results = []
    for turn in (
        lambda x: rotate(x, rotation_of(packed.positions_S, frequencies_F, dtype)),
        lambda x: of_megatron(x, frequencies_F, packed, cp, cp_rank),
    ):
        leaf = x_SAD.clone().requires_grad_()
        turned = turn(leaf)
        results.append((turned, *torch.autograd.grad(turned, leaf, upstream_SAD)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_no_value_is_asked_of_the_device():
    """Neither when a row is described nor in a layer: a fake tensor has none to give."""
    with FakeTensorMode():
        packed = describe_sequences(LENGTHS, 2, 1, torch.device("cpu"))
        rotation = rotation_of(packed.positions_S, torch.ones(D // 2), torch.float32)
        x_SAD = torch.randn(sum(LENGTHS) // 2, A, D, requires_grad=True)
        rotate(x_SAD, rotation).sum().backward()
        assert unpacking_of(packed, 2, 1).key_rows_BL.shape == (len(LENGTHS), max(LENGTHS))
