"""The doctor's table: what it says of absences, which are faked, and that nothing makes it fail."""

import json
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_eopd import doctor
from megatron_eopd.doctoring import hardware, ranges, software
from megatron_eopd.doctoring.finding import Finding, look
from megatron_eopd.models import megatron_config
from megatron_eopd.parallel import cpu


def test_the_whole_table_in_ten_seconds_with_every_topic():
    """Of a core: imports count, and what else the machine does, does not."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "megatron_eopd.doctor", "--json", "--strict"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    findings = json.loads(result.stdout)
    assert [finding["topic"] for finding in findings] == [topic for topic, *_ in doctor.PROBES]
    assert not any(finding["is_obstacle"] for finding in findings)


def test_a_table_names_what_is_missing_below_what_there_is():
    here = Finding("vLLM", "none", "the trainer samples by itself", "much time")
    gone = Finding("torch", "ImportError: libcudart", "no run can start", "make install", True)
    assert doctor.table([here, gone]).splitlines() == [
        "vLLM   none: the trainer samples by itself",
        "       missing: much time",
        "torch  ImportError: libcudart: no run can start",
        "       OBSTACLE: make install",
    ]


@pytest.mark.parametrize("needed", [True, False])
def test_a_probe_that_dies_is_a_finding(needed):
    """A package whose import fails, in whatever way, takes the table with it no more."""

    def dies() -> Finding:
        raise OSError("libnvrtc.so.13: cannot open shared object file\nsecond line")

    finding = look("x", dies, is_needed=needed)
    assert finding.found == "OSError: libnvrtc.so.13: cannot open shared object file"
    assert finding.is_obstacle == needed


@pytest.mark.parametrize("missing", ["torch", "megatron", "vllm", "transformers"])
def test_it_works_without_a_package(missing):
    """Strict says 1 for those without which no run starts, and 0 for the others."""
    code = f"""
import sys
sys.modules[{missing!r}] = None
from megatron_eopd.doctor import main
sys.exit(main(["--strict"]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Traceback" not in result.stderr, result.stderr
    needed = missing != "vllm"
    assert result.returncode == needed, result.stdout
    assert ("OBSTACLE" in result.stdout) == needed


def test_without_vllm_the_sampler_stands_in(monkeypatch):
    monkeypatch.setattr("megatron_eopd.rollout.vllm_options.vllm_available", lambda: False)
    finding = software.vllm()
    assert finding.found == "none" and "rollout.max_fallback_length" in finding.cost


def test_without_a_compiler_the_loss_is_slower(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    finding = software.loss()
    assert finding.use == "in PyTorch" and "4 times slower" in finding.cost


@pytest.fixture
def transformer_engine(monkeypatch):
    """Installs a version of it, by name alone, beside a GPU; its import does as told."""

    def install(own: str, error: Exception | None = None) -> Finding:
        def load(name: str) -> None:
            if error is not None:
                raise error

        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        versions = {"transformer-engine": own, "megatron-core": "0.16.1"}
        monkeypatch.setattr(software, "version", versions.__getitem__)
        range_ = 'transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"'
        monkeypatch.setattr(software, "requires", lambda name: [range_])
        found = SimpleNamespace(find_spec=lambda name: SimpleNamespace())
        monkeypatch.setattr(megatron_config.importlib.util, "find_spec", found.find_spec)
        fake = SimpleNamespace(util=found, import_module=load)
        monkeypatch.setattr(software, "importlib", fake)
        return software.transformer_engine()

    return install


def test_transformer_engine_is_used_where_it_fits(transformer_engine):
    finding = transformer_engine("2.11.0")
    assert (finding.found, finding.use, finding.cost) == ("2.11.0", "its layers", "")


def test_transformer_engine_of_another_range_is_named(transformer_engine):
    """With the range that Megatron-Core names."""
    assert "names <2.12.0,>=2.9.0a0" in transformer_engine("2.20.2").cost


def test_transformer_engine_for_another_torch_is_an_obstacle(transformer_engine):
    """A run would take it, and die."""
    error = ImportError("undefined symbol: _ZN3c104cuda9SetDeviceEi\nmore")
    finding = transformer_engine("2.11.0", error)
    assert "cannot be loaded: undefined symbol" in finding.found and finding.is_obstacle
    assert "model.transformer_impl=local" in finding.cost


def test_megatron_core_that_was_never_run_on_a_cpu_is_an_obstacle(monkeypatch):
    """As emulate_cuda refuses it."""
    monkeypatch.setattr(cpu, "RAN_ON", ("0.1", "0.2"))
    finding = software.megatron_core()
    assert finding.is_obstacle and ">=0.1,<0.2" in finding.cost


def test_packages_out_of_their_range_are_listed(monkeypatch):
    lines = ["numpy>=99", "no-such-package", "torch", 'never; extra == "dev"']
    monkeypatch.setattr(ranges, "requires", lambda name: lines)
    number, missing = ranges.unmet("megatron-eopd")
    assert number.startswith("numpy ") and number.endswith(" is not >=99")
    assert missing == "no-such-package is missing"
    assert software.requirements().is_obstacle


def test_small_shared_memory_is_named(monkeypatch):
    """A container's 64 MB."""
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda path: SimpleNamespace(total=64e6))
    assert "--ipc=host" in hardware.shared_memory().cost


def test_tight_limits_are_named():
    endless = resource.RLIM_INFINITY
    tight = hardware.judge_limits({"memlock": 65536, "nofile": 1024, "nproc": endless})
    assert "memlock" in tight.cost and "ulimit -n 4096" in tight.cost and "∞" in tight.found
    assert hardware.judge_limits({"memlock": endless, "nofile": 65536, "nproc": 1}).cost == ""


def test_gpus_without_peer_access_are_named(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda n: card)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda a, b: (a, b) != (0, 2))
    finding = hardware.gpus()
    assert finding.found == "3 × NVIDIA H100 80 GiB" and "between 0-2:" in finding.cost
