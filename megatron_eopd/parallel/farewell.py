"""The student's last word to ranks that serve it: separate teachers, and engines on their own."""

from dataclasses import dataclass

from megatron_eopd.errors import Interrupted


@dataclass(frozen=True)
class Farewell:
    error: str | None
    """In a line, why the run ends early; None after its last iteration."""
    is_stop: bool = False
    """Whether it was asked to, and will go on another time."""

    @classmethod
    def after(cls, error: BaseException | None) -> "Farewell":
        """`error`: what ends the run, if it is early."""
        if error is None:
            return cls(None)
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return cls(text, is_stop=isinstance(error, Interrupted))
