"""A C++ source as a loaded library, compiled once per machine: in, a source file and flags.

What a compiler made is kept in the user's cache directory, under a name that says for which source,
flags, compiler and CPU. A library does what it likes as this user, so nobody else may be able to
write there. Where nothing can be kept, every process compiles for itself, after a warning.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

COMPILE_S = 120.0
"""Longest that one compilation may take."""
WAIT_S = 60.0
"""Longest wait for another process's compilation, before this one compiles for itself."""
VERSION_S = 20.0
KEEP_DAYS = 30
DAY_S = 86_400.0

CPU_FIELDS = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),  # x86
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),  # ARM
)


class CompilerError(RuntimeError):
    """There is no library, and why."""


class CacheError(RuntimeError):
    """A library cannot be kept, and why."""


def load_library(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """From the cache, where it is compiled if it is missing. Raises CompilerError."""
    compiler = find_compiler()
    try:
        return _from_cache(cache_folder(), source, compiler, flags)
    except (CacheError, OSError) as error:
        warnings.warn(
            f"every process compiles {source.name} for itself: {error}. "
            f"XDG_CACHE_HOME may name another directory, of your own, for what is compiled.",
            stacklevel=2,
        )
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "private.so"
            path.write_bytes(_compiled(source, compiler, flags))
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompilerError(f"what {compiler[0]} makes cannot be loaded: {error}") from error


# --- the compiler --------------------------------------------------------------------------------


def find_compiler() -> list[str]:
    """The command that CXX, or the first of the usual names, stands for."""
    candidates = [os.environ.get("CXX", "").split(), ["g++"], ["clang++"], ["c++"]]
    for program, *options in filter(None, candidates):
        if path := shutil.which(program):
            return [path, *options]
    raise CompilerError("no C++ compiler found (CXX, g++, clang++)")


def _compiled(source: Path, compiler: list[str], flags: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compiled.so"
        _output_of([*compiler, *flags, str(source), "-o", str(path)], COMPILE_S)
        return path.read_bytes()


def _output_of(command: list[str], seconds: float) -> str:
    """What it writes, to either stream. A compiler is several processes; the time-out ends all."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        process = subprocess.Popen(command, **pipes, text=True, errors="replace", process_group=0)
    except OSError as error:
        raise CompilerError(f"{command[0]} does not start: {error}") from error
    with process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise CompilerError(f"not done after {seconds:g} s: {shlex.join(command)}") from None
    if process.returncode:
        raise CompilerError(f"{shlex.join(command)} fails:\n{output[-2000:]}")
    return output


# --- the cache -----------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The user's, made if it is missing. Raises CacheError where others could put a library."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        if not base.is_absolute():
            raise RuntimeError(f"{base} is no absolute path")
    except RuntimeError as error:
        raise CacheError(f"no cache directory: {error}") from error
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = base / "megatron_eopd"
    folder.mkdir(mode=0o700, exist_ok=True)
    folder = folder.resolve()  # from here on without links
    if not _is_private(folder.stat()):
        raise CacheError(
            f"{folder} does not belong to user {os.getuid()}, or group or others may write there; "
            f"once it is removed, the next process makes it anew"
        )
    # A group is not looked at here: with the usual umask 002 it is the user's own.
    for parent in folder.parents:
        if parent.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
            raise CacheError(f"anybody could replace {folder}, because {parent} is open to all")
    return folder


def _is_private(status: os.stat_result) -> bool:
    """Only this user, and root, could have written what is there."""
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _from_cache(
    folder: Path, source: Path, compiler: list[str], flags: tuple[str, ...]
) -> ctypes.CDLL:
    path = folder / f"{source.stem}-{cache_key(source, compiler, flags)}.so"
    if library := _load_kept(path):
        return library
    with _locked(folder / "lock"):
        if library := _load_kept(path):  # another process was first
            return library
        _keep(path, _compiled(source, compiler, flags))
        _remove_unused(folder)
    if library := _load_kept(path):
        return library
    raise CacheError(f"{path} does not load; is its file system mounted noexec?")


def cache_key(source: Path, compiler: list[str], flags: tuple[str, ...]) -> str:
    """Of all that makes the library what it is: by -march=native the CPU is part of it."""
    version = _output_of([*compiler, "--version"], VERSION_S)
    parts = [source.read_bytes(), repr((compiler, version, flags, _cpu())).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _cpu() -> str:
    """Model and instruction sets of all cores; where the system does not tell, the machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return str(platform.uname())
    told = {line for line in lines if line.split(":")[0].strip() in CPU_FIELDS}
    return "\n".join([platform.machine(), *sorted(told)])


def _keep(path: Path, library: bytes) -> None:
    """Under its name only when it is whole, and with its hash behind it."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with open(descriptor, "wb") as file:
            file.write(library + hashlib.sha256(library).digest())
        os.replace(temporary, path)  # mkstemp gave it mode 0600, which is enough to be loaded
    except BaseException:
        os.unlink(temporary)
        raise


def _load_kept(path: Path) -> ctypes.CDLL | None:
    """None unless it is what this user once kept: loading half a library can end the process."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            status, content = os.fstat(file.fileno()), file.read()
        digest_size = hashlib.sha256().digest_size
        library, digest = content[:-digest_size], content[-digest_size:]
        if not _is_private(status) or hashlib.sha256(library).digest() != digest:
            return None
        loaded = ctypes.CDLL(str(path))
    except OSError:
        return None
    if time.time() - status.st_mtime > DAY_S:
        with suppress(OSError):
            os.utime(path)  # says when it was last used
    return loaded


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this machine at a time. Raises CacheError after WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        while not _take(descriptor):
            if time.monotonic() > deadline:
                raise CacheError(f"another process has held {path} for {WAIT_S:g} s")
            time.sleep(0.02)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough while a fork has it, too
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_unused(folder: Path) -> None:
    """What nobody has loaded for KEEP_DAYS, and what a process left that was killed."""
    for path in folder.iterdir():
        with suppress(OSError):
            old = time.time() - path.lstat().st_mtime > KEEP_DAYS * DAY_S
            if old and path.suffix in (".so", ".tmp"):
                path.unlink()
