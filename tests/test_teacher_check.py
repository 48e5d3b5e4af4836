"""When a teacher is compared with transformers, what is asked, and what counts as agreement."""

import os
import re
from dataclasses import replace
from importlib.metadata import version
from math import nan
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_eopd.config import Config, TeacherConfig
from megatron_eopd.data.prompts import PromptSet
from megatron_eopd.data.run_tokenizers import RunTokenizers
from megatron_eopd.data.tokenizer import load_tokenizer
from megatron_eopd.errors import ConfigError
from megatron_eopd.records import Prompt
from megatron_eopd.teacher_check import check, remembered
from megatron_eopd.teacher_check.check import first_prompt, reason_to_skip
from megatron_eopd.teacher_check.judge import BOUNDS, judge
from megatron_eopd.teacher_check.memory import available_bytes
from megatron_eopd.teacher_check.reference import Answer, Opinion, Reading, float32_bytes, opinion
from megatron_eopd.teacher_check.told import lines_about
from tests import tiny_tokenizers as tiny
from tests.test_preflight import MODELS
from tests.tiny_tokenizers import CHATML

GIB = 2**30
PROMPTS = PromptSet([Prompt(0, "p", "", (5, 6, 7))], seed=1, shuffle=False)
SAID = Opinion((4, 5, 6), (-1.0, -2.0, -3.0), (0.5, 0.6, 0.7))


@pytest.mark.parametrize("precision", BOUNDS)
def test_a_difference_within_the_bounds_is_rounding_and_one_beyond_is_not(precision):
    """The mean, the largest and both quantities count; the verdict says where."""
    bounds = BOUNDS[precision]
    ours = np.array([SAID.logprobs, SAID.entropies])
    assert judge(ours, SAID, precision).agrees
    for quantity in (0, 1):
        far = ours.copy()
        far[quantity, 1] += 0.9 * bounds.largest  # alone it stays within the mean, too
        assert judge(far, SAID, precision).agrees == (0.3 * bounds.largest <= bounds.mean)
        far[quantity, 1] += 0.2 * bounds.largest
        verdict = judge(far, SAID, precision)
        assert not verdict.agrees and verdict.token == 1
        assert verdict.quantity == ("log-probability", "entropy")[quantity]
        assert verdict.ours - verdict.theirs == pytest.approx(1.1 * bounds.largest)
        everywhere = ours.copy()
        everywhere[quantity] += 1.1 * bounds.mean
        assert not judge(everywhere, SAID, precision).agrees


def test_no_number_is_no_agreement():
    ours = np.array([SAID.logprobs, SAID.entropies])
    ours[1, 2] = nan
    verdict = judge(ours, SAID, "bfloat16")
    assert not verdict.agrees and (verdict.quantity, verdict.token) == ("entropy", 2)


@pytest.fixture
def host(tmp_path):
    """A host with 100 GiB free, and control groups as they are given: (limit, used, unread)."""

    def make(own: str, groups: dict[str, tuple[str, int, int]]) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/meminfo").write_text(
            f"MemTotal: {2**28} kB\nMemAvailable: {100 * 2**20} kB\n"
        )
        (tmp_path / "proc/self/cgroup").write_text(f"1:cpu:/x\n0::{own}\n")
        for name, (limit, used, unread) in groups.items():
            folder = tmp_path / "sys/fs/cgroup" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "memory.max").write_text(limit)
            (folder / "memory.current").write_text(str(used))
            (folder / "memory.stat").write_text(f"anon 1\ninactive_file {unread}\n")
        return tmp_path

    return make


def test_memory_is_what_the_host_and_every_group_around_it_leave(host):
    assert available_bytes(host("/", {})) == 100 * GIB
    job = {"job": (str(40 * GIB), 30 * GIB, 8 * GIB), "job/step": ("max", 30 * GIB, 0)}
    assert available_bytes(host("/job/step", job)) == 18 * GIB
    assert available_bytes(host("/elsewhere", job)) == 100 * GIB
    assert available_bytes() > 0, "of this host"


def test_what_is_not_compared_is_said(monkeypatch):
    path = MODELS / "teacher"
    sizes = SimpleNamespace(needed=GIB, available=100 * GIB)
    monkeypatch.setattr(check, "float32_bytes", lambda _path: sizes.needed)
    monkeypatch.setattr(check, "available_bytes", lambda: sizes.available)

    def reason(how="auto", prompts=PROMPTS, known=False, section="teacher"):
        return reason_to_skip(
            section, TeacherConfig(hf_path=path, check=how), prompts, is_known=known
        )

    assert reason() is None
    assert reason("never") == "teacher.check=never."
    assert "agreed when this run began" in reason(known=True)
    assert reason("always", known=True) is None
    assert "no prompt of this run asks for it" in reason(section="teachers.code")
    sizes.needed = 51 * GIB
    assert re.search(r"51\.0 GiB.*100\.0 GiB to give.*teacher\.check=always", reason())
    assert reason("always") is None
    sizes.available = 1000 * GIB
    assert re.search(r"51\.0 GiB, and more than 40 GiB would keep the start waiting", reason())
    monkeypatch.setattr(check, "is_mcore", lambda _path: True)
    assert "a Megatron checkpoint, which transformers does not read" in reason()
    with pytest.raises(ConfigError, match=r"teacher\.check=always: .* is a Megatron checkpoint"):
        reason("always")


def test_the_first_prompt_that_is_not_long_is_asked():
    """As the teacher reads it; where all are long, the shortest."""
    lengths = (3000, 2000, 10, 5)
    prompts = [Prompt(n, "", "", (1,) * length) for n, length in enumerate(lengths)]
    prompts.append(Prompt(4, "", "", (1,), teacher="code", teacher_ids={"code": (1,) * 9}))

    def first(some, teacher):
        return first_prompt(PromptSet(some, seed=1, shuffle=False), teacher)

    assert first(prompts, "teacher").index == 2
    assert first(prompts[:2], "teacher").index == 1
    assert first(prompts, "code").index == 4
    assert first(prompts, "other") is None
    long_to_it = replace(prompts[2], teacher_ids={"teacher": (1,) * 5000})
    assert first([*prompts[:2], long_to_it], "teacher").index == 1


def test_an_agreement_is_remembered_for_the_same_teacher_alone(tmp_path, qwen3_dir, monkeypatch):
    """Not for other files, types, payloads, swaps, kernels or libraries; for another layout."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    for file in qwen3_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    def identity(swaps=(), device="cpu", layers="auto", **options):
        tree = {"run_dir": tmp_path, "student": {"hf_path": qwen3_dir}}
        own = {"teacher": {"hf_path": folder} | options, "model": {"transformer_impl": layers}}
        return remembered.identity("teacher", Config.model_validate(tree | own), swaps, device)

    first = identity()
    assert remembered.read(tmp_path) == {}
    remembered.write(tmp_path, {"teacher": first})
    assert remembered.read(tmp_path)["teacher"] == identity() == first
    assert identity(parallel={"tensor_model_parallel_size": 2}) == first
    assert identity(layers="local") == first, "which is what auto comes to here"
    others = [identity(dtype="bfloat16"), identity(payload="logits"), identity(swaps=[(1, 2)])]
    others.append(identity(device="cuda"))
    libraries = ["torch", "megatron-core", "transformers"]
    for library in libraries:
        with monkeypatch.context() as patch:
            patch.setattr(remembered, "version", lambda n, o=library: version(n) + "x" * (n == o))
            others.append(identity())
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "uses_transformer_engine", lambda _model: True)
        patch.setattr(remembered, "version", lambda n: version(n) if n in libraries else "2.0")
        others.append(identity())
    assert all(other != first for other in others)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert identity() != first
    (tmp_path / remembered.FILE).write_text('{"teac')
    assert remembered.read(tmp_path) == {}


def dense(path: Path, ids: list[int], start: int, temperature: float):
    """float64 log-probabilities [N, V] of the tokens from `start` on."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        return (model(torch.tensor([ids])).logits[0, start - 1 : -1] / temperature).log_softmax(-1)


def test_transformers_is_asked_for_what_the_loss_reads(teacher_dir):
    """Tokens that trade places, the shared part of the vocabulary, the temperature; the likeliest
    tokens but none that ends, and then the end. Nothing of torch is left changed."""
    prompt_ids, stops, end, swaps, size = (3, 4, 5), (9, 11), 11, ((11, 60),), 200
    answer = Answer(None, 6, stops, end)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    found = opinion(teacher_dir, prompt_ids, answer, Reading(swaps, size, 0.7), threads + 1)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert len(found.response_ids) == 7 and found.response_ids[-1] == end
    assert not set(stops) & set(found.response_ids[:-1])
    logprobs_NV = dense(teacher_dir, [*prompt_ids, *found.response_ids], 3, 0.7)
    logprobs_NV[:, [11, 60]] = logprobs_NV[:, [60, 11]]
    logprobs_NC = logprobs_NV[:, :size].log_softmax(-1)
    expected = logprobs_NC[range(7), list(found.response_ids)]
    assert torch.tensor(found.logprobs) == pytest.approx(expected.float(), abs=1e-4)
    entropies = -(logprobs_NC.exp() * logprobs_NC).sum(-1)
    assert torch.tensor(found.entropies) == pytest.approx(entropies.float(), abs=1e-4)
    logprobs_NC[:, list(stops)] = -torch.inf
    assert tuple(logprobs_NC[:-1].argmax(-1).tolist()) == found.response_ids[:-1]
    given = opinion(
        teacher_dir, prompt_ids, replace(answer, given=(7, 8)), Reading((), 211, 1.0), threads
    )
    assert given.response_ids == (7, 8, end)
    expected = dense(teacher_dir, [3, 4, 5, 7, 8, end], 3, 1.0)[range(3), [7, 8, end]]
    assert torch.tensor(given.logprobs) == pytest.approx(expected.float(), abs=1e-4)


def test_the_size_of_the_weights_is_known_without_them(family_dirs):
    for family in ("qwen3_tied", "qwen3_moe"):
        model = AutoModelForCausalLM.from_pretrained(family_dirs[family])
        count = sum(p.numel() for p in model.parameters())
        assert float32_bytes(family_dirs[family]) == 4 * count


def test_what_both_models_have_is_told(tmp_path):
    """Sizes, ends through what trades places, and whether two templates are one text."""
    own = CHATML.replace("assistant", "model")
    folders = {
        "student": tiny.write(tmp_path / "student", chat_template=CHATML),
        "same": tiny.write(tmp_path / "same", chat_template=CHATML),
        "own": tiny.write(tmp_path / "own", chat_template=own),
        "none": tiny.write(tmp_path / "none"),
    }
    loaded = {
        name: load_tokenizer(path, model_path=path, vocab_size=400, stop_ids=(1 + 2 * (n > 0),))
        for n, (name, path) in enumerate(folders.items())
    }

    def told(who: str, **data) -> str:
        options = {"run_dir": tmp_path, "student": {"hf_path": folders["student"]}, "data": data}
        config = Config.model_validate(options | {"teacher": {"hf_path": folders[who]}})
        teachers, swaps = {"teacher": loaded[who]}, {"teacher": [(1, 3)]}
        tokenizers = RunTokenizers(loaded["student"], teachers, swaps, 300, [])
        return "\n".join(lines_about("teacher", config, tokenizers))

    count = len(loaded["same"])
    text = told("same", apply_chat_template=True)
    assert f"[teacher] has {count} tokens in 400 columns, the student {count}" in text
    assert "the first 300 are compared. Its chat template is the student's" in text
    assert "ends a response with 3 <|im_end|>, the student with 1 <eos>; " in text
    assert text.endswith("trade places: 1 <eos> ↔ 3 <|im_end|>")
    text = told("own", apply_chat_template=True)
    assert re.search(r"template \(.*own.*\) is another text than the student's \(.*student", text)
    assert "has no chat template to compare" in told("none", apply_chat_template=True)
    assert "No chat template writes the prompts" in told("own")
