"""Figures of an evaluation. In: what became of n samples of each problem. Out: named values of each
problem, and their means over problems, which all weigh the same.

None of them depends on the order of a problem's samples: "of k" means k of the n samples, drawn
without replacement, and the value is the exact mean over all such draws. The share of problems
solved by the first k samples has the same mean and a larger variance.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import comb
from typing import NamedTuple

import numpy as np

from megatron_eopd.tasks.task import Verdict

# Shapes: P problems, N samples of each.


class Outcome(NamedTuple):
    """Of one problem; entry j of every tuple is sample j."""

    verdicts: tuple[str, ...]
    """Values of `Verdict`."""
    canonical: tuple[str, ...]
    """The spelling under which equal answers are equal; empty where there is no answer."""
    second: tuple[bool | None, ...]
    """Whether an independent grader takes it for right; None where none was asked."""
    lengths: tuple[int, ...]
    """Tokens of the response."""
    cut: tuple[bool, ...]
    """Whether it reached the longest length before it ended."""
    num_right: int | None
    """How many different right answers there are; None where nobody knows."""


def per_problem(outcomes: Sequence[Outcome], ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Figure → its value for each problem, NaN where a problem has none.

    pass@k              some of k samples are right (Chen et al. 2021, arXiv 2107.03374)
    pass^k              all of k samples are right (Yao et al. 2024, arXiv 2406.12045)
    avg@n               share of right samples
    maj@k               the answer that most of k samples give is right
    distinct@n          different answers, right or wrong
    distinct_correct@n  different right answers
    coverage            share of all right answers that was found, where their number is known
    length_mean         tokens of a response
    truncated_fraction  share of responses that were cut
    verdict/right, …    share of samples with this verdict
    grader_disagreement share of samples that the two graders judge differently, of those with two

    pass^1 and maj@1 are pass@1, and left out. So are the figures about equal answers where a right
    answer has no spelling, and those of a second grader where there is none.

    Raises:
        ValueError: k larger than n, or problems and samples that do not match.
    """
    n = _samples_per_problem(outcomes)
    if impossible := [k for k in ks if not 1 <= k <= n]:
        raise ValueError(
            f"figures of k={impossible[0]} samples need 1 <= k <= n, and there are n={n} samples "
            f"of each problem. Draw more samples or lower k."
        )
    right_PN = np.array([[v == Verdict.RIGHT for v in o.verdicts] for o in outcomes])
    counts_P = right_PN.sum(axis=1)
    more = [k for k in ks if k > 1]
    values = {f"pass@{k}": _by_count(pass_at_k, n, k)[counts_P] for k in ks}
    values |= {f"pass^{k}": _by_count(pass_hat_k, n, k)[counts_P] for k in more}
    values[f"avg@{n}"] = counts_P / n
    if all(text for o in outcomes for text in _right_spellings(o)):
        values |= {f"maj@{k}": np.array([maj_at_k(o, k) for o in outcomes]) for k in more}
        values |= _diversity(outcomes, n)
    values["length_mean"] = np.array([o.lengths for o in outcomes]).mean(axis=1)
    values["truncated_fraction"] = np.array([o.cut for o in outcomes]).mean(axis=1)
    for verdict in Verdict:
        marks_PN = np.array([[v == verdict for v in o.verdicts] for o in outcomes])
        values[verdict_figure(verdict)] = marks_PN.mean(axis=1)
    disagreement_P = np.array([_disagreement(o) for o in outcomes])
    return values | _where_known("grader_disagreement", disagreement_P)


def figures(outcomes: Sequence[Outcome], ks: Sequence[int]) -> dict[str, float]:
    """Figure → its mean over the problems that have one; `per_problem` says which there are."""
    return {name: float(np.nanmean(v)) for name, v in per_problem(outcomes, ks).items()}


def verdict_figure(verdict: Verdict) -> str:
    return f"verdict/{verdict.value.replace(' ', '_')}"


def highest(name: str, max_response_length: int) -> float:
    """The largest value that a problem can have in a figure; the smallest is 0 in each."""
    if name.startswith("distinct"):
        return float(name.rpartition("@")[2])
    return float(max_response_length) if name == "length_mean" else 1.0


# --- of one problem -----------------------------------------------------------------------------


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c right ones."""
    _check_counts(n, c, k)
    # Python's integers are exact, so no product form is needed to keep from overflow.
    return 1.0 - comb(n - c, k) / comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, are all among the c right ones."""
    _check_counts(n, c, k)
    return comb(c, k) / comb(n, k)


def maj_at_k(outcome: Outcome, k: int) -> float:
    """Chance that k samples vote for a right answer.

    Samples with the same spelling vote together; those without one do not vote, and without any
    vote nothing is right. Answers with equally many votes win equally often. A spelling that was
    judged both ways, as where a grader ran out of time, counts by its share of right samples.
    """
    n = len(outcome.canonical)
    sizes = Counter(text for text in outcome.canonical if text)
    right = Counter(_right_spellings(outcome))
    ordered = sorted(sizes.values())
    chance = 0.0
    for text, num_right in right.items():
        others = ordered.copy()
        others.remove(sizes[text])
        chance += num_right / sizes[text] * _win_chance(sizes[text], tuple(others), n, k)
    return chance


@lru_cache(maxsize=2**17)  # most problems share their sizes with another one
def _win_chance(size: int, others: tuple[int, ...], n: int, k: int) -> float:
    """Chance that `size` equal answers win the vote of k of n samples against others' sizes.

    Draw each sample with chance k/n on its own: given that k came, they are k without replacement.
    So the votes for an answer are binomial, and independent until the total is fixed at k.
    """
    won = 0.0
    for votes in range(1, min(size, k) + 1):
        # Answers that cannot reach as many votes are as good as silent.
        rivals = [other for other in others if other >= votes]
        silent = _binomial(n - size - sum(rivals), n, k)
        # [t, s]: chance that t rivals have as many votes, the rest fewer, and s samples came.
        tied = np.zeros((k // votes, k + 1))
        tied[0, : len(silent)] = silent
        for rival in rivals:
            level = np.zeros_like(tied)
            level[1:, votes:] = tied[:-1, :-votes] * _binomial(rival, n, k)[votes]
            tied = tied @ _fewer(rival, votes, n, k) + level
        shared = tied[:, k - votes] / np.arange(1, len(tied) + 1)
        won += _binomial(size, n, k)[votes] * float(shared.sum())
    return won / _binomial(n, n, k)[k]


@lru_cache(maxsize=2**12)
def _binomial(size: int, n: int, k: int) -> np.ndarray:
    """Chance of 0, 1, … samples of `size`, k at most, each of which comes with chance k/n."""
    # Ratios of exact integers: no chance under- or overflows on its way, and 0 ** 0 is 1.
    return np.array(
        [comb(size, u) * k**u * (n - k) ** (size - u) / n**size for u in range(min(size, k) + 1)]
    )


@lru_cache(maxsize=2**12)
def _fewer(size: int, votes: int, n: int, k: int) -> np.ndarray:
    """[a, b]: chance that an answer brings a samples that came to b, with fewer than `votes`."""
    chances = _binomial(size, n, k)
    return sum(np.diag(np.full(k + 1 - u, chances[u]), u) for u in range(votes))


def _right_spellings(outcome: Outcome) -> list[str]:
    both = zip(outcome.verdicts, outcome.canonical, strict=True)
    return [text for verdict, text in both if verdict == Verdict.RIGHT]


def _disagreement(outcome: Outcome) -> float:
    both = zip(outcome.verdicts, outcome.second, strict=True)
    apart = [(v == Verdict.RIGHT) != second for v, second in both if second is not None]
    return sum(apart) / len(apart) if apart else np.nan


# --- of all problems ----------------------------------------------------------------------------


def _diversity(outcomes: Sequence[Outcome], n: int) -> dict[str, np.ndarray]:
    distinct_P = np.array([len(set(o.canonical) - {""}) for o in outcomes], dtype=float)
    correct_P = np.array([len(set(_right_spellings(o))) for o in outcomes], dtype=float)
    valid_P = np.array([np.nan if o.num_right is None else o.num_right for o in outcomes])
    values = {f"distinct@{n}": distinct_P, f"distinct_correct@{n}": correct_P}
    return values | _where_known("coverage", correct_P / valid_P)


def _where_known(name: str, values_P: np.ndarray) -> dict[str, np.ndarray]:
    return {} if np.isnan(values_P).all() else {name: values_P}


def _by_count(figure: Callable[[int, int, int], float], n: int, k: int) -> np.ndarray:
    """The figure for each possible number of right samples."""
    return np.array([figure(n, c, k) for c in range(n + 1)])


def _check_counts(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n:
        raise ValueError(f"c={c} right samples of n={n} is impossible. Give 0 <= c <= n.")
    if not 1 <= k <= n:
        raise ValueError(f"k={k} samples of n={n}: needs 1 <= k <= n. Draw more or lower k.")


def _samples_per_problem(outcomes: Sequence[Outcome]) -> int:
    """The common n, after checking that all entries describe the same samples."""
    counts = {len(entries) for outcome in outcomes for entries in outcome[:-1]}
    if len(counts) != 1 or counts == {0}:
        raise ValueError(
            f"{len(outcomes)} problems have {sorted(counts)} samples. Give at least one problem, "
            f"and of each equally many samples, at least one, with one entry for each in every "
            f"tuple."
        )
    if unknown := {v for o in outcomes for v in o.verdicts} - {v.value for v in Verdict}:
        raise ValueError(f"verdicts {sorted(unknown)}: give one of {[v.value for v in Verdict]}.")
    if any(o.num_right is not None and o.num_right < 1 for o in outcomes):
        raise ValueError("num_right below 1: give the number of right answers, or None.")
    return counts.pop()
