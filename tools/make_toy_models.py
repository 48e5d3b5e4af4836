#!/usr/bin/env python3
"""Train the Countdown teacher and student of the quick start from scratch on two CPU cores.

In: nothing, the task enumerates its own data. Out: two Hugging Face directories, OUTPUT/teacher and
OUTPUT/student, that any Qwen3 loader reads. The student is stopped early on purpose: distillation
is to have something to teach it.

With --which privileged: OUTPUT/privileged_teacher and OUTPUT/privileged_student, the two shipped
models trained further, on plain prompts and on prompts with a solution in front of them by turns.
They can be shown a solution, and answer as well without one.
"""

import argparse
import math
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from megatron_eopd.evaluation.estimators import Outcome, figures
from megatron_eopd.tasks import countdown

# Shapes: N traces, P problems, B sequences, S = 25 prompt and response tokens, 43 with a solution
# in front, R = 18 response tokens, V vocabulary.

EXAMPLES = """examples:
  python tools/make_toy_models.py
      both models, as two processes with one thread each
  python tools/make_toy_models.py --which student --force
      train the student again and replace it
  python tools/make_toy_models.py --output /tmp/models --steps-scale 0.01
      a trial run whose models have learnt nothing
  python tools/make_toy_models.py --which privileged --output runs/privileged_models
      the two that can be shown a solution
"""

KS = (1, 4, 8, 16)
SHIPPED = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "models"
SHOWN_TEMPLATE = "{solution} ; {prompt}"
"""How a solution is shown, as data.teacher_prompt_template has it."""
FOLLOWED = 0.5
"""How often the answer behind a shown solution is that one in training. Else it is any right one,
as the student's will be: a model that has only copied says nothing of use behind another start."""


@dataclass(frozen=True)
class Recipe:
    """One model: its shape and how it is trained."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    steps: int
    batch_size: int
    lr: float
    warmup_steps: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    start: Path | None = None
    """A model to go on from, of this shape, with prompts of both kinds by turns. Default: random
    weights, and plain prompts."""


RECIPES = {
    "teacher": Recipe(
        hidden_size=96, num_layers=4, intermediate_size=176, steps=4500, batch_size=128, lr=3e-3
    ),
    "student": Recipe(
        hidden_size=64, num_layers=2, intermediate_size=128, steps=750, batch_size=128, lr=3e-3
    ),
}
RECIPES |= {
    f"privileged_{name}": replace(
        RECIPES[name], steps=steps, batch_size=64, lr=1e-3, start=SHIPPED / name
    )
    for name, steps in (("teacher", 1200), ("student", 1600))
}
CHOICES = {name: (name,) for name in RECIPES}
CHOICES |= {
    "both": ("teacher", "student"),
    "privileged": ("privileged_teacher", "privileged_student"),
}


# --- data ---------------------------------------------------------------------------------------


class TraceSampler:
    """Draws training sequences: a problem at random, then one of its valid traces at random.

    Problems, not traces, are drawn evenly, so the model learns an even spread over the answers of
    each problem, and problems with many answers do not crowd out the others.
    """

    def __init__(self, problems: list[countdown.Problem], generator: torch.Generator) -> None:
        # One token per word, so the vocabulary is all there is to it; calling it takes 3 x longer.
        tokenizer = countdown.build_tokenizer()
        id_of = tokenizer.get_vocab()
        self.separator_id = id_of[";"]
        all_traces = countdown.all_problems()
        texts = [
            f"{problem.prompt_text()} {trace} {tokenizer.eos_token}"
            for problem in problems
            for trace in all_traces[problem]
        ]
        self.token_ids_NS = torch.tensor(
            [[id_of[word] for word in text.split(" ")] for text in texts]
        )
        counts = [len(all_traces[problem]) for problem in problems]
        self.num_traces_P = torch.tensor(counts)
        self.first_trace_P = self.num_traces_P.cumsum(0) - self.num_traces_P
        self.generator = generator

    def draw(self, batch_size: int) -> torch.Tensor:
        """Token ids [B, S]."""
        return self.token_ids_NS[self._traces_of(self._problems(batch_size))]

    def draw_shown(self, batch_size: int) -> torch.Tensor:
        """Token ids [B, S]: one of the problem's solutions, a semicolon, and what `draw` gives. The
        response is the solution that was shown with a chance of FOLLOWED, else another draw."""
        problem_B = self._problems(batch_size)
        shown_B, answer_B = self._traces_of(problem_B), self._traces_of(problem_B)
        follows_B = torch.rand(batch_size, generator=self.generator) < FOLLOWED
        answer_B = torch.where(follows_B, shown_B, answer_B)
        # The end-of-sequence token behind a trace stands where a semicolon does between two steps.
        solution_BR = self.token_ids_NS[shown_B, countdown.PROMPT_LENGTH :].clone()
        solution_BR[:, -1] = self.separator_id
        return torch.cat([solution_BR, self.token_ids_NS[answer_B]], dim=1)

    def _problems(self, batch_size: int) -> torch.Tensor:
        return torch.randint(len(self.num_traces_P), (batch_size,), generator=self.generator)

    def _traces_of(self, problem_B: torch.Tensor) -> torch.Tensor:
        """One of each problem's."""
        # float64: the product must stay below the count, and rounding up would leave the problem.
        uniform_B = torch.rand(len(problem_B), generator=self.generator, dtype=torch.float64)
        offset_B = (uniform_B * self.num_traces_P[problem_B]).long()
        return self.first_trace_P[problem_B] + offset_B


# --- training -----------------------------------------------------------------------------------


def build_model(recipe: Recipe) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 in float32."""
    tokenizer = countdown.build_tokenizer()
    config = Qwen3Config(
        vocab_size=countdown.VOCAB_SIZE,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        intermediate_size=recipe.intermediate_size,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def load_model(directory: Path) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    )


def lr_factor(step: int, *, steps: int, warmup_steps: int) -> float:
    """Linear warm-up to 1, then half a cosine down to 0 at the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def response_loss(model: Qwen3ForCausalLM, token_ids_BS: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the response tokens, in nats."""
    # The last R of the S - 1 inputs predict the response, so only they need logits.
    logits_BRV = model(
        token_ids_BS[:, :-1], logits_to_keep=countdown.RESPONSE_LENGTH, use_cache=False
    ).logits
    targets_BR = token_ids_BS[:, -countdown.RESPONSE_LENGTH :]
    return F.cross_entropy(logits_BRV.flatten(0, 1), targets_BR.flatten())


def train_model(name: str, recipe: Recipe, *, seed: int, position: int = 0) -> Qwen3ForCausalLM:
    """Supervised training on random valid traces of the training split; behind prompts of both
    kinds where the recipe goes on from a model."""
    torch.manual_seed(seed)
    sampler = TraceSampler(countdown.split("train"), torch.Generator().manual_seed(seed))
    model = build_model(recipe) if recipe.start is None else load_model(recipe.start)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.lr,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    warmup_steps = min(recipe.warmup_steps, recipe.steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, steps=recipe.steps, warmup_steps=warmup_steps)
    )
    model.train()
    losses: dict[str, str] = {}
    progress = tqdm(range(recipe.steps), desc=name, position=position, mininterval=1.0)
    for step in progress:
        shows = recipe.start is not None and step % 2 == 1
        draw = sampler.draw_shown if shows else sampler.draw
        loss = response_loss(model, draw(recipe.batch_size))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        scheduler.step()
        if step % 50 < 2:
            losses["shown" if shows else "loss"] = f"{loss.item():.3f}"
            progress.set_postfix(losses, refresh=False)
    return model.eval()


def save_model(model: Qwen3ForCausalLM, directory: Path) -> None:
    """Write the Hugging Face directory under a temporary name and rename it when it is complete."""
    tokenizer = countdown.build_tokenizer()
    # vLLM and generate() take their sampling defaults from here, and top_k=50 is transformers' own.
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=countdown.RESPONSE_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        complete = Path(scratch) / directory.name
        model.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
        if directory.exists():
            shutil.rmtree(directory)
        complete.rename(directory)


# --- evaluation ---------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(
    model: Qwen3ForCausalLM,
    problems: list[countdown.Problem],
    *,
    num_samples: int,
    seed: int,
    prompts: list[str] | None = None,
) -> dict[str, float]:
    """pass@k and diversity of samples at temperature 1. `prompts`: what the model reads, equally
    many tokens for each problem. Default: the problems alone."""
    tokenizer = countdown.build_tokenizer()
    torch.manual_seed(seed)
    outcomes, task = [], countdown.Countdown()
    prompts = prompts or [problem.prompt_text() for problem in problems]
    for start in range(0, len(problems), 50):
        chunk = problems[start : start + 50]
        encoded = tokenizer(prompts[start : start + 50], return_tensors="pt")
        output_ids = model.generate(
            **encoded,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=countdown.RESPONSE_LENGTH,
            num_return_sequences=num_samples,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(
            output_ids[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for i, problem in enumerate(chunk):
            responses = texts[i * num_samples : (i + 1) * num_samples]
            outcomes.append(graded(task, problem.answer_text(), responses))
    found = figures(outcomes, [k for k in KS if k <= num_samples])
    shown = ("pass@", "avg@", "distinct_correct@", "coverage")
    return {name: value for name, value in found.items() if name.startswith(shown)}


def graded(task: countdown.Countdown, answer: str, responses: list[str]) -> Outcome:
    grades = [task.grade(answer, text) for text in responses]
    none = (0,) * len(grades)  # lengths are no figure here
    verdicts, canonical, second, _ = zip(*grades, strict=True)
    return Outcome(verdicts, canonical, second, none, none, task.num_right(answer))


# --- command ------------------------------------------------------------------------------------


def make_model(
    name: str, recipe: Recipe, output: Path, *, seed: int, num_problems: int, position: int
) -> dict[str, float]:
    """Train, save and evaluate one model in this process, on one thread."""
    # More threads cost more than they give on models this small, and slow the other process down.
    torch.set_num_threads(1)
    started = time.perf_counter()
    model = train_model(name, recipe, seed=seed, position=position)
    seconds = time.perf_counter() - started
    save_model(model, output / name)
    report = evaluate(model, countdown.split("test")[:num_problems], num_samples=16, seed=seed)
    num_bytes = (output / name / "model.safetensors").stat().st_size
    return {
        "parameters": model.num_parameters(),
        "bytes": num_bytes,
        "train seconds": seconds,
    } | report


def check_output(output: Path, names: Sequence[str], *, force: bool) -> None:
    """Refuse to overwrite before any time is spent on training."""
    existing = [str(output / name) for name in names if (output / name).exists()]
    if existing and not force:
        raise ValueError(
            f"{', '.join(existing)} already exists. "
            "Pass --force to replace it, or another directory with --output."
        )


def format_table(reports: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(reports.values())))
    rows = [["model", *columns]] + [
        [name, *(f"{x:.3f}" if isinstance(x, float) else f"{x:,}" for x in report.values())]
        for name, report in reports.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("examples/quickstart/models"), help="parent directory"
    )
    parser.add_argument("--which", choices=CHOICES, default="both")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--force", action="store_true", help="replace models that already exist")
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="multiplies the training steps (default 1)"
    )
    parser.add_argument(
        "--num-problems", type=int, default=200, help="held-out problems in the table (default 200)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    names = CHOICES[arguments.which]
    try:
        check_output(arguments.output, names, force=arguments.force)
    except ValueError as error:
        sys.exit(f"error: {error}")
    # spawn: a forked child would inherit the locks of this process's torch threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=len(names), mp_context=context) as pool:
        futures = {
            name: pool.submit(
                make_model,
                name,
                replace(RECIPES[name], steps=round(RECIPES[name].steps * arguments.steps_scale)),
                arguments.output,
                seed=arguments.seed,
                num_problems=arguments.num_problems,
                position=position,
            )
            for position, name in enumerate(names)
        }
        reports = {name: future.result() for name, future in futures.items()}
    print(f"\n{arguments.num_problems} held-out problems, 16 samples each at temperature 1:")
    print(format_table(reports))


if __name__ == "__main__":
    main()
