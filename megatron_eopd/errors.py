"""What a user can act on: told as one message without a traceback. Everybody may import this."""


class ExpectedError(Exception):
    """Ends a command with its message. Says what is wrong, with which values, and what to set."""


class ConfigError(ExpectedError, ValueError):
    """An option or an input file is unknown, has the wrong type, or contradicts another one."""


class CheckpointError(ExpectedError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class DiskError(ExpectedError, OSError):
    """A file of the run cannot be written, for a reason that is not the run's own."""


class EngineError(ExpectedError, RuntimeError):
    """The engine died, answered nonsense or did not answer in time. The run cannot go on."""


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
