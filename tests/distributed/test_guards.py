"""Steps that are skipped, and replicas that differ, on real ranks."""

import pytest
import torch
from torch.distributed import get_rank

from megatron_eopd.data.packing import Limits, pack
from megatron_eopd.errors import ReplicaError
from megatron_eopd.models.build import build_model
from megatron_eopd.models.load import load_weights
from megatron_eopd.schedules import Progress
from megatron_eopd.training.optimizer import make_trainable
from megatron_eopd.training.replicas import check_replicas, checksum
from megatron_eopd.training.step import train_step
from tests.distributed.test_models import random_rollouts
from tests.distributed.test_step import OVERLAP, VOCAB, build, make_config, take_step
from tests.ranks import context_for, leave_groups, run_ranks

TRAINING = {"global_batch_size": 8, "lr": 1e-2, "train_iters": 10, "adam_eps": 1e-3}


def state_of(student):
    """Weights, master weights and moments of this rank."""
    student.gather_parameters()
    tensors = [p.detach().clone() for chunk in student.chunks for p in chunk.parameters()]
    for chained in student.optimizer.chained_optimizers:
        for parameter, state in chained.optimizer.state.items():
            moments = [state[name].clone() for name in ("exp_avg", "exp_avg_sq", "step")]
            tensors += [parameter.detach().clone(), *moments]
    return tensors


def spoilt_step(student, token_loss, pool, rollouts, config, context, step):
    """With one NaN, in one microbatch of one data-parallel rank of the last stage."""
    packed = pack(rollouts, Limits.of(config.training), context.layout)
    (batches,) = pool.microbatches([packed])
    if context.layout.is_last_stage and context.layout.dp_rank == 0:
        batches[1].teacher[0].payload.hidden_NH[0] = torch.nan
    progress = Progress(step, step, config.training.train_iters)
    return train_step(student, token_loss, [batches], context, num_rounds=1, progress=progress)


def check_skipping(student_dir, teacher_dir, variants):
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    for tp, pp, changed in variants:
        context = context_for(tp, pp)
        config = make_config(student_dir, teacher_dir, **changed)
        ends = []
        for skips in (False, True):
            parts = build(config, context)
            student, pool, token_loss = parts
            args = (student, token_loss, pool, rollouts, config, context)
            first = take_step(*args, 0, compare_replicas=True)
            bound = None
            if skips:
                before = state_of(student)
                assert spoilt_step(*args, 1).fault.kind == "gradient"
                skipped = take_step(*args, 2, skip_above=first.grad_norm / 1e3)
                assert skipped.fault.kind == "spike" and skipped.grad_norm > 0
                assert all(map(torch.equal, before, state_of(student)))
                bound = first.grad_norm * 1e3
            last = take_step(*args, 3, compare_replicas=True, skip_above=bound)
            assert last.fault is None
            ends.append([torch.tensor(last.grad_norm), *state_of(student)])
        assert all(map(torch.equal, *ends)), changed
        leave_groups()


def test_a_skipped_step_leaves_no_trace(qwen3_dir, teacher_dir, tmp_path):
    """A run that skips a NaN and a spike is, to the bit, the run without those two steps: weights,
    master weights and moments; also where a bound is watched that nothing passes."""
    variants = [
        (2, 1, {}),
        (1, 2, {}),
        (1, 1, {}),
        (1, 1, {"training": TRAINING | OVERLAP}),
        (1, 1, {"model": {"dtype": "bfloat16"}}),
    ]
    run_ranks(2, tmp_path, check_skipping, qwen3_dir, teacher_dir, variants)


def check_bit_flips(cases):
    """`cases`: student, TP, PP, EP, the rank whose bit is flipped, in which weight, and whether
    that has replicas."""
    for path, tp, pp, ep, flipped_rank, weight, has_replicas in cases:
        context = context_for(tp, pp, ep)
        config = make_config(path, path)
        chunks = build_model(path, config.model, context)
        load_weights(chunks, path, context)
        student = make_trainable(chunks, config, context)
        check_replicas(student, context)
        if get_rank() == flipped_rank:
            found = next(p for n, p in chunks[0].named_parameters() if weight in n)
            found.data.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)  # the least of its bits
        if has_replicas:
            with pytest.raises(ReplicaError, match=rf"{weight}.* has the checksum") as raised:
                check_replicas(student, context)
            assert f"on rank(s) [{flipped_rank}]" in str(raised.value)
            assert "more" not in str(raised.value)
        else:
            check_replicas(student, context)
        leave_groups()


def test_one_flipped_bit_of_one_weight_is_told_on_all_ranks(qwen3_dir, family_dirs, tmp_path):
    """Of a dense weight, and of an expert, whose replicas are other ranks; a weight that its rank
    alone has is nobody's replica."""
    moe = family_dirs["qwen3_moe"]
    cases = [
        (qwen3_dir, 1, 1, 1, 1, "linear_fc1", True),
        (qwen3_dir, 1, 1, 1, 0, "final_layernorm", True),
        (qwen3_dir, 2, 1, 1, 1, "linear_fc1", False),
        (moe, 1, 1, 1, 1, "experts", True),
        (moe, 2, 1, 1, 1, "experts", True),
        (moe, 1, 1, 2, 1, "experts", False),
        (moe, 1, 1, 2, 1, "router", True),
    ]
    run_ranks(2, tmp_path, check_bit_flips, cases)


def test_a_stage_tells_the_ranks_of_others(qwen3_dir, tmp_path):
    """PP 2 × DP 2: the first stage is whole, and stops all the same."""
    run_ranks(4, tmp_path, check_bit_flips, [(qwen3_dir, 1, 2, 1, 3, "linear_fc1", True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_sees_every_bit(dtype):
    """Of whole words and of the rest behind them."""
    tensor = torch.randn(7).to(dtype)
    own = checksum(tensor)
    bits = tensor.view(torch.uint8)
    for place in range(bits.numel()):
        for bit in range(8):
            bits[place] ^= 1 << bit
            assert checksum(tensor) != own, (place, bit)
            bits[place] ^= 1 << bit
    assert checksum(tensor) == own
