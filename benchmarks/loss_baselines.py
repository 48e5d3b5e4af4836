"""The contenders of benchmarks/bench_loss.py: our loss and other people's, behind one signature.

A contender is a list of passes. A pass takes both models' logits and returns its terms per token;
the benchmark weighs them, sums them and runs the backward before the next pass begins. Packages
that not everybody has are imported when their contender is built.
"""
# Shapes: N tokens, C of them in a chunk, V this tensor-parallel rank's columns of the vocabulary.

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_eopd.losses import dense_kl_terms, kernels, vocab_parallel_kl_terms
from megatron_eopd.losses.kernels import eager

Terms = dict[str, torch.Tensor]
"""reverse_kl, forward_kl, teacher_entropy: [N], in nats; or jsd: the mean over tokens."""


class Setting(NamedTuple):
    """What a loss may want to know beside the logits."""

    tp_group: dist.ProcessGroup | None
    """None without tensor parallelism."""
    mask_N: torch.Tensor | None
    """Only our loss can skip tokens by it. For everybody, masked tokens have weight 0."""


class UnavailableError(RuntimeError):
    """A contender cannot run here."""


Pass = Callable[[torch.Tensor, torch.Tensor, Setting], Terms]


@dataclass(frozen=True)
class Contender:
    computes: str
    build: Callable[[int], list[Pass]]
    """From the tensor-parallel size. What only has to happen once per process happens here."""
    has_kernels: bool = False
    """Runs our compiled sweeps where there is a compiler."""
    overwrites_student: bool = False
    asks_megatron: bool = False
    """Looks for its tensor-parallel group in Megatron's global state."""
    may_fail_with: tuple[type[Exception], ...] = ()
    """Errors, of building or of the first run, that make it sit out rather than fail the run."""


# --- ours ----------------------------------------------------------------------------------------


def ours(_: int, *, inplace_backward: bool = False) -> list[Pass]:
    def run(student_NV: torch.Tensor, teacher_NV: torch.Tensor, setting: Setting) -> Terms:
        terms = vocab_parallel_kl_terms(
            student_NV,
            teacher_NV,
            tp_group=setting.tp_group,
            mask=setting.mask_N,
            inplace_backward=inplace_backward,
        )
        return terms._asdict()

    return [run]


def ours_in_plain_pytorch(tp: int) -> list[Pass]:
    """What runs where no C++ compiler is found."""
    kernels.kernels_for = lambda *_: eager
    return ours(tp)


# --- autograd of the formula ---------------------------------------------------------------------


def autograd(_: int) -> list[Pass]:
    return [_dense]


def compiled_autograd(_: int) -> list[Pass]:
    compiled = torch.compile(_dense, dynamic=False)
    return [lambda student_NV, teacher_NV, _: compiled(student_NV, teacher_NV)]


def _dense(student_NV: torch.Tensor, teacher_NV: torch.Tensor, _: object = None) -> Terms:
    terms = dense_kl_terms(student_NV.float(), teacher_NV.float())  # in bf16 it would be wrong
    # Nobody asks for the student's entropy, so that torch.compile may leave it out.
    return {name: getattr(terms, name) for name in ("reverse_kl", "forward_kl", "teacher_entropy")}


# --- ModelOpt ------------------------------------------------------------------------------------


def modelopt(tp: int) -> list[Pass]:
    """LogitsKLLoss of the installed package, once per divergence.

    Forward: four all-reduces and the one of the values. Backward: one.
    """
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    config = SimpleNamespace(tensor_model_parallel_size=tp)

    def pass_of(term: str, reverse: bool) -> Pass:
        loss = LogitsKLLoss(config, reverse=reverse)

        def run(student_NV: torch.Tensor, teacher_NV: torch.Tensor, setting: Setting) -> Terms:
            # [s, b, V] in, [b, s] out.
            kl_1N, *_ = loss(student_NV.unsqueeze(1), teacher_NV.unsqueeze(1))
            return {term: _summed_over_ranks(kl_1N[0], setting.tp_group) if tp > 1 else kl_1N[0]}

        return run

    return [pass_of("forward_kl", reverse=False), pass_of("reverse_kl", reverse=True)]


def _summed_over_ranks(part_N: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The value of all ranks' parts with the gradient of this rank's, which is what it owns."""
    whole_N = part_N.detach().clone()
    dist.all_reduce(whole_N, group=group)
    return part_N + (whole_N - part_N.detach())


# --- NeMo-RL -------------------------------------------------------------------------------------

NEMO_RL_CHUNK = 1024


def nemo_rl(_: int) -> list[Pass]:
    def run(student_NV: torch.Tensor, teacher_NV: torch.Tensor, setting: Setting) -> Terms:
        return {"reverse_kl": ChunkedReverseKL.apply(student_NV, teacher_NV, setting.tp_group)}

    return [run]


class ChunkedReverseKL(torch.autograd.Function):
    """NeMo-RL's full-vocabulary reverse KL: its algorithm, restated.

    Tokens go in chunks of 1,024. Each chunk is cast to float32, log-softmaxed over all ranks and
    reduced; the backward computes the same again and fills a float32 gradient of the whole size.
    It has no forward KL. https://github.com/NVIDIA-NeMo/RL/pull/3978

    Forward: five all-reduces per chunk (max and Σexp of both models, the sum). Backward: the same
    five.
    """

    @staticmethod
    def forward(ctx, student_NV, teacher_NV, group):
        ctx.save_for_backward(student_NV, teacher_NV)
        ctx.group = group
        chunks = zip(student_NV.split(NEMO_RL_CHUNK), teacher_NV.split(NEMO_RL_CHUNK), strict=True)
        return torch.cat([_chunk_of_reverse_kl(*chunk, group)[2] for chunk in chunks])

    @staticmethod
    def backward(ctx, upstream_N):
        student_NV, teacher_NV = ctx.saved_tensors
        grad_NV = torch.empty_like(student_NV, dtype=torch.float32)
        for first in range(0, len(student_NV), NEMO_RL_CHUNK):
            rows = slice(first, first + NEMO_RL_CHUNK)
            probs_CV, log_ratio_CV, kl_C = _chunk_of_reverse_kl(
                student_NV[rows], teacher_NV[rows], ctx.group
            )
            grad_NV[rows] = probs_CV.mul_(log_ratio_CV - kl_C.unsqueeze(-1))
            grad_NV[rows].mul_(upstream_N[rows].unsqueeze(-1))
        return grad_NV, None, None


def _chunk_of_reverse_kl(
    student_CV: torch.Tensor, teacher_CV: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student probabilities and log q − log p, both [C, V]; reverse KL, [C]."""
    student_CV = _log_softmax_over_ranks(student_CV.float(), group)
    teacher_CV = _log_softmax_over_ranks(teacher_CV.float(), group)
    probs_CV, log_ratio_CV = student_CV.exp(), student_CV - teacher_CV
    kl_C = (probs_CV * log_ratio_CV).sum(-1)
    dist.all_reduce(kl_C, group=group)
    return probs_CV, log_ratio_CV, kl_C


def _log_softmax_over_ranks(logits_CV: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    max_C1 = logits_CV.amax(-1, keepdim=True)
    dist.all_reduce(max_C1, op=dist.ReduceOp.MAX, group=group)
    centred_CV = logits_CV - max_C1
    sum_exp_C1 = centred_CV.exp().sum(-1, keepdim=True)
    dist.all_reduce(sum_exp_C1, group=group)
    return centred_CV - sum_exp_C1.log()


# --- Liger ---------------------------------------------------------------------------------------


def liger_jsd(_: int) -> list[Pass]:
    """It wants log-probabilities, so making them from logits is part of the price."""
    if not torch.cuda.is_available():
        raise UnavailableError("runs on CUDA only")
    from liger_kernel.transformers import LigerJSD

    jsd = LigerJSD(beta=0.5)

    def run(student_NV: torch.Tensor, teacher_NV: torch.Tensor, _: Setting) -> Terms:
        student_NV, teacher_NV = (x.float().log_softmax(-1) for x in (student_NV, teacher_NV))
        return {"jsd": jsd(student_NV, teacher_NV)}

    return [run]


BOTH_KL = "reverse KL + forward KL + teacher entropy"

CONTENDERS = {
    "ours": Contender(f"{BOTH_KL} + student entropy", ours, has_kernels=True),
    "ours-inplace": Contender(
        f"{BOTH_KL} + student entropy; gradient over the student's logits",
        lambda tp: ours(tp, inplace_backward=True),
        has_kernels=True,
        overwrites_student=True,
    ),
    "ours-eager": Contender(
        f"{BOTH_KL} + student entropy; the form without a C++ compiler or Triton",
        ours_in_plain_pytorch,
    ),
    "modelopt": Contender(
        "reverse KL + forward KL, in two calls of ModelOpt's LogitsKLLoss",
        modelopt,
        asks_megatron=True,
        may_fail_with=(ImportError, torch.OutOfMemoryError),
    ),
    "nemo-rl": Contender(
        "reverse KL only; NeMo-RL's chunked algorithm, restated",
        nemo_rl,
        may_fail_with=(torch.OutOfMemoryError,),
    ),
    "autograd": Contender(
        f"{BOTH_KL}; autograd of the formula, in float32",
        autograd,
        may_fail_with=(torch.OutOfMemoryError,),
    ),
    "compile": Contender(
        f"{BOTH_KL}; torch.compile of that",
        compiled_autograd,
        may_fail_with=(Exception,),  # whatever the compiler trips over
    ),
    "liger": Contender(
        "JSD (β = 0.5) only; LigerJSD on log-softmaxes",
        liger_jsd,
        may_fail_with=(ImportError, UnavailableError, torch.OutOfMemoryError),
    ),
}
