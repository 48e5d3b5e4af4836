"""The life of an engine, as pure code. In: what was seen of it. Out: its state, what may follow.

    RESTARTING ──ready──▶ STALE ──proved──▶ HEALTHY ──silent──▶ SUSPECT
        ▲                   ▲                │    ▲ ◀──spoke──────┘
        │                   └─falls_behind───┘
        └──restarted── DEAD ◀── died, from everywhere

From DEAD no way leads to HEALTHY but through a start, a whole weight sync and its probe.
"""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    RESTARTING = "restarting"
    """Its process loads, with dummy weights."""
    STALE = "stale"
    """It runs, and does not hold the present weights."""
    HEALTHY = "healthy"
    """It holds the present weights, and answers."""
    SUSPECT = "suspect"
    """It holds them, and has been silent for too long: it gets no new requests."""
    DEAD = "dead"
    """Its process is gone, or is not to be trusted."""


_NEXT = {
    ("ready", State.RESTARTING): State.STALE,
    ("proved", State.STALE): State.HEALTHY,
    ("falls_behind", State.HEALTHY): State.STALE,
    ("falls_behind", State.SUSPECT): State.STALE,
    ("falls_behind", State.STALE): State.STALE,
    ("silent", State.HEALTHY): State.SUSPECT,
    ("spoke", State.SUSPECT): State.HEALTHY,
    ("restarted", State.DEAD): State.RESTARTING,
    **{("died", state): State.DEAD for state in State if state != State.DEAD},
}
SERVING = (State.HEALTHY, State.SUSPECT)


class StateError(RuntimeError):
    """An event that cannot happen in a state: a fault of the caller."""


@dataclass
class Life:
    """Of one engine. Its methods are the events of the diagram above."""

    number: int
    max_restarts: int
    """So many times in a row, without a whole task served in between."""
    state: State = State.RESTARTING
    reason: str = ""
    """Why it died last."""
    restarts: int = 0
    """In all."""
    restarts_in_a_row: int = 0
    failed_requests: int = 0
    """Deaths that left requests behind, in all."""
    failed_probes: int = 0
    """Syncs after which it did not hold the trainer's weights, in all."""
    _was_ready: bool = False

    @property
    def serves(self) -> bool:
        return self.state in SERVING

    @property
    def runs(self) -> bool:
        """Whether it can be asked something."""
        return self.state not in (State.DEAD, State.RESTARTING)

    @property
    def is_lost(self) -> bool:
        """Dead, and not to be started again."""
        return self.state == State.DEAD and self.restarts_in_a_row >= self.max_restarts

    @property
    def is_unproven(self) -> bool:
        """Dead before it was ever ready: starting it again would not help."""
        return self.state == State.DEAD and not self._was_ready

    def ready(self) -> None:
        self._go("ready")
        self._was_ready = True

    def proved(self) -> None:
        """A whole sync is behind it, and the probe, where there is one."""
        self._go("proved")

    def falls_behind(self) -> None:
        """The trainer has newer weights, or the engine's are gone, as in sleep."""
        self._go("falls_behind")

    def silent(self) -> None:
        self._go("silent")

    def spoke(self) -> None:
        self._go("spoke")

    def died(self, reason: str) -> None:
        self._go("died")
        self.reason = reason

    def restarted(self) -> None:
        if self.is_lost:
            raise StateError(f"engine {self.number} has used up its {self.max_restarts} restarts")
        self._go("restarted")
        self.restarts += 1
        self.restarts_in_a_row += 1

    def served(self) -> None:
        """All that was asked of it, to the end."""
        self.restarts_in_a_row = 0

    def _go(self, event: str) -> None:
        after = _NEXT.get((event, self.state))
        if after is None:
            raise StateError(f"engine {self.number} is {self.state}: {event} cannot happen to it")
        self.state = after
