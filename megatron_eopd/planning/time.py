"""How long the stages of an iteration take. In: a Setup, assumptions. Out: seconds.

Work divided by speed: floating-point operations, and bytes over memory, links and network. None of
the speeds was measured on the machine that is planned for; a run's own metrics replace them stage
by stage (`Calibration`). What this is good for is to rank layouts, not to promise seconds.
"""
# e: bytes of an element.

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_eopd.config import ModelConfig
from megatron_eopd.planning.assumptions import Assumptions
from megatron_eopd.planning.memory import Placed, Setup, itemsize
from megatron_eopd.planning.shapes import LayerWeights, ModelShape, layers_of_stage

STAGES = ("rollout", "score", "train", "sync")


@dataclass(frozen=True)
class IterationTime:
    """Seconds, by the stages that metrics.jsonl knows as time/rollout, time/score, …"""

    rollout: float
    score: float
    train: float
    sync: float

    @property
    def total(self) -> float:
        return self.rollout + self.score + self.train + self.sync

    @property
    def stages(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in STAGES}


@dataclass(frozen=True)
class Machine:
    """Speeds, and how ranks are spread over nodes."""

    assumptions: Assumptions = field(default_factory=Assumptions)
    gpus_per_node: int = 8

    def link(self, span: int) -> float:
        """Bytes per second between ranks out of `span` consecutive ones."""
        a = self.assumptions
        return 1e9 * (a.node_bandwidth if span <= self.gpus_per_node else a.network_bandwidth)

    def flops(self, dtype: str, share: float) -> float:
        a = self.assumptions
        return 1e12 * share * (a.tflops_float32 if dtype == "float32" else a.tflops)


@dataclass(frozen=True)
class Costs:
    """Seconds that one microbatch takes on a rank, stage by stage of a pipeline."""

    placed: Placed
    machine: Machine

    @property
    def _tokens(self) -> float:
        return self.placed.load.tokens / self.placed.layout.cp

    @property
    def _response_tokens(self) -> float:
        return self.placed.load.response_tokens / self.placed.layout.cp

    @property
    def _speed(self) -> float:
        return self.machine.flops(self.placed.dtype, self.machine.assumptions.mfu)

    def forward(self, stage: int) -> float:
        """Of the stage's layers, all chunks."""
        layout, shape = self.placed.layout, self.placed.shape
        launch = self.machine.assumptions.layer_launch_us * 1e-6
        total = 0.0
        for weights, count in layers_of_stage(shape, layout.pp, layout.vpp, stage).items():
            compute = self._tokens * self.layer_flops(weights) / layout.tp / self._speed
            work = max(compute, launch) + self._score_sweeps
            total += count * (work + self._communication(bool(weights.experts)))
        return total + self._hand_over

    def layer_flops(self, weights: LayerWeights) -> float:
        """Of one token's forward pass, over all tensor-parallel ranks."""
        active = weights.replicated + weights.split + weights.experts * self._routed_share
        return 2 * active + self.core_flops

    @property
    def _routed_share(self) -> float:
        shape, platform = self.placed.shape, self.placed.platform
        if not shape.num_experts:
            return 0.0
        return shape.experts_per_token / shape.num_experts * platform.expert_imbalance

    @property
    def core_flops(self) -> float:
        """Of one token's attention, over all tensor-parallel ranks: half of the sequence is in its
        past, which only a causal kernel makes use of."""
        heads = self.placed.shape.heads
        halves = 2 if self.placed.activations.builds_scores else 1
        return halves * 2 * heads.num_heads * heads.head_dim * self.placed.load.sequence

    def core_attention(self, stage: int) -> float:
        """The part of `forward` that selective recomputation repeats."""
        layout = self.placed.layout
        layers = layers_of_stage(self.placed.shape, layout.pp, layout.vpp, stage)
        compute = self._tokens * self.core_flops / layout.tp / self._speed
        return sum(layers.values()) * (compute + self._score_sweeps)

    @property
    def _score_sweeps(self) -> float:
        """Of a layer whose attention builds its scores: about eight passes over them in float32."""
        if not self.placed.activations.builds_scores:
            return 0.0
        heads = self.placed.shape.heads.num_heads / self.placed.layout.tp
        moved = 8 * 4 * heads * self._tokens * self.placed.load.sequence
        return moved / (1e9 * self.machine.assumptions.memory_bandwidth)

    def _communication(self, has_experts: bool) -> float:
        """Of one layer's forward pass, none of it hidden."""
        layout, shape, e = self.placed.layout, self.placed.shape, itemsize(self.placed.dtype)
        row = e * shape.hidden_size * self._tokens
        # Two all-reduces; under sequence parallelism an all-gather and a reduce-scatter each.
        seconds = 2 * 2 * row * (layout.tp - 1) / layout.tp / self.machine.link(layout.tp)
        keys = 2 * shape.heads.num_groups * shape.heads.head_dim * e / layout.tp
        span = layout.tp * layout.cp
        seconds += (layout.cp - 1) * self._tokens * keys / self.machine.link(span)
        if has_experts:
            span = layout.ep * layout.expert_tp
            sent = row / layout.tp * shape.experts_per_token * (span - 1) / span
            seconds += 2 * sent / self.machine.link(span)  # there and back
        return seconds

    @property
    def _hand_over(self) -> float:
        """Activations from stage to stage, once per chunk."""
        layout = self.placed.layout
        if layout.pp == 1:
            return 0.0
        row = itemsize(self.placed.dtype) * self.placed.shape.hidden_size * self._tokens
        shards = layout.tp if layout.sequence_parallel else 1
        return layout.vpp * row / shards / self.machine.link(2 * layout.stage_size)

    def head(self, shape: ModelShape) -> float:
        """Forward pass of an LM head with this rank's columns."""
        return 2 * self._response_tokens * shape.hidden_size * self.placed.columns / self._speed

    @property
    def loss(self) -> float:
        """Two sweeps over both models' logits, and the gradient once."""
        e = itemsize(self.placed.dtype)
        pairs = self._response_tokens * self.placed.columns
        return 5 * e * pairs / (1e9 * self.machine.assumptions.memory_bandwidth)


def pipelined(stages: Iterable[float], num_microbatches: int, vpp: int) -> float:
    """Seconds of a 1F1B schedule: its slowest stage is always at work, except while the pipeline
    fills and drains; interleaved chunks fill it `vpp` times as fast."""
    stages = list(stages)
    slowest = max(stages)
    return num_microbatches * slowest + (sum(stages) - slowest) / vpp


def estimate(setup: Setup, machine: Machine) -> IterationTime:
    """Without calibration."""
    train = train_seconds(setup, machine)
    return IterationTime(
        rollout=rollout_seconds(setup, machine),
        score=score_seconds(setup, machine, train),
        train=train,
        sync=sync_seconds(setup, machine),
    )


def train_seconds(setup: Setup, machine: Machine) -> float:
    """All optimizer steps of an iteration."""
    student, config = setup.student, setup.config
    costs = Costs(student, machine)
    stages = [_train_stage(costs, n, setup) for n in range(student.layout.pp)]
    per_exchange = setup.microbatches_per_exchange
    rounds = student.load.num_microbatches / per_exchange
    step = rounds * pipelined(stages, per_exchange, student.layout.vpp)
    step += _gradient_seconds(setup, machine)
    overhead = machine.assumptions.step_overhead_s
    return config.optimizer_steps_per_iteration * (step + overhead)


def _train_stage(costs: Costs, stage: int, setup: Setup) -> float:
    """Forward and backward pass of a microbatch; the backward pass costs twice the forward."""
    model = setup.config.model
    forward = costs.forward(stage)
    seconds = 3 * forward + _recomputed(costs, stage, model, forward)
    if stage == setup.student.layout.pp - 1:
        seconds += 3 * costs.head(setup.student.shape) + costs.loss
        if setup.config.teacher.payload == "hidden":
            seconds += max(costs.head(teacher.shape) for teacher in setup.teachers.values())
    return seconds


def _recomputed(costs: Costs, stage: int, model: ModelConfig, forward: float) -> float:
    if model.recompute_granularity == "selective":
        return costs.core_attention(stage)
    if model.recompute_granularity != "full":
        return 0.0
    if model.recompute_method == "uniform":
        return forward
    layout = costs.placed.layout
    num_layers = len(costs.placed.shape.layers) // (layout.pp * layout.vpp)
    return forward * min(model.recompute_num_layers, num_layers) / num_layers


def _gradient_seconds(setup: Setup, machine: Machine) -> float:
    """Reduce-scatter of float32 gradients, the optimizer's own sweep, all-gather of weights."""
    student, training = setup.student, setup.config.training
    layout = student.layout
    replicas = layout.dp * layout.cp
    parameters = max(stage.total for stage in student.parameters)
    e = itemsize(student.dtype)
    sent = 0 if training.overlap_grad_reduce else 4
    sent += 0 if training.overlap_param_gather else e
    seconds = sent * parameters * (replicas - 1) / replicas / machine.link(layout.stage_size)
    # Gradient, master weight and both moments in; the last three and the weight out.
    swept = (4 + 12 + 12 + e) * parameters / replicas
    return seconds + swept / (1e9 * machine.assumptions.memory_bandwidth)


def score_seconds(setup: Setup, machine: Machine, train: float) -> float:
    """What the student waits for the teachers in an iteration. Those on its own ranks take turns;
    each has an equal share of the samples. Those on ranks of their own work while it trains."""
    steps = setup.config.optimizer_steps_per_iteration
    share = steps / len(setup.teachers)
    waits = machine.assumptions.step_overhead_s * steps
    work_ahead = 0.0
    for section in setup.teachers:
        seconds = share * _teacher_step(setup, section, machine)
        if setup.options_of(section).placement == "colocated":
            waits += seconds
        else:
            work_ahead = max(work_ahead, seconds)
    rounds = steps * -(-setup.student.load.num_microbatches // setup.microbatches_per_exchange)
    first = work_ahead / rounds
    hidden = train * (rounds - 1) / rounds
    return waits + first + max(0.0, work_ahead - first - hidden)


def _teacher_step(setup: Setup, section: str, machine: Machine) -> float:
    """Of the samples of an optimizer step."""
    teacher = setup.teachers[section]
    costs = Costs(teacher, machine)
    stages = [costs.forward(n) for n in range(teacher.layout.pp)]
    if setup.options_of(section).payload != "hidden":
        stages[-1] += costs.head(teacher.shape)
    count = teacher.load.num_microbatches
    rounds = max(1, round(setup.student.load.num_microbatches / setup.microbatches_per_exchange))
    drains = (rounds - 1) * (sum(stages) - max(stages))  # the pipeline empties between exchanges
    return pipelined(stages, count, 1) + drains + _load_seconds(setup, section, machine)


def _load_seconds(setup: Setup, section: str, machine: Machine) -> float:
    """An offloaded teacher's weights, from host memory."""
    if not setup.options_of(section).offload:
        return 0.0
    teacher = setup.teachers[section]
    size = max(stage.total for stage in teacher.parameters) * itemsize(teacher.dtype)
    return size / (1e9 * machine.assumptions.host_bandwidth)


def rollout_seconds(setup: Setup, machine: Machine) -> float:
    """Of one vLLM engine: every step reads all weights that its batch uses and the batch's keys and
    values, or is bound by arithmetic."""
    config, shape = setup.config, setup.student.shape
    if config.rollout.replay is not None:
        return 0.0
    if config.rollout.engine == "megatron":
        return _megatron_rollout_seconds(setup, machine)
    dtype, gpus = config.dtype_of(config.rollout), config.rollout.tensor_model_parallel_size
    e = itemsize(dtype)
    response, row = setup.lengths.response, _cache_row(setup)
    batch = sequences_at_once(setup)
    past = setup.lengths.prompt + response / 2
    read = weights_read(shape, batch) * e + batch * past * row
    speed = machine.flops(dtype, machine.assumptions.decode_mfu) * gpus
    step = max(
        read / gpus / (1e9 * machine.assumptions.decode_bandwidth),
        2 * batch * active_parameters(shape) / speed,
    )
    steps = response * config.rollout.batch_size / batch
    prompts = (
        2 * config.rollout.batch_size * setup.lengths.prompt * active_parameters(shape) / speed
    )
    return steps * step + prompts + machine.assumptions.step_overhead_s


def _cache_row(setup: Setup) -> int:
    """Bytes of keys and values of one token in vLLM."""
    shape = setup.student.shape
    heads = shape.heads.num_groups * shape.heads.head_dim
    return 2 * heads * len(shape.layers) * itemsize(setup.config.dtype_of(setup.config.rollout))


def sequences_at_once(setup: Setup) -> int:
    """That vLLM runs: by its options, or by what its key/value cache holds."""
    rollout = setup.config.rollout
    cache = rollout.kv_cache_gib * 2**30 * rollout.tensor_model_parallel_size
    room = int(cache / (_cache_row(setup) * setup.lengths.total))
    return max(1, min(rollout.batch_size, rollout.max_num_seqs, room))


def _megatron_rollout_seconds(setup: Setup, machine: Machine) -> float:
    """The exact sampler: a whole forward pass for every token, half of the response long."""
    student, config = setup.student, setup.config
    costs = Costs(student, machine)
    per_microbatch = sum(costs.forward(n) for n in range(student.layout.pp))
    samples = config.rollout.batch_size / student.layout.dp
    passes = samples * student.load.sequence / student.load.tokens
    return setup.lengths.response * passes * per_microbatch / 2


def active_parameters(shape: ModelShape) -> float:
    """That take part in one token's forward pass, without the embedding."""
    share = shape.experts_per_token / shape.num_experts if shape.num_experts else 0.0
    layers = sum(w.replicated + w.split + w.experts * share for w in shape.layers)
    return layers + shape.vocab_size * shape.hidden_size


def weights_read(shape: ModelShape, batch: float) -> float:
    """Parameters that a decoding step reads: of the experts, those that any of the batch chose."""
    idle = 0.0
    if shape.num_experts:
        idle = (1 - shape.experts_per_token / shape.num_experts) ** batch
    layers = sum(w.replicated + w.split + w.experts * (1 - idle) for w in shape.layers)
    return layers + shape.vocab_size * shape.hidden_size


def sync_seconds(setup: Setup, machine: Machine) -> float:
    """Every weight once, from the stages' leaders to the engine."""
    config, student = setup.config, setup.student
    if config.rollout.engine == "megatron" or config.rollout.replay is not None:
        return 0.0
    a = machine.assumptions
    bandwidth = a.sync_bandwidth_nccl if config.rollout.visible_devices else a.sync_bandwidth
    return student.shape.num_parameters * itemsize(student.dtype) / (1e9 * bandwidth)


@dataclass(frozen=True)
class Calibration:
    """What a run measured over what would have been estimated for it."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """By stage; a stage that is not there is left as estimated."""
    memory: float = 1.0
    """Of activations and logits."""

    def time(self, estimated: IterationTime) -> IterationTime:
        scaled = {name: x * self.seconds.get(name, 1.0) for name, x in estimated.stages.items()}
        return IterationTime(**scaled)
