"""A real vLLM, the trainer's weights in it, and what happens when something breaks.

The reference everywhere is the Hugging Face model that the weights were taken from, in float32.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_eopd.config import WeightSyncConfig
from megatron_eopd.errors import EngineError
from megatron_eopd.parallel.init import free_port
from megatron_eopd.records import Rollout
from megatron_eopd.rollout import engine_process, vllm_engine
from megatron_eopd.rollout.engine import Sampling, numbered_samples
from megatron_eopd.rollout.vllm_engine import VllmEngine, vllm_available
from megatron_eopd.weight_sync import sender
from megatron_eopd.weight_sync.manifest import Manifest
from megatron_eopd.weight_sync.verify import SyncCheck
from tests.dense_sampling import nucleus
from tests.engine.toy import MAX_MODEL_LEN, PROBES, ToyTrainer, largest_difference, make_prompts
from tests.test_engine_process import wait_until_gone
from tests.tiny_models import make_model

pytestmark = [
    pytest.mark.usefixtures("world"),
    pytest.mark.engine,
    pytest.mark.skipif(not vllm_available(), reason="vLLM is not installed"),
]

REPOSITORY = Path(__file__).parents[2]
# Two float32 implementations of four layers; a wrong tensor shows at 0.01 and above.
TOLERANCE = 1e-4
STOP_IDS = tuple(range(10, 26))


def start(tmp_path_factory, **arguments):
    path = tmp_path_factory.mktemp("engine")
    trainer = ToyTrainer(make_model("qwen3", path / "model", vocab_size=256, **arguments))
    return trainer, trainer.start_engine(path / "log" / "engine.txt")


@pytest.fixture(scope="module", params=["untied", "tied"])
def pair(request, world, tmp_path_factory):
    """(trainer, engine), for tests that leave the engine in step with the trainer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_process, "CHILD_MODULE", "tests.engine.patient_child")
        trainer, engine = start(tmp_path_factory, tie_word_embeddings=request.param == "tied")
    with pytest.raises(EngineError, match="refusing to generate: no weights have been received"):
        engine.generate(make_prompts(1), sampling())
    engine.update_weights(0)
    yield trainer, engine
    engine.close()
    wait_until_gone(engine._process.pid)


def sampling(**overrides) -> Sampling:
    usual = Sampling(2, temperature=1.0, max_response_length=20, stop_ids=STOP_IDS, seed=7)
    return dataclasses.replace(usual, **overrides)


def assert_in_step(trainer: ToyTrainer, engine: VllmEngine) -> None:
    assert largest_difference(engine.score(PROBES), trainer.probes()) < TOLERANCE


def test_engine_scores_as_the_trainer_after_every_update(pair):
    """The second update is the telling one: only then is the layout already packed."""
    trainer, engine = pair
    before = trainer.probes()
    for version in (1, 2):
        trainer.train(seed=version)
        report = engine.update_weights(version)
        assert_in_step(trainer, engine)
        assert report.version == version and report.num_bytes == trainer.manifest.num_bytes
        assert 0 < report.seconds < 30
    assert largest_difference(before, trainer.probes()) > 0.1, "training changed nothing"


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.norm.weight",
    ],
)
def test_probe_finds_one_tensor_that_was_not_sent(pair, name):
    trainer, engine = pair
    parameter = trainer.model.get_parameter(name)
    kept = parameter.detach().clone()
    with torch.no_grad():
        # Not a factor: the norms behind a projection would take it out again.
        parameter.add_(0.05 * torch.randn_like(parameter))
    probe = SyncCheck(WeightSyncConfig(), "float32").judge(
        engine.score(PROBES), trainer.probes(), version=1
    )
    assert probe.verdict == "stop" and "does not hold the trainer's weights" in probe.message
    with torch.no_grad():
        parameter.copy_(kept)
    assert_in_step(trainer, engine)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_of_the_distribution_sampled_from(pair, temperature):
    """After the temperature, not before, for every token, the end of sequence included."""
    trainer, engine = pair
    for rollout in engine.generate(make_prompts(8), sampling(temperature=temperature)):
        num_prompt = len(rollout.prompt.prompt_ids)
        expected = trainer.score(rollout.prompt.prompt_ids + rollout.response_ids, temperature)
        assert len(rollout.response_logprobs) == len(rollout.response_ids)
        assert largest_difference([rollout.response_logprobs], [expected[num_prompt - 1 :]]) < 1e-4


def test_top_p_leaves_the_most_likely_tokens_and_their_proportions(pair):
    """The float64 distribution of the same rule, after the temperature; log-probabilities are of
    what is left."""
    trainer, engine = pair
    seldom = 0
    for rollout in engine.generate(make_prompts(8), sampling(temperature=0.8, top_p=0.6)):
        ids = rollout.prompt.prompt_ids + rollout.response_ids
        with torch.no_grad():
            logits_TW = trainer.model(torch.tensor([ids])).logits[
                0, -len(rollout.response_ids) - 1 :
            ]
        for row, token, logprob in zip(
            logits_TW, rollout.response_ids, rollout.response_logprobs, strict=False
        ):
            kept = nucleus(row, temperature=0.8, top_p=0.6)
            assert logprob == pytest.approx(kept[token], abs=TOLERANCE)
            seldom += token != max(kept, key=kept.get)
    assert seldom > 20, "not the most likely token alone"


def test_response_ends_where_it_should(pair):
    """At a stop id, which it includes, or at the length limit; vLLM adds no stop id of its own."""
    _, engine = pair
    rollouts = engine.generate(make_prompts(16), sampling())
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        *body, last = rollout.response_ids
        assert not set(body) & set(STOP_IDS)
        assert (rollout.finish_reason == "stop") == (last in STOP_IDS)
        assert rollout.finish_reason == "stop" or len(rollout.response_ids) == 20


def test_same_seed_same_samples(pair):
    """To the last bit of every logprob. Another seed, sample or batch of prompts: other draws."""
    _, engine = pair
    prompts = make_prompts(8)
    first = engine.generate(prompts, sampling())
    assert [(r.prompt.index, r.sample_index) for r in first] == [
        (i, s) for i in range(8) for s in (0, 1)
    ]
    assert engine.generate(prompts, sampling()) == first
    engine.update_weights(first[0].weight_version)  # the same weights once more
    assert engine.generate(prompts, sampling()) == first
    other = engine.generate(prompts, sampling(seed=8))
    assert sum(a.response_ids == b.response_ids for a, b in zip(first, other, strict=True)) < 4
    assert (
        sum(a.response_ids == b.response_ids for a, b in zip(first[::2], first[1::2], strict=True))
        < 4
    )


def test_responses_are_told_as_they_end_and_are_those_of_vllms_own_loop(pair):
    """Short ones first, each once; every id and bit as LLM.generate returns it at the end."""
    _, engine = pair
    prompts, told = make_prompts(16), []
    rollouts = engine.generate(prompts, sampling(), lambda *response: told.append(response))
    assert sorted(number for number, _ in told) == list(range(32)) and dict(told) == dict(
        enumerate(rollouts)
    )
    assert [number for number, _ in told] != list(range(32))
    jobs = numbered_samples(prompts, sampling())
    whole = engine._process.ask(
        "generate_whole",
        doing="generating",
        wait_s=60,
        requests=[engine._request(prompt, seed, sampling()) for prompt, _, seed in jobs],
    )
    assert [
        (tuple(s.response_ids), tuple(s.response_logprobs), s.finish_reason) for s in whole
    ] == [(r.response_ids, r.response_logprobs, r.finish_reason) for r in rollouts]


def test_rollouts_carry_the_version_that_wrote_them(pair):
    trainer, engine = pair
    for version in (41, 42):
        trainer.train(seed=version)
        engine.update_weights(version)
        assert {r.weight_version for r in engine.generate(make_prompts(3), sampling())} == {version}
    engine._version = 43  # the trainer believes in an update that never came
    with pytest.raises(EngineError, match=r"written by weight versions \['42'\], .* given 43"):
        engine.generate(make_prompts(3), sampling())
    engine.update_weights(43)


def test_prompt_too_long_is_refused(pair):
    _, engine = pair
    limit = sampling(max_response_length=MAX_MODEL_LEN - 4)
    with pytest.raises(ValueError, match=r"prompt 2 has 5 tokens.*max_model_len=128.*Lower"):
        engine.generate(make_prompts(3), limit)


def test_changed_byte_is_found_and_poisons_until_the_next_sync(pair, monkeypatch):
    trainer, engine = pair
    trainer.train(seed=50)

    def pack_and_corrupt(bucket, tensors, device):
        buffer = whole_pack(bucket, tensors, device)
        if bucket[0].name == trainer.manifest.stages[0][1][0].name:
            buffer[3] ^= 64
        return buffer

    whole_pack = sender.pack
    monkeypatch.setattr(sender, "pack", pack_and_corrupt)
    with pytest.raises(EngineError, match="1 of 7 tensors arrived changed, by their checksums"):
        engine.update_weights(50)
    with pytest.raises(EngineError, match=r"refusing to generate.*arrived changed"):
        engine.generate(make_prompts(1), sampling())
    with pytest.raises(EngineError, match="refusing to score"):
        engine.score(PROBES)
    monkeypatch.undo()
    engine.update_weights(51)
    assert_in_step(trainer, engine)


def test_missing_bucket_fails_at_once(pair, monkeypatch):
    """Not at the deadline: the leader knows, and lets go of the workers."""
    trainer, engine = pair
    monkeypatch.setattr(engine._bridge, "_export_buckets", lambda: list(trainer.export())[:-1])
    begin = time.monotonic()
    with pytest.raises(EngineError, match="buckets were exported, and the manifest has"):
        engine.update_weights(60)
    assert time.monotonic() - begin < 10
    monkeypatch.undo()
    engine.update_weights(61)
    assert_in_step(trainer, engine)


def test_wrong_tensor_fails_at_once(pair, monkeypatch):
    trainer, engine = pair
    halves = ([tensor.half() for tensor in bucket] for bucket in trainer.export())
    monkeypatch.setattr(engine._bridge, "_export_buckets", lambda: halves)
    with pytest.raises(EngineError, match=r"is torch.float16 .* manifest says torch.float32"):
        engine.update_weights(62)
    monkeypatch.undo()
    engine.update_weights(63)
    assert_in_step(trainer, engine)


def test_late_leader_meets_the_deadline(pair, monkeypatch):
    trainer, engine = pair

    def export():
        time.sleep(4)
        yield from trainer.export()

    short = engine._weight_sync.model_copy(update={"timeout_s": 1.5})
    monkeypatch.setattr(engine, "_weight_sync", short)
    monkeypatch.setattr(engine._bridge, "_export_buckets", export)
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"vLLM engine .* failed while taking the weights"):
        engine.update_weights(70)
    assert time.monotonic() - begin < 4 + 1.5 + vllm_engine.GRACE_S
    monkeypatch.undo()
    engine.update_weights(71)
    assert_in_step(trainer, engine)


def test_manifest_that_forgets_a_parameter_is_found(pair, monkeypatch):
    """The names arrive complete, and one parameter of the engine would keep its old values."""
    trainer, engine = pair
    (stage,) = trainer.manifest.stages
    smaller = Manifest((stage[:-1],))
    monkeypatch.setattr(engine._bridge, "manifest", smaller)
    monkeypatch.setattr(engine._bridge, "_export_buckets", lambda: list(trainer.export())[:-1])
    engine._bridge.close()  # the next sync tells the engine the manifest anew
    with pytest.raises(EngineError, match="the manifest has nothing for the engine's"):
        engine.update_weights(80)
    monkeypatch.undo()
    engine._bridge.close()
    engine.update_weights(81)
    assert_in_step(trainer, engine)


def test_killed_engine_is_named_at_once_and_what_was_told_is_whole(tmp_path_factory):
    """Told before it died: complete, and what an engine that lives says."""
    _, engine = start(tmp_path_factory)
    engine.update_weights(0)
    pid = engine._process.pid
    prompts, told, killed_at = make_prompts(32), {}, []
    expected = engine.generate(prompts, sampling())

    def tell(number: int, rollout: Rollout) -> None:
        told[number] = rollout
        if len(told) == 5:
            killed_at.append(time.monotonic())
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(EngineError) as caught:
        engine.generate(prompts, sampling(), tell)
    assert killed_at and time.monotonic() - killed_at[0] < 2
    assert "vLLM engine (rollout.tensor_model_parallel_size=1) died while generating 64" in str(
        caught.value
    )
    assert "killed by SIGKILL" in str(caught.value) and "engine.txt:\n" in str(caught.value)
    assert 5 <= len(told) < 64
    assert all(rollout == expected[number] for number, rollout in told.items())
    with pytest.raises(EngineError, match="died"):
        engine.update_weights(1)
    engine.close()
    wait_until_gone(pid)


def test_missing_vllm_says_how_to_install_it(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(vllm_engine, "vllm_available", lambda: False)
    with pytest.raises(EngineError, match=r"make install.*rollout.engine=megatron"):
        start(tmp_path_factory)


def test_start_failure_quotes_the_engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine")
    trainer = ToyTrainer(make_model("qwen3", path / "model"))
    (path / "model" / "config.json").write_text("{}")
    with pytest.raises(EngineError, match=r"vLLM engine .* failed while starting"):
        trainer.start_engine(path / "engine.txt")


def test_two_stage_leaders_on_two_ranks(tmp_path):
    """Stage 0 on rank 0, stage 1 on rank 1, and collectives between the transfers."""
    run_two_ranks(tmp_path)


@pytest.mark.slow
def test_engine_with_two_workers(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine")
    trainer = ToyTrainer(make_model("qwen3", path / "model", vocab_size=256))
    engine = trainer.start_engine(path / "engine.txt", engine_tp=2)
    for version in (0, 1):
        trainer.train(seed=version)
        engine.update_weights(version)
        assert_in_step(trainer, engine)
    first = engine.generate(make_prompts(4), sampling())
    assert engine.generate(make_prompts(4), sampling()) == first
    engine.close()


def run_two_ranks(tmp_path: Path) -> None:
    make_model("qwen3", tmp_path / "model", vocab_size=256)
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.two_leaders", str(tmp_path)],
            cwd=REPOSITORY,
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            | {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0 and output.endswith("all checks passed\n"), output
