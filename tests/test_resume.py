"""Which checkpoint a run goes on from, and what may have changed since."""

import errno
import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from megatron_eopd import preflight
from megatron_eopd.checkpoints import files
from megatron_eopd.checkpoints.resume import choose_checkpoints
from megatron_eopd.config import Config, load_config
from megatron_eopd.errors import CheckpointError, ConfigError
from megatron_eopd.viewing.recordings import recordings_of

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples/quickstart/eopd.toml"


@pytest.fixture
def config(monkeypatch, tmp_path):
    """The quick start's, 6 iterations long, with overrides."""
    monkeypatch.chdir(ROOT)
    common = [f"run_dir={tmp_path / 'run'}", "rollout.engine=megatron", "training.train_iters=6"]

    def load(*overrides: str) -> Config:
        return load_config(QUICKSTART, [*common, *overrides])

    return load


def finish_checkpoint(run_dir: Path, iteration: int, **position) -> Path:
    """All of a complete checkpoint that is looked at before anything is loaded."""
    path = files.checkpoint_dir(run_dir, iteration)
    path.mkdir(parents=True)
    common = {"iteration": iteration, "seed": 1234, "prompts_digest": "", "layout": {}}
    (path / "position.json").write_text(json.dumps(common | position))
    (path / "data.distcp").write_bytes(b"data")
    files.write_sums(path, files.sum_files(path.iterdir()))
    return path


def chosen(config: Config, *, trains: bool = True) -> Path | None:
    return next(iter(choose_checkpoints(config, trains=trains).directories), None)


def test_a_runs_own_checkpoints_come_before_another_runs(config, tmp_path):
    """Given again, the command that began from another run must not begin there again."""
    other = finish_checkpoint(tmp_path / "other", 9)
    load = f"checkpoint.load={other}"
    assert chosen(config()) is None
    assert chosen(config(load)) == other
    own = [finish_checkpoint(tmp_path / "run", n) for n in (2, 4)]
    assert chosen(config()) == own[1]
    assert chosen(config(load)) == own[1]
    assert chosen(config(load), trains=False) == other, "an evaluation of this one"
    assert chosen(config("checkpoint.resume=2")) == own[0]
    with pytest.raises(ConfigError, match=r"resume=3: no complete .*000003\. There are 000002, 00"):
        chosen(config("checkpoint.resume=3"))
    with pytest.raises(ConfigError, match=r"resume=none, but .*000004 is there"):
        chosen(config("checkpoint.resume=none"))


def test_later_checkpoints_are_set_aside_and_kept(tmp_path):
    for n in (2, 4, 6):
        finish_checkpoint(tmp_path, n)
    moved = files.set_aside_later(tmp_path, (2, 0))
    assert [path.name for path in moved] == ["superseded-000004-1", "superseded-000006-1"]
    assert all((path / files.DONE).is_file() for path in moved)
    assert files.newest(tmp_path).name == "000002"
    finish_checkpoint(tmp_path, 4)
    assert files.set_aside_later(tmp_path, (3, 0))[0].name == "superseded-000004-2"
    assert files.set_aside_later(tmp_path, (3, 0)) == []


def test_later_recordings_of_tokens_are_set_aside(tmp_path):
    """That of the iteration which comes next is written anew. A half one counts for nothing."""
    (tmp_path / "tokens").mkdir()
    for name in ("000000.npz", "000010.npz", "000020.npz", "000030.unfinished"):
        (tmp_path / "tokens" / name).write_text("")
    moved = files.set_aside_later(tmp_path, (10, 0))
    assert [path.name for path in moved] == ["superseded-000020.npz-1"]
    assert [each.place for each in recordings_of(tmp_path)] == ["000000", "000010"]


def test_a_million_iterations_are_newer_than_the_one_before(tmp_path):
    """A name of seven digits sorts before one of six."""
    for n in (999_999, 1_000_000):
        finish_checkpoint(tmp_path, n)
    assert files.newest(tmp_path).name == "1000000"


LONGER = "training.train_iters=12"


@pytest.mark.parametrize(
    "options,said",
    [
        ((), "the learning rate would jump.*Set training.lr_decay_iters=6"),
        (
            ("training.lr_decay_style=constant", "objective.final_entropy_threshold=0.1"),
            "threshold of forward KL would jump.*objective.schedule_steps=24",
        ),
    ],
)
def test_a_longer_run_says_how_its_schedules_go_on(config, tmp_path, options, said):
    prompts = preflight.check(config(), 2).prompts
    digest = {"seed": config().seed, "prompts_digest": prompts.digest}
    finish_checkpoint(tmp_path / "run", 3, **digest, optimizer_steps=12, train_iters=6)
    assert preflight.check(config(*options), 2).candidates.directories[0].name == "000003"
    with pytest.raises(ConfigError, match=rf"of a run of 6 iterations.*train_iters=12: .*{said}"):
        preflight.check(config(LONGER, *options), 2)
    kept = ("training.lr_decay_iters=6", "objective.schedule_steps=24")
    assert (
        preflight.check(config(LONGER, *options, *kept), 2).candidates.directories[0].name
        == "000003"
    )
    assert preflight.check(config(LONGER, *options), 2, trains=False).candidates.directories


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "bit flipped": (flip_a_bit, "data.distcp has other content than was written"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 3 of 4 bytes"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 of 4 bytes"),
    "missing": (Path.unlink, "data.distcp is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_says_so(config, tmp_path, damage):
    older, newer = (finish_checkpoint(tmp_path / "run", n) for n in (2, 4))
    spoil, said = DAMAGES[damage]
    spoil(newer / "data.distcp")
    found = choose_checkpoints(config(), trains=True)
    assert found.directories == [older]
    (warning,) = found.warnings
    assert said in warning and str(newer) in warning and f"Going on from {older}." in warning
    with pytest.raises(CheckpointError, match="is damaged"):
        choose_checkpoints(config("checkpoint.resume=4"), trains=True)
    spoil(older / "data.distcp")
    with pytest.raises(
        CheckpointError, match=r"(?s)every checkpoint .*000004.*000002.*another run"
    ):
        choose_checkpoints(config(), trains=True)


@pytest.mark.parametrize(
    "name,content,said",
    [
        ("position.json", "{", "position.json: cannot be read"),
        ("position.json", None, "position.json: missing"),
        ("checksums.json", "[]", "checksums.json: damaged"),
        ("checksums.json", '{"files": {"a": {"bytes": 1}}}', "checksums.json: damaged"),
    ],
)
def test_so_does_one_without_a_position_or_sums(config, tmp_path, name, content, said):
    older, newer = (finish_checkpoint(tmp_path / "run", n) for n in (2, 4))
    (newer / name).unlink()
    if content is not None:
        (newer / name).write_text(content)
    found = choose_checkpoints(config(), trains=True)
    assert found.directories == [older] and said in found.warnings[0]


def test_a_checkpoint_from_before_there_were_sums_is_taken(config, tmp_path):
    path = finish_checkpoint(tmp_path / "run", 2)
    (path / "checksums.json").unlink()
    assert choose_checkpoints(config(), trains=True).directories == [path]
    (path / "position.json").write_text('{"iteration": 2, "of the future": 1}')
    with pytest.raises(CheckpointError, match="of a newer version"):
        choose_checkpoints(config(), trains=True)


def test_large_files_are_left_to_all_ranks_together(config, tmp_path, monkeypatch):
    path = finish_checkpoint(tmp_path / "run", 2)
    flip_a_bit(path / "data.distcp")
    monkeypatch.setattr(files, "QUICK_BYTES", 0)
    assert choose_checkpoints(config(), trains=True).directories == [path]
    sums = files.read_sums(path)
    assert len(files.problems_of(path, sums, sums)) == 1


def test_sums_are_those_of_sha256sum(tmp_path):
    path = finish_checkpoint(tmp_path, 2)
    lines = "".join(f"{found.sha256}  {name}\n" for name, found in files.read_sums(path).items())
    done = subprocess.run(["sha256sum", "-c", "-"], input=lines, cwd=path, text=True)
    assert done.returncode == 0


def test_the_tool_lists_and_verifies(tmp_path, capsys, monkeypatch):
    tool = runpy.run_path(str(ROOT / "tools/checkpoints.py"))["main"]
    run_dir = tmp_path / "run"
    for n in (2, 4, 6):
        finish_checkpoint(run_dir, n)
    assert tool(["verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count("verified") == 3
    flip_a_bit(run_dir / "checkpoints/000004/data.distcp")
    (run_dir / "checkpoints/000006/DONE").unlink()
    monkeypatch.setattr(files, "QUICK_BYTES", 0)
    assert tool(["list", str(run_dir), "--iteration", "4"]) == 0, "a look at sizes"
    capsys.readouterr()
    assert tool(["verify", str(run_dir)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("  ")[2] for line in lines] == [
        "verified",
        "data.distcp has other content than was written",
        "never finished",
    ]
    assert tool(["list", str(tmp_path)]) == 2
    assert "no checkpoints there" in capsys.readouterr().err
    (run_dir / "checkpoints/000008.unfinished").mkdir()
    assert tool(["list", str(run_dir), "--iteration", "8"]) == 0
    assert "being written" in capsys.readouterr().out
    assert tool(["list", str(run_dir), "--iteration", "3"]) == 2


@pytest.mark.parametrize(
    "changed,said",
    [
        ({"seed": 4}, r"with seed=4 \(now \d+\): its samples could not be continued"),
        ({"prompts_digest": "others"}, "with other prompts"),
        ({"tokenizer_digest": "0123456789abcdef"}, r"another tokenizer, 0123456789ab \(now "),
        ({"seed": 4, "prompts_digest": "others"}, "with seed=4 .* and other prompts"),
    ],
)
def test_what_samples_depend_on_must_be_as_it_was(config, tmp_path, changed, said):
    inputs = preflight.check(config(), 2)
    same = {
        "seed": config().seed,
        "prompts_digest": inputs.prompts.digest,
        "tokenizer_digest": inputs.tokenizers.student.digest,
    }
    finish_checkpoint(tmp_path / "run", 2, **same | changed)
    with pytest.raises(ConfigError, match=said):
        preflight.check(config(), 2)


def test_a_format_of_the_future_is_refused_by_its_number(config, tmp_path):
    finish_checkpoint(tmp_path / "run", 2, format=3)
    with pytest.raises(CheckpointError, match="format 3, and this version reads up to 2"):
        choose_checkpoints(config(), trains=True)


@pytest.mark.parametrize(
    "name,said",
    [("checksums.json", "checksums.json is missing"), ("DONE", "never finished .no DONE in it")],
)
def test_a_file_that_says_the_rest_is_sound_must_be_there(config, tmp_path, name, said):
    older, newer = (finish_checkpoint(tmp_path / "run", n, format=2) for n in (2, 4))
    (newer / name).unlink()
    found = choose_checkpoints(config(), trains=True)
    assert found.directories == [older]
    (warning,) = found.warnings
    assert re.search(said, warning) and f"Going on from {older}." in warning
    (older / "DONE").unlink()
    (newer / "DONE").unlink(missing_ok=True)
    found = choose_checkpoints(config(), trains=True)
    assert found.directories == [] and len(found.warnings) == 2, "begins, and says so"


def test_a_sector_that_cannot_be_read_is_damage(config, tmp_path, monkeypatch):
    older, newer = (finish_checkpoint(tmp_path / "run", n, format=2) for n in (2, 4))
    read = files._sha256

    def fail(file, *rest):
        if str(newer) in file.name and file.name.endswith("data.distcp"):
            raise OSError(errno.EIO, "Input/output error")
        return read(file, *rest)

    monkeypatch.setattr(files, "_sha256", fail)
    found = choose_checkpoints(config(), trains=True)
    assert found.directories == [older]
    assert "data.distcp cannot be read (Input/output error)" in found.warnings[0]


@pytest.mark.parametrize("moment", ["between the renames", "before the second"])
def test_a_checkpoint_saved_again_outlives_a_kill_between_its_two_renames(tmp_path, moment):
    """One of the two versions has its name again: the newer one if it is complete."""
    checkpoints = tmp_path / "checkpoints"
    for name, is_complete in (
        ("000004.unfinished", moment == "between the renames"),
        ("000004.replaced", True),
        ("000006.unfinished", False),
    ):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "which").write_text(name)
        if is_complete:
            (checkpoints / name / "DONE").touch()
    (back,) = files.put_back(tmp_path)
    expected = "000004.unfinished" if moment == "between the renames" else "000004.replaced"
    assert (back / "which").read_text() == expected
    assert files.complete(tmp_path) == [checkpoints / "000004"] == [back]
    assert files.put_back(tmp_path) == []
