"""The parts of a run, built once and closed in reverse order. In: Config, ranks. Out: Session."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_eopd import checkpoint
from megatron_eopd.config import Config
from megatron_eopd.data.prompts import PromptSet
from megatron_eopd.data.tokenizer import Tokenizer
from megatron_eopd.evaluation.evaluate import held_out_prompts
from megatron_eopd.models.build import CausalLM, build_model, read_hf_config
from megatron_eopd.models.export import Exporter
from megatron_eopd.models.load import load_weights
from megatron_eopd.parallel.collectives import collecting, raise_together
from megatron_eopd.parallel.init import ParallelContext
from megatron_eopd.parallel.worlds import Role
from megatron_eopd.preflight import Inputs, max_sequence_length
from megatron_eopd.records import Prompt
from megatron_eopd.rollout.engine import RolloutEngine, SyncReport
from megatron_eopd.rollout.megatron_engine import MegatronEngine, score_tokens
from megatron_eopd.rollout.vllm_engine import VllmEngine, vllm_available
from megatron_eopd.run_log import RunLog
from megatron_eopd.teacher.placement import open_teachers
from megatron_eopd.teacher.pool import TeacherPool
from megatron_eopd.training.optimizer import Trainable, make_trainable
from megatron_eopd.training.token_loss import TokenLoss
from megatron_eopd.weight_sync.verify import check_probe

PROBE_SEQUENCES, PROBE_TOKENS = 4, 16


@dataclass(frozen=True)
class Session:
    """What the loop works with. Built by `open_session`, identical in shape on every rank."""

    config: Config
    context: ParallelContext
    log: RunLog
    tokenizer: Tokenizer
    prompts: PromptSet
    held_out: list[Prompt]
    student: Trainable
    teachers: TeacherPool
    token_loss: TokenLoss
    exporter: Exporter
    engine: RolloutEngine
    vocab_size: int
    first_iteration: int
    """0, or the iteration of the checkpoint that was loaded."""

    def push_weights(self, version: int) -> SyncReport:
        """Give the engine the student's weights, and check with probes that it holds them."""
        report = self.engine.update_weights(version)
        if self.config.weight_sync.verify and isinstance(self.engine, VllmEngine):
            probes = probe_sequences(self.vocab_size, self.config)
            check_probe(
                self.engine.score(probes),
                score_tokens(self.student.chunks, probes, self.vocab_size, self.context),
                tolerance=_probe_tolerance(self.config),
                version=version,
            )
        return report


@contextmanager
def open_session(
    config: Config,
    inputs: Inputs,
    roles: Mapping[str, Role],
    store: dist.Store,
    context: ParallelContext,
    log: RunLog,
) -> Iterator[Session]:
    """On the student's ranks. `store`: the job's, where separate teachers are met."""
    student_path = config.student.hf_path
    hf_config = read_hf_config(student_path)
    chunks = build_model(student_path, config.model, context)
    errors: list[Exception] = []
    with collecting(errors):  # each rank reads other tensors, so one may fail alone
        load_weights(chunks, student_path, context)
    raise_together(errors, context.cpu_group)  # before the collectives of the next model's loading
    student = make_trainable(chunks, config, context)
    first_iteration = 0
    if inputs.resume_from is not None:
        first_iteration = checkpoint.load(inputs.resume_from, student, context).iteration
        log.line(f"resumed from {inputs.resume_from}")
    bucket_bytes = int(config.weight_sync.bucket_mib * 2**20)
    exporter = Exporter(chunks, hf_config, context, bucket_bytes)
    with ExitStack() as stack:
        teachers = stack.enter_context(open_teachers(config, roles, inputs.swaps, store, context))
        engine = _make_engine(config, inputs, chunks, exporter, hf_config.vocab_size, context, log)
        stack.enter_context(closing(engine))
        yield Session(
            config=config,
            context=context,
            log=log,
            tokenizer=inputs.tokenizer,
            prompts=inputs.prompts,
            held_out=held_out_prompts(config, inputs.tokenizer),
            student=student,
            teachers=teachers,
            token_loss=TokenLoss(chunks[-1], teachers.heads, config, hf_config.vocab_size, context),
            exporter=exporter,
            engine=engine,
            vocab_size=hf_config.vocab_size,
            first_iteration=first_iteration,
        )


def _make_engine(
    config: Config,
    inputs: Inputs,
    chunks: Sequence[CausalLM],
    exporter: Exporter,
    vocab_size: int,
    context: ParallelContext,
    log: RunLog,
) -> RolloutEngine:
    rollout = config.rollout
    if rollout.replay is not None:
        log.line(f"rollouts: replayed from {rollout.replay}; evaluations use the exact sampler")
        return MegatronEngine(chunks, vocab_size, rollout.max_num_seqs, context)
    if rollout.engine == "megatron" or not vllm_available():
        why = "as configured" if rollout.engine == "megatron" else "vLLM is NOT installed here"
        log.line(f"rollouts: the trainer's exact sampler ({why}); slow for anything but toys")
        return MegatronEngine(chunks, vocab_size, rollout.max_num_seqs, context)
    log.line("rollouts: starting vLLM …")
    return VllmEngine(
        model_path=config.student.hf_path,
        dtype=config.dtype_of(rollout),
        seed=config.seed,
        # One more: to score a sequence vLLM also samples the token behind it.
        max_model_len=max(max_sequence_length(config, inputs.prompts), PROBE_TOKENS) + 1,
        rollout=rollout,
        weight_sync=config.weight_sync,
        manifest=exporter.manifest,
        stage_leader=context.layout.leads_stage,
        export_buckets=exporter.buckets,
        cpu_group=context.cpu_group,
        log_path=config.run_dir / "log" / "engine.txt",
    )


def probe_sequences(vocab_size: int, config: Config) -> list[list[int]]:
    """Fixed random token ids: they touch weights that real text may leave alone."""
    generator = torch.Generator().manual_seed(config.seed)
    shape = (PROBE_SEQUENCES, PROBE_TOKENS)
    return torch.randint(vocab_size, shape, generator=generator).tolist()


def _probe_tolerance(config: Config) -> float:
    if config.weight_sync.tolerance is not None:
        return config.weight_sync.tolerance
    exact = config.model.dtype == "float32" and config.dtype_of(config.rollout) == "float32"
    return 1e-4 if exact else 0.1
