"""A checkpoint is written while training goes on: of what was there when it began."""

import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from megatron_eopd.checkpoints import files, saver, writing
from megatron_eopd.checkpoints.loader import load
from megatron_eopd.checkpoints.position import make_position, read_position
from megatron_eopd.checkpoints.saver import Saver
from megatron_eopd.config.training import CheckpointConfig
from megatron_eopd.errors import CheckpointError, LostRankError, NonFiniteError
from megatron_eopd.host_memory import in_blocks
from megatron_eopd.models import mcore_files
from megatron_eopd.models.build import build_model
from megatron_eopd.training.optimizer import make_trainable
from tests.distributed.test_models import random_rollouts
from tests.distributed.test_step import VOCAB, build, make_config, take_step
from tests.ranks import context_for, leave_groups, run_ranks
from tests.saving import save
from tests.tiny_models import make_model


@pytest.fixture
def held(monkeypatch) -> SimpleNamespace:
    """Writing waits until `may_write` is set, and then fails if `fails`."""
    gate = SimpleNamespace(may_write=threading.Event(), fails=lambda rank: False)
    write = writing._write_own

    def write_later(directory, own, rank, pace):
        assert gate.may_write.wait(60)
        if gate.fails(rank):
            raise OSError(28, "No space left on device")
        return write(directory, own, rank, pace)

    monkeypatch.setattr(writing, "_write_own", write_later)
    return gate


def start(student_dir, teacher_dir, run_dir, **options):
    """A student that has taken a step, and what takes the next."""
    context = context_for(1, 1)
    config = make_config(student_dir, teacher_dir)
    student, pool, token_loss = build(config, context)
    rollouts = [s.rollout for s in random_rollouts(VOCAB, count=8, seed=11)]

    def step():
        take_step(student, token_loss, pool, rollouts, config, context, step=0)

    step()
    its_saver = Saver(run_dir, student_dir, CheckpointConfig(**options), context, print)
    return student, context, step, its_saver


def weights(student):
    return [p.detach().clone() for chunk in student.chunks for p in chunk.parameters()]


def position(iteration, context, **more):
    return make_position(iteration, 1, "digest", context, **more)


def check_beside(held, student_dir, teacher_dir, run_dir):
    student, context, step, its_saver = start(student_dir, teacher_dir, run_dir)
    before = weights(student)
    directory = its_saver.save(student, position(1, context), {"note.txt": "beside"})
    step()
    assert not directory.exists() and files.complete(run_dir) == []
    its_saver.poll()  # goes on without waiting
    assert not all(map(torch.equal, before, weights(student)))
    held.may_write.set()
    its_saver.finish()
    assert files.complete(run_dir) == [directory]
    assert (directory / "note.txt").read_text() == "beside"
    assert files.quick_problems(directory) == []
    assert load(directory, student, VOCAB, context).adam_step == 1
    assert all(map(torch.equal, before, weights(student)))
    leave_groups()


def test_what_is_written_is_what_was_there_when_the_save_began(
    held, qwen3_dir, teacher_dir, tmp_path
):
    run_ranks(2, tmp_path, check_beside, held, qwen3_dir, teacher_dir, tmp_path / "run")


def check_blocks(held, student_dir, teacher_dir, run_dir):
    writing.host_memory_like = partial(in_blocks, pin_memory=False)
    check_beside(held, student_dir, teacher_dir, run_dir)
    (directory,) = files.complete(run_dir)
    written = sum(path.stat().st_size for path in directory.glob("*.distcp"))
    weights = load_file(student_dir / "model.safetensors").values()
    # Of a view torch could also store all that lies around it, many times as much.
    assert 12 < written / sum(w.numel() for w in weights) < 24


def test_a_copy_in_blocks_of_memory_is_written_as_any_other(held, qwen3_dir, teacher_dir, tmp_path):
    """As on a GPU, whose tensors are copied into blocks of page-locked memory."""
    run_ranks(2, tmp_path, check_blocks, held, qwen3_dir, teacher_dir, tmp_path / "run")


def check_too_large(held, student_dir, teacher_dir, run_dir):
    held.may_write.set()
    options = {"staging_gib": 1e-6}
    student, context, _, its_saver = start(student_dir, teacher_dir, run_dir, **options)
    directory = its_saver.save(student, position(1, context))
    assert files.complete(run_dir) == [directory], "complete at once"
    leave_groups()


def test_what_finds_no_room_in_memory_is_waited_for(held, qwen3_dir, teacher_dir, tmp_path):
    run_ranks(2, tmp_path, check_too_large, held, qwen3_dir, teacher_dir, tmp_path / "run")


def check_no_memory(held, student_dir, teacher_dir, run_dir):
    """On rank 1 alone."""
    held.may_write.set()
    student, context, _, its_saver = start(student_dir, teacher_dir, run_dir)
    allocate = writing.host_memory_like

    def no_memory(tensors):
        if context.layout.rank == 1:
            allocate(tensors[:3])
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return allocate(tensors)

    writing.host_memory_like = no_memory
    before = weights(student)
    directory = its_saver.save(student, position(1, context))
    assert files.complete(run_dir) == [directory], "complete at once"
    load(directory, student, VOCAB, context)
    assert all(map(torch.equal, before, weights(student)))
    leave_groups()


def test_so_is_what_the_machine_has_no_memory_for(held, qwen3_dir, teacher_dir, tmp_path):
    run_ranks(2, tmp_path, check_no_memory, held, qwen3_dir, teacher_dir, tmp_path / "run")


def check_failure(held, student_dir, teacher_dir, run_dir):
    """On rank 1 alone; both hear of it, before the next save is due."""
    student, context, step, its_saver = start(student_dir, teacher_dir, run_dir)
    held.may_write.set()
    good = its_saver.save(student, position(1, context))
    its_saver.finish()
    held.fails = lambda rank: rank == 1
    its_saver.save(student, position(2, context))
    with pytest.raises(CheckpointError, match=r"000002: the checkpoint cannot be .*No space left"):
        for _ in range(1000):
            step()
            its_saver.poll()
    assert files.complete(run_dir) == [good]
    held.fails = lambda rank: False
    with its_saver:
        its_saver.save(student, position(3, context))
    assert [path.name for path in files.complete(run_dir)] == ["000001", "000003"]
    assert not list((run_dir / "checkpoints").glob("*.unfinished")), "what failed is swept away"
    leave_groups()


def test_a_failure_in_the_background_is_told_on_every_rank(held, qwen3_dir, teacher_dir, tmp_path):
    run_ranks(2, tmp_path, check_failure, held, qwen3_dir, teacher_dir, tmp_path / "run")


def check_late(held, student_dir, teacher_dir, run_dir):
    student, context, _, its_saver = start(
        student_dir, teacher_dir, run_dir, save_timeout_minutes=0.01
    )
    its_saver.save(student, position(1, context))
    with pytest.raises(CheckpointError, match=r"not written within .*save_timeout_minutes=0.01"):
        its_saver.finish()
    held.may_write.set()
    leave_groups()


def test_a_disk_that_hangs_ends_the_wait(held, qwen3_dir, teacher_dir, tmp_path):
    run_ranks(1, tmp_path, check_late, held, qwen3_dir, teacher_dir, tmp_path / "run")


def check_left(held, student_dir, teacher_dir, run_dir):
    """Of an error that all ranks have, and of one that this rank has alone."""
    student, context, _, its_saver = start(student_dir, teacher_dir, run_dir)
    threading.Timer(0.5, held.may_write.set).start()
    with pytest.raises(NonFiniteError), its_saver:
        its_saver.save(student, position(1, context))
        raise NonFiniteError
    assert [path.name for path in files.complete(run_dir)] == ["000001"]
    held.may_write.clear()
    begin = time.monotonic()
    with pytest.raises(LostRankError), its_saver:
        its_saver.save(student, position(2, context))
        raise LostRankError
    assert time.monotonic() - begin < 5
    assert [path.name for path in files.complete(run_dir)] == ["000001"]
    held.may_write.set()
    leave_groups()


def test_a_run_that_ends_finishes_its_save_unless_a_rank_is_lost(
    held, qwen3_dir, teacher_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(saver, "ALONE_S", 0.5)
    run_ranks(2, tmp_path, check_left, held, qwen3_dir, teacher_dir, tmp_path / "run")


def check_kept(student_dir, teacher_dir, run_dir):
    student, context, _, _ = start(student_dir, teacher_dir, run_dir)
    options = {"keep_last": 2, "keep_best": "pass@8"}
    for iteration, figure in ((1, 0.3), (2, 0.5), (3, 0.2), (4, None), (5, 0.4), (6, None)):
        figures = {} if figure is None else {"eval/own/pass@8": figure, "eval/own/pass@1": 0}
        place = position(iteration, context, figures=figures)
        save(run_dir, student, place, student_dir, context, **options)
    assert [path.name for path in files.complete(run_dir)] == ["000002", "000005", "000006"]
    options["keep_best"] = "pass@1"
    (run_dir / "checkpoints/000002/position.json").write_text("{")  # damaged, and no reason to stop
    save(run_dir, student, position(6, context, steps_done=2), student_dir, context, **options)
    assert [path.name for path in files.complete(run_dir)] == ["000005", "000006", "000006-2"]
    # Again under the same name: the newer one counts.
    again = position(6, context, steps_done=2, is_evaluated=False)
    directory = save(run_dir, student, again, student_dir, context, **options)
    assert read_position(directory) == replace(again, adam_step=1)
    assert (run_dir / "checkpoints/latest").read_text() == "000006-2\n"
    assert len(list((run_dir / "checkpoints").iterdir())) == 4
    leave_groups()


def test_the_best_and_the_newest_stay(qwen3_dir, teacher_dir, tmp_path):
    run_ranks(1, tmp_path, check_kept, qwen3_dir, teacher_dir, tmp_path / "run")


LARGE = {"vocab_size": 16_384, "hidden_size": 256, "intermediate_size": 768}


def check_memory(model, run_dir, peaks):
    """Some 7 million parameters, 12 bytes each."""
    context = context_for(1, 1)
    config = make_config(model, model)
    chunks = build_model(model, config.model, context)
    student = make_trainable(chunks, config, context)
    student.wrapped[0].zero_grad_buffer()
    student.optimizer.step()
    for name, is_async in (("waiting", False), ("beside", True)):
        its_saver = Saver(run_dir, model, CheckpointConfig(async_save=is_async), context, print)
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak becomes what is used now
        before = memory_of("VmRSS")
        its_saver.save(student, position(1, context))
        its_saver.finish()
        peaks[name, context.layout.rank] = memory_of("VmHWM") - before
    leave_groups()


def memory_of(name: str) -> int:
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(name))
    return int(line.split()[1]) * 1024


def test_a_save_needs_the_ranks_own_share_or_a_chunk_of_it(tmp_path):
    """Gathering the optimizer took 30 to 36 bytes a parameter on each of two ranks."""
    model = make_model("qwen3_tied", tmp_path / "model", **LARGE)
    num_parameters = sum(p.numel() for p in load_file(model / "model.safetensors").values())
    assert num_parameters > 6e6
    with mp.Manager() as manager:
        peaks = manager.dict()
        run_ranks(2, tmp_path, check_memory, model, tmp_path / "run", peaks)
        peaks = dict(peaks)
    share, slack = 12 * num_parameters / 2, 12 * 2**20
    for rank in (0, 1):
        assert peaks["waiting", rank] < mcore_files.CHUNK_BYTES + slack, peaks
        assert peaks["beside", rank] < share + slack, peaks
