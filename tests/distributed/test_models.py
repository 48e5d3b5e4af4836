"""Megatron-Core models against transformers: the same directory, the same logits, any layout."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_eopd.config import ModelConfig
from megatron_eopd.data.packing import make_microbatches
from megatron_eopd.models.build import build_model
from megatron_eopd.models.export import Exporter
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.hf_files import HFCheckpoint
from megatron_eopd.models.hf_weights import num_experts
from megatron_eopd.models.load import load_weights
from megatron_eopd.parallel.pipeline import map_hidden
from megatron_eopd.parallel.vocab import gather_vocab, vocab_parallel_logprobs
from megatron_eopd.records import Prompt, Rollout, ScoredRollout
from tests.ranks import context_for, leave_groups, run_ranks

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def random_rollouts(vocab_size: int, count: int, seed: int) -> list[ScoredRollout]:
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab_size, (n,), generator=generator).tolist())

    rollouts = []
    for index in range(count):
        prompt = Prompt(index, text="", answer="", prompt_ids=ids(3 + index % 4))
        response = ids(5 + index % 7)
        rollouts.append(Rollout(prompt, 0, response, (0.0,) * len(response), "stop", 0))
    return [ScoredRollout(r) for r in rollouts]


def load(hf_dir, tp, pp, *, sequence_parallel=False):
    context = context_for(tp, pp, sequence_parallel=sequence_parallel)
    return *load_into(context, hf_dir), context


def load_into(context, hf_dir):
    (model,) = build_model(hf_dir, ModelConfig(), context)
    load_weights([model], hf_dir, context)
    return model, read_hf_config(hf_dir)


def response_logits(model, hf_config, context, scored) -> list[torch.Tensor]:
    """Whole-vocabulary logits of the rows that predict the responses, on the last stage."""

    def at_last_stage(batch, hidden):
        logits = model.lm_head(model.pick_rows(hidden, batch.prediction_rows_N))
        whole = gather_vocab(logits, context.groups.tp, hf_config.vocab_size)
        logprobs = vocab_parallel_logprobs(
            logits,
            batch.target_ids_N,
            tp_group=context.groups.tp,
            vocab_size=hf_config.vocab_size,
        )
        expected = whole.log_softmax(-1).gather(-1, batch.target_ids_N[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
        return whole

    pairs = [scored[n : n + 2] for n in range(0, len(scored), 2)]
    batches = make_microbatches(pairs, context.layout, context.device)
    return map_hidden([model], batches, at_last_stage, context)


def transformers_logits(hf_dir, scored) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    rows = []
    for s in scored:
        tokens = s.rollout.prompt.prompt_ids + s.rollout.response_ids
        logits = model(torch.tensor([tokens])).logits[0]
        rows.append(logits[len(s.rollout.prompt.prompt_ids) - 1 : -1])
    return torch.cat(rows)


def check_logits(hf_dir, layouts, expected, scored):
    for tp, pp, sequence_parallel in layouts:
        model, hf_config, context = load(hf_dir, tp, pp, sequence_parallel=sequence_parallel)
        found = response_logits(model, hf_config, context, scored)
        if context.layout.is_last_stage:
            torch.testing.assert_close(torch.cat(found), expected, atol=1e-4, rtol=0)
        else:
            assert found == []
        leave_groups()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp,pp", LAYOUTS)
def test_logits_equal_transformers(tp, pp, tied, qwen3_dir, tied_qwen3_dir, tmp_path):
    """Within 1e-4 in float32, with a vocabulary of prime size and head_dim · heads ≠ hidden."""
    hf_dir = tied_qwen3_dir if tied else qwen3_dir
    scored = random_rollouts(vocab_size=211, count=6, seed=3)
    with torch.no_grad():
        expected = transformers_logits(hf_dir, scored)
    layouts = [(tp, pp, False), (tp, pp, True)] if tp > 1 else [(tp, pp, False)]
    run_ranks(tp * pp, tmp_path, check_logits, hf_dir, layouts, expected, scored)


UNEVEN = (1, 2, 2, 1, None, 1)
"""Also layers of the first and of the last pipeline stage."""


def on_layouts(layouts, dirs, check):
    """`check(family, hf_dir, context)` of every family that can have the layout, in the groups of
    one context: every context costs threads that stay until the process ends."""
    for tp, pp, ep, expert_tp, *layers in layouts:
        ends = tuple(layers) or (None, None)
        context = context_for(tp, pp, ep, expert_tp, layers=ends, sequence_parallel=tp > 1)
        for family, hf_dir in dirs.items():
            if ep * expert_tp == 1 or num_experts(read_hf_config(hf_dir)):
                check(family, hf_dir, context)
        leave_groups()


def check_every_family(dirs, layouts, scored, expected):
    def check(family, hf_dir, context):
        model, hf_config = load_into(context, hf_dir)
        found = response_logits(model.eval(), hf_config, context, scored)
        if context.layout.is_last_stage:
            worst = (torch.cat(found) - expected[family]).abs().max()
            assert worst < 1e-4, f"{family}: {worst} on {context.layout.describe()}"

    on_layouts(layouts, dirs, check)


def test_every_family_gives_the_logits_of_transformers(family_dirs, tmp_path):
    """Within 1e-4 in float32 at TP 2 × PP 2 and with experts over TP, DP or both: rope scaling,
    biases, tied embeddings, dense layers between experts."""
    scored = random_rollouts(vocab_size=211, count=4, seed=4)
    with torch.no_grad():
        expected = {name: transformers_logits(path, scored) for name, path in family_dirs.items()}
    layouts = [(2, 2, 1, 1), (2, 2, 2, 1), (2, 2, 1, 2), (1, 2, 2, 1), (1, 1, 4, 1)]
    run_ranks(4, tmp_path, check_every_family, family_dirs, layouts, scored, expected)


def check_export(dirs, layouts, target):
    def check(family, hf_dir, context):
        model, hf_config = load_into(context, hf_dir)
        exporter = Exporter([model], hf_config, hf_config.vocab_size, context, bucket_bytes=200_000)
        assert len(exporter.manifest.stages) == context.layout.pp
        out = target / f"{family}-{context.layout.pp}-{context.layout.ep}"
        exporter.save_hf(hf_dir, out)
        with HFCheckpoint(hf_dir) as source, HFCheckpoint(out) as written:
            assert source.names() == written.names() == set(exporter.manifest.names)
            assert len(exporter.manifest.names) == len(source.names()), "none is sent twice"
            for name in source.names():
                assert torch.equal(source.slice(name)[:], written.slice(name)[:]), name

    on_layouts(layouts, dirs, check)


def test_import_then_export_is_the_identity(family_dirs, tmp_path):
    """HF → shards → HF gives every tensor back bitwise, and tied embeddings are written once."""
    out = tmp_path / "out"
    out.mkdir()
    layouts = [(2, 2, 1, 1), (1, 2, 1, 1), (2, 1, 2, 2), (1, 2, 2, 1), UNEVEN]
    run_ranks(4, tmp_path, check_export, family_dirs, layouts, out)
    reloaded = AutoModelForCausalLM.from_pretrained(out / "qwen3_moe-2-2", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(family_dirs["qwen3_moe"], dtype=torch.float32)
    tokens = torch.arange(20)[None]
    assert torch.equal(reloaded(tokens).logits, original(tokens).logits)
