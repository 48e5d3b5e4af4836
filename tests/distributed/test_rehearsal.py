"""A rehearsal against the same step for real, and what its watch counts."""

import json

import pytest
import torch
import torch.distributed as dist

from megatron_eopd.config import Config
from megatron_eopd.models.load import load_model
from megatron_eopd.parallel.layout import Layout
from megatron_eopd.planning.activations import Lengths, Load
from megatron_eopd.rehearsal import rehearse as rehearsal
from megatron_eopd.rehearsal.watch import Watch
from megatron_eopd.rehearsal.world import fake_world
from tests.ranks import context_for, leave_groups, run_ranks, start_ranks

LENGTHS = Lengths(8, 56)
MIB = 2**20


class RealWatch(Watch):
    """Of tensors that exist."""

    def _communicate(self, func, args, kwargs):
        return func(*args, **kwargs)


def config_of(hf_dir, payload, head) -> Config:
    return Config.model_validate(
        {
            "run_dir": "unused",
            "student": {"hf_path": hf_dir},
            "teacher": {"hf_path": hf_dir, "payload": payload},
            # On a CPU bfloat16 and float32 take the same attention, a GPU's bfloat16 another one.
            "model": {"dtype": "float32"},
            "objective": {"head": head, "head_chunk_size": 64},
            "rollout": {"batch_size": 8, "max_response_length": LENGTHS.response},
            "training": {"global_batch_size": 8, "micro_batch_size": 4},
        }
    )


def perform_for_real(configs, out):
    rehearsal.build_model = load_model
    for number, config in enumerate(configs):
        context, watch = context_for(1, 1), RealWatch()
        load = Load.of(config.training, LENGTHS, context.layout)
        plan = rehearsal.full_plan(load, LENGTHS, context.layout, config)
        with watch:
            watch.enter("start")
            rehearsal.perform_student(config, plan, context, watch)
            watch.enter("end")
        peaks = {name: watch.tallies[name].peak for name in ("scoring", "training")}
        (out / f"{number}.json").write_text(json.dumps(peaks))
        leave_groups()


def perform_as_rehearsal(_rank, config, path):
    found = rehearsal.rehearse(config, 1, 0, LENGTHS)
    path.write_text(json.dumps({name: tally.peak for name, tally in found.tallies.items()}))


def test_a_rehearsal_needs_the_memory_of_the_real_step(family_dirs, tmp_path):
    """Tiny models, one rank: every tensor of the real step is counted by the same watch."""
    cases = [("hidden", "chunked"), ("hidden", "materialized"), ("logits", "chunked")]
    configs = [config_of(family_dirs["qwen3"], *case) for case in cases]
    run_ranks(1, tmp_path, perform_for_real, configs, tmp_path)
    for number, config in enumerate(configs):
        path = tmp_path / f"rehearsed{number}.json"
        start_ranks(1, perform_as_rehearsal, config, path)
        rehearsed, real = (json.loads(p.read_text()) for p in (path, tmp_path / f"{number}.json"))
        for stretch, peak in real.items():
            assert abs(rehearsed[stretch] / peak - 1) < 0.05, (cases[number], stretch)


def watched(check) -> None:
    watch = Watch()
    with fake_world(Layout(2, 1, 2, rank=0), watch) as context:
        watch.enter("all")
        check(context, watch)
        watch.enter("end")


def check_counts(_rank):
    def count(context, watch):
        device = context.device
        a = torch.empty(MIB, dtype=torch.uint8, device=device)
        b = torch.empty(2 * MIB, dtype=torch.uint8, device=device)
        view = b[:5]
        del b
        c = torch.empty(MIB, dtype=torch.uint8, device=device)  # the peak: a, b by its view, c
        del view, a
        torch.empty(MIB, dtype=torch.uint8, device=device)
        torch.empty(100 * MIB)  # in host memory
        m = torch.empty(8, 16, device=device)
        m @ m.T
        dist.all_reduce(m, group=context.groups.tp)
        m.sum().item()
        m.tolist()
        bool((m > 0).all())
        torch.tensor(3.0).item()
        m.sum().cpu().item()
        del c

    def check(context, watch):
        count(context, watch)
        watch.enter("end")
        tally = watch.tallies["all"]
        assert 4 * MIB <= tally.peak < 4 * MIB + 4096
        assert tally.flops == 2 * 8 * 16 * 8
        ((what, calls),) = tally.collectives.items()
        assert (what.name, what.ranks, calls) == ("allreduce", 2, 1)
        assert tally.bytes_moved[what] == 8 * 16 * 4
        # A list is one copy, and what lies on the host is there.
        assert tally.reads.total() == 4

    watched(check)


def check_offloaded(_rank):
    def check(context, watch):
        host = torch.empty(MIB, dtype=torch.uint8, device="cpu")
        assert watch.is_on_host(host) and not host.is_cuda
        there = host.to(context.device, non_blocking=True)
        assert there.is_cuda
        watch.enter("end")
        assert watch.tallies["all"].peak == MIB

    watched(check)


@pytest.mark.parametrize("check", [check_counts, check_offloaded])
def test_the_watch_counts_what_a_gpu_would_hold_and_be_asked_for(check):
    start_ranks(1, check)
