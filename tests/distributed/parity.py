"""One batch, one step, any layouts of student and teacher: loss, KL terms and every gradient.

In: a Case. Out: what its ranks found, gathered into one dict under Hugging Face names, and its
distance from what a single process finds. The short list in test_parallelism.py and the whole
matrix of `make test-matrix` are lists of Cases.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

from megatron_eopd.config import Config
from megatron_eopd.data.packing import Limits, exchange_size, own_response_tokens, pack, rounds_of
from megatron_eopd.metrics.means import divide
from megatron_eopd.models.build import build_model
from megatron_eopd.models.export import Exporter
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.load import load_weights
from megatron_eopd.parallel.init import choose_device, free_port, join_groups, leave_groups
from megatron_eopd.parallel.worlds import STUDENT, roles_of, student_layout
from megatron_eopd.records import Rollout
from megatron_eopd.schedules import START
from megatron_eopd.teacher.placement import open_teachers, wire_store
from megatron_eopd.teacher.separate import serve
from megatron_eopd.tokens.notes import TokenNotes
from megatron_eopd.training.optimizer import make_trainable
from megatron_eopd.training.step import accumulate_gradients, share_from_last_stage
from megatron_eopd.training.token_loss import TokenLoss
from tests.ranks import start_ranks

PAYLOADS = ("hidden", "logits", "topk")
TERMS = ("reverse_kl", "forward_kl", "teacher_entropy", "student_entropy")


@dataclass(frozen=True)
class Case:
    """Layouts and options of one run. World size: the student's product, and separate ranks."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    sp: bool = False
    dp: int = 1
    ep: int = 1
    layers: tuple[int | None, int | None] = (None, None)
    """Of the student's first and last pipeline stage."""
    payload: str = "hidden"
    teacher: dict = field(default_factory=dict)
    """Options of [teacher] beside path and payload."""
    training: dict = field(default_factory=dict)
    other: dict = field(default_factory=dict)
    """Other sections. A teacher in them may have the name of a model for a path."""
    swaps: tuple[tuple[int, int], ...] = ()
    """Of every teacher: what eos_token_map comes to."""
    vocab_size: int | None = None
    """Tokens that are compared; None for all of the student's columns."""

    @property
    def world_size(self) -> int:
        students = self.tp * self.pp * self.cp * self.dp
        teachers = [self.teacher, *self.other.get("teachers", {}).values()]
        return students + sum(teacher.get("world_size", 0) for teacher in teachers)

    def config(self, models: dict[str, Path]) -> Config:
        objective = {"entropy_threshold": 2.8}
        if self.payload == "topk":
            objective |= {"name": "eopd_paper", "top_k": 4}
        options = {
            "run_dir": "unused",
            "student": {"hf_path": models["student"]},
            "teacher": {"hf_path": models["teacher"], "payload": self.payload} | self.teacher,
            "parallel": {
                "tensor_model_parallel_size": self.tp,
                "pipeline_model_parallel_size": self.pp,
                "virtual_pipeline_model_parallel_size": self.vpp,
                "decoder_first_pipeline_num_layers": self.layers[0],
                "decoder_last_pipeline_num_layers": self.layers[1],
                "context_parallel_size": self.cp,
                "expert_model_parallel_size": self.ep,
                "sequence_parallel": self.sp,
                "distributed_timeout_minutes": 1,
            },
            "objective": objective,
            "rollout": {"temperature": 0.8, "batch_size": 16},
            "training": {"global_batch_size": 16, "micro_batch_size": 2} | self.training,
        }
        for section, own in self.other.items():
            options[section] = options.get(section, {}) | own
        for teacher in options.get("teachers", {}).values():
            teacher["hf_path"] = models.get(teacher["hf_path"], teacher["hf_path"])
        return Config.model_validate(options)

    def describe(self) -> str:
        sizes = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp, "CP": self.cp, "DP": self.dp}
        text = " ".join(f"{name}{size}" for name, size in sizes.items())
        text += " SP" if self.sp else ""
        text += f" EP{self.ep}" if self.ep > 1 else ""
        if any(self.layers):
            text += " layers " + "…".join(str(n or "") for n in self.layers)
        own = self.teacher.get("parallel", {})
        short = {"tensor": "TP", "pipeline": "PP", "expert": "EP"}
        parts = [f"{short[k.split('_')[0]]}{v}" for k, v in own.items() if k.endswith("size")]
        if "world_size" in self.teacher:
            parts.append(f"on {self.teacher['world_size']} ranks of its own")
        if parts:
            text += f" | teacher {' '.join(parts)}"
        return f"{text} | {self.payload}"


class RecordingLoss(TokenLoss):
    """Keeps the KL terms of every token it sees, in the order of the microbatches."""

    seen: list[torch.Tensor]

    def _signals(self, *args):
        signals, terms, details = super()._signals(*args)
        self.seen.append(torch.stack([getattr(terms.kl, name).detach() for name in TERMS], -1))
        return signals, terms, details


def run_cases(
    cases: list[Case], models: dict[str, Path], rollouts: list[Rollout], tmp_path: Path
) -> list[dict]:
    """Results of the cases, which share one world size and layout of ranks, in one launch. Single
    processes have nothing to tell each other: two of them share the cases."""
    world_size = cases[0].world_size
    out = tmp_path / f"cases-{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    numbered = list(enumerate(cases))
    if world_size == 1:
        halves = [half for half in (numbered[0::2], numbered[1::2]) if half]
        ports = [free_port() for _ in halves]
        start_ranks(len(halves), _single_main, ports, halves, models, rollouts, out)
    else:
        start_ranks(
            world_size, _rank_main, free_port(), world_size, numbered, models, rollouts, out
        )
    return [_collect(out / str(n)) for n, _ in numbered]


def _single_main(half, ports, halves, models, rollouts, out) -> None:
    _rank_main(0, ports[half], 1, halves[half], models, rollouts, out)


def _rank_main(rank, port, world_size, numbered, models, rollouts, out) -> None:
    choose_device()
    job = TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    first = numbered[0][1].config(models)
    role = next(r for r in roles_of(first, world_size).values() if r.holds(rank))
    store = PrefixStore(role.name, job)
    dist.init_process_group("gloo", store=store, rank=rank - role.first_rank, world_size=role.size)
    context = None
    columns = read_hf_config(models["student"]).vocab_size
    for n, case in numbered:
        config = case.config(models)
        layout = role.layout(config, rank)
        if context is None or context.layout != layout:
            if context is not None:
                leave_groups()
            context = join_groups(layout, torch.device("cpu"), timeout_minutes=1, seed=1)
        own = PrefixStore(f"case{n}", job)
        vocab_size = case.vocab_size or columns
        if role.name == STUDENT:
            _student_case(
                config, case.swaps, vocab_size, world_size, rollouts, own, context, out / str(n)
            )
        else:
            teacher = config.all_teachers[role.name]
            students = student_layout(config, world_size)
            joint = wire_store(own, role.name)
            serve(teacher, role, config, case.swaps, vocab_size, joint, students, context)
    leave_groups()
    dist.destroy_process_group()


def _check_notes(
    notes: TokenNotes, shared, rollouts: list[Rollout], context, *, is_summed: bool
) -> None:
    """Whatever the options, every token was taken down once, with the values of the metrics.
    `is_summed`: over teachers, of which the first is taken down."""
    columns = notes.gather(context)
    if columns is None:
        return
    places = set(zip(columns["response"].tolist(), columns["token"].tolist(), strict=True))
    assert len(places) == len(columns["token"]) == sum(len(r.response_ids) for r in rollouts)
    for name in () if is_summed else ("reverse_kl", "forward_kl"):
        total = columns[name].astype("float64").sum()
        assert abs(total - shared.sums[f"loss/{name}"][0]) <= 1e-5 * abs(total), name


def _student_case(config, swaps, vocab_size, world_size, rollouts, store, context, out) -> None:
    chunks = build_model(config.student.hf_path, config.model, context)
    load_weights(chunks, config.student.hf_path, context)
    hf_config = read_hf_config(config.student.hf_path)
    student = make_trainable(chunks, config, context)
    roles = roles_of(config, world_size)
    swaps = dict.fromkeys(config.all_teachers, swaps)
    packed = pack(rollouts, Limits.of(config.training), context.layout)
    rounds = rounds_of(packed, exchange_size(config))
    with open_teachers(config, roles, swaps, vocab_size, store, context) as pool:
        loss = RecordingLoss(chunks[-1], pool.heads, config, vocab_size, context)
        loss.seen = []
        notes = TokenNotes(rollouts)
        means = accumulate_gradients(
            student,
            loss,
            pool.microbatches(rounds),
            context,
            num_rounds=len(rounds),
            progress=START,
            compare_engine=False,
            notes=notes,
            force_all_reduce=True,
        )
        shared = share_from_last_stage(means, context)
        is_summed = config.objective.teacher_mixture == "divergences"
        _check_notes(notes, shared, rollouts, context, is_summed=is_summed)
    student.optimizer.prepare_grads()
    metrics = divide([shared.sums]) | {"grad_norm": student.optimizer.get_grad_norm()}
    terms = {}  # of a sum there are several at a token
    if not is_summed:
        terms = _terms_by_token(packed[context.layout.dp_rank], loss.seen, context.layout)
    gradients = _whole_gradients(student, hf_config, context)
    out.mkdir(exist_ok=True)
    found = {"terms": terms, "gradients": gradients, "metrics": metrics}
    torch.save(found, out / f"{context.layout.rank}.pt")


def _terms_by_token(batches, seen, layout) -> dict[tuple[int, int, int], torch.Tensor]:
    """(prompt, sample, token) → its terms, of the tokens on this rank."""
    if not layout.is_last_stage:
        return {}
    rows = iter(torch.cat(seen))
    found = {}
    for rollouts in batches:
        for rollout in rollouts:
            _, tokens = own_response_tokens(rollout, layout, layout.cp_rank)
            for token in tokens:
                found[rollout.prompt.index, rollout.sample_index, token] = next(rows)
    assert next(rows, None) is None, "terms of tokens that no rollout has"
    return found


def _whole_gradients(student, hf_config, context) -> dict[str, torch.Tensor]:
    """By the way of an export: gradients in the place of weights, whole under HF names."""
    for chunk in student.chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad.detach().clone()
    exporter = Exporter(
        student.chunks, hf_config, hf_config.vocab_size, context, bucket_bytes=2**20
    )
    stage = exporter.manifest.stages[context.layout.pp_rank]
    tensors = [tensor for bucket in exporter.buckets() for tensor in bucket]
    names = [spec.name for bucket in stage for spec in bucket]
    return dict(zip(names, tensors, strict=True)) if tensors else {}


def _collect(out: Path) -> dict:
    found = {"terms": {}, "gradients": {}}
    for path in sorted(out.iterdir(), key=lambda p: int(p.stem)):
        part = torch.load(path)
        for name in ("terms", "gradients"):
            found[name] |= part[name]
        found["metrics"] = part["metrics"]
    return found


@dataclass(frozen=True)
class Distance:
    """Of a result from the single process's, relative: `loss` also has the gradient norm that the
    optimizer would clip by, `terms` and `gradients` are the worst of their kind."""

    loss: float
    terms: float
    gradients: float
    worst: str
    """The parameter whose gradient is farthest."""


def distance(found: dict, expected: dict) -> Distance:
    assert found["terms"].keys() == expected["terms"].keys(), "each token once, on some rank"
    assert found["gradients"].keys() == expected["gradients"].keys()
    assert found["metrics"].keys() >= expected["metrics"].keys()
    ours, theirs = (
        torch.tensor([x["metrics"][name] for name in ("loss/total", "grad_norm")])
        for x in (found, expected)
    )
    loss = ((ours - theirs).abs() / theirs).max().item()
    keys, terms = sorted(expected["terms"]), 0.0
    if keys:
        ours, theirs = (torch.stack([x["terms"][key] for key in keys]) for x in (found, expected))
        terms = max(_relative(ours[:, n], theirs[:, n]) for n in range(len(TERMS)))
    gradients = {
        name: _relative(found["gradients"][name], gradient)
        for name, gradient in expected["gradients"].items()
    }
    worst = max(gradients, key=gradients.get)
    return Distance(loss, terms, gradients[worst], worst)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖difference‖ / ‖expected‖."""
    difference = (found.double() - expected.double()).norm()
    return (difference / expected.double().norm()).item()
