"""A task whose responses say what grading them does: for tests and benchmarks of what grades."""

import os
import re
import signal
import sys
import time
from typing import ClassVar

from megatron_eopd.tasks.task import Grade, Verdict


class HostileTask:
    name = "hostile"
    preload: ClassVar = ("tests.hostile_task",)

    def problems(self):
        return iter(())

    def grade(self, answer: str, response: str) -> Grade:
        verb, _, argument = response.partition(" ")
        return getattr(self, f"do_{verb}")(argument)

    def right_response(self, answer: str) -> str:
        return answer

    def num_right(self, answer: str) -> None:
        return None

    def do_say(self, argument: str) -> Grade:
        return Grade(Verdict.RIGHT, argument)

    def do_wrong(self, _: str) -> Grade:
        return Grade(Verdict.WRONG)

    def do_spin(self, _: str) -> Grade:
        while True:
            pass

    def do_hang_in_c(self, _: str) -> Grade:
        re.match(r"(a+)+$", "a" * 60 + "b")  # exponential, and deaf to Python's signals

    def do_sleep(self, seconds: str) -> Grade:
        time.sleep(float(seconds))
        return Grade(Verdict.RIGHT)

    def do_eat_memory(self, _: str) -> Grade:
        eaten = []
        while True:
            eaten.append(bytearray(1 << 24))

    def do_crash(self, _: str) -> Grade:
        os.kill(os.getpid(), signal.SIGSEGV)

    def do_exit(self, code: str) -> Grade:
        os._exit(int(code or 0))

    def do_fail(self, argument: str) -> Grade:
        raise KeyError(argument)

    def do_name_modules(self, _: str) -> Grade:
        return Grade(Verdict.RIGHT, " ".join(sys.modules))

    def do_name_process(self, _: str) -> Grade:
        return Grade(Verdict.RIGHT, str(os.getpid()))


class Exiting(HostileTask):
    """Ends the process at every response, and knows no right one."""

    def grade(self, answer: str, response: str) -> Grade:
        os._exit(3)

    def right_response(self, answer: str) -> None:
        return None


class Reading(HostileTask):
    """Can say what it can read."""

    def is_gradable(self, answer: str) -> bool:
        return "?" not in answer if "hang" not in answer else bool(self.do_spin(answer))
