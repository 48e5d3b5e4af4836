"""python -m megatron_eopd.doctor: what this machine has, what a run would use, what is missing.

Out: a table, or JSON. Never a traceback: what cannot be looked at is a line that says so.
"""

import argparse
import json
import sys
import textwrap
import warnings
from collections.abc import Sequence

from megatron_eopd.doctoring import hardware, software
from megatron_eopd.doctoring.finding import Finding, look

PROBES = (
    ("Python", software.python, True),
    ("packages", software.requirements, True),
    ("torch", software.torch_build, True),
    ("driver", hardware.driver, False),
    ("GPUs", hardware.gpus, False),
    ("NCCL", hardware.nccl, False),
    ("Megatron-Core", software.megatron_core, True),
    ("TransformerEngine", software.transformer_engine, False),
    ("Apex's kernel", software.apex, False),
    ("attention", software.attention, True),
    ("vLLM", software.vllm, False),
    ("loss", software.loss, False),
    ("shared memory", hardware.shared_memory, False),
    ("ulimits", hardware.limits, False),
    ("host memory", hardware.host_memory, False),
)
"""Topic, probe, and whether a run needs it."""
WIDTH = 100


def examine() -> list[Finding]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that are imported for the first time
        return [look(topic, probe, is_needed=needed) for topic, probe, needed in PROBES]


def table(findings: Sequence[Finding]) -> str:
    first = max(len(finding.topic) for finding in findings) + 2
    lines = []
    for finding in findings:
        said = ": ".join(filter(None, [finding.found, finding.use]))
        mark = "OBSTACLE: " if finding.is_obstacle else "missing: "
        texts = [said, *([mark + finding.cost] if finding.cost else [])]
        wrapped = [line for text in texts for line in textwrap.wrap(text, WIDTH - first)]
        lines += [
            f"{finding.topic if n == 0 else '':{first}}{line}" for n, line in enumerate(wrapped)
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_eopd.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="a list of findings instead of a table")
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if no run could start on this machine"
    )
    options = parser.parse_args(arguments)
    findings = examine()
    if options.json:
        print(json.dumps([finding.as_dict() for finding in findings], indent=2))
    else:
        print(table(findings))
    return int(options.strict and any(finding.is_obstacle for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
