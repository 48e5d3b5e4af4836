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

import psutil
import pytest
import torch

from megatron_eopd.config import WeightSyncConfig
from megatron_eopd.errors import EngineError
from megatron_eopd.parallel.init import free_port
from megatron_eopd.records import Rollout
from megatron_eopd.rollout import engine_process, vllm_options
from megatron_eopd.rollout.engine import Sampling, numbered_samples
from megatron_eopd.rollout.messages import Sample
from megatron_eopd.rollout.states import State
from megatron_eopd.rollout.vllm_engines import VllmEngines
from megatron_eopd.rollout.vllm_options import vllm_available
from megatron_eopd.weight_sync import outlet
from megatron_eopd.weight_sync.manifest import Manifest
from megatron_eopd.weight_sync.verify import SyncCheck
from tests.dense_sampling import nucleus
from tests.engine.toy import (
    MAX_MODEL_LEN,
    PROBES,
    ToyTrainer,
    largest_difference,
    make_prompts,
    pids,
    scores,
)
from tests.living import wait_until_gone
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


def start(tmp_path_factory, options=None, **arguments):
    path = tmp_path_factory.mktemp("engine")
    trainer = ToyTrainer(make_model("qwen3", path / "model", vocab_size=256, **arguments))
    return trainer, trainer.start_engine(path / "log" / "engine.txt", **(options or {}))


@pytest.fixture(scope="module", params=["untied", "tied"])
def pair(request, world, tmp_path_factory):
    """(trainer, engine), for tests that leave the engine in step with the trainer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_process, "CHILD_MODULE", "tests.engine.patient_child")
        trainer, engine = start(tmp_path_factory, tie_word_embeddings=request.param == "tied")
    with pytest.raises(EngineError, match="refusing to score: no weights have been received"):
        engine._fleet.ask(engine._fleet.handles, "score", 60, "scoring", sequences=PROBES)
    engine.update_weights(0)
    yield trainer, engine
    engine.close()
    wait_until_gone(lambda: [pid for pid in pids(engine) if psutil.pid_exists(pid)], 5)


def sampling(**overrides) -> Sampling:
    usual = Sampling(2, temperature=1.0, max_response_length=20, stop_ids=STOP_IDS, seed=7)
    return dataclasses.replace(usual, **overrides)


def assert_in_step(trainer: ToyTrainer, engine: VllmEngines) -> None:
    for found in scores(engine, PROBES):
        assert largest_difference(found, trainer.probes()) < TOLERANCE


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
    (found,) = scores(engine, PROBES)
    probe = SyncCheck(WeightSyncConfig(), "float32").judge(found, trainer.probes(), version=1)
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
    requests = [r for group in engine._requests(jobs, sampling()) for r in group]
    (whole,) = engine._fleet.ask(
        engine._fleet.handles, "generate_whole", 60, "generating", requests=requests
    ).values()
    assert [
        (tuple(s.response_ids), tuple(s.response_logprobs), s.finish_reason) for s in whole
    ] == [(r.response_ids, r.response_logprobs, r.finish_reason) for r in rollouts]


def test_rollouts_carry_the_version_that_wrote_them(pair):
    trainer, engine = pair
    for version in (41, 42):
        trainer.train(seed=version)
        engine.update_weights(version)
        assert {r.weight_version for r in engine.generate(make_prompts(3), sampling())} == {version}
    late = Sample(0, [1], [-0.5], "stop", ["41"])
    with pytest.raises(EngineError, match=r"written by weight versions \['41'\], .* given 42"):
        engine._to_rollout(make_prompts(1)[0], 0, late)


def test_prompt_too_long_is_refused(pair):
    _, engine = pair
    limit = sampling(max_response_length=MAX_MODEL_LEN - 4)
    with pytest.raises(ValueError, match=r"prompt 2 has 5 tokens.*max_model_len=128.*Lower"):
        engine.generate(make_prompts(3), limit)


def test_changed_byte_is_found_and_poisons_until_the_next_sync(pair, monkeypatch):
    trainer, engine = pair
    trainer.train(seed=50)

    def pack_and_corrupt(bucket, tensors, buffer):
        whole_pack(bucket, tensors, buffer)
        if bucket[0].name == trainer.manifest.stages[0][1][0].name:
            buffer[3] ^= 64

    whole_pack = outlet.pack
    monkeypatch.setattr(outlet, "pack", pack_and_corrupt)
    with pytest.raises(EngineError, match="1 of 7 tensors arrived changed, by their checksums"):
        engine.update_weights(50)
    assert not engine._fleet.serving
    for verb, what in [("score", {"sequences": PROBES}), ("commit", {"version": 50})]:
        with pytest.raises(EngineError, match=r"refusing to .*arrived changed"):
            engine._fleet.ask(engine._fleet.handles, verb, 60, verb, **what)
    monkeypatch.undo()
    engine.update_weights(51)
    assert_in_step(trainer, engine)


def test_missing_bucket_fails_at_once(pair, monkeypatch):
    """Not at the deadline: the leader knows, and lets go of the workers."""
    trainer, engine = pair
    monkeypatch.setattr(engine._own.outlet, "_export_buckets", lambda: list(trainer.export())[:-1])
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
    monkeypatch.setattr(engine._own.outlet, "_export_buckets", lambda: halves)
    with pytest.raises(EngineError, match=r"is torch.float16 .* manifest says torch.float32"):
        engine.update_weights(62)
    monkeypatch.undo()
    engine.update_weights(63)
    assert_in_step(trainer, engine)


def test_manifest_that_forgets_a_parameter_is_found(tmp_path):
    """The names arrive complete, and one parameter of the engine would keep its old values."""
    trainer = ToyTrainer(make_model("qwen3", tmp_path / "model", vocab_size=256))
    (stage,) = trainer.manifest.stages
    trainer.manifest = Manifest((stage[:-1],))
    engine = trainer.start_engine(
        tmp_path / "engine.txt", export=lambda: list(trainer.export())[:-1]
    )
    with pytest.raises(EngineError, match="the manifest has nothing for the engine's"):
        engine.update_weights(80)
    engine.close()


def test_an_engine_that_dies_loses_nothing(tmp_path_factory):
    """Alone: it starts again, gets the weights, and draws what is missing, bit for bit. In the
    middle of a call, of a sync, and of its own start."""
    told: list[str] = []

    def tell(line: str) -> None:
        if line.startswith("WARNING"):
            told.append(line)

    trainer, engine = start(tmp_path_factory, {"tell": tell})
    engine.update_weights(0, PROBES)
    prompts = make_prompts(32)
    expected = engine.generate(prompts, sampling())

    seen = []

    def kill(number: int, rollout: Rollout) -> None:
        seen.append(number)
        if len(seen) == 5:
            os.killpg(pids(engine)[0], signal.SIGKILL)

    assert engine.generate(prompts, sampling(), kill) == expected
    assert sorted(seen) == list(range(64)), "each told once"
    assert "engine 0 on rank 0 died: killed by SIGKILL" in told[-1]
    assert "requests go back into the queue. It starts again, 1 of 3" in told[-1]

    trainer.train(seed=1)
    victim = pids(engine)[0]
    exports = [interrupted(trainer, victim)]
    engine._own.outlet._export_buckets = lambda: exports.pop() if exports else trainer.export()
    engine.update_weights(1, PROBES)
    assert pids(engine)[0] != victim and "while taking the weights" in told[-1]
    assert_in_step(trainer, engine)

    second = pids(engine)[0]
    os.killpg(second, signal.SIGKILL)
    while pids(engine)[0] == second:
        engine._fleet.exchange()  # it starts again
    os.killpg(pids(engine)[0], signal.SIGKILL)
    assert engine.update_weights(1, PROBES).probe.verdict == "sound"
    assert engine._fleet.handles[0].life.restarts_in_a_row == 3
    engine.close()
    wait_until_gone(lambda: [pid for pid in pids(engine) if psutil.pid_exists(pid)], 5)


def interrupted(trainer: ToyTrainer, victim: int):
    """The export; the engine is killed behind its first bucket."""
    first, *others = trainer.export()
    yield first
    os.killpg(victim, signal.SIGKILL)
    yield from others


def test_two_engines_draw_as_one(tmp_path_factory):
    """Bit for bit, also while one of them is killed, and when it has come back. What a sync would
    give to both, both have."""
    trainer, one = start(tmp_path_factory)
    one.update_weights(0)
    prompts = make_prompts(40)
    expected = one.generate(prompts, sampling())
    one.close()
    two = trainer.start_engine(tmp_path_factory.mktemp("two") / "engine.txt", num_engines=2)
    two.update_weights(0, PROBES)
    drawn = two.generate(prompts, sampling())
    assert drawn == expected
    used = two.metrics()
    assert min(used["engine/0/tokens_per_s"], used["engine/1/tokens_per_s"]) > 0
    assert used["engine/alive"] == 2 and 0 <= used["engine/0/idle_share"] < 1

    def kill(number: int, rollout: Rollout) -> None:
        if not killed:
            killed.append(os.killpg(pids(two)[1], signal.SIGKILL))

    killed: list[None] = []
    assert two.generate(prompts, sampling(), kill) == expected
    assert [h.life.state for h in two._fleet.handles] == [State.HEALTHY, State.RESTARTING]
    trainer.train(seed=1)
    two.update_weights(1, PROBES)  # without waiting for the other
    two._fleet.wait_for_start()
    while not two._fleet.handles[1].life.runs:
        two._fleet.exchange()
    trainer.train(seed=2)
    two.update_weights(2, PROBES)
    assert len(two._fleet.serving) == 2
    assert_in_step(trainer, two)
    two.close()


def test_an_engine_asleep_refuses(pair):
    trainer, engine = pair
    with engine.asleep():
        for verb, what in [("score", {"sequences": PROBES}), ("commit", {"version": 0})]:
            with pytest.raises(EngineError, match=f"refusing to {verb}: asleep"):
                engine._fleet.ask(engine._fleet.handles, verb, 60, verb, **what)
        trainer.train(seed=90)
    engine.update_weights(90)
    assert_in_step(trainer, engine)


def test_missing_vllm_says_how_to_install_it(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(vllm_options, "vllm_available", lambda: False)
    with pytest.raises(EngineError, match=r"make install.*rollout.engine=megatron"):
        start(tmp_path_factory)


def test_start_failure_quotes_the_engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine")
    trainer = ToyTrainer(make_model("qwen3", path / "model"))
    (path / "model" / "config.json").write_text("{}")
    with pytest.raises(
        EngineError, match=r"engine 0 on rank 0 cannot be started: it failed to"
    ) as no:
        trainer.start_engine(path / "engine.txt")
    assert "engine.0.txt:\n" in str(no.value)


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
