"""Entropy-aware on-policy distillation on Megatron-Core: prompts in, a distilled student out."""

import warnings

# What Megatron-Core does inside itself, said anew by every rank, and nothing a user can act on:
for _message in (
    # both are optional here; the README says what runs without them
    ".*Apex (are|is) not installed.*",
    # its own calls of what torch 2.13 has renamed
    ".*torch.distributed.(all_gather_into|reduce_scatter)_tensor.* is deprecated.*",
    # its distributed optimizer, clearing the gradients of float32 shards
    ".*grad attribute of a Tensor that is not a leaf.*",
    # its own default
    ".*full scope is deprecated.*cuda_graph_scope.*",
):
    warnings.filterwarnings("ignore", message=_message)
