"""Reference operations on logits whose vocabulary is cut over the tensor-parallel ranks.

Plain and exact, without gradients: used for probes, for the reference sampler and for metrics.
"""
# Shapes: N tokens, V this rank's columns, W the whole vocabulary without padding.

import torch
import torch.distributed as dist


def gather_vocab(
    logits_NV: torch.Tensor, tp_group: dist.ProcessGroup, vocab_size: int
) -> torch.Tensor:
    """Whole logits [N, W] on every rank. One all-gather."""
    shards = [torch.empty_like(logits_NV) for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather(shards, logits_NV.contiguous(), group=tp_group)
    return torch.cat(shards, dim=-1)[:, :vocab_size]


def vocab_parallel_logprobs(
    logits_NV: torch.Tensor,
    token_ids_N: torch.Tensor,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """log p(token) in nats, float32 [N], of the given tokens. One all-gather of [N, 3]."""
    first = dist.get_rank(tp_group) * logits_NV.shape[-1]
    columns = min(max(vocab_size - first, 0), logits_NV.shape[-1])
    # One column at the end stands for "nothing here": an empty shard has a maximum too.
    real = torch.nn.functional.pad(
        logits_NV[:, :columns].float() / temperature, (0, 1), value=-1e30
    )
    maximum = real.amax(-1)
    exp_sum = (real - maximum.unsqueeze(-1)).exp().sum(-1)
    local = token_ids_N - first
    owned = (local >= 0) & (local < columns)
    own_logit = real.gather(-1, torch.where(owned, local, 0).unsqueeze(-1)).squeeze(-1)
    own_logit = torch.where(owned, own_logit, 0.0)

    mine = torch.stack([maximum, exp_sum, own_logit])
    shards = [torch.empty_like(mine) for _ in range(dist.get_world_size(tp_group))]
    dist.all_gather(shards, mine, group=tp_group)
    maxima, exp_sums, logits = torch.stack(shards, dim=1)
    highest = maxima.amax(0)
    log_z = highest + (exp_sums * (maxima - highest).exp()).sum(0).log()
    return logits.sum(0) - log_z
