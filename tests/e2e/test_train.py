"""Whole runs under torchrun, with real vLLM rollouts, as a user starts them."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from megatron_eopd.metrics.rows import read_metrics
from megatron_eopd.reporting.run_report import before_after_table
from megatron_eopd.tokens.file import read_tokens
from tests.tiny_models import make_model

ROOT = Path(__file__).parents[2]
QUICKSTART = "examples/quickstart/eopd.toml"
MODELS = ROOT / "examples/quickstart/models"
SMALL = [
    "training.train_iters=3",
    "rollout.batch_size=32",
    "rollout.record=true",
    "training.global_batch_size=16",
    "training.micro_batch_size=8",
    "training.lr_warmup_steps=1",
    "checkpoint.save_interval=2",
    "evaluation.num_problems=20",
    "evaluation.samples_per_problem=4",
]
pytestmark = pytest.mark.engine


def command(run_dir: Path, *overrides: str, ranks: int = 2) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc_per_node={ranks}", "-m", "megatron_eopd.train", QUICKSTART),
        *(f"run_dir={run_dir}", *SMALL, *overrides),
    ]


def train(run_dir: Path, *overrides: str, ranks: int = 2) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(run_dir, *overrides, ranks=ranks),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def timeless(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the allocator had a hand in."""
    clocked = re.compile(r"time/|throughput/|memory/|engine/|weight_sync/(\w+_s|seconds)$")
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not clocked.match(k)} for row in rows]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    run_dir = tmp_path_factory.mktemp("first") / "run"
    done = train(run_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir, done


def test_a_run_leaves_everything_that_it_promises(first_run):
    run_dir, done = first_run
    assert len(re.findall(r"^step \d+/\d+ \| loss ", done.stdout, re.MULTILINE)) == 3
    assert "| countdown/reverse_kl |" in done.stdout and str(run_dir / "hf") in done.stdout
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert before_after_table(rows) in done.stdout
    assert "WARNING (told once)" not in done.stdout
    assert (run_dir / "report.html").is_file() and (run_dir / "report.md").is_file()
    assert {path.name for path in (run_dir / "tokens").iterdir()} == {"000000.npz"}
    assert json.loads((run_dir / "config.json").read_text())["training"]["train_iters"] == 3
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload().Tags()
    assert {"loss/total", "eval/countdown/pass@1", "gate/fraction"} <= set(events["scalars"])
    assert {"entropy/teacher", "entropy/student"} <= set(events["histograms"])
    assert "evaluation/text_summary" in events["tensors"]
    assert (run_dir / "checkpoints/000003/DONE").is_file()
    assert (run_dir / "rollouts/000002.jsonl").is_file()
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 3]
    names = (ROOT / "docs/metrics.md").read_text()
    for name in {name for row in rows for name in row} - {"iteration"}:
        documented = re.sub(r"(?<=[@^])\d+", "k", re.sub(r"eval/\w+/", "eval/<task>/", name))
        documented = re.sub(r"^(engine|by_position|by_entropy)/\d+/", r"\1/N/", documented)
        assert f"`{documented}`" in names, f"{name} is not in docs/metrics.md"


def test_recorded_tokens_are_shown_and_scored_again_the_same(first_run, tmp_path):
    """Of training and evaluations; scored on another layout, from the rollouts that were kept, with
    the weights that wrote them: those of a checkpoint, and the student as it came."""
    run_dir = Path(shutil.copytree(first_run[0], tmp_path / "run"))
    view = [sys.executable, "-m", "megatron_eopd.view", str(run_dir)]
    shown = subprocess.run(view, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    names = {"index", "000000", "evaluation-000000-countdown", "evaluation-000003-countdown"}
    assert {path.stem for path in (run_dir / "view").iterdir()} == names
    evaluated = read_tokens(run_dir / "evaluations/000003/countdown.tokens.npz")
    assert {r.verdict for r in evaluated.responses} <= {"right", "wrong", "no_answer"}
    trained = read_tokens(run_dir / "tokens/000000.npz")
    assert np.abs(trained.signals["engine_mismatch"]).max() < 1e-4
    alone = ["--score", "--overwrite", "parallel.tensor_model_parallel_size=1"]
    for iteration in (0, 2):
        done = subprocess.run(
            [*view, "--iteration", str(iteration), *alone],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        scored = read_tokens(run_dir / f"tokens/00000{iteration}.npz")
        assert np.abs(scored.signals["engine_mismatch"]).max() < 1e-4
    again = read_tokens(run_dir / "tokens/000000.npz")
    assert again.ids_T.tolist() == trained.ids_T.tolist()
    for name, values_T in trained.signals.items():
        assert again.signals[name] == pytest.approx(values_T, abs=1e-4), name


def test_the_engine_had_the_trainers_weights_in_every_iteration(first_run):
    """Sampled log-probabilities of vLLM and the trainer agree within float32 rounding."""
    rows = [r for r in timeless(first_run[0]) if "mismatch/logprob_abs_p99" in r]
    assert len(rows) == 3
    for row in rows:
        assert 0 < row["mismatch/logprob_abs_mean"] <= row["mismatch/logprob_abs_p99"] < 1e-4
        assert row["weight_sync/version"] == row["iteration"]


@pytest.mark.parametrize("tied,tp,pp,engines", [(False, 2, 2, 2), (True, 1, 2, 1)])
def test_after_three_steps_the_engines_score_as_the_trainer_does(tied, tp, pp, engines, tmp_path):
    """Within 1e-4 nats in float32; and a skipped sync is seen, so the check can fail."""
    student = Path(shutil.copytree(MODELS / "student", tmp_path / "student"))
    if tied:
        make_model("qwen3", student, seed=4, vocab_size=112, tie_word_embeddings=True)
    script = str(Path(__file__).parent / "sync_after_steps.py")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={tp * pp}", script, QUICKSTART),
            *(f"run_dir={tmp_path / 'run'}", f"student.hf_path={student}"),
            *(*SMALL, "training.lr=1e-3", "training.train_iters=8"),
            f"parallel.tensor_model_parallel_size={tp}",
            f"parallel.pipeline_model_parallel_size={pp}",
            f"rollout.num_engines={engines}",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    in_sync, stale = map(float, done.stdout.split("differences: ")[1].split()[:2])
    assert in_sync < 1e-4
    assert stale > 1e-2, "a stale engine must be far outside the tolerance"


def test_a_student_of_experts_reaches_the_engine_with_every_step(tmp_path):
    """vLLM packs the experts' weights anew in each sync: the first and all later ones compute. And
    a resume from the second iteration takes the third one again, to the bit."""
    student = shutil.copytree(MODELS / "student", tmp_path / "student")
    make_model("qwen3_moe", student, seed=4, vocab_size=112)
    sizes = ["tensor_model_parallel_size=1", "expert_model_parallel_size=2"]
    options = [f"student.hf_path={student}", *(f"parallel.{size}" for size in sizes)]
    options += ["training.lr=1e-3", "evaluation.tasks=none"]
    done = train(tmp_path / "run", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["weight_sync/version"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert 0 < row["weight_sync/probe_difference"] < 3e-5
        assert 0 < row["mismatch/logprob_abs_mean"] <= row["mismatch/logprob_abs_p99"] < 1e-4
    straight = Path(shutil.copytree(tmp_path / "run", tmp_path / "straight"))
    shutil.rmtree(tmp_path / "run/checkpoints/000003")
    done = train(tmp_path / "run", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "000002" in done.stdout.split("resumed from")[1]
    assert timeless(tmp_path / "run") == timeless(straight)
    assert_same_weights(tmp_path / "run/hf", straight / "hf")


def test_models_of_other_widths_share_the_tokens_that_both_have(tmp_path):
    """The student has 16 columns of padding, the teacher 32, and its tokenizer two more tokens. No
    column past the shared tokens is ever sampled, and the engine scores as the trainer does."""
    models = {"student": 128, "teacher": 144}
    for seed, (name, columns) in enumerate(models.items()):
        path = shutil.copytree(MODELS / name, tmp_path / name)
        make_model("qwen3_tied", path, seed=seed, vocab_size=columns)
    config = json.loads((tmp_path / "student/config.json").read_text())
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    config["rope_parameters"] = {"full_attention": rope}  # which vLLM itself does not look into
    (tmp_path / "student/config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "teacher")
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    options = [f"{name}.hf_path={tmp_path / name}" for name in models]
    options += ["training.lr=1e-3", "evaluation.tasks=none", "model.make_vocab_size_divisible_by=8"]
    refused = train(tmp_path / "run", *options)
    assert refused.returncode != 0 and "objective.exclude_unshared_tokens=true" in refused.stderr
    done = train(tmp_path / "run", *options, "objective.exclude_unshared_tokens=true")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert 0 < row["weight_sync/probe_difference"] < 3e-5
        assert 0 < row["mismatch/logprob_abs_mean"] < 1e-4
    files = sorted((tmp_path / "run/rollouts").iterdir())
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    ids = [i for line in lines for i in line["response_ids"]]
    assert len(ids) > 1000 and max(ids) == 111, "all 112 tokens are likely, and nothing else"
    exported = load_file(tmp_path / "run/hf/model.safetensors")["model.embed_tokens.weight"]
    assert len(exported) == models["student"], "the export has the student's own width"


def test_resume_goes_on_as_if_nothing_had_happened(first_run, tmp_path):
    """2 iterations + resume + 1 = 3 straight, bitwise, so the same seed gives the same run; a
    half-written row is forgotten."""
    run_dir = Path(shutil.copytree(first_run[0], tmp_path / "run"))
    shutil.rmtree(run_dir / "hf")
    (run_dir / "checkpoints/000003/DONE").unlink()  # broke off while it was written
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "loss/to')
    done = train(run_dir)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout and "000002" in done.stdout
    assert timeless(run_dir) == timeless(first_run[0])
    assert_same_weights(run_dir / "hf", first_run[0] / "hf")


def test_a_finished_run_only_reports_again(first_run, tmp_path):
    """And says which options are not those it was started with. No engine has anything to do."""
    run_dir = Path(shutil.copytree(first_run[0], tmp_path / "run"))
    done = train(run_dir, "objective.entropy_threshold=0.5", "rollout.engine=megatron")
    assert done.returncode == 0, done.stderr
    assert "changed option, objective.entropy_threshold: 0.8 → 0.5" in done.stdout
    assert "step" not in done.stdout.split("resumed from")[1].split("# eopd")[0]
    assert timeless(run_dir) == timeless(first_run[0])


def evaluate(*arguments: str) -> subprocess.CompletedProcess:
    start = [*(sys.executable, "-m", "torch.distributed.run", "--standalone")]
    return subprocess.run(
        [*start, "--nproc_per_node=2", "-m", "megatron_eopd.evaluate", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def findings(directory: Path) -> tuple[dict, list[dict]]:
    """The report without what tells the model, and all samples in their order."""
    report = json.loads((directory / "countdown.json").read_text())
    lines = (directory / "countdown.samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines[1:]]
    samples.sort(key=lambda sample: (sample["problem"], sample["sample"]))
    return report | {"model": None}, [s | {"weight_version": None} for s in samples]


def test_evaluating_a_finished_run_gives_the_figures_of_its_last_evaluation(first_run, tmp_path):
    """Drawn anew from its checkpoint."""
    run_dir = Path(shutil.copytree(first_run[0], tmp_path / "run"))
    before = findings(run_dir / "evaluations/000003")
    shutil.rmtree(run_dir / "evaluations")
    arguments = (QUICKSTART, f"run_dir={run_dir}", *SMALL)
    done = evaluate(*arguments)
    assert done.returncode == 0, done.stderr
    assert findings(run_dir / "evaluations/000003") == before
    assert "| coverage |" in done.stdout
    assert timeless(run_dir) == timeless(first_run[0]), "the run itself is left as it was"
    row = timeless(first_run[0])[-1]
    for name, value in before[0]["figures"].items():
        assert row[f"eval/countdown/{name}"] == pytest.approx(value, rel=1e-11)
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    shown = [e.value for e in events.Scalars("eval/countdown/pass@1") if e.step == 3]
    assert shown == pytest.approx([row["eval/countdown/pass@1"]] * len(shown)) and len(shown) > 1


def test_the_export_is_evaluated_to_the_same_samples_and_a_killed_engine_costs_none(
    first_run, tmp_path
):
    """As a model alone, with its teacher and without any section of training; its engine is killed
    on the way, and later the whole command."""
    run_dir, output = first_run[0], tmp_path / "evaluation"
    arguments = [
        *("--model", str(run_dir / "hf"), "--teacher", str(MODELS / "teacher"), "-t", "countdown"),
        *("--num-problems", "20", "--num-samples", "4", "--max-response-length", "24"),
        *("-o", str(output), "parallel.tensor_model_parallel_size=2", "rollout.kv_cache_gib=0.25"),
        *("rollout.max_num_seqs=2", "rollout.num_engines=1"),
    ]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*start, "-m", "megatron_eopd.evaluate", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    samples = output / "countdown.samples.jsonl"
    deadline = time.monotonic() + 120
    while not samples.is_file() or samples.read_bytes().count(b"\n") < 9:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "vllm_child" in " ".join(child.cmdline()):
            child.kill()
    while samples.read_bytes().count(b"\n") < 30:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    process.terminate()
    said, _ = process.communicate(timeout=120)
    assert "engine 0 on rank 0 died: killed by SIGKILL" in said
    kept = samples.read_bytes()
    done = evaluate(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert samples.read_bytes().startswith(kept), "nothing is drawn again"
    report, drawn = findings(output)
    in_training, before = findings(run_dir / "evaluations/000003")
    assert drawn == before
    for name, value in in_training["figures"].items():
        assert report["figures"][name] == pytest.approx(value, rel=1e-5), name


def assert_same_weights(hf_dir: Path, other: Path) -> None:
    ours, theirs = (load_file(d / "model.safetensors") for d in (hf_dir, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_export_gives_the_trainers_logits_in_transformers_and_vllm(first_run):
    """Checkpoint (TP 2, loaded at TP 1), transformers and vLLM agree within 1e-4 in float32."""
    script = Path(__file__).parent / "compare_export.py"
    for engine in ("trainer", "vllm"):
        done = subprocess.run(
            [sys.executable, str(script), engine, str(first_run[0])],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert float(done.stdout.split()[-1]) < 1e-4


def test_a_checkpoint_of_a_run_is_a_model(first_run, tmp_path):
    """It converts to what the run exported, and another run starts from its weights: vLLM, which
    takes only its config.json, agrees with the trainer after the first sync."""
    checkpoint = first_run[0] / "checkpoints" / "000003"
    converted = tmp_path / "converted"
    command = [sys.executable, "tools/convert_hf.py", "to-hf", str(checkpoint), str(converted)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    exported = first_run[0] / "hf"
    assert_same_weights(converted, exported)
    assert {p.name for p in converted.iterdir()} == {p.name for p in exported.iterdir()}

    done = train(
        tmp_path / "run",
        f"student.hf_path={checkpoint}",
        "training.train_iters=0",
        "evaluation.tasks=none",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_weights(tmp_path / "run" / "hf", exported)


def test_a_recorded_run_replays_on_a_pipeline(first_run, tmp_path):
    """The samples of a TP 2 run give a PP 2 run the same first iteration."""
    done = train(
        tmp_path / "run",
        f"rollout.replay={first_run[0] / 'rollouts'}",
        "rollout.record=false",
        "training.train_iters=1",
        "parallel.tensor_model_parallel_size=1",
        "parallel.pipeline_model_parallel_size=2",
        "evaluation.tasks=none",
        "checkpoint.export_hf=false",
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        next(row for row in timeless(d) if "loss/total" in row)
        for d in (tmp_path / "run", first_run[0])
    )
    # Two optimizer steps: Adam's first step magnifies rounding before the second is measured.
    for name in ("loss/total", "loss/reverse_kl", "optim/grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3)


def test_a_bad_option_ends_the_job_in_time(tmp_path):
    begin = time.monotonic()
    done = train(tmp_path / "run", "objective.entropy_treshold=0.5")
    assert done.returncode != 0 and time.monotonic() - begin < 60
    assert "Did you mean objective.entropy_threshold" in done.stderr
    assert not (tmp_path / "run").exists()
