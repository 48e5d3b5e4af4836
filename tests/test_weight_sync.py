"""The wire format, the transfer groups and their deadlines, without an engine."""

import math
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eopd.config import WeightSyncConfig
from megatron_eopd.errors import EngineError
from megatron_eopd.records import Prompt, Rollout
from megatron_eopd.weight_sync.buckets import buffer_bytes, checksum, offsets, pack, unpack
from megatron_eopd.weight_sync.communicator import (
    GlooCommunicator,
    TransferError,
    join_store,
    serve_store,
)
from megatron_eopd.weight_sync.manifest import Manifest, TensorSpec
from megatron_eopd.weight_sync.sender import WeightSender
from megatron_eopd.weight_sync.verify import (
    EXPECTED_ROUNDING,
    SyncCheck,
    mean_difference,
    probe_sequences,
)

CPU = torch.device("cpu")
# Odd sizes and mixed types, so that nothing is aligned by accident.
BUCKET = (
    TensorSpec("a", "bfloat16", (3,)),
    TensorSpec("b", "float32", (5, 3)),
    TensorSpec("c", "bfloat16", (7, 1, 3)),
    TensorSpec("d", "float32", ()),
)


def tensors_of(bucket) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s.shape, generator=generator).to(s.torch_dtype) for s in bucket]


def test_unpack_returns_what_pack_was_given():
    """Bit for bit, in any mixture of types and odd sizes, on 16-byte boundaries."""
    tensors = tensors_of(BUCKET)
    tensors[1] = tensors[1].t().contiguous().t()  # the exporter may hand over a transposed view
    buffer = pack(BUCKET, tensors, CPU)
    assert buffer.numel() == buffer_bytes(BUCKET)
    assert all(start % 16 == 0 for start in offsets(BUCKET))
    unpacked = unpack(BUCKET, buffer)
    assert [name for name, _ in unpacked] == ["a", "b", "c", "d"]
    for (_, got), sent in zip(unpacked, tensors, strict=True):
        assert got.dtype == sent.dtype and torch.equal(got, sent)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, buffer_bytes(BUCKET) - 1), st.integers(1, 255))
def test_no_changed_byte_passes(position, change):
    """Wherever it is: in a tensor, in the gap behind one, or in a checksum."""
    buffer = pack(BUCKET, tensors_of(BUCKET), CPU)
    buffer[position] ^= change
    with pytest.raises(ValueError, match="tensors arrived changed"):
        unpack(BUCKET, buffer)


def test_error_names_the_tensor_that_changed():
    buffer = pack(BUCKET, tensors_of(BUCKET), CPU)
    buffer[offsets(BUCKET)[2]] ^= 1
    with pytest.raises(ValueError, match=r"1 of 4 tensors .*: c$"):
        unpack(BUCKET, buffer)


@pytest.mark.parametrize("distance", [1, 2, 512, 1 << 20])
def test_checksum_sees_exchanged_words(distance):
    """Also when they differ in the sign of one float alone, the top bit of a word, and when they
    lie in different chunks of the computation."""
    words = torch.zeros((1 << 20) + 2, dtype=torch.int64)
    words[0], words[distance] = 7, 7 ^ (-1 << 63)
    exchanged = words.clone()
    exchanged[0], exchanged[distance] = words[distance], words[0]
    assert checksum(words.view(torch.uint8)) != checksum(exchanged.view(torch.uint8))


def test_checksum_is_that_of_plain_python():
    """Σ (w ^ (w >> 32)) · (2i + 1) modulo 2^64, on unsigned words: what any device must find."""
    data = torch.randint(0, 256, (8 * 1000,), dtype=torch.uint8)
    words = memoryview(data.numpy().tobytes()).cast("Q")
    expected = sum((w ^ (w >> 32)) * (2 * i + 1) for i, w in enumerate(words)) % 2**64
    assert checksum(data).item() % 2**64 == expected


@pytest.mark.parametrize(
    ("position", "tensor", "message"),
    [
        (0, torch.zeros(4, dtype=torch.bfloat16), r"a is torch.bfloat16 \(4,\).* \(3,\)"),
        (1, torch.zeros(5, 3, dtype=torch.bfloat16), r"b is torch.bfloat16.*torch.float32"),
    ],
)
def test_pack_refuses_what_the_manifest_does_not_say(position, tensor, message):
    tensors = tensors_of(BUCKET)
    tensors[position] = tensor
    with pytest.raises(ValueError, match=message):
        pack(BUCKET, tensors, CPU)


def test_pack_refuses_an_incomplete_bucket():
    with pytest.raises(ValueError, match="a bucket of 3 tensors where the manifest has 4: a, b"):
        pack(BUCKET, tensors_of(BUCKET)[:3], CPU)


def test_manifest_survives_json_and_its_digest_sees_every_field():
    manifest = Manifest(((BUCKET[:2], BUCKET[2:]), (BUCKET[:1],)))
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest and again.digest == manifest.digest
    others = [
        Manifest(((BUCKET[:2], BUCKET[2:]),)),
        Manifest(((BUCKET[:1], BUCKET[1:]), (BUCKET[:1],))),  # other buckets, same names
        Manifest.from_json(manifest.to_json().replace("bfloat16", "float16")),
        Manifest.from_json(manifest.to_json().replace('"a"', '"e"')),
    ]
    assert len({other.digest for other in [manifest, *others]}) == 5


def meet(timeout_s: float = 5.0) -> tuple[GlooCommunicator, GlooCommunicator]:
    """A leader and one worker, both in this process."""
    store = serve_store(0, timeout_s)
    leader: list[GlooCommunicator] = []
    thread = threading.Thread(
        target=lambda: leader.append(GlooCommunicator(store, 0, 2, timeout_s))
    )
    thread.start()
    worker = GlooCommunicator(join_store("127.0.0.1", store.port, timeout_s), 1, 2, timeout_s)
    thread.join()
    return leader[0], worker


def test_sender_delivers_its_buckets_in_order():
    buckets = (BUCKET[:2], BUCKET[2:])
    leader, worker = meet()
    sender = WeightSender(leader, buckets)
    for _ in range(2):  # a sync, and the next one on the same group
        arrived = []

        def receive(arrived=arrived):
            for bucket in buckets:
                buffer = torch.empty(buffer_bytes(bucket), dtype=torch.uint8)
                worker.broadcast(buffer, timeout_s=5)
                arrived.extend(unpack(bucket, buffer))

        thread = threading.Thread(target=receive)
        thread.start()
        sender.start()
        for bucket in buckets:
            sender.send(tensors_of(bucket), time.monotonic() + 5)
        sender.finish()
        thread.join()
        sent = [t for bucket in buckets for t in tensors_of(bucket)]
        assert [name for name, _ in arrived] == ["a", "b", "c", "d"]
        assert all(torch.equal(a, b) for (_, a), b in zip(arrived, sent, strict=True))


def test_sender_counts_its_buckets():
    leader, _worker = meet()
    sender = WeightSender(leader, ())
    with pytest.raises(ValueError, match="a bucket more than the manifest's 0"):
        sender.send([], time.monotonic() + 1)
    sender = WeightSender(leader, (BUCKET,))
    with pytest.raises(ValueError, match="0 buckets were exported, and the manifest has 1"):
        sender.finish()


def test_sender_gives_up_at_its_deadline():
    """The worker never reads; a bucket larger than any socket buffer cannot leave."""
    bucket = (TensorSpec("large", "float32", (16 << 20,)),)
    leader, _worker = meet(timeout_s=60)
    sender = WeightSender(leader, (bucket,))
    begin = time.monotonic()
    with pytest.raises(TransferError):
        sender.send([torch.zeros(16 << 20)], begin + 1)
    assert time.monotonic() - begin < 3
    assert sender.dead


def test_receiver_gives_up_at_its_deadline():
    _leader, worker = meet(timeout_s=60)
    begin = time.monotonic()
    with pytest.raises(TransferError, match="a broadcast of 64 bytes failed"):
        worker.broadcast(torch.empty(64, dtype=torch.uint8), timeout_s=0.5)
    assert time.monotonic() - begin < 3


def test_abort_lets_go_of_the_other_side():
    """A leader that fails before it sends must not keep the workers until their deadline."""
    leader, worker = meet(timeout_s=60)
    threading.Timer(0.3, leader.abort).start()
    begin = time.monotonic()
    with pytest.raises(TransferError):
        worker.broadcast(torch.empty(64, dtype=torch.uint8), timeout_s=30)
    assert time.monotonic() - begin < 5


def test_no_worker_comes():
    with pytest.raises(TransferError, match="rank 0 of 2 met no full group"):
        GlooCommunicator(serve_store(0, 0.5), 0, 2, 0.5)


def test_no_leader_answers():
    store = serve_store(0, 1)
    port = store.port
    del store
    with pytest.raises(TransferError, match=rf"no stage leader answers at 127.0.0.1:{port}"):
        join_store("127.0.0.1", port, 0.5)


def test_port_in_use_is_named():
    taken = serve_store(0, 1)
    with pytest.raises(TransferError, match=rf"port {taken.port} is in use.*weight_sync.port"):
        serve_store(taken.port, 1)


LIKELY = [math.log(0.5)] * 8


def test_only_likely_tokens_are_compared():
    """A rare token is off by a step of bfloat16 and does not count; fewer than eight likely ones
    are filled up with the likeliest."""
    trainer = [[*LIKELY[:4], -30.0], LIKELY[4:]]
    engine = [[*[x - 0.01 for x in LIKELY[:4]], -29.0], LIKELY[4:]]
    difference, count = mean_difference(engine, trainer, min_probability=0.1)
    assert count == 8 and difference == pytest.approx(0.005)
    assert mean_difference([[-5.0, -9.0]], [[-4.0, -6.0]], 0.1) == (2.0, 2)


@pytest.mark.parametrize("dtype,rounding", EXPECTED_ROUNDING.items())
def test_the_check_warns_and_stops_by_the_rounding_of_the_first_sync(dtype, rounding):
    def judge(check, difference):
        probe = check.judge([[x - difference for x in LIKELY]], [LIKELY], version=3)
        assert probe.difference == pytest.approx(difference) or difference != difference
        return probe

    quiet, noisy = (SyncCheck(WeightSyncConfig(), dtype) for _ in range(2))
    assert judge(quiet, rounding / 10).verdict == "sound"
    assert judge(quiet, 2.9 * rounding).verdict == "sound", "a lucky first figure is no baseline"
    assert judge(quiet, 4 * rounding).verdict == "warn"
    stopped = judge(quiet, 11 * rounding)
    assert stopped.verdict == "stop"
    assert "weight version 3" in stopped.message and "probe_stop_factor=10" in stopped.message
    assert judge(quiet, math.nan).verdict == "stop"
    assert judge(noisy, 2.5 * rounding).verdict == "sound"
    assert judge(noisy, 7 * rounding).verdict == "sound", "three times what was measured"
    assert judge(noisy, 8 * rounding).verdict == "warn"
    assert judge(SyncCheck(WeightSyncConfig(), dtype), 11 * rounding).verdict == "stop"


def test_probes_are_of_prompts_and_of_the_newest_responses():
    prompts = [Prompt(i, "", "", (i,) * 300) for i in range(10)]
    rollouts = [Rollout(p, 0, (90,) * 300, (0.0,) * 300, "stop", 1) for p in prompts]
    probes = probe_sequences(prompts, rollouts, max_tokens=40)
    assert [(ids[0], ids[-1], len(ids)) for ids in probes] == [
        *((i, i, 40) for i in (0, 5)),
        *((i, 90, 40) for i in (0, 5)),
    ]
    assert len(probe_sequences(prompts[:1], [], max_tokens=500)[0]) == 96
    assert probe_sequences([Prompt(0, "", "", (1,))], [], 40) == [], "nothing to predict"


def test_a_first_sync_that_warns_is_no_baseline():
    check = SyncCheck(WeightSyncConfig(), "bfloat16")

    def judge(difference):
        return check.judge([[x - difference for x in LIKELY]], [LIKELY], version=0).verdict

    assert [judge(0.25), judge(0.25), judge(0.35)] == ["warn", "warn", "stop"]


def test_broken_weights_are_not_blamed_on_the_engine():
    with pytest.raises(EngineError, match=r"the trainer's own log-probabilities .* are nan"):
        SyncCheck(WeightSyncConfig(), "float32").judge([LIKELY], [[math.nan, *LIKELY[1:]]], 3)
