"""The parts of benchmarks/toy_privileged.py on which its table rests."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from megatron_eopd.tasks import countdown

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """benchmarks/ is no package."""
    spec = importlib.util.spec_from_file_location(
        "toy_privileged", REPOSITORY / "benchmarks" / "toy_privileged.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    path = sys.path.copy()  # the script finds tools/ by it
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    for name in (spec.name, "make_toy_models"):
        del sys.modules[name]


def test_intervals_over_seeds_are_those_of_student_t(bench):
    values = np.array([0.1, 0.12, 0.09, 0.15, 0.11])
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert bench.t_interval(values) == pytest.approx((expected.low, expected.high))


def responses(bench: ModuleType, texts: list[str]) -> object:
    """One response to each of the first problems."""
    tokenizer = countdown.build_tokenizer()
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    ids_BR = torch.zeros(len(ids), bench.LONGEST, dtype=torch.long)
    for b, row in enumerate(ids):
        ids_BR[b, : len(row)] = torch.tensor(row)
    lengths_B1 = torch.tensor([[len(row)] for row in ids])
    mask_BR = torch.arange(bench.LONGEST) < lengths_B1
    return bench.Responses(ids_BR, mask_BR, torch.ones(len(ids), dtype=torch.bool), num_samples=1)


def test_a_response_follows_the_solution_up_to_its_first_other_token(bench):
    """A token follows it if all tokens before it are the solution's, whatever itself is."""
    first, second = list(countdown.Countdown().problems())[:2]
    solution = first.columns["solution"]
    words = second.columns["solution"].split(" ")
    words[7] = "?"  # the operation of the second step
    followed_BR = bench.follows_solution(responses(bench, [solution, " ".join(words)]))
    assert followed_BR[0, : countdown.RESPONSE_LENGTH].all()
    assert followed_BR[1, :8].all() and not followed_BR[1, 8:].any()


def test_both_prompts_end_alike_and_one_begins_with_a_right_solution(bench):
    plain, shown = (bench.prompts_of(5, shown=shown) for shown in (False, True))
    for problem, text, more in zip(countdown.split("test"), plain, shown, strict=False):
        assert text == problem.prompt_text()
        assert countdown.verify(problem, more.removesuffix(f" ; {text}"))


def test_another_output_is_asked_for_where_options_differ(bench, tmp_path):
    """Runs of 60 iterations and of 3 never stand in one table."""
    own = bench.parse_arguments(["--output", str(tmp_path)])
    bench.check_options(own)
    bench.check_options(own)
    other = bench.parse_arguments(["--output", str(tmp_path), "--iterations", "3"])
    with pytest.raises(SystemExit, match=r"'iterations': 60.*not.*'iterations': 3.*--output"):
        bench.check_options(other)
