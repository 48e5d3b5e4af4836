"""What top-p sampling draws from, in float64 and one token after the other: the reference."""

import torch


def nucleus(logits_W: torch.Tensor, temperature: float, top_p: float) -> dict[int, float]:
    """Token → log-probability, of the tokens that can be drawn: the most likely ones, until their
    probabilities sum to top_p; of equally likely ones the higher numbers first."""
    probs_W = (logits_W.double() / temperature).softmax(-1).tolist()
    kept: dict[int, float] = {}
    for token in sorted(range(len(probs_W)), key=lambda n: (probs_W[n], n), reverse=True):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = probs_W[token]
    return {token: torch.tensor(p / sum(kept.values())).log().item() for token, p in kept.items()}
