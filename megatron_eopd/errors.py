"""What a user can act on, where several rooms raise it."""


class EngineError(RuntimeError):
    """The engine died, answered nonsense or did not answer in time. The run cannot go on."""
