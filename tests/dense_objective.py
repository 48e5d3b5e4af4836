"""Every objective in its densest form: whole vocabulary, float64, autograd, no cleverness.

Written from the papers' formulas and from nothing in megatron_eopd/losses, to be its oracle.
p: teacher, q: student.
"""
# Shapes: N tokens, V vocabulary.

import torch

from megatron_eopd.config import ObjectiveConfig


def dense_token_loss(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor,
    sampled_ids_N: torch.Tensor,
    rollout_logprobs_N: torch.Tensor,
    positions_N: torch.Tensor,
    objective: ObjectiveConfig,
    *,
    alpha: float,
    tau: float,
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss_N, gate_N). `tau` is the threshold that the gate really uses."""
    log_q = (student_logits_NV / student_temperature).log_softmax(-1)
    log_p = (teacher_logits_NV / teacher_temperature).log_softmax(-1).detach()
    p, q = log_p.exp(), log_q.exp()
    parts, beta, skew = objective.formula, objective.jsd_beta, objective.skew
    kl = {"forward": (p * (log_p - log_q)).sum(-1), "reverse": (q * (log_q - log_p)).sum(-1)}

    def at_sampled(x_NV):
        return x_NV[torch.arange(len(x_NV)), sampled_ids_N]

    def surrogate(baseline_N):
        advantage = (at_sampled(log_p) - rollout_logprobs_N + baseline_N).detach()
        ratio = (at_sampled(log_q) - rollout_logprobs_N).exp()
        clipped = ratio.clamp(1 - objective.clip_ratio, 1 + objective.clip_ratio)
        return torch.maximum(-ratio * advantage, -clipped * advantage)

    def on_support(direction):
        losses = []
        for row_p, row_q in zip(log_p, log_q, strict=True):
            best_p = set(row_p.topk(objective.top_k).indices.tolist())
            best_q = set(row_q.topk(objective.top_k).indices.tolist())
            chosen = {"teacher": best_p, "student": best_q, "union": best_p | best_q}
            inside = torch.tensor(sorted(chosen[objective.top_k_support]))
            a, b = row_p[inside], row_q[inside]
            if objective.top_k_normalization == "tail":
                a = torch.cat([a, (1 - a.exp().sum()).log().view(1)])
                b = torch.cat([b, (1 - b.exp().sum()).log().view(1)])
            if objective.top_k_normalization in ("teacher", "both"):
                a = a - a.exp().sum().log()
            if objective.top_k_normalization in ("student", "both"):
                b = b - b.exp().sum().log()
            forward, reverse = (a.exp() * (a - b)).sum(), (b.exp() * (b - a)).sum()
            losses.append(forward if direction == "forward" else reverse)
        return torch.stack(losses)

    def to_mixture(first, second, share):
        return (first * (first / (share * first + (1 - share) * second)).log()).sum(-1)

    reverse = {
        "none": lambda: torch.zeros_like(kl["reverse"]),
        "full": lambda: kl["reverse"],
        "sampled": lambda: surrogate(0.0),
        "vopd": lambda: surrogate(kl["reverse"]),
        "topk": lambda: on_support("reverse"),
        "skewed": lambda: to_mixture(q, p, skew),
    }[parts.reverse_kl]()
    forward = {
        "none": lambda: torch.zeros_like(kl["forward"]),
        "full": lambda: kl["forward"],
        "topk": lambda: on_support("forward"),
        "skewed": lambda: to_mixture(p, q, skew),
        "jsd": lambda: beta * to_mixture(p, q, beta) + (1 - beta) * to_mixture(q, p, 1 - beta),
    }[parts.forward_kl]()

    def at_most(term, clip):
        return term if clip is None else torch.where(term > clip, torch.full_like(term, clip), term)

    reverse = at_most(reverse, objective.reverse_kl_clip)
    forward = at_most(forward, objective.forward_kl_clip)
    entropy, students_entropy = -(p * log_p).sum(-1), -(q * log_q).sum(-1).detach()
    overlap = dense_overlap(log_q.detach(), log_p, objective.top_k)[0]
    gate = {
        "hard": (entropy >= tau).double(),
        "quantile": (entropy >= tau).double(),
        "sigmoid": torch.sigmoid((entropy - tau) / objective.gate_width),
        "student": (students_entropy >= tau).double(),
        "disagreement": (overlap <= objective.gate_max_overlap).double(),
        "always": torch.ones_like(entropy),
        "never": torch.zeros_like(entropy),
    }[parts.gate]
    reverse_share = 1 - alpha * gate if parts.combine == "interpolate" else 1.0
    loss = reverse_share * reverse + alpha * gate * forward
    if objective.token_weight == "position":
        loss = loss * (0.25 + 0.75 * torch.sigmoid((positions_N - 0.30) / 0.10))
    if objective.token_weight == "early":
        gain = objective.early_token_gain
        loss = loss * ((1 - positions_N) * (1 + gain) + positions_N)
    if objective.entropy_weight == "confidence":
        floor, scale = objective.entropy_weight_floor, objective.entropy_weight_scale
        confidence = (-entropy / scale).exp()
        loss = loss * (confidence + floor * (1 - confidence))
    ignored = torch.tensor([i in objective.ignored_token_ids for i in sampled_ids_N.tolist()])
    return loss.masked_fill(ignored, 0.0), gate


def dense_overlap(
    log_q: torch.Tensor, log_p: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """|top_k(p) ∩ top_k(q)| / k, and the mass of p and of q on that intersection, each [N]."""
    found = []
    for rows in zip(log_p, log_q, strict=True):
        best = [row.argsort(descending=True, stable=True)[:top_k].tolist() for row in rows]
        both = sorted(set(best[0]) & set(best[1]))
        found.append([len(both) / len(best[0]), *(row[both].exp().sum() for row in rows)])
    return torch.tensor(found, dtype=log_p.dtype).view(-1, 3).unbind(-1)
