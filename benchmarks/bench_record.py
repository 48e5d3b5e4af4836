"""What recording tokens adds to an optimizer step, of a vocabulary as large as Qwen3's.

Scoring and step of two small models, with no, some and all responses recorded, by turns. The models
are so small that the heads and the sweep over the vocabulary are nearly all of the step: in a real
one the share of a recording is smaller. One process, one thread. Prints a table of
docs/monitoring.md.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_eopd.config import Config
from megatron_eopd.data.packing import Limits, exchange_size, pack, rounds_of
from megatron_eopd.models.load import load_model
from megatron_eopd.parallel.init import ParallelContext, parallel_context
from megatron_eopd.records import DEFAULT_TEACHER, Prompt, Rollout
from megatron_eopd.schedules import START
from megatron_eopd.teacher.colocated import ColocatedTeacher
from megatron_eopd.teacher.pool import TeacherPool
from megatron_eopd.tokens.assemble import about, assemble
from megatron_eopd.tokens.file import write_tokens
from megatron_eopd.tokens.notes import TokenNotes
from megatron_eopd.training.optimizer import make_trainable
from megatron_eopd.training.step import train_step
from megatron_eopd.training.token_loss import TokenLoss

SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
RESPONSES, TOKENS = 32, 64
"""Of a step."""
RECORDED = (0, 8, RESPONSES)
ITERATION = 4
"""Steps, as the paper has it."""
REPEATS = 7


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, who in enumerate(("student", "teacher")):
            torch.manual_seed(seed)
            Qwen3ForCausalLM(Qwen3Config(**SHAPE)).save_pretrained(folder / who)
        config = Config.model_validate(
            {
                "run_dir": "unused",
                "student": {"hf_path": folder / "student"},
                "teacher": {"hf_path": folder / "teacher"},
                "rollout": {"batch_size": RESPONSES},
                "training": {"global_batch_size": RESPONSES, "micro_batch_size": 8},
                "logging": {"record_top_tokens": "all"},
            }
        )
        with parallel_context(config.parallel, seed=1, longest_wait_s=0) as context:
            seconds = measure(config, context, folder / "tokens.npz")
    print("| responses recorded, of 32 | CPU seconds of scoring and step | more than without |")
    print("|---|---|---|")
    plain = statistics.median(seconds[0])
    for count, each in seconds.items():
        more = statistics.median(a / b for a, b in zip(each, seconds[0], strict=True)) - 1
        print(f"| {count} | {statistics.median(each):.2f} | {more:+.1%} |")
    added = statistics.median(a - b for a, b in zip(seconds[8], seconds[0], strict=True))
    share = added / (ITERATION * plain)
    print(f"an iteration of {ITERATION} steps, of which one records 8 responses: {share:+.2%}")


def measure(config: Config, context: ParallelContext, path: Path) -> dict[int, list[float]]:
    """Seconds of each repetition, by how many responses it recorded."""
    chunks = load_model(config.student.hf_path, config.model, context)
    vocab_size = SHAPE["vocab_size"]
    teacher = ColocatedTeacher(config.teacher, "teacher", config, (), vocab_size, context)
    pool = TeacherPool({DEFAULT_TEACHER: teacher}, context)
    token_loss = TokenLoss(chunks[-1], pool.heads, config, vocab_size, context)
    student = make_trainable(chunks, config, context)
    generator = torch.Generator().manual_seed(1)
    rollouts = [
        Rollout(
            Prompt(n, "", "", tuple(range(8))),
            0,
            tuple(torch.randint(vocab_size, (TOKENS,), generator=generator).tolist()),
            (-12.0,) * TOKENS,
            "stop",
            0,
        )
        for n in range(RESPONSES)
    ]
    packed = pack(rollouts, Limits.of(config.training), context.layout)
    rounds = rounds_of(packed, exchange_size(config))

    def step(count: int) -> None:
        chosen = rollouts[:count]
        notes = TokenNotes(chosen) if chosen else None
        train_step(
            student,
            token_loss,
            pool.microbatches(rounds),
            context,
            num_rounds=len(rounds),
            progress=START,
            compare_engine=True,
            notes=notes,
        )
        if notes is not None:
            columns = notes.gather(context)
            described = about(config, "training", 0, columns)
            steps = [0] * count
            record = assemble(described, chosen, columns, lambda _: (b"", False), steps=steps)
            write_tokens(path, record)

    step(0)
    seconds: dict[int, list[float]] = {count: [] for count in RECORDED}
    for _ in range(REPEATS):
        for count in RECORDED:
            begin = time.process_time()  # of one thread: what others take of the core is not in it
            step(count)
            seconds[count].append(time.process_time() - begin)
    print(
        f"a recording of all {RESPONSES * TOKENS:,} tokens: {path.stat().st_size / 2**20:.1f} MiB"
    )
    return seconds


if __name__ == "__main__":
    main()
