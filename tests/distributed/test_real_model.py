"""The metrics of a batch as the trainer computes them, in float32, against dense float64.

Of a tiny pair of models always, and of a real one where it can be had: 30 layers and a vocabulary
of 49,152, over which rounding adds up.
"""
# Shapes: N response tokens of all rollouts, V vocabulary.

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megatron_eopd.config import Config
from megatron_eopd.data.packing import Limits, exchange_size, pack, rounds_of
from megatron_eopd.data.tokenizer import load_tokenizer
from megatron_eopd.metrics.means import divide
from megatron_eopd.models.build import build_model
from megatron_eopd.models.hf_config import read_hf_config
from megatron_eopd.models.load import load_weights
from megatron_eopd.records import DEFAULT_TEACHER, Prompt, Rollout, Turn
from megatron_eopd.teacher.colocated import ColocatedTeacher
from megatron_eopd.teacher.pool import TeacherPool
from megatron_eopd.training.step import measure
from megatron_eopd.training.token_loss import TokenLoss
from tests.distributed.test_models import random_rollouts
from tests.distributed.test_step import assert_layouts_agree, make_config
from tests.ranks import context_for, leave_groups, run_ranks
from tests.real_model import real_model_dirs
from tests.tiny_models import make_model

NAMES = (
    "loss/total",
    "loss/reverse_kl",
    "loss/forward_kl",
    "entropy/teacher_mean",
    "entropy/student_mean",
    "gate/fraction",
)
TEMPERATURES = (1.0, 0.7)

QUESTIONS_AND_ANSWERS = [
    (
        "A baker fills 7 trays with 12 rolls each and sells 59 rolls. How many are left?",
        "The baker makes 7 * 12 = 84 rolls. After 59 are sold, 84 - 59 = 25 are left.\n#### 25",
    ),
    (
        "Nora reads 15 pages a day. How many days does a book of 240 pages take her?",
        "She needs 240 / 15 = <<240/15=16>>16 days.\n#### 16",
    ),
    (
        "A shirt of $20 is sold at 25% off. What do 3 of them cost?",
        "Step 1: The discount is $20 * 0.25 = $5.\nStep 2: A shirt costs $20 - $5 = $15.\n"
        "Step 3: Three of them cost 3 * $15 = $45.\n\nThe answer is $45.",
    ),
    (
        "Ann is twice as old as Ben, and together they are 36. How old is Ben?",
        "Let Ben be x years old. Then Ann is 2x, and x + 2x = 3x = 36. So x = 12: Ben is 12 years "
        "old.\n#### 12",
    ),
    (
        "A train goes 90 km in the first hour and 20 km less in the second. How far is that?",
        "In the second hour the train goes 90 - 20 = 70 km. Together that is 90 + 70 = 150 km.",
    ),
    (
        "Of 40 apples a quarter is red and half of the rest is green. How many are green?",
        "I'm sorry, let me think... 40 / 4 = 10 apples are red, so 30 are not. Half of these, "
        "30 / 2 = 15, are green. Therefore there are 15 green apples!",
    ),
]


@pytest.fixture(scope="session")
def real_models(tmp_path_factory) -> tuple[Path, Path]:
    return real_model_dirs(tmp_path_factory.mktemp("real_model"))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> tuple[Path, Path]:
    """(teacher, student) with one tied embedding each, as the real ones."""
    path = tmp_path_factory.mktemp("tiny_llama")
    options = {"hidden_size": 96, "num_hidden_layers": 2, "initializer_range": 0.2}
    return (
        make_model("llama", path / "teacher", seed=5, tie_word_embeddings=True, **options),
        make_model("llama", path / "student", seed=1, tie_word_embeddings=True),
    )


def config_at(temperature: float, models: tuple[Path, Path], entropy_threshold: float) -> Config:
    teacher, student = models
    return make_config(
        student,
        teacher,
        objective={"entropy_threshold": entropy_threshold},
        rollout={"temperature": temperature, "batch_size": 8},
        training={"global_batch_size": 8, "micro_batch_size": 2, "lr": 1e-2, "adam_eps": 1e-3},
    )


def written_rollouts(hf_dir: Path) -> list[Rollout]:
    tokenizer = load_tokenizer(hf_dir)
    rollouts = []
    for index, (question, answer) in enumerate(QUESTIONS_AND_ANSWERS):
        prompt = Prompt(index, question, answer, tokenizer.encode_chat([Turn("user", question)]))
        ids = (*tokenizer.encode(answer), tokenizer.stop_ids[0])
        rollouts.append(Rollout(prompt, 0, ids, (0.0,) * len(ids), "stop", 0))
    return rollouts


def write_metrics(configs, rollouts, tp, pp, path) -> None:
    """On each rank: the models once, the metrics of every config, as an evaluation does it."""
    context = context_for(tp, pp)
    config = configs[0]
    hf_config = read_hf_config(config.student.hf_path)
    chunks = build_model(config.student.hf_path, config.model, context)
    load_weights(chunks, config.student.hf_path, context)
    teacher = ColocatedTeacher(config.teacher, "teacher", config, (), hf_config.vocab_size, context)
    pool = TeacherPool({DEFAULT_TEACHER: teacher}, context)
    found = []
    for config in configs:
        token_loss = TokenLoss(chunks[-1], pool.heads, config, hf_config.vocab_size, context)
        packed = pack(rollouts, Limits.of(config.training), context.layout)
        rounds = pool.microbatches(rounds_of(packed, exchange_size(config)))
        found.append(divide([measure(token_loss, chunks, rounds, context).sums]))
    if context.layout.rank == 0:
        path.write_text(json.dumps(found))
    leave_groups()


def dense_attention(module, query, key, value, attention_mask, scaling, **_):
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    is_future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    probs = scores.masked_fill(is_future, -torch.inf).softmax(-1)
    return (probs @ value).transpose(1, 2), probs


def dense_norm(norm: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


@torch.no_grad()
def dense_logits_NV(hf_dir: Path, rollouts: list[Rollout]) -> torch.Tensor:
    """By transformers, with float64 also where it says float32 whatever the model's type: in norms
    and in the softmax of eager attention. The tables of rotary embeddings stay as they are."""
    AttentionInterface.register("dense", dense_attention)
    model = AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.float64, attn_implementation="dense"
    )
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = partial(dense_norm, module)
    rows = []
    for rollout in rollouts:
        prompt_ids = rollout.prompt.prompt_ids
        tokens = torch.tensor([prompt_ids + rollout.response_ids])
        rows.append(model(tokens).logits[0, len(prompt_ids) - 1 : -1])
    return torch.cat(rows)


def dense_metrics(config: Config, student_NV, teacher_NV) -> dict[str, float]:
    log_q = (student_NV / config.rollout.temperature).log_softmax(-1)
    log_p = (teacher_NV / config.rollout.temperature).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    reverse_kl = (q * (log_q - log_p)).sum(-1)
    forward_kl = (p * (log_p - log_q)).sum(-1)
    teacher_entropy, student_entropy = -(p * log_p).sum(-1), -(q * log_q).sum(-1)
    threshold = config.objective.entropy_threshold
    distance = (teacher_entropy - threshold).abs().min()
    assert distance > 3e-5, f"a token {distance:.1e} from the threshold: float32 may say otherwise"
    gate = (teacher_entropy >= threshold).double()
    loss = reverse_kl + gate * forward_kl
    columns = (loss, reverse_kl, forward_kl, teacher_entropy, student_entropy, gate)
    return {name: (x.sum() / len(x)).item() for name, x in zip(NAMES, columns, strict=True)}


def assert_metrics_are_dense(models, entropy_threshold, rollouts, layouts, tmp_path) -> str:
    """On every layout (TP, PP, DP) and at both temperatures; gives back a table."""
    configs = [config_at(temperature, models, entropy_threshold) for temperature in TEMPERATURES]
    found = {}
    for tp, pp, dp in layouts:
        path = tmp_path / f"{tp}-{pp}-{dp}.json"
        run_ranks(tp * pp * dp, tmp_path, write_metrics, configs, rollouts, tp, pp, path)
        found[f"TP {tp} PP {pp} DP {dp}"] = json.loads(path.read_text())
    teacher_NV, student_NV = (dense_logits_NV(path, rollouts) for path in models)
    table = f"{len(teacher_NV)} tokens\n" + " " * 23
    table += "".join(f"{name.split('/')[1]:>15}" for name in NAMES)
    worst = 0.0
    for n, config in enumerate(configs):
        expected = dense_metrics(config, student_NV, teacher_NV)
        assert 0.05 < expected["gate/fraction"] < 0.95, "the batch must hold open and closed gates"
        values = "".join(f"{x:15.8f}" for x in expected.values())
        table += f"\n  T = {config.rollout.temperature}, float64     {values}"
        for layout, metrics in found.items():
            off = [metrics[n][name] / x - 1 for name, x in expected.items()]
            table += f"\n  {layout:21}" + "".join(f"{x:15.1e}" for x in off)
            worst = max(worst, *map(abs, off))
    assert worst < 1e-6, table
    return f"{table}\n"


def test_metrics_of_a_tiny_model_are_those_of_dense_float64(tiny_models, tmp_path, capsys):
    """Within 1e-6 relative, whole and with the vocabulary cut in two."""
    rollouts = [s.rollout for s in random_rollouts(vocab_size=211, count=8, seed=11)]
    layouts = [(1, 1, 1), (2, 1, 1)]
    table = assert_metrics_are_dense(tiny_models, 2.8, rollouts, layouts, tmp_path)
    with capsys.disabled():
        print(f"\n  tiny Llama, {table}")


@pytest.mark.slow
def test_metrics_of_a_real_model_are_those_of_dense_float64(real_models, tmp_path, capsys):
    """Within 1e-6 relative, about what float32 logits leave of a mean over some 300 tokens. On one
    rank, over two stages, over two data-parallel ranks."""
    rollouts = written_rollouts(real_models[0])
    layouts = [(1, 1, 1), (1, 2, 1), (1, 1, 2)]
    table = assert_metrics_are_dense(real_models, 0.8, rollouts, layouts, tmp_path)
    with capsys.disabled():
        print(f"\n  SmolLM2-135M-Instruct and a part of it, {table}")


def test_gradient_norm_of_a_tied_llama_is_that_of_dense_float64(tiny_models, tmp_path):
    """Within 1e-5 relative, with the loss and the step after it."""
    config = config_at(0.8, tiny_models, 2.8)
    rollouts = [s.rollout for s in random_rollouts(vocab_size=211, count=8, seed=11)]
    layouts = [(1, 1, 1, False, 2), (2, 1, 1, True, 4)]
    assert_layouts_agree([config], rollouts, layouts, tmp_path)
