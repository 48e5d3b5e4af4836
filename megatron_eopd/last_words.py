"""What a rank was doing when it ended without a word. In: its stage. Out: a file, if it was killed.

NCCL's watchdog, a fault in a kernel and the kernel's out-of-memory killer end a process in which no
line of Python runs any more. So the stage is written down when it begins, and behind it Python's
faulthandler, which needs no interpreter, writes where each thread was. A rank that leaves by itself
has told why, and removes the file; what the next start finds is of one that did not.
"""

import atexit
import faulthandler
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

STAGE_BYTES = 512
SHOWN_LINES = 12


class LastWords:
    """From now on until `remove`, at the latest until this process leaves by itself.

    faulthandler knows one file: the last of these that was made has it.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self._path = path
        self._process = os.getpid()
        self._file = path.open("w+b", buffering=0)
        self.note(stage)
        self._file.seek(STAGE_BYTES)  # where faulthandler goes on
        faulthandler.enable(self._file)
        atexit.register(self.remove)

    def note(self, stage: str) -> None:
        """One system call of a few microseconds."""
        line = stage.encode()[: STAGE_BYTES - 1].ljust(STAGE_BYTES - 1) + b"\n"
        with suppress(OSError):  # a full disk is told by what must be written
            os.pwrite(self._file.fileno(), line, 0)

    def remove(self) -> None:
        if os.getpid() != self._process or self._file.closed:
            return  # what a rank forks is not the rank
        faulthandler.disable()
        atexit.unregister(self.remove)
        self._file.close()
        self._path.unlink(missing_ok=True)


class Ending(NamedTuple):
    text: str
    is_fault: bool
    """A fault of this process; else it was killed, like all others perhaps."""


def read_last_words(path: Path) -> Ending | None:
    """Of the start before this one, if it left any."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    stage = content[:STAGE_BYTES].decode(errors="replace").strip()
    trace = content[STAGE_BYTES:].decode(errors="replace").strip().splitlines()
    if not trace:
        return Ending(f"was killed, by the system or by hand, in {stage}", False)
    shown = "".join(f"\n  {line}" for line in trace[1 : SHOWN_LINES + 1])
    return Ending(f"ended in {stage} with: {trace[0]}{shown}", True)
