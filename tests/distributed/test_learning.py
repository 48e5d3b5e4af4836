"""A run learns; and thresholds that no token reaches, or all do, are other objectives."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_eopd.config import load_config
from megatron_eopd.metrics.rows import read_metrics
from tests.ranks import start_ranks

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples/quickstart/eopd.toml"
BATCH = 64
OPTIONS = [
    "rollout.engine=megatron",
    f"rollout.batch_size={BATCH}",
    f"training.global_batch_size={BATCH}",
    f"training.micro_batch_size={BATCH}",
    "training.lr=1e-3",
    "training.lr_warmup_steps=0",
    "parallel.tensor_model_parallel_size=1",
    "checkpoint.export_hf=false",
    "checkpoint.save_interval=100",
    "evaluation.num_problems=64",
    "evaluation.samples_per_problem=1",
]


def run(run_dir: Path, *overrides: str) -> list[dict]:
    """Rows of metrics.jsonl of a whole run on one rank."""
    start_ranks(1, _train, [f"run_dir={run_dir}", *OPTIONS, *overrides])
    return read_metrics(run_dir / "metrics.jsonl")


def _train(rank: int, options: list[str]) -> None:
    from megatron_eopd import launch, loop

    torch.set_num_threads(1)
    launch.on_every_rank(load_config(QUICKSTART, options), loop.train)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """The toy student with noise of a fifth of each matrix's spread: it has something to learn."""
    path = tmp_path_factory.mktemp("damaged") / "student"
    shutil.copytree(ROOT / "examples/quickstart/models/student", path)
    generator = torch.Generator().manual_seed(1)
    weights = load_file(path / "model.safetensors")
    for tensor in weights.values():
        if tensor.ndim > 1:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor += (0.2 * tensor.float().std() * noise).to(tensor.dtype)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_thirty_steps_bring_a_damaged_student_back(damaged, tmp_path):
    """Held-out reverse KL falls by more than a third (0.75 → 0.42 nats when this was written)."""
    rows = run(tmp_path / "run", f"student.hf_path={damaged}", "training.train_iters=30")
    evaluations = [row["eval/countdown/reverse_kl"] for row in rows if "loss/total" not in row]
    before, after = evaluations
    assert before > 0.6 and after < 2 / 3 * before


@pytest.mark.parametrize(
    "threshold,other",
    [
        ("1e9", ["objective.name=opd"]),
        ("-1", ["objective.gate=always"]),
    ],
)
def test_a_threshold_beyond_all_entropies_is_another_objective(threshold, other, damaged, tmp_path):
    """τ = ∞ is reverse KL alone, τ = −1 both KLs everywhere: the same losses, gradients and, by the
    samples of the next iteration, weights."""
    common = [f"student.hf_path={damaged}", "training.train_iters=3", "evaluation.tasks=none"]
    eopd = run(tmp_path / "eopd", *common, f"objective.entropy_threshold={threshold}")
    same = run(tmp_path / "other", *common, *other)
    assert len(eopd) == len(same) == 3
    for ours, theirs in zip(eopd, same, strict=True):
        for name in ("loss/total", "optim/grad_norm", "entropy/student_mean", "gate/fraction"):
            assert ours[name] == theirs[name], name
