"""tools/compare_runs.py finds what differs between two runs, and names where it begins."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from megatron_eopd.metrics.writer import MetricsWriter
from megatron_eopd.models.mcore_writer import MCoreWriter, Source

ROOT = Path(__file__).parents[1]
compare_runs = runpy.run_path(str(ROOT / "tools/compare_runs.py"))["main"]
WEIGHT, MOMENT = "decoder.final_layernorm.weight", "optimizer.state.exp_avg.output_layer.weight"
EMBEDDING = "embedding.word_embeddings.weight"
CLOCKS = (
    "engine/0/restarts",  # an engine that died drew the same samples elsewhere
    "engine/1/tokens_per_s",
    "engine/alive",
    "throughput/tokens_per_s",
    "time/total",
    "weight_sync/hand_over_s",
    "weight_sync/probe_s",
    "weight_sync/seconds",
)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {WEIGHT: (4,), MOMENT: (6, 2), EMBEDDING: (8, 4)}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def write_checkpoint(path: Path, state: dict[str, torch.Tensor], cuts: int = 1) -> None:
    """`cuts`: into how many pieces each tensor's first axis."""
    path.mkdir(parents=True)
    parts = []
    for number in range(cuts):
        sources = []
        for key, whole in state.items():
            rows = len(whole) // cuts
            own = whole[number * rows : (number + 1) * rows]
            offset = (number * rows, *(0 for _ in whole.shape[1:]))
            item = ShardedTensor(
                key, own, own.dtype, tuple(own.shape), tuple(whole.shape), offset, None
            )
            sources.append(Source(item, tuple(own.shape), own.dtype, own.clone))
        parts.append(sources)
    writer = MCoreWriter(path, parts, {})
    for number in range(cuts):
        writer.write_part(number)
    writer.finish({})
    (path / "position.json").write_text(json.dumps({"iteration": 4, "layout": {"tp": cuts}}))
    (path / "DONE").touch()


def write_metrics(run_dir: Path, losses: list[float], tokens_per_s: float = 1.0) -> None:
    writer = MetricsWriter(run_dir, resumed_at=0)
    for iteration, loss in enumerate(losses, start=1):
        clocked = dict.fromkeys(CLOCKS, tokens_per_s) | {"weight_sync/probe_difference": 1e-6}
        writer.write(iteration, {"loss/total": loss, "optim/grad_norm": 2 * loss, **clocked})
    writer.close()


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """Two runs that only their clocks and their layouts tell apart."""
    for name, cuts in (("a", 1), ("b", 2)):
        run_dir = tmp_path / name
        write_metrics(run_dir, [4.0, 3.0, 2.0, 1.0], tokens_per_s=cuts)
        write_checkpoint(run_dir / "checkpoints/000004", tensors(), cuts)
        (run_dir / "hf").mkdir()
        save_file({"w": torch.ones(3)}, run_dir / "hf/model.safetensors")
        (run_dir / "rollouts").mkdir()
        (run_dir / "rollouts/000000.jsonl").write_text('{"response_ids": [1, 2]}\n')
        (run_dir / "config.json").write_text(json.dumps({"parallel": {"tp": cuts}}))
    return tmp_path / "a", tmp_path / "b"


def compare(runs: tuple[Path, Path], capsys, *options: str) -> tuple[int, str]:
    """Exit status with --assert-equal, and all that was printed."""
    code = compare_runs([*map(str, runs), "--assert-equal", *options])
    return code, "".join(capsys.readouterr())


def test_clocks_options_and_layouts_do_not_count(runs, capsys):
    code, said = compare(runs, capsys)
    assert code == 0 and said.endswith("equal to the last bit\n"), said
    assert f"left out: {', '.join(CLOCKS)})" in said
    assert "3 metrics compared" in said, "and what the probe found is one"
    assert "option parallel.tp: 1 → 2" in said


def test_the_first_step_and_metric_that_differ_are_named(runs, capsys):
    write_metrics(runs[1], [4.0, 3.0, 2.0 + 1e-9, 7.0])
    code, said = compare(runs, capsys)
    assert code == 1 and said.endswith("different: metrics.jsonl\n"), said
    assert "first difference: iteration 3, loss/total: A 2, B 2.000000001 (relative 5e-10)" in said
    assert "worst of 2 row(s): iteration 4, loss/total: A 1, B 7 (relative 0.857)" in said
    assert compare_runs([*map(str, runs)]) == 0  # it was not asked to assert


def test_a_tolerance_is_relative(runs, capsys):
    write_metrics(runs[1], [4.0, 3.0, 2.0 + 1e-9, 1.0])
    assert compare(runs, capsys, "--rtol", "1e-8")[0] == 0
    assert compare(runs, capsys, "--rtol", "1e-10")[0] == 1


def test_rows_that_one_has_alone_or_twice_are_found(runs, capsys):
    write_metrics(runs[1], [4.0, 3.0, 2.0])
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "loss/total": 2.0}\n')
    code, said = compare(runs, capsys)
    assert code == 1
    assert "B has iteration(s) 3 more than once" in said and "only A has iteration(s) 4" in said


def test_doubled_and_missing_steps_of_tensorboard_are_found(runs, capsys):
    with SummaryWriter(runs[1] / "tensorboard") as writer:  # a second file, and no purge
        writer.add_scalar("loss/total", 3.0, 2)
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "loss/total": 0.5}\n')
    code, said = compare(runs, capsys)
    assert code == 1
    assert "B: doubled: step(s) 2 of 1 tag(s), loss/total" in said
    assert "A: missing: step(s) 5 of 1 tag(s), loss/total" in said


@pytest.mark.parametrize("key", [WEIGHT, MOMENT, EMBEDDING])
def test_one_bit_of_a_tensor_is_seen(runs, capsys, key, tmp_path):
    state = tensors()
    last = state[key].view(-1)[-1:]
    last.copy_(torch.nextafter(last, last + 1))
    write_checkpoint(tmp_path / "c/checkpoints/000004", state)
    write_metrics(tmp_path / "c", [4.0, 3.0, 2.0, 1.0])
    for name in ("hf", "rollouts"):
        (tmp_path / "c" / name).symlink_to(runs[0] / name)
    code, said = compare((runs[0], tmp_path / "c"), capsys)
    assert code == 1 and said.endswith("different: checkpoints\n") and f"{key}: relative" in said
    assert compare((runs[0], tmp_path / "c"), capsys, "--rtol", "1e-6")[0] == 0


def test_not_a_number_is_no_number(runs, capsys, tmp_path):
    """No tolerance takes it for equal, and it is equal to itself."""
    state = tensors()
    state[WEIGHT][0] = torch.nan
    for name in ("c", "d"):
        write_checkpoint(tmp_path / name / "checkpoints/000004", state)
    assert compare((tmp_path / "c", tmp_path / "d"), capsys)[0] == 0
    code, said = compare((runs[0], tmp_path / "c"), capsys, "--rtol", "1e6")
    assert code == 1 and f"{WEIGHT}: relative inf" in said


def test_padding_of_a_vocabulary_does_not_count(runs, capsys, tmp_path):
    state = tensors()
    state[EMBEDDING] = torch.cat([state[EMBEDDING], torch.full((4, 4), 9.0)])
    for name, cuts in (("c", 1), ("d", 2)):
        write_checkpoint(tmp_path / name / "checkpoints/000004", state, cuts)
    for pair in ((runs[0], tmp_path / "c"), (tmp_path / "d", runs[0])):
        assert "checkpoints: 000004, 3 tensors\n" in compare(pair, capsys)[1]


def test_exports_rollouts_and_positions_are_compared(runs, capsys):
    save_file({"w": torch.tensor([1.0, 1.0, 2.0])}, runs[1] / "hf/model.safetensors")
    (runs[1] / "rollouts/000000.jsonl").write_text('{"response_ids": [1, 3]}\n')
    (runs[1] / "checkpoints/000004/position.json").write_text('{"iteration": 5}')
    code, said = compare(runs, capsys)
    assert code == 1 and said.endswith("different: checkpoints, hf, rollouts\n")
    assert "w: relative 0.5" in said and "position.json, iteration: A 4, B 5" in said
    assert "000000.jsonl line 1, response_ids: A [1, 2], B [1, 3]" in said


def test_what_cannot_be_compared_is_told(runs, capsys, tmp_path):
    code, said = compare((runs[0], tmp_path / "none"), capsys)
    assert (
        code == 2
        and said == f"error: {tmp_path}/none: no such directory. Give the run_dir of a run.\n"
    )
    code, said = compare((runs[0], tmp_path), capsys)
    assert code == 2 and "neither metrics.jsonl nor checkpoints" in said
    code, said = compare(runs, capsys, "--iteration", "3")
    assert code == 2 and "no complete" in said and "There are 000004" in said
