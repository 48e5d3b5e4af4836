"""The planner's memory model against real models, optimizers and autograd, on real ranks."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_eopd.config import Config
from megatron_eopd.models.build import build_model
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.packed_sequences import describe_sequences
from megatron_eopd.parallel.layout import pad_vocab_size
from megatron_eopd.parallel.pipeline import hidden_states, run_schedule
from megatron_eopd.planning.activations import (
    Activations,
    Load,
    Platform,
    activation_bytes,
    chunks_in_flight,
)
from megatron_eopd.planning.memory import parameters_per_stage, training_state
from megatron_eopd.planning.shapes import ModelShape
from megatron_eopd.training.optimizer import make_trainable
from tests.ranks import context_for, leave_groups, run_ranks

# (TP, PP, VPP, CP, EP, expert TP), and layers of the first and the last pipeline stage
LAYOUTS = [
    (2, 2, 1, 1, 1, 1),
    (2, 2, 2, 1, 1, 1),
    (2, 1, 1, 2, 1, 1),
    (2, 2, 1, 1, 1, 1, None, 1),
]
EXPERT_LAYOUTS = [
    (2, 2, 1, 1, 2, 1, 3, 1),
    (1, 2, 2, 1, 2, 1),
    (2, 1, 1, 2, 1, 2),
    (1, 1, 1, 1, 4, 1),
]
SEQUENCES = [32, 32]


def config_of(hf_dir, **model) -> Config:
    return Config.model_validate(
        {
            "run_dir": "unused",
            "student": {"hf_path": hf_dir},
            "teacher": {"hf_path": hf_dir},
            "model": model,
        }
    )


def num_bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def check_state(layouts, dirs, dtype):
    for tp, pp, vpp, cp, ep, expert_tp, *layers in layouts:
        cut = {"cp": cp, "vpp": vpp, "layers": tuple(layers) or (None, None)}
        context = context_for(tp, pp, ep, expert_tp, sequence_parallel=tp > 1, **cut)
        for family, hf_dir in dirs.items():
            where = f"{family} on {context.layout.describe()}, stage {context.layout.pp_rank}"
            check_state_of_model(hf_dir, dtype, context, where)
        leave_groups()


def check_state_of_model(hf_dir, dtype, context, where):
    layout, config = context.layout, config_of(hf_dir, dtype=dtype)
    shape = ModelShape.of(read_hf_config(hf_dir))
    student = make_trainable(build_model(hf_dir, config.model, context), config, context)
    columns = pad_vocab_size(shape.vocab_size, 128, layout.tp)
    expected = parameters_per_stage(shape, layout, columns)[layout.pp_rank]
    parameters = [p for chunk in student.chunks for p in chunk.parameters()]
    assert sum(p.numel() for p in parameters) == expected.total, where
    state = training_state(expected, layout, dtype)
    assert num_bytes(parameters) == state["weights"], where
    # Megatron starts every parameter at a multiple of 64 elements, and fills up each buffer.
    padding = 4 * (64 * len(parameters) + 2 * 128 * layout.world_size)
    buffers = [b for w in student.wrapped for b in (*w.buffers, *w.expert_parallel_buffers)]
    kept = num_bytes(b.grad_data for b in buffers)
    assert state["gradients"] <= kept <= state["gradients"] + padding, where
    total = torch.tensor([_optimizer_bytes(student), state["optimizer"]])
    dist.all_reduce(total)
    # Rounded up on each rank, once for experts and once for all else.
    assert 0 <= total[1] - total[0] <= 2 * layout.world_size, (where, total)


def _optimizer_bytes(student) -> int:
    """Of the tensors that the optimizer has after a step."""
    student.optimizer.zero_grad()
    student.optimizer.step()
    total = 0
    for part in student.optimizer.chained_optimizers:
        is_low = any(p.dtype == torch.bfloat16 for c in student.chunks for p in c.parameters())
        for master, state in part.optimizer.state.items():
            kept = [state["exp_avg"], state["exp_avg_sq"], *([master] if is_low else [])]
            assert {t.dtype for t in kept} == {torch.float32}
            total += num_bytes(kept)
    return total


def test_weights_gradients_and_optimizer_are_exact_on_one_rank(family_dirs, tmp_path):
    """Every family: parameters, their bytes, float32 gradients and the optimizer's state."""
    run_ranks(1, tmp_path, check_state, [(1, 1, 1, 1, 1, 1)], family_dirs, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_gradients_and_optimizer_are_exact_on_four_ranks(family_dirs, tmp_path, dtype):
    """Cut by tensor, pipeline (interleaved, too), context and expert parallelism; the optimizer's
    state summed over all ranks."""
    dense = {f: family_dirs[f] for f in ("qwen3", "qwen3_tied", "llama_tied_with_biases")}
    run_ranks(4, tmp_path, check_state, LAYOUTS, dense, dtype)
    experts = {"qwen3_moe": family_dirs["qwen3_moe"]}
    run_ranks(4, tmp_path, check_state, EXPERT_LAYOUTS, experts, dtype)


def saved_bytes(model, run) -> int:
    """Of the storages that autograd keeps of a forward pass, each once, without the weights."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def check_activations(cases, out_dir):
    for number, (hf_dir, dtype, recompute, tp, cp, ep) in enumerate(cases):
        context = context_for(tp, 1, ep, cp=cp, sequence_parallel=tp > 1)
        model = config_of(hf_dir, dtype=dtype, recompute_granularity=recompute).model
        shape = ModelShape.of(read_hf_config(hf_dir))
        load = Load(sum(SEQUENCES), 0, SEQUENCES[0], 1)
        e = 4 if dtype == "float32" else 2
        activations = Activations(shape, context.layout, load, e, Platform(on_gpu=False))
        predicted = activation_bytes(activations, 0, model)
        if recompute == "full":  # a layer comes back in the backward pass only
            predicted -= max(activations.layer(w) for w in shape.layers)
        chunks = build_model(hf_dir, model, context)
        measured = saved_bytes(chunks[0], forward_pass(chunks, context))
        # Routers send one rank more tokens than another; their sum is what it must be.
        pair = torch.tensor([measured, predicted])
        dist.all_reduce(pair)
        if context.layout.rank == 0:
            (out_dir / f"{number}.json").write_text(json.dumps(pair.tolist()))
        leave_groups()


def forward_pass(chunks, context):
    """Of SEQUENCES through all layers, ready to be called."""
    cp, cp_rank = context.layout.cp, context.layout.cp_rank
    packed = describe_sequences(SEQUENCES, cp, cp_rank, context.device)
    ids_1S = (torch.arange(sum(SEQUENCES) // cp) % 200)[None]
    (model,) = chunks
    return partial(
        model, ids_1S, torch.zeros_like(ids_1S), attention_mask=None, packed_seq_params=packed
    )


# Family, dtype, recomputation, TP, CP, EP
ACTIVATIONS = [
    ("qwen3", "float32", None, 1, 1, 1),
    ("qwen3", "float32", "selective", 1, 1, 1),
    ("qwen3", "float32", "full", 1, 1, 1),
    ("qwen3", "bfloat16", None, 1, 1, 1),
    ("qwen3", "bfloat16", "selective", 1, 1, 1),
    ("llama", "float32", None, 1, 1, 1),
    ("llama", "bfloat16", None, 1, 1, 1),
    ("llama", "bfloat16", "selective", 1, 1, 1),
    ("qwen3_moe", "float32", None, 1, 1, 1),
    ("qwen3_moe", "bfloat16", None, 1, 1, 1),
    ("qwen3_moe_mixed", "bfloat16", None, 1, 1, 1),
    ("qwen3", "float32", None, 2, 1, 1),
    ("qwen3", "bfloat16", None, 2, 1, 1),
    ("qwen3", "float32", None, 1, 2, 1),
    ("qwen3", "bfloat16", None, 1, 2, 1),
    ("qwen3_moe", "bfloat16", None, 1, 1, 2),
    ("qwen3_moe", "bfloat16", None, 2, 1, 2),
]


def test_activations_are_what_autograd_keeps(family_dirs, tmp_path, capsys):
    """Within 1 % of every tensor that the forward pass keeps. What is left out is indices, and
    tables of positions, which weigh more where almost nothing else is kept."""
    table = "\n  family           dtype     recompute  TP CP EP   measured  predicted   error\n"
    for world in (1, 2):
        cases = [case for case in ACTIVATIONS if max(case[3:]) == world]
        out = tmp_path / str(world)
        out.mkdir()
        paths = [(family_dirs[case[0]], *case[1:]) for case in cases]
        run_ranks(world, tmp_path, check_activations, paths, out)
        for number, (family, dtype, recompute, tp, cp, ep) in enumerate(cases):
            measured, predicted = json.loads((out / f"{number}.json").read_text())
            error = predicted / measured - 1
            table += (
                f"  {family:<16} {dtype:<9} {recompute or 'none':<10} {tp:2} {cp:2} {ep:2} "
                f"{measured:10,} {predicted:10,} {error:+7.2%}\n"
            )
            assert abs(error) < (0.05 if recompute == "full" else 0.01), table
    with capsys.disabled():
        print(table)


def check_in_flight(hf_dir, cases):
    for pp, vpp, num_microbatches in cases:
        context = context_for(1, pp, vpp=vpp)
        chunks = build_model(hf_dir, config_of(hf_dir).model, context)
        most = most_in_flight(chunks, [make_batch(context)] * num_microbatches, context)
        expected = chunks_in_flight(context.layout, context.layout.pp_rank, num_microbatches)
        assert most == expected, (pp, vpp, num_microbatches, context.layout.pp_rank, most)
        leave_groups()


def most_in_flight(chunks, batches, context) -> int:
    """Forward passes whose backward pass has not begun, at their most, in Megatron's schedule."""
    counts = [0]

    def forward_step(batches, model):
        hidden = hidden_states(model, next(batches))
        counts.append(counts[-1] + 1)
        hidden.register_hook(lambda _: counts.append(counts[-1] - 1))
        return hidden, lambda hidden: (hidden.sum(), torch.tensor(1, dtype=torch.int), {})

    run_schedule(forward_step, chunks, batches, context, forward_only=False)
    return max(counts)


def make_batch(context) -> SimpleNamespace:
    """What the forward pass reads of a MicroBatch."""
    sequences = describe_sequences([8], 1, 0, context.device)
    return SimpleNamespace(token_ids_1S=torch.arange(8)[None], sequences=sequences)


def test_microbatches_in_flight_are_those_of_the_real_schedule(qwen3_dir, tmp_path):
    """1F1B and interleaved, with fewer and more microbatches than fill the pipeline."""
    run_ranks(2, tmp_path, check_in_flight, qwen3_dir, [(2, 1, 1), (2, 1, 4), (2, 2, 2), (2, 2, 6)])
    run_ranks(4, tmp_path, check_in_flight, qwen3_dir, [(4, 1, 3), (4, 1, 8)])
