"""What a user can act on: told as one message without a traceback. Everybody may import this."""

import json
import os
import time
from contextlib import suppress
from errno import EDQUOT, EFBIG, EIO, ENOSPC, EROFS, ESTALE
from pathlib import Path


class ExpectedError(Exception):
    """Ends a command with its message. Says what is wrong, with which values, and what to set."""


class ConfigError(ExpectedError, ValueError):
    """An option or an input file is unknown, has the wrong type, or contradicts another one."""


class CheckpointError(ExpectedError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class DiskError(ExpectedError, OSError):
    """A file of the run cannot be written, for a reason that is not the run's own."""


_DISK = (ENOSPC, EDQUOT, EFBIG, EIO, EROFS, ESTALE)


def disk_error(error: Exception, stage: str) -> DiskError | None:
    """What an OSError says of a disk that takes no more; None of other ones."""
    if not isinstance(error, OSError) or error.errno not in _DISK:
        return None
    what = error.filename or "a file of the run"
    return DiskError(
        f"{what} cannot be written, in {stage}: {error.strerror}. Make room, or see to the disk, "
        f"and start the same command again; it goes on from what is complete."
    )


class EngineError(ExpectedError, RuntimeError):
    """The engine died, answered nonsense or did not answer in time. The run cannot go on."""


class TransferError(RuntimeError):
    """Weights on their way to an engine: the other side is gone, late, or has given up. Whoever
    waits for the sync makes an EngineError of it."""


class WireError(RuntimeError):
    """The other end of a wire between ranks is gone or late. Whoever knows what it meant says so
    with an error of its own."""


class TeacherError(ExpectedError, RuntimeError):
    """A separate teacher is gone, late, or has failed; the message says which and why."""


class RemoteError(ExpectedError, RuntimeError):
    """Another rank raised; the message is that rank's."""


class LostRankError(ExpectedError, RuntimeError):
    """Another rank died or hangs; the message says in which stage this one noticed."""


class Interrupted(Exception):
    """The run was asked to stop, and does. The message says by what, and where."""


class NonFiniteError(ExpectedError, RuntimeError):
    """Loss, gradient or an updated weight is NaN or infinite. Raised on every rank."""


class SpikeError(ExpectedError, RuntimeError):
    """Too many gradient norms in a row were too large. Raised on every rank."""


class ReplicaError(ExpectedError, RuntimeError):
    """Data-parallel ranks hold different weights. Raised on every rank, before a save."""


def tell_torchrun(reason: str) -> None:
    """Why this rank ends: torchrun closes with it, below the noise of the ranks that it stops.

    The file's form is that of torch.distributed.elastic.multiprocessing.errors.ErrorHandler, whose
    own writer would put a traceback there.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"timestamp": str(int(time.time()))}
        content = json.dumps({"message": {"message": reason, "extraInfo": extra}})
        with suppress(OSError):  # it says the same above
            Path(path).write_text(content)
