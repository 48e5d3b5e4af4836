"""The recipes whose teacher is shown a solution, whole, by the commands of their READMEs.

Their data preparation and their training run as they stand there, on eight problems of the form of
GSM8K's, but on one rank, with tiny random models in the place of real ones and the trainer's own
sampler in that of vLLM. That the layouts work is for tests/test_examples.py.
"""

import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_eopd.metrics.rows import read_metrics
from tests.tiny_models import make_model
from tests.tiny_tokenizers import CHATML, byte_level, write

ROOT = Path(__file__).parents[2]
OWN = {
    # References in the first iteration, samples in the second.
    "privileged_gsm8k": ("rollout.reference_schedule_iters=1",),
    "self_distillation": (),
}
TINY = (
    "rollout.engine=megatron",
    "rollout.batch_size=4",
    "rollout.max_response_length=6",
    "rollout.record=true",
    "training.global_batch_size=2",
    "training.train_iters=2",
    "evaluation.num_problems=2",
    "data.max_prompt_length=200",
)


@pytest.fixture
def work_dir(tmp_path) -> Path:
    """As a reader's: the repository, and GSM8K's files beside it."""
    for name in ("examples", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, first in (("train", 1), ("test", 5)):
        rows = [problem(n) for n in range(first, first + 4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def problem(n: int) -> dict[str, str]:
    steps = f"It is {n} and two: <<{n}+2={n + 2}>>{n + 2}."
    return {"question": f"{n} of what is {n} plus two?", "answer": f"{steps}\n#### {n + 2}"}


def tiny(path: Path, seed: int) -> None:
    tokenizer = byte_level()
    make_model(
        "llama",
        path,
        seed=seed,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=1024,
        bos_token_id=tokenizer.token_to_id("<bos>"),
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
    )
    write(path, tokenizer, eos_token="<|im_end|>", chat_template=CHATML)


def commands(recipe: str) -> list[list[str]]:
    """Of the README's bash blocks, in words, with the variables that they set filled in."""
    text = (ROOT / f"examples/{recipe}/README.md").read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    variables: dict[str, str] = {}
    found = []
    for line in blocks.replace("\\\n", " ").splitlines():
        filled = re.sub(r"\$(\w+)", lambda match: variables[match[1]], line)
        words = shlex.split(filled, comments=True)
        if len(words) == 1 and (assignment := re.fullmatch(r"(\w+)=(.*)", words[0])):
            variables[assignment[1]] = assignment[2]
        elif words:
            found.append(words)
    return found


@pytest.mark.parametrize("recipe", OWN)
def test_a_recipe_runs_by_the_commands_of_its_readme(recipe, work_dir, monkeypatch):
    """Every teacher's prompt has its problem's solution, no student's has; the run ends with finite
    divergences that are not 0."""
    folder = work_dir / "runs" / recipe
    for seed, name in enumerate(("student", "teacher")):
        tiny(folder / name, seed)
    monkeypatch.chdir(work_dir)
    prepare = runpy.run_path(str(ROOT / "tools/prepare_data.py"))["main"]
    for words in commands(recipe):
        if words[1:2] == ["tools/prepare_data.py"]:
            # The tiny tokenizer has few words, and spells the others.
            assert prepare(["200" if word == "112" else word for word in words[2:]]) == 0
    prepared = folder / "train.jsonl"
    if prepared.is_file():  # tools/generate.py would have the teacher write answers into it
        rows = [json.loads(line) | {"response": "two"} for line in prepared.open()]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    (words, *_) = (words for words in commands(recipe) if words[0] == "torchrun")
    words = ["--nproc_per_node=1" if word == "--nproc_per_node=2" else word for word in words[1:]]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, *TINY, *OWN[recipe]],
        cwd=work_dir,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    run_dir = folder / "run"
    recorded = [json.loads(line) for line in (run_dir / "rollouts/000001.jsonl").open()]
    assert len(recorded) == 4
    decode = AutoTokenizer.from_pretrained(folder / "student").decode
    for row in recorded:
        n = int(row["prompt"]["text"][0])
        shown, asked = (
            decode(row["prompt"]["teacher_ids"]["teacher"]),
            decode(row["prompt"]["prompt_ids"]),
        )
        assert f"<<{n}+2={n + 2}>>" in shown and shown.startswith(asked[:20])
        assert "<<" not in asked
    steps = [row for row in read_metrics(run_dir / "metrics.jsonl") if "loss/total" in row]
    assert len(steps) == 2
    assert all(math.isfinite(s["loss/total"]) and s["loss/reverse_kl"] > 1e-3 for s in steps)
    assert (run_dir / "hf/config.json").is_file()
