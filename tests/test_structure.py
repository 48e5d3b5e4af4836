"""The package's structure: who imports whom."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "megatron_eopd"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports_of(path: Path) -> set[str]:
    """The package's modules that one imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return found


def room_of(module: str) -> str:
    """The folder directly below the package, or the file there."""
    return module.split(".")[1] if "." in module else module


def test_no_circle_of_imports():
    """Neither between files nor between rooms: data flows one way."""
    graph = {module: imports_of(path) for module, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())
    rooms: dict[str, set[str]] = {}
    for module, imported in graph.items():
        others = {room_of(name) for name in imported} - {room_of(module)}
        rooms.setdefault(room_of(module), set()).update(others)
    list(TopologicalSorter(rooms).static_order())


def test_records_stand_at_the_bottom():
    assert imports_of(PACKAGE / "records.py") == set() == imports_of(PACKAGE / "errors.py")


def test_options_are_read_without_torch():
    """So --help, and a mistyped option, answer at once."""
    code = "import sys, megatron_eopd.train, megatron_eopd.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0


def test_the_loss_and_the_tests_of_its_kernels_need_torch_alone():
    """So that they run on a GPU machine without Megatron-Core, transformers or pydantic."""
    code = """
import sys
for name in ("megatron", "transformers", "pydantic", "vllm"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/triton"]))
"""
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout[-2000:]
