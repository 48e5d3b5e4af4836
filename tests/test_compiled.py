"""The compiled library's cache: one compilation per machine, and nobody else's code."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_eopd.losses.kernels import compiled
from megatron_eopd.losses.kernels.compiled import CompilerError, cache_folder, load_library

FLAGS = ("-shared", "-fPIC")
# compiled.py needs no other module: a process that runs it alone starts at once.
OTHER_PROCESS = """
import pathlib, runpy, sys
load_library = runpy.run_path(sys.argv[1])["load_library"]
print(load_library(pathlib.Path(sys.argv[2]), tuple(sys.argv[3:])).answer())
"""


class Compiler:
    """g++, found through CXX, behind a script that notes each compilation."""

    def __init__(self, folder: Path) -> None:
        self.path, self.log = folder / "compiler", folder / "log"
        self.source = folder / "answer.cpp"
        self.source.write_text('extern "C" int answer() { return 42; }\n')
        self.does("exec g++ $@")

    def does(self, script: str) -> None:
        note = f'case "$*" in *--version) exec g++ --version;; esac\necho "$*" >> {self.log}'
        self.path.write_text(f"#!/bin/sh\n{note}\n{script}\n")
        self.path.chmod(0o755)

    def answer(self) -> int:
        return load_library(self.source, FLAGS).answer()

    def in_other_process(self) -> subprocess.Popen:
        command = [sys.executable, "-c", OTHER_PROCESS, compiled.__file__, str(self.source), *FLAGS]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    @property
    def calls(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def compiler(tmp_path, monkeypatch) -> Compiler:
    compiler = Compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler.path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return compiler


def kept() -> list[Path]:
    return sorted(cache_folder().glob("*.so"))


# --- one compilation -----------------------------------------------------------------------------


def test_another_process_does_not_compile_again(compiler):
    assert compiler.answer() == 42
    assert compiler.in_other_process().communicate()[0] == "42\n"
    assert compiler.calls == 1


def test_processes_that_start_at_once_compile_once(compiler):
    """All of them before the first is done."""
    compiler.does("sleep 0.5; exec g++ $@")
    processes = [compiler.in_other_process() for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["42\n"] * 3
    assert compiler.calls == 1


def test_another_source_flag_compiler_or_cpu_is_another_library(compiler, tmp_path, monkeypatch):
    def key(*flags: str, program: str = "") -> str:
        return compiled.cache_key(compiler.source, [program or str(compiler.path)], flags)

    keys = [key(*FLAGS), key("-O1", *FLAGS), key(*FLAGS, program="g++")]
    assert keys[0] == key(*FLAGS)
    compiler.path.write_text("#!/bin/sh\necho version 2\n")
    keys.append(key(*FLAGS))
    compiler.source.write_text('extern "C" int answer() { return 43; }\n')
    keys.append(key(*FLAGS))
    monkeypatch.setattr(compiled, "_cpu", lambda: "another one")
    keys.append(key(*FLAGS))
    assert len(set(keys)) == len(keys)


def test_a_changed_source_is_compiled(compiler):
    assert compiler.answer() == 42
    compiler.source.write_text('extern "C" int answer() { return 43; }\n')
    assert compiler.answer() == 43


def test_the_model_and_the_instruction_sets_say_which_cpu_it_is():
    told = compiled._cpu().lower()
    assert "flags" in told or "features" in told
    assert "mhz" not in told  # changes from one moment to the next


def test_what_nobody_used_for_a_month_is_removed(compiler):
    """At the next compilation. Loading counts as use."""
    compiler.answer()
    (used,) = kept()
    forgotten, recent = used.with_name("forgotten.so"), used.with_name("recent.so")
    for path, days in ((used, 31), (forgotten, 31), (recent, 29)):
        path.touch()
        os.utime(path, times=(time.time() - days * 86_400,) * 2)
    compiler.answer()
    compiler.source.write_text('extern "C" int answer() { return 43; }\n')
    compiler.answer()
    assert used.exists() and recent.exists() and not forgotten.exists()


# --- nobody else's code --------------------------------------------------------------------------


def test_only_the_user_may_write_what_is_kept(compiler):
    """Whatever the umask."""
    umask = os.umask(0)
    try:
        compiler.answer()
        compiler.answer()
    finally:
        os.umask(umask)
    assert compiler.calls == 1
    assert cache_folder().stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in cache_folder().iterdir())


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_may_write_is_refused(compiler, mode):
    compiler.answer()
    cache_folder().chmod(mode)
    with pytest.warns(UserWarning, match=r"compiles answer.cpp for itself: .*others may write"):
        assert compiler.answer() == 42
    assert compiler.calls == 2


def test_a_folder_whose_parent_is_open_to_all_is_refused(compiler):
    compiler.answer()
    cache_folder().parent.chmod(0o777)
    with pytest.warns(UserWarning, match="anybody could replace"):
        assert compiler.answer() == 42
    assert compiler.calls == 2


def test_a_folder_of_another_user_is_refused(compiler, monkeypatch):
    compiler.answer()
    owner = cache_folder().stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.warns(UserWarning, match="does not belong to user"):
        assert compiler.answer() == 42
    assert compiler.calls == 2


@pytest.mark.parametrize("kind", ["writable", "link"])
def test_a_file_that_others_may_have_written_is_replaced(compiler, tmp_path, kind):
    compiler.answer()
    (path,) = kept()
    if kind == "writable":
        path.chmod(0o666)
    else:
        path.symlink_to(path.rename(tmp_path / "elsewhere.so"))
    assert compiler.answer() == 42
    assert compiler.calls == 2
    assert not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600


# --- what may go wrong ---------------------------------------------------------------------------


def test_a_truncated_file_is_replaced(compiler):
    """Before it is loaded: a page that is missing ends the process at its first use."""
    compiler.answer()
    (path,) = kept()
    whole = path.read_bytes()
    path.unlink()  # this process has it mapped, and would end with what is cut off
    path.write_bytes(whole[: len(whole) // 2])
    assert compiler.in_other_process().communicate()[0] == "42\n"
    assert compiler.calls == 2 and len(path.read_bytes()) == len(whole)


def test_a_file_that_does_not_load_is_replaced(compiler):
    """Whole, but of another architecture, say."""
    compiler.answer()
    compiled._keep(kept()[0], b"no library")
    assert compiler.in_other_process().communicate()[0] == "42\n"
    assert compiler.calls == 2


def test_a_failure_is_quoted_and_not_kept(compiler):
    compiler.does("echo no such flag >&2; exit 1")
    for _ in range(2):
        with pytest.raises(CompilerError, match=r"answer.cpp .* fails:\nno such flag"):
            compiler.answer()
    assert compiler.calls == 2 and not kept()
    compiler.does("exec g++ $@")
    assert compiler.answer() == 42


def test_a_compiler_that_hangs_is_ended(compiler, tmp_path, monkeypatch):
    """With the processes that it started."""
    monkeypatch.setattr(compiled, "COMPILE_S", 0.3)
    compiler.does(f"sleep 60 & echo $! > {tmp_path}/child; wait")
    with pytest.raises(CompilerError, match=r"not done after 0\.3 s"):
        compiler.answer()
    child, deadline = int((tmp_path / "child").read_text()), time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the compiler's child goes on"
        time.sleep(0.01)


@pytest.mark.parametrize("base", ["a file", "relative"])
def test_without_a_folder_every_process_compiles_for_itself(compiler, tmp_path, monkeypatch, base):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", base if base == "relative" else str(tmp_path / base))
    for _ in range(2):
        with pytest.warns(UserWarning, match="every process compiles"):
            assert compiler.answer() == 42
    assert compiler.calls == 2


def test_a_full_disk_leaves_nothing_half_done(compiler, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert compiler.answer() == 42
    assert [path.name for path in cache_folder().iterdir()] == ["lock"]


def test_nobody_waits_for_ever_for_another_process(compiler, monkeypatch):
    monkeypatch.setattr(compiled, "WAIT_S", 0.1)
    with open(cache_folder() / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match=r"lock for 0\.1 s"):
            assert compiler.answer() == 42
    assert compiler.calls == 1 and not kept()
