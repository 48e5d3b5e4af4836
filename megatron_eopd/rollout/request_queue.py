"""The requests of one call, which engines pull from. In: requests in groups. Out: who gets which.

Pure code. A group, the samples of a prompt, stays together where it can: they share the prompt's
keys and values. Longest prompts go first, so that none is left alone in the end. What an engine
held when it died goes back to the head of the queue, with its seeds, so that whoever answers it
draws the same sample.
"""

from collections import deque
from collections.abc import Collection, Sequence

from megatron_eopd.rollout.messages import SampleRequest

Group = list[SampleRequest]


class RequestQueue:
    def __init__(self, groups: Sequence[Sequence[SampleRequest]], max_in_flight: int) -> None:
        """`max_in_flight`: most requests that one engine has; a larger group goes alone."""
        self._waiting: deque[Group] = deque(
            sorted(map(list, groups), key=lambda group: -len(group[0].prompt_ids))
        )
        self._in_flight: dict[int, dict[int, SampleRequest]] = {}
        self._max_in_flight = max_in_flight
        self.total = sum(map(len, self._waiting))
        self.answered = 0

    @property
    def is_done(self) -> bool:
        return self.answered == self.total

    def in_flight(self, engine: int) -> int:
        return len(self._in_flight.get(engine, ()))

    def deal(self, engines: Collection[int]) -> dict[int, list[SampleRequest]]:
        """What each of these engines gets now: group by group, always to the one that has least."""
        dealt: dict[int, list[SampleRequest]] = {}
        while self._waiting and engines:
            engine = min(engines, key=self.in_flight)
            has, group = self.in_flight(engine), self._waiting[0]
            if has and has + len(group) > self._max_in_flight:
                break
            self._waiting.popleft()
            self._in_flight.setdefault(engine, {}).update({r.number: r for r in group})
            dealt.setdefault(engine, []).extend(group)
        return dealt

    def take_answer(self, engine: int, number: int) -> bool:
        """Whether it was awaited from this engine; an answer that was not is dropped."""
        if self._in_flight.get(engine, {}).pop(number, None) is None:
            return False
        self.answered += 1
        return True

    def give_back(self, engine: int) -> int:
        """All that the engine has not answered; returns how many."""
        lost = list(self._in_flight.pop(engine, {}).values())
        groups: dict[int, Group] = {}
        for request in lost:
            groups.setdefault(request.group, []).append(request)
        self._waiting.extendleft(reversed(groups.values()))
        return len(lost)
