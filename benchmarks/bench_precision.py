"""What rounding logits to bfloat16 does to the loss, the gate and the gradient of a bfloat16 model.

Both ways of objective.logits_dtype start from the same bfloat16 hidden states and LM heads; what
they are compared with multiplies these in float64. By default with made-up states of a vocabulary
as large as Qwen3's; given two folders and texts, with those of real models. Prints a table of
docs/objectives.md.
"""
# Shapes: N tokens, H hidden size, V vocabulary.

import argparse
import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_eopd.config import ObjectiveConfig
from megatron_eopd.losses import dense_kl_terms, vocab_parallel_kl_terms
from megatron_eopd.losses.chunked_head import chunked_head_loss
from megatron_eopd.losses.head_products import logits_of

THRESHOLD = ObjectiveConfig().entropy_threshold
CHUNK = 64
States = tuple[torch.Tensor, torch.Tensor]
"""(hidden states [N, H], LM head [V, H]), bfloat16."""


def made_up(
    noise: float, num_tokens: int = 512, vocab: int = 151_936, hidden: int = 1024
) -> tuple[States, ...]:
    """(student, teacher). Logits as a language model's: a spread of 2.5 with a few tokens at 14 to
    26 above it; the student's states are the teacher's, with `noise` of their spread."""
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(vocab, hidden, generator=generator) / hidden**0.5
    teacher_NH = 2.5 * torch.randn(num_tokens, hidden, generator=generator)
    heights = 14 + 12 * torch.rand(num_tokens, 1, generator=generator)
    heights = heights - 4 * torch.rand(num_tokens, 4, generator=generator).cumsum(-1)
    favourites = torch.randint(vocab, (num_tokens, 4), generator=generator)
    teacher_NH += (heights.unsqueeze(-1) * weight_VH[favourites]).sum(1)
    student_NH = teacher_NH + noise * teacher_NH.std() * torch.randn(
        num_tokens, hidden, generator=generator
    )
    return tuple((x.bfloat16(), weight_VH.bfloat16()) for x in (student_NH, teacher_NH))


def of_models(folders: list[Path], texts: Path, num_texts: int) -> tuple[States, ...]:
    """(student, teacher), of the answers in a JSON-lines file of questions and answers."""
    lines = [json.loads(line) for line in texts.read_text().splitlines()[:num_texts]]
    tokenizer = AutoTokenizer.from_pretrained(folders[1])
    found = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        states = []
        for line in lines:
            first = len(tokenizer(line["question"]).input_ids)
            ids = tokenizer(line["question"] + "\n" + line["answer"], return_tensors="pt").input_ids
            with torch.no_grad():
                states.append(model.model(ids).last_hidden_state[0, first:-1])
        found.append((torch.cat(states), model.lm_head.weight.detach()))
    return tuple(found)


def measure(student: States, teacher: States, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Per-token terms, and the gradient of the hidden states under this dtype of logits; float64
    takes the dense formula."""
    terms_of_chunks = []
    compute = dense_kl_terms if dtype == torch.float64 else vocab_parallel_kl_terms
    if dtype == torch.float64:
        student, teacher = ([x.double() for x in states] for states in (student, teacher))
        dtype = None

    def loss_of_chunk(logits_CV: torch.Tensor, rows: slice) -> torch.Tensor:
        terms = compute(logits_CV, logits_of(teacher[0][rows], teacher[1], dtype))
        terms_of_chunks.append([x.detach() for x in terms[:3]])
        # Ungated, so that a token whose gate flips does not hide what rounding does to gradients.
        return (terms.reverse_kl + terms.forward_kl).sum()

    hidden_NH = student[0].clone().requires_grad_()
    chunked_head_loss(
        hidden_NH,
        student[1],
        loss_of_chunk,
        chunk_size=CHUNK,
        tp_group=dist.group.WORLD,
        logits_dtype=dtype,
    ).backward()
    names = ("reverse_kl", "forward_kl", "teacher_entropy")
    values = (torch.cat(x).double() for x in zip(*terms_of_chunks, strict=True))
    return dict(zip(names, values, strict=True)) | {"gradient": hidden_NH.grad.double()}


def rows_of(student: States, teacher: States) -> list[str]:
    exact = measure(student, teacher, torch.float64)
    kl, entropy = exact["reverse_kl"], exact["teacher_entropy"]
    head = logits_of(teacher[0][:64], teacher[1], torch.float32)
    lines = [
        f"{len(kl)} tokens, V = {len(teacher[1]):,}, highest logit {head.max():.0f}, mean KL "
        f"{kl.mean():.4f}, teacher entropy {entropy.mean():.2f} nats, gate open for "
        f"{(entropy >= THRESHOLD).double().mean():.1%}",
        "| `logits_dtype` | KL of a token, mean (worst) error | mean KL, relative error | entropy "
        "of a token, mean (worst) error | gates that flip | gradient of hidden states, error |",
        "|---|---|---|---|---|---|",
    ]
    for name, dtype in (("model", None), ("float32", torch.float32)):
        found = measure(student, teacher, dtype)
        off = {key: (found[key] - exact[key]).abs() for key in ("reverse_kl", "teacher_entropy")}
        flips = (found["teacher_entropy"] >= THRESHOLD) != (entropy >= THRESHOLD)
        gradient = (found["gradient"] - exact["gradient"]).norm() / exact["gradient"].norm()
        lines.append(
            f"| `{name}` | {off['reverse_kl'].mean():.1e} ({off['reverse_kl'].max():.1e}) | "
            f"{found['reverse_kl'].mean() / kl.mean() - 1:+.1e} | "
            f"{off['teacher_entropy'].mean():.1e} ({off['teacher_entropy'].max():.1e}) | "
            f"{int(flips.sum())} of {len(flips)} | {gradient:.1e} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Rounded logits against exact ones.")
    parser.add_argument("--models", nargs=2, type=Path, metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--texts", type=Path, help="JSON lines with question and answer")
    parser.add_argument("--num-texts", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/r", rank=0, world_size=1)
        if arguments.models:
            states = of_models(arguments.models, arguments.texts, arguments.num_texts)
            print(*rows_of(*states), sep="\n")
        else:
            for noise in (0.03, 0.1, 0.3):
                print(*rows_of(*made_up(noise)), sep="\n")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
