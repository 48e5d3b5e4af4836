"""The student on held-out problems. In: an engine, and teachers if there are. Out: figures, and
files that hold every sample.

The same stages as training: generate, score, measure; then grade. Samples go through files, so what
was drawn before an interruption is not drawn again, and memory does not grow with their number.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_eopd.config import Config
from megatron_eopd.data.packing import rounds_as_trained
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.evaluation.grading_pool import GradingPool
from megatron_eopd.evaluation.problems import ProblemSet, grading_pool
from megatron_eopd.evaluation.recorder import Recorder
from megatron_eopd.evaluation.report_file import make_report, write_report
from megatron_eopd.evaluation.reports import Report, scalars_of
from megatron_eopd.evaluation.sample_file import Json, Measured, SampleFile
from megatron_eopd.evaluation.settings import measuring_settings, sampling_settings
from megatron_eopd.evaluation.token_keeper import TokenKeeper
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.parallel.collectives import collecting, from_rank_zero, raise_together
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.records import Prompt, Rollout
from megatron_eopd.rollout.engine import RolloutEngine, Sampling
from megatron_eopd.run_log import RunLog
from megatron_eopd.teacher.pool import TeacherPool
from megatron_eopd.training.step import measure
from megatron_eopd.training.token_loss import TokenLoss

BATCHES_AT_ONCE = 4
"""Responses are drawn and measured so many times the engine's batch at a time: few enough for
memory, and enough that the engine waits seldom for the last of them."""
SHOWN = 32
"""Samples of each task that are kept for whoever shows some."""


@dataclass(frozen=True)
class Evaluation:
    figures: dict[str, float]
    """`eval/<task>/<figure>` → value."""
    reports: list[Report]
    shown: list[tuple[Rollout, bool]]
    """The first sample of the first problems of each task, and whether it is right."""


@dataclass(frozen=True)
class Evaluator:
    """What an evaluation is made with. Every method is collective over the student's ranks."""

    config: Config
    context: ParallelContext
    log: RunLog
    tokenizer: Tokenizer
    engine: RolloutEngine
    engine_name: str
    """As reports say it."""
    chunks: Sequence[CausalLM]
    teachers: TeacherPool
    token_loss: TokenLoss | None
    """None without a teacher: then no divergences are measured."""
    checkpoint: Path | None = None
    """Which the weights were read from; None of a run that goes on."""

    def evaluate(
        self, problem_sets: Sequence[ProblemSet], directory: Path, model: Json, *, anew: bool
    ) -> Evaluation:
        """Into files of the directory. `model`: whose weights the engine has. `anew`: take nothing
        of what is there.

        Raises:
            ConfigError: there are samples that were drawn otherwise.
            EngineError: what was told by then is on the disk.
        """
        with ExitStack() as stack:
            pool = None
            if self._writes:
                pool = stack.enter_context(grading_pool(problem_sets, self.config.evaluation))
            done = [self._one(p, directory, model, pool, anew=anew) for p in problem_sets]
        reports = [report for report, _ in done]
        return Evaluation(
            {f"eval/{r.task}/{name}": v for r in reports for name, v in scalars_of(r).items()},
            reports,
            [pair for _, shown in done for pair in shown],
        )

    @property
    def _writes(self) -> bool:
        return self.context.layout.rank == 0

    def _one(
        self,
        problems: ProblemSet,
        directory: Path,
        model: Json,
        pool: GradingPool | None,
        *,
        anew: bool,
    ) -> tuple[Report, list[tuple[Rollout, bool]]]:
        size = self._problems_at_once
        errors: list[Exception] = []
        with ExitStack() as stack:
            recorder = measured = settings = None
            with collecting(errors):
                if pool is not None:
                    settings = self._settings(problems)
                    weights = {name: value for name, value in model.items() if name != "path"}
                    drawn = settings | {"model": weights}
                    recorder = stack.enter_context(
                        self._recorder(problems, directory, drawn, pool, anew)
                    )
                    if self.token_loss is not None:
                        path = directory / f"{problems.name}.measured.jsonl"
                        told = measuring_settings(problems, self.config, size, self.checkpoint)
                        measured = Measured(path, told | {"samples": drawn}, anew=anew)
            raise_together(errors, self.context.cpu_group)
            keeper = self._keeper(problems, directory, model)
            if anew and pool is not None:
                keeper.path.unlink(missing_ok=True)  # of other samples
            for number, prompts in enumerate(problems.chunks(size)):
                self._draw(prompts, recorder)
                if self.token_loss is not None:
                    self._measure(number, prompts, recorder, measured, keeper)

            def reported() -> tuple[Report, list[tuple[Rollout, bool]]]:
                sums = measured.sums() if measured is not None else []
                options = self.config.evaluation
                report = make_report(problems, recorder.outcomes(), sums, settings, model, options)
                write_report(report, directory)
                return report, _shown(problems, recorder)

            return from_rank_zero(reported, self.context.cpu_group)

    def _keeper(self, problems: ProblemSet, directory: Path, model: Json) -> TokenKeeper:
        return TokenKeeper(
            task=problems.name,
            directory=directory,
            iteration=model.get("iteration", 0),
            config=self.config,
            tokenizer=self.tokenizer,
            context=self.context,
            tell=self.log.line,
        )

    def _settings(self, problems: ProblemSet) -> Json:
        return sampling_settings(problems, self.config, self.tokenizer, self.engine_name)

    @property
    def _problems_at_once(self) -> int:
        samples = BATCHES_AT_ONCE * self.config.rollout.max_num_seqs
        return max(1, samples // self.config.evaluation.samples_per_problem)

    def _recorder(
        self, problems: ProblemSet, directory: Path, settings: Json, pool: GradingPool, anew: bool
    ) -> Recorder:
        count = self.config.evaluation.samples_per_problem
        path = directory / f"{problems.name}.samples.jsonl"
        file = SampleFile(path, settings, count, anew=anew)
        bar = self.log.bar(count * len(problems.prompts), problems.name)
        return Recorder(problems, file, count, pool, self.tokenizer, bar, self.log.line)

    def _draw(self, prompts: list[Prompt], recorder: Recorder | None) -> None:
        """What is missing of the prompts' samples, until all are graded and written."""
        group, options = self.context.cpu_group, self.config.evaluation
        missing = from_rank_zero(lambda: recorder.missing(prompts), group)
        if not missing:
            return
        sampling = Sampling(
            samples_per_prompt=options.samples_per_problem,
            temperature=self.config.evaluation_temperature,
            max_response_length=self.config.evaluation_response_length,
            stop_ids=self.tokenizer.stop_ids,
            seed=options.seed,
            top_p=options.top_p,
        )
        try:
            self.engine.generate(missing, sampling, recorder and recorder.add)
        except Exception:
            if recorder is not None:
                with suppress(Exception):  # the engine's fault is the one to tell
                    recorder.settle()
            raise
        from_rank_zero(lambda: recorder.settle(), group)

    def _measure(
        self,
        number: int,
        prompts: list[Prompt],
        recorder: Recorder | None,
        measured: Measured | None,
        keeper: TokenKeeper,
    ) -> None:
        """The divergences from the teacher on the student's own answers."""
        group = self.context.cpu_group
        if from_rank_zero(lambda: measured.of(number) is not None, group):
            if number == 0 and keeper.count and measured and not keeper.path.is_file():
                self.log.line(
                    f"tokens of {keeper.task} are not recorded: its samples were measured before, "
                    f"without a recording"
                )
            return
        rollouts = from_rank_zero(lambda: recorder.rollouts(prompts), group)
        notes = keeper.notes(rollouts) if number == 0 else None
        rounds = self.teachers.microbatches(
            rounds_as_trained(rollouts, self.config, self.context.layout)
        )
        sums = measure(self.token_loss, self.chunks, rounds, self.context, notes).sums
        if notes is not None:
            keeper.keep(notes, recorder)
        from_rank_zero(lambda: measured.add(number, sums), group)


def _shown(problems: ProblemSet, recorder: Recorder) -> list[tuple[Rollout, bool]]:
    shown = []
    for prompt in problems.prompts[:SHOWN]:
        sample = recorder.file.read(prompt.index)[0]
        shown.append((sample.rollout(prompt), sample.verdict == "right"))
    return shown
