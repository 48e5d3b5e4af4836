"""The gradient is the same however student and teacher are cut. Short; `make test-matrix` has all.

Loss, KL terms of every token and the gradient of every parameter within 1e-5 relative of a single
process's, in float32: rounding is at 1e-6, and any term that is lost, doubled or given to the wrong
token is at 1e-2 and more.
"""

from pathlib import Path

import pytest
import torch

from megatron_eopd.records import Prompt, Rollout
from tests.distributed.parity import PAYLOADS, Case, distance, run_cases
from tests.tiny_models import make_model

TOLERANCE = 1e-5
VOCAB = 211


def unequal_rollouts(count: int, seed: int) -> list[Rollout]:
    """Responses of 1 to 30 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB, (n,), generator=generator).tolist())

    rollouts = []
    for index in range(count):
        length = int(torch.randint(1, 31, (), generator=generator))
        logprobs = tuple((-6 * torch.rand(length, generator=generator)).tolist())
        prompt = Prompt(index, "", "", ids(1 + index % 5))
        rollouts.append(Rollout(prompt, 0, ids(length), logprobs, "stop", 0))
    return rollouts


def make_models(path: Path) -> dict[str, Path]:
    """A tied student, so that its embedding has gradients on two stages; heads for TP 4."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    sure = {"hidden_size": 96, "initializer_range": 0.2}
    return {
        "student": make_model("qwen3_tied", path / "student", seed=1, **heads),
        "teacher": make_model("qwen3", path / "teacher", seed=5, **heads, **sure),
    }


def make_expert_models(path: Path) -> dict[str, Path]:
    """A student and a teacher of 8 experts."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    sure = {"initializer_range": 0.2}
    return {
        "student": make_model("qwen3_moe", path / "student", seed=2, **heads),
        "teacher": make_model("qwen3_moe", path / "teacher", seed=6, **heads, **sure),
    }


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="session")
def rollouts():
    return unequal_rollouts(16, seed=11)


@pytest.fixture(scope="session")
def expected(models, rollouts, tmp_path_factory):
    """Payload → what a single process finds."""
    cases = [Case(payload=payload) for payload in PAYLOADS]
    results = run_cases(cases, models, rollouts, tmp_path_factory.mktemp("expected"))
    return dict(zip(PAYLOADS, results, strict=True))


def check(cases, models, rollouts, expected, tmp_path, capsys):
    table = ""
    for case, found in zip(cases, run_cases(cases, models, rollouts, tmp_path), strict=True):
        far = distance(found, expected[case.payload])
        table += f"\n  {case.describe():60} loss {far.loss:.1e} terms {far.terms:.1e} "
        table += f"gradients {far.gradients:.1e} ({far.worst})"
        assert max(far.loss, far.terms, far.gradients) < TOLERANCE, table
    with capsys.disabled():
        print(table)


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2, "sp": True, "pp": 2},
        {"pp": 2, "vpp": 2, "cp": 2},
        {"tp": 2, "cp": 2, "sp": True},
        {"cp": 2, "dp": 2},
        {"pp": 2, "layers": (3, None)},
    ],
    ids=str,
)
def test_student_layouts(layout, models, rollouts, expected, tmp_path, capsys):
    """Every payload, the teacher as the student's."""
    cases = [Case(**layout, payload=payload) for payload in PAYLOADS]
    check(cases, models, rollouts, expected, tmp_path, capsys)


def own_layout(tp=1, pp=1, sp=False, **options):
    return options | {
        "parallel": {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "sequence_parallel": sp,
        }
    }


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 4, "teacher": own_layout(tp=2, pp=2)},
        {"tp": 2, "cp": 2, "sp": True, "teacher": own_layout(pp=2)},
        {"pp": 2, "dp": 2, "teacher": own_layout(tp=4, sp=True)},
        {"tp": 2, "teacher": own_layout(pp=2, placement="separate", world_size=2)},
        {"cp": 2, "dp": 1, "teacher": own_layout(tp=2, placement="separate", world_size=2)},
        {"pp": 2, "vpp": 2, "teacher": own_layout(placement="separate", world_size=2)},
    ],
    ids=lambda layout: Case(**layout).describe(),
)
def test_teacher_layouts(layout, models, rollouts, expected, tmp_path, capsys):
    """Every payload, the teacher cut in another way or on ranks of its own."""
    cases = [Case(**layout, payload=payload) for payload in PAYLOADS]
    check(cases, models, rollouts, expected, tmp_path, capsys)


def test_stages_of_unequal_numbers_of_layers(rollouts, tmp_path, capsys):
    """Six layers as 2 + 1 + 1 + 2, as interleaved chunks of 1 and 2, and the teacher's own cut:
    the gradient of a single process."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    deep = heads | {"num_hidden_layers": 6}
    models = {
        "student": make_model("qwen3_tied", tmp_path / "student", seed=1, **deep),
        "teacher": make_model("qwen3", tmp_path / "teacher", seed=5, initializer_range=0.2, **deep),
    }
    (alone,) = run_cases([Case()], models, rollouts, tmp_path)
    own = {"pipeline_model_parallel_size": 2, "decoder_last_pipeline_num_layers": 5}
    groups = [
        [Case(pp=2, vpp=2, layers=(2, 4)), Case(pp=2, layers=(None, 2), teacher={"parallel": own})],
        [Case(pp=4, layers=(2, 2), teacher={"parallel": own})],
    ]
    for cases in groups:
        check(cases, models, rollouts, {"hidden": alone}, tmp_path, capsys)


@pytest.fixture(scope="session")
def expert_models(tmp_path_factory):
    return make_expert_models(tmp_path_factory.mktemp("experts"))


def test_experts_over_ranks(expert_models, rollouts, tmp_path, capsys):
    """A student with 8 experts has the same gradients with all of them on a rank and with 4, over
    data-, tensor- and pipeline-parallel ranks, and whether the teacher's are cut or not."""
    (expected,) = run_cases([Case()], expert_models, rollouts, tmp_path)
    experts = {"expert_model_parallel_size": 2}
    groups = [
        [
            Case(dp=2, ep=2),
            Case(dp=2, ep=2, payload="logits"),
            Case(dp=2, ep=2, teacher=own_layout(pp=2)),
        ],
        [Case(tp=2, sp=True, ep=2), Case(tp=2, sp=True, ep=1, teacher={"parallel": experts})],
        [Case(pp=2, vpp=2, dp=2, ep=2)],
    ]
    for cases in groups:
        by_payload = {case.payload: expected for case in cases}
        check(cases, expert_models, rollouts, by_payload, tmp_path, capsys)


def test_a_dense_teacher_in_the_layout_of_a_student_with_experts(
    models, expert_models, rollouts, tmp_path, capsys
):
    mixed = expert_models | {"teacher": models["teacher"]}
    (expected,) = run_cases([Case()], mixed, rollouts, tmp_path)
    check([Case(dp=2, ep=2)], mixed, rollouts, {"hidden": expected}, tmp_path, capsys)


def test_packing_rounds_overlap_and_recomputation_change_nothing(
    models, rollouts, expected, tmp_path, capsys
):
    """One sequence to a row, a token budget, another order of the rollouts, portions of an
    exchange, overlapped collectives and recomputed layers: all the same gradient."""
    budget = {"micro_batch_size": None, "max_tokens_per_microbatch": 64}
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    recompute = {"model": {"recompute_granularity": "full", "recompute_num_layers": 1}}
    split = {"microbatches_per_exchange": 1}
    whole = [
        Case(training={"micro_batch_size": 1}),
        Case(training=budget),
        Case(teacher=split, training=overlap),
    ]
    cut = [
        Case(pp=2, vpp=2, training=budget, other=recompute),
        Case(pp=2, vpp=2, training=overlap, teacher=split, payload="logits"),
    ]
    for cases in (whole, cut, [Case(dp=2, training=budget | overlap, teacher=split)]):
        check(cases, models, rollouts, expected, tmp_path, capsys)
    check([Case(dp=2)], models, rollouts[::-1], expected, tmp_path, capsys)


def test_a_step_with_fewer_rollouts_than_ranks(models, rollouts, tmp_path, capsys):
    """Three rollouts on four data-parallel ranks: the fourth works on padding, which counts not."""
    cases = [Case(payload=payload) for payload in PAYLOADS]
    found = run_cases(cases, models, rollouts[:3], tmp_path)
    few = dict(zip(PAYLOADS, found, strict=True))
    cases = [Case(dp=4, payload=payload) for payload in PAYLOADS]
    cases.append(Case(dp=4, teacher=own_layout(tp=2)))
    check(cases, models, rollouts[:3], few, tmp_path, capsys)


CHUNKED = {"objective": {"head": "chunked", "head_chunk_size": 16, "entropy_threshold": 2.8}}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_ranks_without_a_token(payload, models, tmp_path, capsys):
    """Short answers behind long prompts lie on one of two context-parallel ranks, and three
    rollouts leave a fourth data-parallel rank nothing: both heads then have the metrics, and the
    gradient, of a single process."""
    generator = torch.Generator().manual_seed(3)
    short = []
    for index in range(3):
        ids = torch.randint(VOCAB, (44,), generator=generator).tolist()
        prompt = Prompt(index, "", "", tuple(ids[:40]))
        short.append(Rollout(prompt, 0, tuple(ids[40:]), (-1.0,) * 4, "stop", 0))
    (alone,) = run_cases([Case(payload=payload)], models, short, tmp_path)
    for layout in ({"cp": 2}, {"dp": 4}):
        cases = [Case(**layout, payload=payload, other=other) for other in ({}, CHUNKED)]
        check(cases, models, short, {payload: alone}, tmp_path, capsys)
