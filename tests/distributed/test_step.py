"""One optimizer step: the same loss and gradient norm on every layout, and in transformers."""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from megatron_eopd.config import Config
from megatron_eopd.data.packing import Limits, exchange_size, pack, rounds_of
from megatron_eopd.metrics.means import divide
from megatron_eopd.models.build import build_model
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.load import load_weights
from megatron_eopd.records import DEFAULT_TEACHER
from megatron_eopd.rollout.recording import read_rollouts
from megatron_eopd.schedules import START, Progress
from megatron_eopd.teacher.colocated import ColocatedTeacher
from megatron_eopd.teacher.pool import TeacherPool
from megatron_eopd.training import optimizer
from megatron_eopd.training.optimizer import make_trainable
from megatron_eopd.training.replicas import check_replicas
from megatron_eopd.training.step import (
    accumulate_gradients,
    share_from_last_stage,
    train_step,
)
from megatron_eopd.training.token_loss import TokenLoss
from tests.dense_objective import dense_token_loss
from tests.distributed.test_models import random_rollouts
from tests.ranks import context_for, leave_groups, run_ranks

VOCAB = 211
# (TP, PP, DP, sequence parallel, micro batch size)
LAYOUTS = [
    (1, 1, 1, False, 8),
    (1, 1, 1, False, 2),
    (2, 1, 1, False, 4),
    (2, 1, 1, True, 4),
    (1, 2, 1, False, 2),
    (1, 1, 2, False, 1),
    (2, 2, 1, False, 4),
    (2, 1, 2, True, 2),
    (1, 2, 2, False, 4),
]

RECORDED_LAYOUTS = [
    (1, 1, 1, False, 32),
    (2, 1, 1, False, 32),
    (1, 2, 1, False, 8),
    (1, 1, 2, False, 16),
    (2, 2, 1, False, 16),
]
MODELS = Path(__file__).parents[2] / "examples/quickstart/models"


def make_config(student_dir, teacher_dir, **changed) -> Config:
    options = {
        "run_dir": "unused",
        "student": {"hf_path": student_dir},
        "teacher": {"hf_path": teacher_dir},
        "objective": {"entropy_threshold": 2.8},
        "rollout": {"temperature": 0.8, "batch_size": 8},
        "training": {"global_batch_size": 8, "lr": 1e-2, "train_iters": 10, "adam_eps": 1e-3},
    }
    return Config.model_validate(options | changed)


def build(config, context):
    hf_config = read_hf_config(config.student.hf_path)
    chunks = build_model(config.student.hf_path, config.model, context)
    load_weights(chunks, config.student.hf_path, context)
    teacher = ColocatedTeacher(config.teacher, "teacher", config, (), hf_config.vocab_size, context)
    pool = TeacherPool({DEFAULT_TEACHER: teacher}, context)
    token_loss = TokenLoss(chunks[-1], pool.heads, config, hf_config.vocab_size, context)
    return make_trainable(chunks, config, context), pool, token_loss


def take_step(student, token_loss, pool, rollouts, config, context, step, **options):
    packed = pack(rollouts, Limits.of(config.training), context.layout)
    rounds = rounds_of(packed, exchange_size(config))
    return train_step(
        student,
        token_loss,
        pool.microbatches(rounds),
        context,
        num_rounds=len(rounds),
        progress=Progress(step, step, config.training.train_iters),
        **options,
    )


def check_layouts(configs, rollouts, layouts, out_dir):
    """Two steps on the same batch; the second also shows that the weights moved alike."""
    for tp, pp, dp, sp, micro_batch_size in layouts:
        context = context_for(tp, pp, sequence_parallel=sp)
        assert context.layout.dp == dp
        for number, base_config in enumerate(configs):
            training = base_config.training.model_copy(
                update={"micro_batch_size": micro_batch_size}
            )
            config = base_config.model_copy(update={"training": training})
            student, pool, token_loss = build(config, context)
            reports = [
                take_step(student, token_loss, pool, rollouts, config, context, n) for n in range(2)
            ]
            if context.layout.rank == 0:
                means = [divide([report.sums]) for report in reports]
                row = [
                    [m["loss/total"], r.grad_norm, m["gate/fraction"]]
                    for m, r in zip(means, reports, strict=True)
                ]
                name = f"{number}-{tp}-{pp}-{dp}-{sp}-{micro_batch_size}.json"
                (out_dir / name).write_text(json.dumps(row))
        leave_groups()


def transformers_step(config, rollouts) -> tuple[float, float, float]:
    """(loss, gradient norm, gate fraction) in float64 by autograd of the dense formula."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (config.student.hf_path, config.teacher.hf_path)
    )
    student_logits, teacher_logits = [], []
    for rollout in rollouts:
        tokens = torch.tensor([rollout.prompt.prompt_ids + rollout.response_ids])
        first = len(rollout.prompt.prompt_ids) - 1
        student_logits.append(student(tokens).logits[0, first:-1])
        teacher_logits.append(teacher(tokens).logits[0, first:-1].detach())
    teacher_logits = torch.cat(teacher_logits)
    objective = config.objective
    tau = objective.entropy_threshold
    if objective.formula.gate == "quantile":
        log_p = (teacher_logits / config.teacher_temperature).log_softmax(-1)
        tau = (-(log_p.exp() * log_p).sum(-1)).quantile(objective.gate_quantile).item()
    loss, gate = dense_token_loss(
        torch.cat(student_logits),
        teacher_logits,
        torch.tensor([i for r in rollouts for i in r.response_ids]),
        torch.tensor([x for r in rollouts for x in r.response_logprobs], dtype=torch.float64),
        torch.cat([torch.linspace(0, 1, len(r.response_ids)).double() for r in rollouts]),
        objective,
        alpha=objective.formula.forward_kl_weight,
        tau=tau,
        student_temperature=config.student_temperature,
        teacher_temperature=config.teacher_temperature,
    )
    loss.mean().backward()
    grad_norm = math.sqrt(sum(p.grad.square().sum().item() for p in student.parameters()))
    return loss.mean().item(), grad_norm, gate.mean().item()


def assert_layouts_agree(configs, rollouts, layouts, tmp_path) -> str:
    """Run every layout, compare with the dense float64 step; gives back tables of both."""
    for world in {math.prod(layout[:3]) for layout in layouts}:
        here = [layout for layout in layouts if math.prod(layout[:3]) == world]
        run_ranks(world, tmp_path, check_layouts, configs, rollouts, here, tmp_path)
    return "".join(
        assert_layouts_agree_on(number, config, rollouts, layouts, tmp_path)
        for number, config in enumerate(configs)
    )


def assert_layouts_agree_on(number, config, rollouts, layouts, tmp_path) -> str:
    loss, grad_norm, gate = transformers_step(config, rollouts)
    if config.objective.formula.gate not in ("always", "never"):
        assert 0.05 < gate < 0.95, "the batch must hold open and closed gates"
    second = None
    table = f"\n  {config.objective.model_dump(exclude_defaults=True)}"
    table += "\n  TP PP DP SP  mb        loss   grad norm\n"
    table += f"  dense float64     {loss:.7f}  {grad_norm:.7f}\n"
    for tp, pp, dp, sp, mb in layouts:
        steps = json.loads((tmp_path / f"{number}-{tp}-{pp}-{dp}-{sp}-{mb}.json").read_text())
        table += f"  {tp:2} {pp:2} {dp:2} {sp:2} {mb:3}     {steps[0][0]:.7f}  {steps[0][1]:.7f}\n"
        assert steps[0] == pytest.approx([loss, grad_norm, gate], rel=1e-5), table
        assert steps[1][0] < loss, "a step on the batch lowers its loss"
        second = second or steps[1]
        # Adam divides by the gradient's own size, which magnifies rounding after the first step.
        assert steps[1] == pytest.approx(second, rel=1e-4), table
    return table


@pytest.mark.parametrize("tied", [False, True])
def test_layouts_agree_with_transformers(
    tied, qwen3_dir, tied_qwen3_dir, teacher_dir, tmp_path, capsys
):
    """Loss and gradient norm within 1e-5 relative of the dense float64 step, on every layout."""
    config = make_config(tied_qwen3_dir if tied else qwen3_dir, teacher_dir)
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    table = assert_layouts_agree([config], rollouts, LAYOUTS, tmp_path)
    with capsys.disabled():
        print(f"\n  random models, tied={tied}{table}")


def test_a_recorded_batch_gives_one_step_on_every_layout(tmp_path, capsys):
    """The toy models on rollouts that vLLM wrote in a TP 2 run, replayed on other layouts."""
    config = make_config(
        MODELS / "student",
        MODELS / "teacher",
        objective={"entropy_threshold": 0.8},
        rollout={"batch_size": 32},
        training={"global_batch_size": 32, "lr": 1e-3, "train_iters": 10, "adam_eps": 1e-3},
    )
    rollouts = [r for _, r in read_rollouts(Path(__file__).parent / "recorded/000000.jsonl")]
    table = assert_layouts_agree([config], rollouts, RECORDED_LAYOUTS, tmp_path)
    with capsys.disabled():
        print(f"\n  recorded batch, toy models{table}")


OBJECTIVES = [
    {"name": "eopd_paper", "top_k": 4},
    {"name": "eopd_mix", "gate_width": 0.5, "head": "chunked", "head_chunk_size": 5},
    {"name": "eopd", "head": "chunked", "head_chunk_size": 7},
    {"name": "eopd", "gate": "quantile", "gate_quantile": 0.6},
    {"name": "eopd", "inplace_backward": True, "token_weight": "position"},
    {"name": "eopd", "ignored_token_ids": list(range(0, VOCAB, 30))},
    {"name": "vopd", "head": "chunked", "head_chunk_size": 1000},
    {"name": "jsd", "jsd_beta": 0.3, "head": "chunked", "head_chunk_size": 5},
    {"name": "skewed_kl"},
    {"name": "opd", "reverse_kl": "topk", "top_k_support": "union", "top_k_normalization": "tail"},
    {"name": "eopd", "gate": "student", "entropy_threshold": 4.85, "reverse_kl_clip": 3.6}
    | {"token_weight": "early", "entropy_weight": "confidence"},
    {"name": "eopd", "gate": "disagreement", "top_k": 48, "gate_max_overlap": 0.2}
    | {"forward_kl_clip": 2.9, "head": "chunked", "head_chunk_size": 5},
]
OBJECTIVE_LAYOUTS = [(1, 1, 2, False, 4), (2, 1, 1, True, 8), (1, 2, 1, False, 4)]


@pytest.mark.parametrize("tied", [False, True])
def test_every_objective_and_head_agree_with_transformers(
    tied, qwen3_dir, tied_qwen3_dir, teacher_dir, tmp_path, capsys
):
    """Loss and gradient norm of other objectives, with both heads, over DP, TP with sequence
    parallelism and PP, microbatches included, within 1e-5 of the dense float64 step."""
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    student_dir = tied_qwen3_dir if tied else qwen3_dir
    configs = [
        make_config(
            student_dir,
            teacher_dir,
            objective={"entropy_threshold": 2.8} | options,
        )
        for options in OBJECTIVES
        if not tied or options.get("head") == "chunked"
    ]
    table = assert_layouts_agree(configs, rollouts, OBJECTIVE_LAYOUTS, tmp_path)
    with capsys.disabled():
        print(f"\n  random models, tied={tied}{table}")


INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
CHUNKED = {"entropy_threshold": 2.8, "head": "chunked", "head_chunk_size": 5}


def check_variants(student_dir, teacher_dir, variants, out_dir):
    """The same batch with options that must not change the mathematics."""
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    for number, (tp, pp, changed) in enumerate(variants):
        config = make_config(student_dir, teacher_dir, **changed)
        context = context_for(tp, pp, vpp=config.parallel.virtual_pipeline_model_parallel_size)
        student, pool, token_loss = build(config, context)
        reports = [
            take_step(student, token_loss, pool, rollouts, config, context, n) for n in range(2)
        ]
        student.gather_parameters()
        if context.layout.rank == 0:
            row = [[divide([r.sums])["loss/total"], r.grad_norm] for r in reports]
            # Of the embedding that the next forward pass would use, as an export must find it.
            row.append([student.chunks[0].embedding.word_embeddings.weight.square().sum().item()])
            (out_dir / f"variant-{number}.json").write_text(json.dumps(row))
        if config.model.dtype == "bfloat16":
            assert {p.dtype for p in student.chunks[0].parameters()} == {torch.bfloat16}
            states = student.optimizer.chained_optimizers[0].optimizer.state
            assert {p.dtype for p in states} == {torch.float32}, "master weights"
            assert {s["exp_avg_sq"].dtype for s in states.values()} == {torch.float32}
        leave_groups()


def test_recomputation_and_overlap_change_nothing_and_bfloat16_little(
    qwen3_dir, teacher_dir, tmp_path
):
    """bfloat16 keeps 8 bits of each activation; master weights and moments stay float32."""
    training = {"global_batch_size": 8, "lr": 1e-2, "train_iters": 10, "adam_eps": 1e-3}
    variants = [
        (1, 2, {}),
        (2, 1, {}),
        (2, 1, {"model": {"recompute_granularity": "full"}}),
        (1, 2, {"model": {"recompute_granularity": "full"}}),
        (2, 1, {"model": {"recompute_granularity": "selective"}}),
        (1, 1, {"training": training | {"overlap_grad_reduce": True}}),
        (1, 1, {"training": training | OVERLAP}),
        (1, 2, {"training": training | OVERLAP, "parallel": INTERLEAVED}),
        (1, 1, {"training": training | OVERLAP, "objective": CHUNKED}),
        (1, 2, {"training": training | OVERLAP, "parallel": INTERLEAVED, "objective": CHUNKED}),
        (2, 1, {"model": {"dtype": "bfloat16"}}),
        (1, 2, {"model": {"dtype": "bfloat16"}}),
    ]
    run_ranks(2, tmp_path, check_variants, qwen3_dir, teacher_dir, variants, tmp_path)
    rows = [json.loads((tmp_path / f"variant-{n}.json").read_text()) for n in range(len(variants))]
    for (tp, *_, changed), row in zip(variants, rows, strict=True):
        is_low = changed.get("model", {}).get("dtype") == "bfloat16"
        # Tensor-parallel ranks hold half of the embedding.
        for step, plain in zip(row, rows[tp - 1], strict=True):
            assert step == pytest.approx(plain, rel=3e-2 if is_low else 1e-4), changed


def check_non_finite(student_dir, teacher_dir):
    context = context_for(1, 2)
    config = make_config(student_dir, teacher_dir)
    student, pool, token_loss = build(config, context)
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    packed = pack(rollouts, Limits.of(config.training), context.layout)
    (batches,) = pool.microbatches([packed])
    before = [p.detach().clone() for p in student.chunks[0].parameters()]
    if context.layout.is_last_stage:
        batches[1].teacher[0].payload.hidden_NH[0] = torch.nan
    report = train_step(student, token_loss, [batches], context, num_rounds=1, progress=START)
    assert report.fault.kind == "gradient" and "not changed" in report.fault.message
    named = report.fault.figures["not_finite"]
    assert [where.split(" (")[0] for where in named] == ["rank 0", "rank 1"] and all(named.values())
    for old, new in zip(before, student.chunks[0].parameters(), strict=True):
        assert torch.equal(old, new)


def check_overflow(student_dir, teacher_dir):
    """Adam's first update is the learning rate itself, whatever the gradient."""
    context = context_for(1, 2)
    config = make_config(student_dir, teacher_dir)
    training = config.training.model_copy(update={"lr": 1e37, "lr_decay_style": "constant"})
    config = config.model_copy(update={"training": training})
    student, pool, token_loss = build(config, context)
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    (batches,) = pool.microbatches([pack(rollouts, Limits.of(config.training), context.layout)])
    options = {"num_rounds": 1, "progress": START}
    fault = train_step(student, token_loss, [batches], context, **options).fault
    assert fault.kind == "weights"
    assert re.search(r"update made weights .* not finite .*lr=1e\+37", fault.message)


def test_an_update_that_overflows_stops_all_ranks(qwen3_dir, teacher_dir, tmp_path):
    """A pipeline of two: only a sum over both stages tells both."""
    run_ranks(2, tmp_path, check_overflow, qwen3_dir, teacher_dir)


def test_a_nan_on_one_stage_stops_all_ranks_before_the_step(qwen3_dir, teacher_dir, tmp_path):
    run_ranks(2, tmp_path, check_non_finite, qwen3_dir, teacher_dir)


class NoReads(TorchDispatchMode):
    """Whoever asks the device for a value, or for a size that depends on values, is named."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.REFUSED), func
        return func(*args, **(kwargs or {}))


def check_reads(configs):
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    for config in configs:
        context = context_for(1, 1)
        student, pool, token_loss = build(config, context)
        (batches,) = pool.microbatches([pack(rollouts, Limits.of(config.training), context.layout)])
        assert len(batches) == 4
        with NoReads():
            means = accumulate_gradients(
                student,
                token_loss,
                [batches],
                context,
                num_rounds=1,
                progress=START,
                compare_engine=True,
                diagnose=True,
            )
        assert share_from_last_stage(means, context).sums["loss/total"][1] > 0
        leave_groups()


def test_until_all_microbatches_are_done_nobody_asks_the_device(qwen3_dir, teacher_dir, tmp_path):
    """Neither layers nor losses nor metrics nor the gate's quantile: a read waits for everything
    that is queued on a GPU."""
    training = {"global_batch_size": 8, "micro_batch_size": 2, "train_iters": 10}
    objectives = [
        {"name": "eopd"},
        {"name": "eopd", "gate": "quantile"},
        {"name": "eopd_paper", "top_k": 4, "head": "chunked", "head_chunk_size": 5},
        {"name": "skewed_kl", "ignored_token_ids": [1, 2], "token_weight": "position"},
        {"name": "eopd", "gate": "disagreement", "reverse_kl_clip": 2.0, "token_weight": "early"}
        | {"entropy_weight": "confidence"},
    ]
    configs = [
        make_config(qwen3_dir, teacher_dir, objective=each, training=training)
        for each in objectives
    ]
    run_ranks(1, tmp_path, check_reads, configs)


def check_small_buckets(student_dir, teacher_dir):
    whole = optimizer.DistributedDataParallelConfig
    optimizer.DistributedDataParallelConfig = partial(whole, bucket_size=1000)
    training = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    rollouts = [x.rollout for x in random_rollouts(VOCAB, count=8, seed=11)]
    norms = []
    for head in ("materialized", "chunked"):
        config = make_config(student_dir, teacher_dir, objective={"head": head})
        config = config.model_copy(update={"training": config.training.model_copy(update=training)})
        context = context_for(1, 1)
        student, pool, token_loss = build(config, context)
        assert len(student.wrapped[0].bucket_groups) > 1
        reports = [
            take_step(student, token_loss, pool, rollouts, config, context, n) for n in range(3)
        ]
        student.gather_parameters()
        check_replicas(student, context)
        norms.append([report.grad_norm for report in reports])
        leave_groups()
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_an_lm_head_that_is_gathered_while_others_work_is_waited_for(
    qwen3_dir, teacher_dir, tmp_path
):
    """In a bucket of its own, as a real model's is: the chunked head reads it without calling it,
    and steps and replicas are as with the head that is called."""
    run_ranks(2, tmp_path, check_small_buckets, qwen3_dir, teacher_dir)
