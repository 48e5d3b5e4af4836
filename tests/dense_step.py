"""One step of a run in its densest form: transformers' models in float64, whole logits, autograd.

In: a Config and rollouts. Out: loss, KL terms of every token and every gradient, as
tests.distributed.parity has them, so that `distance` compares the two.
"""
# Shapes: N tokens of a response, V vocabulary.

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_eopd.config import Config
from megatron_eopd.records import Rollout, teacher_name
from tests.dense_objective import dense_token_loss

TeacherLogits = Callable[[str, Rollout], torch.Tensor]
"""Of a teacher by its name, [N, V]."""


def load_float64(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def response_logits(
    model: PreTrainedModel, prompt_ids: Sequence[int], response_ids: Sequence[int]
) -> torch.Tensor:
    """[N, V], each row the prediction of its token."""
    logits = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0]
    return logits[len(prompt_ids) - 1 : -1]


def teachers_of(config: Config) -> TeacherLogits:
    """Each teacher behind the prompt that it reads."""
    models = {
        teacher_name(section): load_float64(teacher.hf_path)
        for section, teacher in config.all_teachers.items()
    }

    @torch.no_grad()
    def logits(name: str, rollout: Rollout) -> torch.Tensor:
        return response_logits(models[name], rollout.prompt.ids_for(name), rollout.response_ids)

    return logits


def dense_step(
    config: Config, rollouts: Sequence[Rollout], teacher_logits: TeacherLogits | None = None
) -> dict:
    """{"terms", "gradients", "metrics"}; without terms where losses are summed over teachers.
    `rollouts`: whole responses."""
    teacher_logits = teacher_logits or teachers_of(config)
    student, count = load_float64(config.student.hf_path), config.objective.max_trained_tokens
    total, num_tokens, terms = 0.0, 0, {}
    for rollout in rollouts:
        student_NV = response_logits(student, rollout.prompt.prompt_ids, rollout.response_ids)
        spoken = _spoken(config, rollout, teacher_logits)
        loss_N = sum(
            weight * token_losses(config, rollout, student_NV, teacher_NV)[:count]
            for weight, teacher_NV in spoken
        )
        total = total + loss_N.sum()
        num_tokens += len(loss_N)
        if config.objective.teacher_mixture != "divergences":
            ((_, teacher_NV),) = spoken
            terms |= _terms(config, rollout, student_NV[:count], teacher_NV[:count])
    (total / num_tokens).backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    norm = sum(g.square().sum() for g in gradients.values()) ** 0.5
    metrics = {"loss/total": (total / num_tokens).item(), "grad_norm": norm.item()}
    return {"terms": terms, "gradients": gradients, "metrics": metrics}


def _spoken(
    config: Config, rollout: Rollout, teacher_logits: TeacherLogits
) -> list[tuple[float, torch.Tensor]]:
    """(weight, logits [N, V]) of each teacher; of a mixture of distributions, of that one."""
    weights = {teacher_name(s): t.weight for s, t in config.all_teachers.items()}
    own = {n: w for n, w in weights.items() if rollout.prompt.is_scored_by(n)}
    logits = [(weight, teacher_logits(name, rollout)) for name, weight in own.items()]
    if config.objective.teacher_mixture != "distributions":
        return logits
    total, temperature = sum(own.values()), config.teacher_temperature
    p_NV = sum(weight / total * (x / temperature).softmax(-1) for weight, x in logits)
    return [(total, temperature * p_NV.log())]


def token_losses(
    config: Config, rollout: Rollout, student_NV: torch.Tensor, teacher_NV: torch.Tensor
) -> torch.Tensor:
    """[N], of one teacher."""
    objective = config.objective
    last = max(rollout.whole_length - 1, 1)
    loss_N, _ = dense_token_loss(
        student_NV,
        teacher_NV,
        torch.tensor(rollout.response_ids),
        torch.tensor(rollout.response_logprobs, dtype=torch.float64),
        torch.arange(len(student_NV), dtype=torch.float64) / last,
        objective,
        alpha=objective.formula.forward_kl_weight,
        tau=objective.entropy_threshold,
        student_temperature=config.student_temperature,
        teacher_temperature=config.teacher_temperature,
    )
    return loss_N


def _terms(
    config: Config, rollout: Rollout, student_NV: torch.Tensor, teacher_NV: torch.Tensor
) -> dict[tuple[int, int, int], torch.Tensor]:
    """In the order of tests.distributed.parity.TERMS."""
    log_q = (student_NV.detach() / config.student_temperature).log_softmax(-1)
    log_p = (teacher_NV / config.teacher_temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    rows = torch.stack(
        [
            (q * (log_q - log_p)).sum(-1),
            (p * (log_p - log_q)).sum(-1),
            -(p * log_p).sum(-1),
            -(q * log_q).sum(-1),
        ],
        -1,
    )
    key = rollout.prompt.index, rollout.sample_index
    return {(*key, token): row for token, row in enumerate(rows)}
