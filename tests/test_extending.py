"""docs/extending.md: its patches apply, touch the files that it names, and do what they should."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending.md").read_text()


@pytest.fixture
def extended(tmp_path):
    """A copy of the package with a section's patch; runs Python there."""
    for folder in ("megatron_eopd", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "images")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    (tmp_path / "tests").mkdir()
    for name in ("dense_objective.py", "tiny_models.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    shutil.copy(ROOT / "tests/e2e/greedy_tokens.py", tmp_path)

    def extended(heading: str):
        section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        patch = re.search(r"```diff\n(.*?)```", section, re.DOTALL)[1]
        touched = set(re.findall(r"^\+\+\+ b/(.*)", patch, re.MULTILINE))
        named = re.findall(r"^\| `(.*?)` \|", section, re.MULTILINE)
        places = {
            name if name.startswith(("docs", "tests")) else f"megatron_eopd/{name}"
            for name in named
        }
        new = {p for p in touched if not (ROOT / p).is_file()}
        assert touched - new | {str(Path(p).with_name("<name>.py")) for p in new} == places
        done = subprocess.run(
            ["git", "apply", "-"], input=patch, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

        def run(*arguments: str) -> str:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=tmp_path,
                env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        return run

    return extended


DIVERGENCE = """
import torch
from megatron_eopd.config import ObjectiveConfig
from megatron_eopd.losses import vocab_parallel_terms
from megatron_eopd.losses.estimators import TokenSignals
from megatron_eopd.losses.objective import coefficients_at, token_objective
from megatron_eopd.schedules import START
from megatron_eopd.losses.vocab_sum import sum_over_vocab
from tests.dense_objective import dense_token_loss

torch.manual_seed(0)
objective = ObjectiveConfig(reverse_kl="none", forward_kl="hellinger", gate="always")
student, teacher = 3 * torch.randn(2, 16, 40)
ids, positions = torch.arange(16), torch.linspace(0, 1, 16)

def ours(student):
    terms = vocab_parallel_terms(student, teacher, sampled_ids=ids, top_k=4)
    over_vocab = lambda h: sum_over_vocab(h, student, teacher, terms)
    signals = TokenSignals(terms.kl, terms.picked, torch.zeros(16), over_vocab, None)
    return token_objective(signals, objective, coefficients_at(objective, START)).loss_N

def dense(student):
    rest = (ids, torch.zeros(16), positions, objective)
    return dense_token_loss(student, teacher.double(), *rest, alpha=1.0, tau=0.8)[0]

for make, logits in ((ours, student), (dense, student.double())):
    logits.requires_grad_()
    loss = make(logits)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    if make is ours:
        found = loss.detach(), gradient
torch.testing.assert_close(found, (loss.detach().float(), gradient.float()), rtol=1e-5, atol=1e-6)
"""


def test_a_divergence(extended):
    """Values and gradients of float64; --help has its word; the top k alone are refused for it."""
    run = extended("A divergence")
    run("-c", DIVERGENCE)
    assert "jsd, hellinger, none" in run("-m", "megatron_eopd.train", "--help")
    fits = "from megatron_eopd.objectives import *; print(fits_top_k(FORWARD_KL))"
    assert "topk" in run("-c", fits) and "hellinger" not in run("-c", fits)


MODEL_FAMILY = """
import json
from pathlib import Path
from greedy_tokens import trainer_tokens, transformers_tokens
from tests.tiny_models import make_model

model = make_model("mistral", Path("model"))
print(json.dumps([transformers_tokens(model), trainer_tokens(model)]))
"""


def test_a_model_family(extended):
    """The trainer continues prompts as transformers does."""
    run = extended("A model family")
    theirs, ours = json.loads(run("-c", MODEL_FAMILY).splitlines()[-1])
    assert ours == theirs and len({token for row in ours for token in row}) > 5


TRACKER = """
from pathlib import Path
from megatron_eopd.config import LoggingConfig
from megatron_eopd.metrics.writer import MetricsWriter

names = LoggingConfig.model_validate({"trackers": ["csv"]}).trackers
for resumed_at, iterations in ((None, (1, 2, 3)), (1, (2,))):
    writer = MetricsWriter(Path("run"), resumed_at, names)
    for iteration in iterations:
        writer.write(iteration, {"loss/total": iteration / 2}, {"entropy/teacher": [1.0]})
    writer.close()
print(Path("run/metrics.csv").read_text())
"""


def test_a_tracker(extended):
    """It shows what was written, and forgets with the run."""
    run = extended("A tracker")
    assert run("-c", TRACKER).split() == ["1,loss/total,0.5", "2,loss/total,1.0"]
