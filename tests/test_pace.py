"""Background work takes a share of the time, until somebody waits for it."""

import threading
import time

from megatron_eopd.checkpoints.pace import Pace


def work(pace: Pace, pieces: int) -> float:
    begin = time.monotonic()
    for _ in range(pieces):
        time.sleep(0.02)
        pace()
    return time.monotonic() - begin


def test_it_sleeps_for_the_rest_of_the_time():
    pace = Pace(0.1)
    assert work(pace, 3) > 0.5 and pace.slept_s > 0.44


def test_whole_shares_do_not_sleep():
    pace = Pace()
    work(pace, 3)
    assert pace.slept_s < 0.01


def test_who_is_waited_for_hurries_out_of_its_sleep():
    pace = Pace(1e-6)
    threading.Timer(0.1, pace.hurry).start()
    assert work(pace, 3) < 5
