"""The queue that engines pull from: nothing lost, nothing twice, whoever dies when."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eopd.rollout.messages import SampleRequest
from megatron_eopd.rollout.request_queue import RequestQueue

ENGINES = (0, 1, 2)


def groups_of(sizes: list[tuple[int, int]]) -> list[list[SampleRequest]]:
    """Groups of (requests, tokens of the prompt)."""
    groups, number = [], 0
    for group, (size, length) in enumerate(sizes):
        numbers = range(number, number + size)
        groups.append(
            [SampleRequest(n, group, [1] * length, 100 + n, 1.0, 1.0, 8, []) for n in numbers]
        )
        number += size
    return groups


@dataclass
class Model:
    """What must be true of a queue, kept in the plainest way."""

    groups: list[list[SampleRequest]]
    limit: int
    held: dict[int, dict[int, SampleRequest]] = field(
        default_factory=lambda: {engine: {} for engine in ENGINES}
    )
    answered: list[int] = field(default_factory=list)
    returned: set[int] = field(default_factory=set)
    """Groups of which a part came back."""

    def deal(self, queue: RequestQueue, engines: list[int]) -> None:
        before = {engine: len(self.held[engine]) for engine in ENGINES}
        dealt = queue.deal(engines)
        assert set(dealt) <= set(engines)
        for engine, requests in dealt.items():
            assert not {r.number for r in requests} & {*self.answered, *self.everywhere()}
            self.held[engine] |= {r.number: r for r in requests}
            by_group = {r.group: [q for q in requests if q.group == r.group] for r in requests}
            for group, part in by_group.items():
                assert group in self.returned or part == self.groups[group], "a group was split"
            largest = max(map(len, by_group.values()))
            assert len(self.held[engine]) <= self.limit or (
                not before[engine] and len(by_group) == 1 and largest > self.limit
            )
        for engine in ENGINES:
            assert queue.in_flight(engine) == len(self.held[engine])

    def everywhere(self) -> set[int]:
        return {number for held in self.held.values() for number in held}


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_every_request_is_answered_once_in_any_interleaving(data):
    """Engines are dealt to, answer in any order and twice, and die with what they hold."""
    pairs = st.tuples(st.integers(1, 5), st.integers(1, 9))
    groups = groups_of(data.draw(st.lists(pairs, min_size=1, max_size=8)))
    limit = data.draw(st.integers(1, 6))
    queue, model = RequestQueue(groups, limit), Model(groups, limit)
    originals = {r.number: r for group in groups for r in group}
    for _ in range(data.draw(st.integers(0, 40))):
        engine = data.draw(st.sampled_from(ENGINES))
        held = model.held[engine]
        match data.draw(st.sampled_from(("deal", "answer", "again", "die"))):
            case "deal":
                model.deal(queue, data.draw(st.lists(st.sampled_from(ENGINES), unique=True)))
            case "answer" if held:
                number = data.draw(st.sampled_from(sorted(held)))
                assert queue.take_answer(engine, number)
                assert held.pop(number) == originals[number], "with its prompt and its seed"
                model.answered.append(number)
            case "again":
                number = data.draw(st.sampled_from(sorted(originals)))
                if number not in held:
                    assert not queue.take_answer(engine, number)
            case "die":
                assert queue.give_back(engine) == len(held)
                model.returned |= {r.group for r in held.values()}
                held.clear()
        assert queue.answered == len(model.answered)
        assert queue.is_done == (len(model.answered) == len(originals))
    while not queue.is_done:  # at the end one engine lives
        model.deal(queue, [0])
        for engine in ENGINES:
            for number in list(model.held[engine]):
                assert queue.take_answer(engine, number)
                model.answered.append(model.held[engine].pop(number).number)
    assert sorted(model.answered) == sorted(originals) and queue.total == len(originals)


def test_longest_prompts_go_first_and_equal_ones_in_their_order():
    queue = RequestQueue(groups_of([(1, 3), (1, 9), (1, 5), (1, 9)]), max_in_flight=1)
    order = []
    while not queue.is_done:
        (request,) = queue.deal([0])[0]
        order.append(request.number)
        queue.take_answer(0, request.number)
    assert order == [1, 3, 2, 0]


def test_the_engine_that_has_least_gets_the_next_group():
    queue = RequestQueue(groups_of([(4, 9), (2, 8), (1, 7), (1, 6), (1, 5)]), max_in_flight=4)
    dealt = queue.deal([0, 1])
    assert [r.group for r in dealt[0]] == [0] * 4
    assert [r.group for r in dealt[1]] == [1, 1, 2, 3]
    assert queue.deal([0, 1]) == {}, "both are full"
    queue.take_answer(0, 0)
    assert [r.group for r in queue.deal([0, 1])[0]] == [4]


def test_a_group_above_the_limit_goes_alone():
    queue = RequestQueue(groups_of([(5, 9), (1, 8)]), max_in_flight=2)
    assert [r.group for r in queue.deal([0])[0]] == [0] * 5
    for number in range(4):
        queue.take_answer(0, number)
    assert [r.group for r in queue.deal([0])[0]] == [1]


def test_what_a_dead_engine_held_goes_first_to_others_in_its_order():
    """Before prompts that are longer, because it has waited the longest."""
    queue = RequestQueue(groups_of([(2, 9), (2, 8), (2, 7)]), max_in_flight=4)
    assert [r.number for r in queue.deal([0])[0]] == [0, 1, 2, 3]
    queue.take_answer(0, 1)
    assert queue.give_back(0) == 3 and queue.give_back(0) == 0
    assert not queue.take_answer(0, 2), "it no longer awaits anything from the dead one"
    again = queue.deal([1])[1]
    assert [r.number for r in again] == [0, 2, 3]
    assert [r.seed for r in again] == [100, 102, 103]


@pytest.mark.parametrize("engines", [(), (0,)])
def test_a_queue_without_requests_is_done(engines):
    queue = RequestQueue([], max_in_flight=1)
    assert queue.is_done and queue.deal(engines) == {}
