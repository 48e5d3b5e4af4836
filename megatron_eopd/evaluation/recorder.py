"""Responses of an engine into graded samples on the disk, on one rank. In: Rollouts, as they end.
Out: a SampleFile that grows by whole problems.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from tqdm import tqdm

from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.evaluation.estimators import Outcome
from megatron_eopd.evaluation.grading_pool import GradingPool
from megatron_eopd.evaluation.problems import ProblemSet
from megatron_eopd.evaluation.sample_file import Sample, SampleFile
from megatron_eopd.records import Prompt, Rollout
from megatron_eopd.tasks.task import Grade, Verdict

TELL_INTERVAL_S = 60.0

Graded = list[tuple[Rollout, str, Future[Grade]]]
"""Responses to one problem, their texts and grades, as far as there are."""


class Recorder:
    """Grading goes on beside the engine, in the pool's processes."""

    def __init__(
        self,
        problems: ProblemSet,
        file: SampleFile,
        samples_per_problem: int,
        pool: GradingPool,
        tokenizer: Tokenizer,
        bar: tqdm,
        tell: Callable[[str], None],
    ) -> None:
        """`bar`: of samples; `tell` hears now and then how far it is, for logs without a bar."""
        self.file = file
        self._problems, self._count = problems, samples_per_problem
        self._pool, self._tokenizer, self._bar = pool, tokenizer, bar
        self._open: dict[int, Graded] = {}
        self._whole: deque[Graded] = deque()
        self._before = samples_per_problem * sum(file.has(p.index) for p in problems.prompts)
        self._done = self._before
        self._tell, self._begin = tell, time.monotonic()
        self._told_at = self._begin
        self._has_warned = False
        bar.update(self._before)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self.file.close()

    def missing(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Of which there are not all samples yet."""
        return [prompt for prompt in prompts if not self.file.has(prompt.index)]

    def add(self, _: int, rollout: Rollout) -> None:
        """As an engine tells it: in any order, and a problem's samples once each."""
        own = self._open.setdefault(rollout.prompt.index, [])
        text = self._tokenizer.decode(rollout.response_ids)
        own.append((rollout, text, self._grade(rollout, text)))
        self._go_on()
        if len(own) == self._count:
            self._whole.append(self._open.pop(rollout.prompt.index))
        while self._whole and all(grade.done() for *_, grade in self._whole[0]):
            self._write(self._whole.popleft())

    def _go_on(self) -> None:
        self._bar.update()
        self._done += 1
        now = time.monotonic()
        if now - self._told_at > TELL_INTERVAL_S:
            self._told_at = now
            far = tqdm.format_meter(
                self._done,
                self._count * len(self._problems.prompts),
                now - self._begin,
                initial=self._before,
                unit=" samples",
                bar_format="{n_fmt} of {total_fmt} samples, {rate_fmt}, ETA {remaining}",
            )
            self._tell(f"evaluation on {self._problems.name}: {far}")

    def settle(self) -> None:
        """Wait for the grades of all problems that are whole. The others are drawn again."""
        while self._whole:
            self._write(self._whole.popleft())
        self._open.clear()

    def rollouts(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        return [s.rollout(prompt) for prompt in prompts for s in self.file.read(prompt.index)]

    def outcomes(self) -> list[Outcome]:
        """Of all problems, in their order."""
        both = zip(self.file.outcomes(), self._problems.problems, strict=True)
        return [o._replace(num_right=self._problems.task.num_right(p.answer)) for o, p in both]

    def _grade(self, rollout: Rollout, text: str) -> Future[Grade]:
        if rollout.finish_reason == "length":
            # A response that was cut has not ended, however right it looks.
            return _known(Grade(Verdict.NO_ANSWER))
        return self._pool.submit(self._problems.task, rollout.prompt.answer, text)

    def _write(self, graded: Graded) -> None:
        in_order = sorted(graded, key=lambda each: each[0].sample_index)
        samples = [_sample(rollout, text, grade.result()) for rollout, text, grade in in_order]
        self.file.add(samples)
        for sample in samples:
            self._warn(sample)

    def _warn(self, sample: Sample) -> None:
        """Once: a task that ends its process is likely to do it often."""
        is_ended = sample.verdict == Verdict.TIMED_OUT and sample.detail
        if is_ended and not self._has_warned:
            self._has_warned = True
            self._tell(
                f"warning: evaluation on {self._problems.name}: "
                f"{self._problems.problems[sample.problem].where}: {sample.detail}, and the sample "
                f"counts as timed out. This is told once; the `detail` of samples has the others."
            )


def _sample(rollout: Rollout, text: str, grade: Grade) -> Sample:
    return Sample(
        problem=rollout.prompt.index,
        sample=rollout.sample_index,
        verdict=grade.verdict.value,
        answer=grade.canonical,
        second=grade.second,
        finish_reason=rollout.finish_reason,
        weight_version=rollout.weight_version,
        text=text,
        response_ids=rollout.response_ids,
        detail=grade.detail,
    )


def _known(grade: Grade) -> Future[Grade]:
    future: Future[Grade] = Future()
    future.set_result(grade)
    return future
