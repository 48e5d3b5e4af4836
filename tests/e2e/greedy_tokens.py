"""Print, as JSON, the tokens that models continue fixed prompts with when they always take the
most probable one: read by transformers, by vLLM, or by the trainer's reference sampler. A line for
each pair of a reader and a model.

usage: python greedy_tokens.py transformers|vllm|trainer MODEL_DIR …
"""

import json
import os
import sys
from pathlib import Path

import torch

PROMPTS = torch.randint(1, 100, (4, 8), generator=torch.Generator().manual_seed(3)).tolist()
NUM_TOKENS = 12


def transformers_tokens(path: Path) -> list[list[int]]:
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    greedy = GenerationConfig(do_sample=False, min_new_tokens=NUM_TOKENS, max_new_tokens=NUM_TOKENS)
    tokens = torch.tensor(PROMPTS)
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=greedy)
    return out[:, tokens.shape[1] :].tolist()


def vllm_tokens(path: Path) -> list[list[int]]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_CI_ENV": "1"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(path),
        dtype="float32",
        enforce_eager=True,
        max_model_len=32,
        skip_tokenizer_init=True,
        generation_config="vllm",
        kv_cache_memory_bytes=64 << 20,
    )
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def trainer_tokens(path: Path) -> list[list[int]]:
    from megatron_eopd.config import ModelConfig, ParallelConfig
    from megatron_eopd.models.build import build_model
    from megatron_eopd.models.hf_config import read_hf_config
    from megatron_eopd.models.load import load_weights
    from megatron_eopd.parallel.init import parallel_context
    from megatron_eopd.records import Prompt
    from megatron_eopd.rollout.engine import Sampling
    from megatron_eopd.rollout.megatron_engine import MegatronEngine

    with parallel_context(ParallelConfig(), seed=1, longest_wait_s=0) as context:
        chunks = build_model(path, ModelConfig(), context)
        load_weights(chunks, path, context)
        engine = MegatronEngine(chunks, read_hf_config(path).vocab_size, len(PROMPTS), context)
        prompts = [Prompt(i, "", "", tuple(ids)) for i, ids in enumerate(PROMPTS)]
        # So cold that nothing but the most probable token is ever drawn.
        sampling = Sampling(
            samples_per_prompt=1,
            temperature=1e-6,
            max_response_length=NUM_TOKENS,
            stop_ids=(),
            seed=0,
        )
        rollouts = engine.generate(prompts, sampling)
    return [list(rollout.response_ids) for rollout in rollouts]


if __name__ == "__main__":
    readers = {"transformers": transformers_tokens, "vllm": vllm_tokens, "trainer": trainer_tokens}
    for reader, model_dir in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        print(json.dumps(readers[reader](Path(model_dir))))
