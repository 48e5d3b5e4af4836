"""One part of the trainer's way, on the device that is here. In: a case, as JSON. Out: figures.

torchrun --nproc_per_node=N -m tests.gpu.whole_path '{"part": "logits", …}'. A process of its own
for each case: on a CPU it emulates CUDA for good. With N ranks tensors are parallel N-fold.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import PrefixStore
from transformers import AutoModelForCausalLM

from megatron_eopd.config import Config
from megatron_eopd.data.packing import make_microbatches
from megatron_eopd.metrics.means import divide
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.load import load_model
from megatron_eopd.parallel.init import ParallelContext, job_store, own_rank, world_context
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.parallel.pipeline import map_hidden
from megatron_eopd.parallel.vocab import gather_vocab
from tests.distributed.test_models import random_rollouts
from tests.distributed.test_step import build, make_config, take_step

Figures = dict[str, Any]


def logits(case: Figures, context: ParallelContext) -> Figures:
    """Largest distance to transformers in float32, of ours and of transformers in our dtype."""
    config, scored = config_of(case), random_rollouts(vocab_size=211, count=6, seed=3)
    (model,) = load_model(config.student.hf_path, config.model, context)
    vocab_size = read_hf_config(config.student.hf_path).vocab_size

    def at_last_stage(batch, hidden):
        shard = model.lm_head(model.pick_rows(hidden, batch.prediction_rows_N))
        return gather_vocab(shard, context.groups.tp, vocab_size)

    with torch.no_grad():
        batches = make_microbatches([scored], context.layout, context.device)
        (ours,) = map_hidden([model.eval()], batches, at_last_stage, context)
        exact = transformers_logits(case, scored, torch.float32, context.device)
        theirs = transformers_logits(case, scored, getattr(torch, case["dtype"]), context.device)
    return {
        "ours": (ours.float() - exact).abs().max().item(),
        "transformers": (theirs - exact).abs().max().item(),
        "largest": exact.abs().max().item(),
    }


def transformers_logits(case, scored, dtype, device) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(case["student"], dtype=dtype).to(device)
    rows = []
    for s in scored:
        tokens = s.rollout.prompt.prompt_ids + s.rollout.response_ids
        whole = model(torch.tensor([tokens], device=device)).logits[0].float()
        rows.append(whole[len(s.rollout.prompt.prompt_ids) - 1 : -1])
    return torch.cat(rows)


def step(case: Figures, context: ParallelContext) -> Figures:
    """Scoring and two optimizer steps on the same batch."""
    config = config_of(case)
    rollouts = [s.rollout for s in random_rollouts(vocab_size=211, count=8, seed=11)]
    student, pool, token_loss = build(config, context)
    reports, begin = [], time.monotonic()
    for number in range(2):
        reports.append(take_step(student, token_loss, pool, rollouts, config, context, number))
        if context.device.type == "cuda":
            torch.cuda.synchronize()
    return {
        "loss": [divide([report.sums])["loss/total"] for report in reports],
        "grad_norm": [float(report.grad_norm) for report in reports],
        "seconds": time.monotonic() - begin,
    }


def config_of(case: Figures) -> Config:
    objective = {"entropy_threshold": 2.8, "head": case.get("head", "materialized")}
    model = {"dtype": case["dtype"], "transformer_impl": case["impl"]}
    return make_config(case["student"], case["teacher"], objective=objective, model=model)


PARTS: dict[str, Callable[[Figures, ParallelContext], Figures]] = {"logits": logits, "step": step}


def main() -> None:
    case = json.loads(sys.argv[1])
    rank, world_size = own_rank()
    parallel = config_of(case).parallel.model_copy(
        update={"tensor_model_parallel_size": world_size}
    )
    layout = Layout.from_config(parallel, world_size, rank)
    store = PrefixStore("whole_path", job_store(2))
    with world_context(layout, store, 2, seed=1, longest_wait_s=0) as context:
        figures = PARTS[case["part"]](case, context)
        if rank == 0:
            device = context.device.type
            name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
            print("FIGURES " + json.dumps({"device": name, **figures}), flush=True)


if __name__ == "__main__":
    main()
