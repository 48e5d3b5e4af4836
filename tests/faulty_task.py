"""Tasks as users may write them by mistake. Light to import: processes that grade do."""

from megatron_eopd.tasks.task import Grade, Verdict


class Faulty:
    """A user's own, with one fault."""

    name = "faulty"

    def __init__(self, verdict="right", count=None, extra=None):
        self._verdict, self._count, self._extra = verdict, count, extra

    def grade(self, answer, response):
        return Grade(Verdict(self._verdict)) if isinstance(self._verdict, str) else self._verdict

    def right_response(self, answer):
        return None

    def num_right(self, answer):
        return self._count
