"""Weights through the memory of one GPU, from this process to others that read it by CUDA IPC."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_eopd.weight_sync.buckets import buffer_bytes, pack, unpack
from megatron_eopd.weight_sync.manifest import TensorSpec
from megatron_eopd.weight_sync.ring import Ring
from megatron_eopd.weight_sync.share import make_share

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
ROOT = Path(__file__).parents[2]
SLOT = 64 << 20


def start_reader(address: dict, count: int, die_after: int = -1) -> subprocess.Popen:
    reader = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.share_reader"],
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    reader.stdin.write(json.dumps({"address": address, "count": count, "die_after": die_after}))
    reader.stdin.write("\n")
    reader.stdin.flush()
    return reader


def hand_over(num_readers: int, count: int, die_after: int = -1) -> tuple[Ring, list, list[int]]:
    """The ring, what each reader said, and the sums of the buckets."""
    share = make_share(torch.device("cuda"), SLOT, 2)
    ring = Ring(share, num_readers, timeout_s=60)
    readers = [
        start_reader(address, count, die_after if n == 0 else -1)
        for n, address in enumerate(ring.addresses())
    ]
    generator = torch.Generator("cuda").manual_seed(0)
    sums = []
    for _ in range(count):
        slot = ring.next_slot(SLOT)
        slot.view(torch.int64).random_(generator=generator)
        ring.publish(SLOT)
        sums.append(slot.view(torch.int64).sum())
    ring.finish()
    ring.close()
    share.close()
    said = [reader.communicate(timeout=60)[0] for reader in readers]
    return ring, said, [int(s) for s in sums]


@pytest.mark.parametrize("num_readers", [1, 2])
def test_readers_get_every_bucket_of_a_gpu(num_readers):
    """Through two slots that are used again and again."""
    _, said, sums = hand_over(num_readers, count=12)
    for text in said:
        assert json.loads(text)["sums"] == sums


def test_a_reader_that_ends_is_left_out():
    """And the memory that it had open does not hold the writer up."""
    begin = time.monotonic()
    _, said, sums = hand_over(2, count=12, die_after=3)
    assert said[0] == "" and json.loads(said[1])["sums"] == sums
    assert time.monotonic() - begin < 50


def test_memory_comes_back():
    """Sync after sync, in the writer."""
    used = []
    for _ in range(6):
        hand_over(1, count=2)
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
        used.append(torch.cuda.memory_reserved())
    assert max(used[1:]) <= used[1], used


def test_checksums_are_of_the_gpus_bytes():
    specs = tuple(TensorSpec(str(n), "bfloat16", (1000 + n, 33)) for n in range(5))
    tensors = [torch.randn(s.shape, device="cuda").bfloat16() for s in specs]
    buffer = torch.empty(buffer_bytes(specs), dtype=torch.uint8, device="cuda")
    pack(specs, tensors, buffer)
    for (_, got), sent in zip(unpack(specs, buffer), tensors, strict=True):
        assert torch.equal(got, sent)
    buffer[7] ^= 1
    with pytest.raises(ValueError, match="1 of 5 tensors arrived changed"):
        unpack(specs, buffer)
