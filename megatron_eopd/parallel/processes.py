"""No process outlives the one that started it: Linux kills it then, however that one ended.

A rank dies with its torchrun, and what a rank forks with the rank. A process that is started anew,
by subprocess or spawn, has to ask for it itself.

Linux means the thread that started the process, not the whole process. So what is to live for
longer than a thread is started from the main one.
"""

import ctypes
import os
import signal
import threading

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Looked up once: in a process that was just forked, the loader's locks may be held for ever.
_prctl = ctypes.CDLL(None).prctl


def die_with(parent_pid: int) -> None:
    """Have this process killed when the one that started it ends. SIGKILL: a rank that waits in a
    collective hears nothing else."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the request reached the kernel
        os._exit(1)


def die_with_torchrun() -> None:
    """Nothing without torchrun: the parent is then a shell, which a run under nohup outlives.

    Does not see that torchrun has ended before; `require_torchrun` does.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())


def forks_die_with_their_parents() -> None:
    """For what this process forks from now on on its main thread, and those in turn."""
    forking = threading.local()

    def before() -> None:
        is_lasting = threading.current_thread() is threading.main_thread()
        forking.parent = os.getpid() if is_lasting else None

    def in_child() -> None:
        if forking.parent is not None:
            die_with(forking.parent)

    os.register_at_fork(before=before, after_in_child=in_child)
