"""Several teachers, tokens that trade places, and what a teacher may never hold or send."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eopd.teacher.exchange import VocabCut
from tests.distributed import parity
from tests.distributed.parity import PAYLOADS, Case, distance, run_cases
from tests.distributed.test_parallelism import TOLERANCE, own_layout, unequal_rollouts
from tests.tiny_models import make_model

SWAPS = ((7, 200), (3, 4))


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Teachers of other widths, tied and untied."""
    path = tmp_path_factory.mktemp("teachers")
    sure = {"initializer_range": 0.2}
    return {
        "student": make_model("qwen3", path / "student", seed=1),
        "teacher": make_model("qwen3", path / "math", seed=5, hidden_size=96, **sure),
        "code": make_model("qwen3_tied", path / "code", seed=6, hidden_size=32, **sure),
    }


def weighted(first: dict, second: dict, share: float) -> dict:
    """What a batch of both subsets must come to: sums over tokens, divided by all tokens."""

    def mix(a, b):
        return share * a + (1 - share) * b

    gradients = {n: mix(g, second["gradients"][n]) for n, g in first["gradients"].items()}
    metrics = {"loss/total": mix(*(x["metrics"]["loss/total"] for x in (first, second)))}
    metrics["grad_norm"] = sum(g.double().square().sum().item() for g in gradients.values()) ** 0.5
    return {"gradients": gradients, "terms": first["terms"] | second["terms"], "metrics": metrics}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_each_prompt_is_scored_by_the_teacher_it_names(payload, models, tmp_path):
    """One step with two teachers, of other widths and layouts and one on a rank of its own, equals
    the two steps with one teacher each."""
    rollouts = unequal_rollouts(16, seed=3)
    parts = rollouts[::2], rollouts[1::2]
    alone = Case(payload=payload)
    (of_math,) = run_cases([alone], models, parts[0], tmp_path)
    (of_code,) = run_cases([alone], models | {"teacher": models["code"]}, parts[1], tmp_path)
    tokens = [sum(len(r.response_ids) for r in part) for part in parts]
    expected = weighted(of_math, of_code, tokens[0] / sum(tokens))
    named = [
        replace(r, prompt=replace(r.prompt, teacher="code")) if n % 2 else r
        for n, r in enumerate(rollouts)
    ]
    colocated = {"hf_path": models["code"], "payload": payload}
    cases = [
        Case(tp=2, payload=payload, other={"teachers": {"code": colocated | own_layout(pp=2)}}),
        Case(dp=2, payload=payload, other={"teachers": {"code": colocated}}),
    ]
    apart = colocated | own_layout(placement="separate", world_size=1)
    other = [Case(tp=2, payload=payload, other={"teachers": {"code": apart}})]
    results = run_cases(cases, models, named, tmp_path) + run_cases(other, models, named, tmp_path)
    for case, found in zip(cases + other, results, strict=True):
        far = distance(found, expected)
        assert max(far.loss, far.terms, far.gradients) < TOLERANCE, (case, far)


@pytest.mark.parametrize("name", ["teacher", "code"])
def test_swapped_tokens_trade_places_in_the_teachers_distribution(name, models, tmp_path):
    """As if the rows of its LM head had been exchanged on disk, wherever they are cut; as input the
    tokens stay what they are, also where the embedding is tied to the head."""
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in models[name].iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    weights = load_file(changed / "model.safetensors")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).clone()
    for a, b in SWAPS:
        head[[a, b]] = head[[b, a]]
    save_file(weights | {"lm_head.weight": head}, changed / "model.safetensors")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    rollouts = unequal_rollouts(12, seed=4)
    expected = run_cases(
        [Case(payload=payload) for payload in PAYLOADS],
        models | {"teacher": changed},
        rollouts,
        tmp_path,
    )
    of_payload = dict(zip(PAYLOADS, expected, strict=True))
    as_it_is = models | {"teacher": models[name]}
    cases = [Case(tp=2, payload=payload, swaps=SWAPS) for payload in PAYLOADS]
    cases.append(Case(tp=2, swaps=SWAPS, teacher=own_layout(pp=2)))
    for case, found in zip(cases, run_cases(cases, as_it_is, rollouts, tmp_path), strict=True):
        far = distance(found, of_payload[case.payload])
        assert max(far.loss, far.terms, far.gradients) < TOLERANCE, (case, far)
    (unchanged,) = run_cases([Case()], as_it_is, rollouts, tmp_path)
    assert distance(unchanged, of_payload["hidden"]).terms > 1e-2, "the swap must be seen"


@pytest.mark.parametrize("tp,other_tp", [(1, 1), (2, 4), (4, 2), (2, 3), (8, 2)])
def test_overlaps_of_two_cuts_cover_the_vocabulary_once(tp, other_tp):
    cuts = [VocabCut(211, -(-211 // (size * 8)) * 8) for size in (tp, other_tp)]
    seen = []
    for rank in range(tp):
        for other_rank in range(other_tp):
            found = cuts[0].overlap(rank, cuts[1], other_rank)
            if found is not None:
                here, there = (
                    range(s.start + r * c.width, s.stop + r * c.width)
                    for s, r, c in zip(found, (rank, other_rank), cuts, strict=True)
                )
                assert here == there
                seen += here
    assert sorted(seen) == list(range(211))


VOCAB = 5003


class WidestTensor(TorchDispatchMode):
    """The largest last dim of any tensor of two dims or more that an operation makes."""

    widest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1:
                self.widest = max(self.widest, tensor.shape[-1])
        return out


def test_no_rank_ever_holds_the_logits_of_the_whole_vocabulary(tmp_path, monkeypatch):
    """Every tensor of a step, at TP 4 with a teacher at TP 2 × PP 2, both ways of handing over: the
    widest has the 2,560 columns of a teacher's rank. All else is narrower than a vocabulary."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCAB}
    models = {
        name: make_model("qwen3", tmp_path / name, seed=n, **heads)
        for n, name in enumerate(("student", "teacher"))
    }
    accumulate = parity.accumulate_gradients

    def watched(*args, **kwargs):
        with WidestTensor() as watch:
            means = accumulate(*args, **kwargs)
        # A student's rank has 1280; the mass outside the top k takes one more than there are.
        assert 1280 <= watch.widest <= 2561, f"a tensor with {watch.widest} columns"
        return means

    monkeypatch.setattr(parity, "accumulate_gradients", watched)
    cases = [Case(tp=4, payload=payload, teacher=own_layout(tp=2, pp=2)) for payload in PAYLOADS]
    run_cases(cases, models, unequal_rollouts(8, seed=1), tmp_path)
