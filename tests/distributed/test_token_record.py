"""Signals of single tokens, as they are recorded, against dense float64."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from megatron_eopd.losses.teacher_top_k import top_k_of_teacher, top_k_terms
from megatron_eopd.losses.token_details import details_of_logits, details_of_top_k
from megatron_eopd.losses.vocab_parallel import vocab_parallel_terms
from megatron_eopd.tokens import assemble as assemble_module
from megatron_eopd.tokens.assemble import about, assemble
from megatron_eopd.tokens.file import read_tokens, write_tokens
from megatron_eopd.tokens.notes import TokenNotes, choose
from megatron_eopd.tokens.record import SIGNALS, TOP, TokenRecord
from megatron_eopd.viewing.page import Side, page_html
from tests.distributed.test_losses import TEMPERATURES, case_logits, cut
from tests.distributed.test_models import random_rollouts
from tests.distributed.test_picked_tokens import top_ids
from tests.distributed.test_step import VOCAB, build, make_config, take_step
from tests.ranks import context_for, leave_groups, run_ranks
from tests.test_viewing import data_of, decode

# Shapes: N tokens, W whole vocabulary.

K = 5
# (TP, PP, CP, VPP), of 4 ranks; DP 4 has ranks without a wanted token
LAYOUTS = [(1, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (1, 2, 2, 1), (1, 2, 1, 2)]


def dense_ranks(logits: torch.Tensor, ids: torch.Tensor) -> list[int]:
    own = logits.gather(-1, ids.unsqueeze(-1))
    return (1 + (logits > own).sum(-1)).tolist()


def check_details(N: int, W: int, dtype: torch.dtype, top_k: int | None, swept: int = 0):
    """`top_k`: of a teacher that hands over no more; None: its logits are there. `swept`: how many
    of the teacher's the loss asks of the sweep."""
    tp, rank = dist.get_world_size(), dist.get_rank()
    width = -(-W // tp) + 3
    student, teacher = (x.to(dtype) for x in case_logits("flat", N, W))
    ids = torch.randint(W, (N,), generator=torch.Generator().manual_seed(2))
    own, other = cut(student, width, rank), cut(teacher, width, rank)
    options = {"tp_group": dist.group.WORLD, "vocab_size": W}
    if top_k is None:
        asked = options | TEMPERATURES | {"sampled_ids": ids, "top_k": swept}
        terms = vocab_parallel_terms(own, other, **asked)
        details = partial(details_of_logits, own, other, terms, ids, swept_top_k=swept)
    else:
        temperature = TEMPERATURES["teacher_temperature"]
        told = top_k_of_teacher(other, ids, top_k=top_k, temperature=temperature, **options)
        temperature = TEMPERATURES["student_temperature"]
        terms = top_k_terms(own, told, sampled_ids=ids, student_temperature=temperature, **options)
        details = partial(details_of_top_k, own, told, terms, ids)
    rows = slice(1, N - 1)
    found = details(rows, top_k=K)
    student, teacher, ids = student[rows].double(), teacher[rows].double(), ids[rows]
    assert found.student_rank_N.tolist() == dense_ranks(student, ids)
    ranks = dense_ranks(teacher, ids)
    if top_k is not None:  # a tie has the place that its id gives it
        listed = top_ids(teacher, top_k)
        ranks = [x.index(i) + 1 if i in x else 0 for x, i in zip(listed, ids.tolist(), strict=True)]
    assert found.teacher_rank_N.tolist() == ranks
    log_q = (student / TEMPERATURES["student_temperature"]).log_softmax(-1)
    log_p = (teacher / TEMPERATURES["teacher_temperature"]).log_softmax(-1)
    teachers, students = top_ids(teacher, min(K, top_k or K)), top_ids(student, K)
    for n, (p_ids, q_ids) in enumerate(zip(teachers, students, strict=True)):
        row = found.top_ids_NK[n].tolist()
        assert [i for i in row[:K] if i >= 0] == p_ids
        assert [i for i in row[K:] if i >= 0] == [i for i in q_ids if i not in p_ids]
        for place, i in enumerate(row):
            if i < 0:
                continue
            assert abs(found.top_student_logprobs_NK[n, place] - log_q[n, i]) < 1e-5
            of_teacher = found.top_teacher_logprobs_NK[n, place]
            if top_k is None or i in top_ids(teacher, top_k)[n]:
                assert abs(of_teacher - log_p[n, i]) < 1e-5
            else:
                assert of_teacher.isnan()


def check_all_details():
    for dtype in (torch.float32, torch.bfloat16):
        for top_k in (None, 16, 3):
            check_details(5, 37, dtype, top_k)
            check_details(4, 2000, dtype, top_k)  # bfloat16: full of ties
        for swept in (3, 5, 16):
            check_details(4, 2000, dtype, None, swept)
    check_details(4, 4, torch.float32, None)  # fewer tokens than are asked for


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_likely_tokens_and_ranks_match_dense_float64(tp, tmp_path):
    """Of both models, wherever the columns are, as far as the payload tells."""
    run_ranks(tp, tmp_path, check_all_details)


def record_steps(configs, rollouts, directory: Path):
    for tp, pp, cp, vpp in LAYOUTS:
        context = context_for(tp, pp, cp=cp, vpp=vpp)
        sizes = {"pipeline_model_parallel_size": pp, "virtual_pipeline_model_parallel_size": vpp}
        for number, base in enumerate(configs):
            parallel = base.parallel.model_copy(update=sizes)  # rounds are of groups of stages
            config = base.model_copy(update={"parallel": parallel})
            chosen = choose(rollouts, 5)
            notes = TokenNotes(chosen)
            student, pool, token_loss = build(config, context)
            options = {"notes": notes, "compare_engine": True}
            take_step(student, token_loss, pool, rollouts, config, context, 0, **options)
            columns = notes.gather(context)
            assert (columns is not None) == (context.layout.rank == 0)
            if columns is not None:
                described = about(config, "training", 0, columns)
                record = assemble(
                    described, chosen, columns, lambda i: (b"%d" % i, False), steps=[0] * 5
                )
                write_tokens(directory / f"{number}-{tp}-{pp}-{cp}-{vpp}.npz", record)
        leave_groups()


def dense_signals(config, rollouts) -> dict[str, np.ndarray]:
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for path in (config.student.hf_path, config.teacher.hf_path)
    )
    found: dict[str, list[torch.Tensor]] = {name: [] for name in SIGNALS}
    for rollout in rollouts:
        tokens = torch.tensor([rollout.prompt.prompt_ids + rollout.response_ids])
        rows = slice(len(rollout.prompt.prompt_ids) - 1, -1)
        with torch.no_grad():
            logits = [model(tokens).logits[0, rows] for model in (student, teacher)]
        log_q, log_p = (x.div(config.rollout.temperature).log_softmax(-1) for x in logits)
        own = torch.tensor(rollout.response_ids).unsqueeze(-1)
        reverse_kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        forward_kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        gate = (entropy >= config.objective.entropy_threshold).double()
        values = {
            "teacher_entropy": entropy,
            "student_entropy": -(log_q.exp() * log_q).sum(-1),
            "reverse_kl": reverse_kl,
            "forward_kl": forward_kl,
            "gate": gate,
            "loss": reverse_kl + gate * forward_kl,
            "student_logprob": log_q.gather(-1, own).squeeze(-1),
            "teacher_logprob": log_p.gather(-1, own).squeeze(-1),
        }
        engine = torch.tensor(rollout.response_logprobs, dtype=torch.float64)
        values["engine_mismatch"] = values["student_logprob"] - engine
        for name, each in values.items():
            found[name].append(each)
    return {name: torch.cat(each).numpy() for name, each in found.items()}


def check_record(record: TokenRecord, config, rollouts, expected, notable_kl: float) -> None:
    assert record.ids_T.tolist() == [i for r in rollouts for i in r.response_ids]
    is_whole = config.teacher.payload != "topk"
    html = page_html(record, [Side("run", record.about, len(record.responses))])
    columns = data_of(html)["columns"]
    for name in SIGNALS:
        if is_whole or name not in ("reverse_kl", "forward_kl", "loss"):
            assert np.abs(record.signals[name] - expected[name]).max() < 1e-5, name
            assert np.abs(decode(columns[name]) - expected[name]).max() < 1e-4, name
    gated = expected["teacher_entropy"] >= config.objective.entropy_threshold
    rows = np.flatnonzero(gated | (record.signals["reverse_kl"] >= notable_kl))
    assert gated.sum() + is_whole <= len(rows) < len(record.ids_T)
    assert record.top_rows_G.tolist() == rows.tolist()
    assert record.top_ids_GK.shape == (len(rows), 2 * TOP)
    assert {r.step for r in record.responses} == {0}


def test_a_recording_equals_transformers_in_float64_on_every_layout(
    qwen3_dir, teacher_dir, tmp_path, monkeypatch
):
    """So does its page: five responses of eight, with chunks that part them, and with each
    payload."""
    whole = make_config(qwen3_dir, teacher_dir)
    configs = [
        whole,
        make_config(qwen3_dir, teacher_dir, teacher={"hf_path": teacher_dir, "payload": "logits"}),
        make_config(
            qwen3_dir,
            teacher_dir,
            objective={"entropy_threshold": 2.8, "head": "chunked", "head_chunk_size": 3},
        ),
        make_config(
            qwen3_dir,
            teacher_dir,
            objective={"name": "eopd_paper", "entropy_threshold": 2.8},
            teacher={"hf_path": teacher_dir, "payload": "topk"},
        ),
    ]
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]
    chosen = choose(rollouts, 5)
    expected = dense_signals(whole, chosen)
    # Random models are far apart everywhere.
    notable_kl = float(np.quantile(expected["reverse_kl"], 0.8))
    monkeypatch.setattr(assemble_module, "NOTABLE_KL", notable_kl)
    run_ranks(4, tmp_path, record_steps, configs, rollouts, tmp_path, timeout_s=120)
    for number, config in enumerate(configs):
        for tp, pp, cp, vpp in LAYOUTS:
            record = read_tokens(tmp_path / f"{number}-{tp}-{pp}-{cp}-{vpp}.npz")
            check_record(record, config, chosen, expected, notable_kl)
