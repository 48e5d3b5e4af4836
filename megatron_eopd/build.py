"""The parts of a run, built once and closed in reverse order. In: Config, ranks. Out: Session."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_eopd.checkpoints.loader import load
from megatron_eopd.checkpoints.position import Position, make_position, read_position
from megatron_eopd.checkpoints.resume import first_sound
from megatron_eopd.checkpoints.saver import Saver
from megatron_eopd.config import Config
from megatron_eopd.data.prompts import PromptSet
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.engines import make_engine, start_own_engine
from megatron_eopd.evaluation.problems import ProblemSet
from megatron_eopd.interruption import Interruption
from megatron_eopd.models.causal_lm import CausalLM
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.load import load_model
from megatron_eopd.models.mcore_files import MCoreCheckpoint
from megatron_eopd.parallel.collectives import collecting, from_rank_zero, raise_together
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.worlds import Role
from megatron_eopd.preflight import Inputs
from megatron_eopd.records import Rollout
from megatron_eopd.rollout.engine import RolloutEngine, SyncReport
from megatron_eopd.rollout.placement import Places
from megatron_eopd.rollout.recording import Recording
from megatron_eopd.run_log import RunLog, StageTimes, gauge_of
from megatron_eopd.schedules import Progress
from megatron_eopd.teacher.placement import open_teachers
from megatron_eopd.teacher.pool import TeacherPool
from megatron_eopd.training.optimizer import Trainable, make_trainable
from megatron_eopd.training.skipping import StepGuard
from megatron_eopd.training.token_loss import TokenLoss
from megatron_eopd.weight_sync.verify import probe_sequences


@dataclass(frozen=True)
class Session:
    """What the loop works with. Built by `open_session`, identical in shape on every rank."""

    config: Config
    context: ParallelContext
    log: RunLog
    stop: Interruption
    tokenizer: Tokenizer
    prompts: PromptSet | None
    """To train on; None where nothing is trained."""
    problem_sets: list[ProblemSet]
    """To evaluate on."""
    recording: Recording | None
    chunks: list[CausalLM]
    """The student's, on this rank."""
    student: Trainable | None
    """The same with its optimizer, where it is trained."""
    teachers: TeacherPool
    token_loss: TokenLoss | None
    """None without a teacher."""
    engine: RolloutEngine
    max_probe_tokens: int
    vocab_size: int
    """Tokens that student and teachers share."""
    first_iteration: int
    """0, or the iteration of the checkpoint that was loaded."""
    first_step: int
    """Optimizer steps until then, without those of an iteration that was broken off."""
    first_steps_done: int
    """Of the first iteration, where the run was stopped within it."""
    resumed_from: Path | None
    """The checkpoint that was loaded."""
    saver: Saver | None
    """Where the student is trained."""
    guard: StepGuard
    """Which steps are skipped."""
    resumes_evaluated: bool
    """Whether a checkpoint was loaded, and the evaluation due at its iteration was made before."""

    @property
    def first_place(self) -> tuple[int, int]:
        """Iteration, and optimizer steps of it that were taken before."""
        return self.first_iteration, self.first_steps_done

    def progress(self, iteration: int, step: int = 0) -> Progress:
        """Before step `step` of an iteration."""
        each = self.config.optimizer_steps_per_iteration
        return Progress(
            iterations=iteration + step / each,
            steps=self.first_step + (iteration - self.first_iteration) * each + step,
            train_iters=self.config.training.train_iters,
        )

    def push_weights(self, version: int, rollouts: Sequence[Rollout] = ()) -> SyncReport:
        """Give the engine the student's weights, and compare what both make of likely tokens, also
        of these rollouts."""
        probes: list[list[int]] = []
        if self.engine.compares_weights:
            prompts = self.prompts or self.problem_sets[0].prompts
            probes = probe_sequences(prompts, rollouts, self.max_probe_tokens)
        return self.engine.update_weights(version, probes)


@contextmanager
def open_session(
    config: Config,
    inputs: Inputs,
    roles: Mapping[str, Role],
    places: Places | None,
    store: dist.Store,
    context: ParallelContext,
    log: RunLog,
    stop: Interruption,
    *,
    trains: bool,
) -> Iterator[Session]:
    """On the student's ranks. `store`: the job's, where separate ranks are met; `places`: of vLLM's
    engines, where it is used. Without training there is no optimizer, and of a checkpoint the
    weights are read."""
    times, tokenizers = StageTimes(log, "start-up", gauge_of(context.device)), inputs.tokenizers
    with ExitStack() as stack:
        # First of all: vLLM loads in its own process while the models are built here.
        errors: list[Exception] = []
        relay = None
        with collecting(errors):
            relay = start_own_engine(config, inputs, places, context.layout.rank)
        if relay is not None:
            stack.callback(relay.close)
        raise_together(errors, context.cpu_group)
        # Each rank has listed the folder by itself, and on a shared disk not all see the same.
        candidates = from_rank_zero(lambda: inputs.candidates, context.cpu_group)
        with times("checkpoint"):
            directory = first_sound(candidates, context, log)
        with times("student"):
            source = config.student.hf_path if trains or directory is None else directory
            chunks = load_model(source, config.model, context)
            student = make_trainable(chunks, config, context) if trains else None
        with times("checkpoint"):
            position = _go_on(config, inputs, directory, student, context, log)
        with times("teachers"):
            teachers = stack.enter_context(
                open_teachers(
                    config, roles, tokenizers.swaps, tokenizers.vocab_size, store, context
                )
            )
            if directory is not None and any(t.follows for t in config.all_teachers.values()):
                vocab_size = read_hf_config(config.student.hf_path).vocab_size
                teachers.read(MCoreCheckpoint(directory), vocab_size)
        with times("engine"):
            engine = make_engine(relay, config, inputs, places, store, chunks, context, log, stop)
        stack.push(lambda _type, error, _traceback: engine.close(error))
        saver = None
        if trains:
            saver = stack.enter_context(
                Saver(config.run_dir, config.student.hf_path, config.checkpoint, context, log.line)
            )
        token_loss = None
        if config.all_teachers:
            token_loss = TokenLoss(
                chunks[-1],
                teachers.heads,
                config,
                tokenizers.vocab_size,
                context,
                tokenizers.student.stop_ids,
            )
        log.startup |= times.seconds
        yield Session(
            config=config,
            context=context,
            log=log,
            stop=stop,
            tokenizer=tokenizers.student,
            prompts=inputs.prompts,
            problem_sets=inputs.problem_sets,
            recording=inputs.recording,
            chunks=chunks,
            student=student,
            teachers=teachers,
            token_loss=token_loss,
            engine=engine,
            # To score a sequence vLLM also samples the token behind it.
            max_probe_tokens=inputs.max_sequence_length - 1,
            vocab_size=tokenizers.vocab_size,
            first_iteration=position.iteration,
            first_step=position.steps_of(config) - position.steps_done,
            first_steps_done=position.steps_done,
            resumed_from=directory,
            saver=saver,
            guard=StepGuard(config.training, position.grad_norms, position.skipped_in_a_row),
            resumes_evaluated=directory is not None and position.is_evaluated,
        )


def _go_on(
    config: Config,
    inputs: Inputs,
    directory: Path | None,
    student: Trainable | None,
    context: ParallelContext,
    log: RunLog,
) -> Position:
    """Where the run stands, by the checkpoint that was chosen; the student to be trained, too."""
    if directory is None:
        prompts_digest = inputs.prompts.digest if inputs.prompts else ""
        return make_position(0, config.seed, prompts_digest, context)
    if student is None:
        log.line(f"the weights of {directory}")
        return read_position(directory)
    vocab_size = read_hf_config(config.student.hf_path).vocab_size
    position = load(directory, student, vocab_size, context)
    log.line(f"resumed from {directory}")
    return position
