"""The same distillation through TRL's DistillationTrainer, to set beside a run of megatron_eopd.

It measures what a user of TRL gets on the same models, prompts and settings: seconds per iteration
(generation, both forward passes, the backward pass and the optimizer together), sampled tokens per
iteration, peak memory, and a trained student that can be evaluated like any other. The student
writes every response itself, and the loss is KL(student ‖ teacher) over the full vocabulary at
temperature 1, averaged over the response tokens of the iteration. Generation is Hugging Face's.

It runs in an environment of its own, so that TRL changes nothing in this project's. torch comes
first, so that nothing else chooses its build:

  python3 -m venv /tmp/trl-env
  /tmp/trl-env/bin/pip install torch==2.13.0
  /tmp/trl-env/bin/pip install trl==1.16.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0

One run, offline because TRL otherwise reports its use to the Hugging Face hub:

  HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 /tmp/trl-env/bin/python benchmarks/bench_trl.py \\
      --student STUDENT --teacher TEACHER --prompts prompts.jsonl --output /tmp/trl-student \\
      --iterations 20 --batch-size 8 --micro-batch-size 4 --max-new-tokens 128
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import accelerate
import datasets
import torch
import transformers
import trl
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

PACKAGES = (torch, transformers, accelerate, datasets, trl)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", required=True, metavar="DIR")
    parser.add_argument("--teacher", required=True, metavar="DIR")
    parser.add_argument("--prompts", required=True, help='jsonl: {"prompt": …, "answer": …} a line')
    parser.add_argument("--output", type=Path, required=True, help="student; numbers in DIR.json")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8, help="samples per optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--autocast", action="store_true", help="see AutocastTrainer")
    arguments = parser.parse_args()
    if arguments.batch_size % arguments.micro_batch_size:
        parser.error("--batch-size must be a multiple of --micro-batch-size")
    if arguments.autocast and arguments.dtype != "bfloat16":
        parser.error("--autocast goes with --dtype bfloat16")
    return arguments


class AutocastTrainer(DistillationTrainer):
    """Trains the student in bfloat16, where bf16=True alone leaves the training pass in float32:
    accelerate puts autocast around the model's `forward`, and TRL 1.16.0 goes past that one."""

    def compute_loss_context_manager(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16)


class Clock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next: nothing falls between."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **_) -> None:
        self.before = time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the optimizer's kernels may still be queued
        now = time.perf_counter()
        self.seconds.append(now - self.before)
        self.before = now


def configuration(arguments: argparse.Namespace) -> DistillationConfig:
    return DistillationConfig(
        output_dir=str(arguments.output),
        max_steps=arguments.iterations,
        per_device_train_batch_size=arguments.micro_batch_size,
        gradient_accumulation_steps=arguments.batch_size // arguments.micro_batch_size,
        max_completion_length=arguments.max_new_tokens,
        beta=1.0,  # TRL's end for KL(student ‖ teacher): trl/kernels/chunked_divergence.py
        temperature=1.0,
        top_p=1.0,
        top_k=0,  # off
        learning_rate=arguments.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        # The student's weights stay float32 in either case, for the optimizer; as in Megatron.
        bf16=arguments.dtype == "bfloat16",
        teacher_model_init_kwargs={"dtype": arguments.dtype},
        use_cpu=not torch.cuda.is_available(),
        seed=arguments.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )


def prompt_dataset(path: str) -> datasets.Dataset:
    """Every prompt as a chat of one user turn; TRL itself applies the chat template."""
    with open(path, encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return datasets.Dataset.from_dict({"prompt": chats})


def main() -> None:
    arguments = parse_arguments()
    clock = Clock()
    trainer = (AutocastTrainer if arguments.autocast else DistillationTrainer)(
        model=arguments.student,
        teacher_model=arguments.teacher,
        args=configuration(arguments),
        train_dataset=prompt_dataset(arguments.prompts),
        callbacks=[clock],
    )
    trainer.train()
    trainer.save_model(str(arguments.output))  # the tokenizer with it

    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    mean_lengths = [entry["completions/mean_length"] for entry in steps]
    report = {
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "versions": {package.__name__: package.__version__ for package in PACKAGES},
        "threads": torch.get_num_threads(),
        "seconds": clock.seconds,
        "median_seconds_without_first": statistics.median(clock.seconds[1:] or clock.seconds),
        "sampled_tokens": [round(length * arguments.batch_size) for length in mean_lengths],
        "loss": [entry["loss"] for entry in steps],
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if torch.cuda.is_available():
        report["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    Path(f"{arguments.output}.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
