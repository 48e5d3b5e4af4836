"""The life of an engine: every event in every state, and all ways that lead to serving."""

import itertools

import pytest

from megatron_eopd.rollout.states import Life, State, StateError

EVENTS = ("ready", "proved", "falls_behind", "silent", "spoke", "died", "restarted")
ALLOWED = {
    ("restarting", "ready"): "stale",
    ("stale", "proved"): "healthy",
    ("stale", "falls_behind"): "stale",
    ("healthy", "falls_behind"): "stale",
    ("suspect", "falls_behind"): "stale",
    ("healthy", "silent"): "suspect",
    ("suspect", "spoke"): "healthy",
    ("restarting", "died"): "dead",
    ("stale", "died"): "dead",
    ("healthy", "died"): "dead",
    ("suspect", "died"): "dead",
    ("dead", "restarted"): "restarting",
}
"""The diagram, written down a second time."""


def happen(life: Life, event: str) -> None:
    getattr(life, event)(*(["a reason"] if event == "died" else []))


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", EVENTS)
def test_an_event_leads_where_the_diagram_says_or_cannot_happen(state, event):
    life = Life(7, max_restarts=3, state=state)
    after = ALLOWED.get((state.value, event))
    if after is None:
        with pytest.raises(StateError, match=f"engine 7 is {state}: {event} cannot happen"):
            happen(life, event)
        assert life == Life(7, max_restarts=3, state=state), "a refused event changes nothing"
    else:
        happen(life, event)
        assert life.state == after


def test_no_way_from_death_to_serving_but_start_sync_and_proof():
    """All sequences of up to six events from DEAD, those that cannot happen cut off."""
    ways, reached = [((), Life(0, max_restarts=9, state=State.DEAD))], 0
    for _ in range(6):
        longer = []
        for (events, life), event in itertools.product(ways, EVENTS):
            after = Life(**vars(life))
            try:
                happen(after, event)
            except StateError:
                continue
            longer.append(((*events, event), after))
            if not after.serves:
                continue
            reached += 1
            last_life = [*events, event][max(i for i, e in enumerate(events) if e == "restarted") :]
            rest = iter(last_life)
            assert all(step in rest for step in ("restarted", "ready", "proved")), last_life
        ways = longer
    assert reached > 10, "some do lead there"


@pytest.mark.parametrize("state", State)
def test_only_a_proved_engine_serves_and_only_one_that_has_loaded_is_asked(state):
    life = Life(0, 3, state=state)
    assert life.serves == (state in ("healthy", "suspect"))
    assert life.runs == (state in ("stale", "healthy", "suspect"))


def die_and_restart(life: Life) -> None:
    for event in ("died", "restarted", "ready"):
        happen(life, event)


@pytest.mark.parametrize("max_restarts", [0, 1, 3])
def test_so_many_restarts_in_a_row_and_no_more(max_restarts):
    life = Life(4, max_restarts)
    life.ready()
    for _ in range(max_restarts):
        die_and_restart(life)
    assert not life.is_lost
    life.died("the last time")
    assert life.is_lost and life.reason == "the last time"
    with pytest.raises(StateError, match=f"engine 4 has used up its {max_restarts} restarts"):
        life.restarted()
    assert life.state == State.DEAD and life.restarts == max_restarts


def test_a_task_that_was_served_counts_restarts_from_zero_again():
    """In a row, not in all."""
    life = Life(0, max_restarts=2)
    life.ready()
    for _ in range(5):
        die_and_restart(life)
        die_and_restart(life)
        life.proved()
        life.served()
        assert life.restarts_in_a_row == 0
    assert life.restarts == 10


def test_an_engine_that_never_was_ready_is_unproven_and_one_that_was_never_is_again():
    life = Life(0, max_restarts=2)
    assert not life.is_unproven
    life.died("no such model")
    assert life.is_unproven
    life.restarted()
    life.ready()
    life.died("later")
    life.restarted()
    life.died("while it started again")
    assert not life.is_unproven
