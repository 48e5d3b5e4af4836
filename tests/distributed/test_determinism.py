"""model.deterministic_mode: every operation of a step has a deterministic kernel, here at least."""

import json

import pytest
import torch

from megatron_eopd.parallel.init import choose_deterministic_kernels
from tests.distributed.test_models import random_rollouts
from tests.distributed.test_step import VOCAB, build, make_config, take_step
from tests.ranks import context_for, leave_groups, run_ranks
from tests.tiny_models import make_model


def check_steps(student_dir, teacher_dir, out):
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    rows = []
    for number in range(3):
        if number == 1:
            choose_deterministic_kernels()
            assert torch.are_deterministic_algorithms_enabled()
        context = context_for(2, 1, sequence_parallel=True)
        model = {"deterministic_mode": number > 0}
        config = make_config(student_dir, teacher_dir, model=model)
        student, pool, token_loss = build(config, context)
        assert student.chunks[0].config.deterministic_mode == (number > 0)
        own = (student, token_loss, pool, rollouts, config, context)
        reports = [take_step(*own, step=0) for _ in range(2)]
        rows.append([[report.grad_norm, report.sums] for report in reports])
        leave_groups()
    if context.layout.rank == 0:
        out.write_text(json.dumps(rows))


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_steps_are_the_same_again(family, tmp_path):
    student, teacher = (make_model(family, tmp_path / f"m{n}", seed=n) for n in (1, 2))
    run_ranks(2, tmp_path, check_steps, student, teacher, tmp_path / "rows.json")
    plain, first, second = json.loads((tmp_path / "rows.json").read_text())
    assert plain == first == second
