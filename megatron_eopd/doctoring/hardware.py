"""Probes of what the machine is: devices, transfers between them, memory, limits."""

import resource
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from megatron_eopd.doctoring.finding import Finding

GIB = 2**30
ENOUGH_SHARED_GIB = 1
ENOUGH_FILES = 4096


def driver() -> Finding:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return Finding("driver", "no nvidia-smi", "make install takes this for a CPU machine")
    told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    if told.returncode:
        return Finding("driver", told.stdout.strip() or "no answer", "none", "nvidia-smi fails")
    return Finding("driver", told.stdout.split()[0], "")


def gpus() -> Finding:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return Finding("GPUs", "none", "ranks on the CPU, over gloo")
    all_of = [torch.cuda.get_device_properties(n) for n in range(count)]
    names = sorted({f"{p.name} {p.total_memory / GIB:.0f} GiB" for p in all_of})
    found = f"{count} × {', '.join(names)}"
    apart = [
        f"{a}-{b}"
        for a in range(count)
        for b in range(count)
        if a < b and not torch.cuda.can_device_access_peer(a, b)
    ]
    if apart:
        cost = f"no peer access between {', '.join(apart)}: NCCL goes through host memory there"
        return Finding("GPUs", found, "a rank on each", cost)
    return Finding("GPUs", found, "a rank on each, peer to peer" if count > 1 else "one rank")


def nccl() -> Finding:
    import torch

    if not torch.distributed.is_nccl_available():
        cost = "" if not torch.cuda.is_available() else "ranks on GPUs cannot speak to each other"
        return Finding("NCCL", "none", "gloo", cost, torch.cuda.is_available())
    own = ".".join(map(str, torch.cuda.nccl.version()))
    return Finding("NCCL", own, "between GPUs" if torch.cuda.is_available() else "gloo")


def shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    total = shutil.disk_usage(path).total / GIB
    small = total < ENOUGH_SHARED_GIB
    cost = "NCCL and vLLM run out of it: docker's --ipc=host or --shm-size=16g" if small else ""
    return Finding("shared memory", f"{total:.1f} GiB in {path}", "NCCL's and vLLM's", cost)


def limits() -> Finding:
    kinds = {"memlock": "RLIMIT_MEMLOCK", "nofile": "RLIMIT_NOFILE", "nproc": "RLIMIT_NPROC"}
    soft = {name: resource.getrlimit(getattr(resource, kind))[0] for name, kind in kinds.items()}
    return judge_limits(soft)


def judge_limits(soft: Mapping[str, int]) -> Finding:
    """`soft`: bytes, files and processes by ulimit's names; RLIM_INFINITY for no limit."""
    endless = resource.RLIM_INFINITY
    found = ", ".join(f"{n} {'∞' if v == endless else v}" for n, v in soft.items())
    costs = []
    if soft["memlock"] != endless:
        costs.append("InfiniBand needs memlock unlimited (ulimit -l unlimited)")
    if soft["nofile"] != endless and soft["nofile"] < ENOUGH_FILES:
        costs.append(f"many ranks need more files (ulimit -n {ENOUGH_FILES})")
    return Finding("ulimits", found, "", "; ".join(costs))


def host_memory() -> Finding:
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 / GIB for line in lines}
    found = f"{sizes['MemTotal']:.0f} GiB, {sizes['MemAvailable']:.0f} available"
    return Finding("host memory", found, "offloaded teachers, checkpoints, weights for engines")
