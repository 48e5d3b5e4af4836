"""pass@k and diversity figures. In: graded samples, n for each problem. Out: one dict of means.

Every figure is first computed for each problem and then averaged over problems, each with the same
weight. pass@k is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), not the share of
problems solved within the first k samples, which has the same mean and a larger variance.
"""

from collections.abc import Sequence
from math import comb, sqrt


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c correct ones."""
    if not 0 <= c <= n:
        raise ValueError(f"c={c} correct samples of n={n} is impossible. Give 0 <= c <= n.")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n, and n={n}. Draw more samples or lower k.")
    # Python integers are exact here; the product form is only needed where they overflow.
    return 1.0 - comb(n - c, k) / comb(n, k)


def summarize(
    correct: list[list[bool]],
    canonical: list[list[str]],
    num_valid: list[int] | None,
    ks: Sequence[int],
) -> dict[str, float]:
    """Means over problems of pass@k, accuracy and diversity.

    correct[i][j] and canonical[i][j] describe sample j of problem i: whether it is right, and the
    spelling under which equal answers are equal. num_valid[i] is how many right answers problem i
    has; without it there is no "coverage", the share of them that was found.
    """
    n = _samples_per_problem(correct, canonical, num_valid)
    report = {f"pass@{k}": _mean([pass_at_k(n, sum(marks), k) for marks in correct]) for k in ks}
    report[f"avg@{n}"] = _mean([sum(marks) / n for marks in correct])
    num_distinct = [
        len({text for mark, text in zip(marks, texts, strict=True) if mark})
        for marks, texts in zip(correct, canonical, strict=True)
    ]
    report[f"distinct_correct@{n}"] = _mean(num_distinct)
    if num_valid is not None:
        report["coverage"] = _mean(
            [found / valid for found, valid in zip(num_distinct, num_valid, strict=True)]
        )
    return report


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share seen in `count` independent trials (Wilson 1927), which
    keeps inside [0, 1] and has a width also where the share is 0."""
    z = 1.959964
    spread = z / (1 + z * z / count)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = spread * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _samples_per_problem(
    correct: list[list[bool]], canonical: list[list[str]], num_valid: list[int] | None
) -> int:
    """The common n, after checking that the three lists describe the same samples."""
    counts = {len(marks) for marks in correct}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"problems have {sorted(counts)} samples. "
            "Give at least one problem, and equally many samples, at least one, for each."
        )
    if [len(marks) for marks in correct] != [len(texts) for texts in canonical]:
        raise ValueError(
            f"correct describes {len(correct)} problems and canonical {len(canonical)}, or their "
            "sample counts differ. Give one entry of each for every sample."
        )
    if num_valid is not None and (len(num_valid) != len(correct) or min(num_valid) < 1):
        raise ValueError(
            f"num_valid has {len(num_valid)} entries, the smallest {min(num_valid, default=0)}, "
            f"for {len(correct)} problems. Give one count of at least 1 for each."
        )
    return counts.pop()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
