"""How sure a mean is, and whether two models differ: bootstrap and permutation, pure functions of numpy arrays."""

import numpy as np

CONFIDENCE = 95.0  # percent; the field's habit
_BLOCK = 1 << 20  # numbers drawn at a time: 8 MiB
_MULTINOMIAL_COST = 10  # one multinomial number takes as long as so many draws; measured
_ROUNDING = 1e-9  # of the largest possible sum: sums that differ by less are equal


def mean_interval(tasks: list[np.ndarray], samples: int, generator: np.random.Generator) -> tuple[float, float, float]:
    """Mean over the means of tasks, with its 95 % bootstrap percentile interval (Efron and Tibshirani 1993, ch. 13).

    Questions are drawn with replacement within each task: tasks are given, questions are a sample.

    Args:
        tasks: One array of values per task, shape (n,) with n > 0; a single task for its own mean.
        samples: Resamples.

    Returns:
        (mean, low, high); the interval has no width where all values of each task are equal, as with n = 1.
    """
    means_B = sum(bootstrap_means(values_n, samples, generator) for values_n in tasks) / len(tasks)
    low, high = np.percentile(means_B, [50 - CONFIDENCE / 2, 50 + CONFIDENCE / 2])
    return mean_of_means(tasks), float(low), float(high)


def mean_of_means(tasks: list[np.ndarray]) -> float:
    """Mean over the means of tasks."""
    return float(sum(_mean(*np.unique(values_n, return_counts=True)) for values_n in tasks) / len(tasks))


def bootstrap_means(values_n: np.ndarray, samples: int, generator: np.random.Generator) -> np.ndarray:
    """Means of `samples` resamples of the values with replacement; shape (samples,).

    Of few distinct values, as of right and wrong, a resample is how often it holds each: multinomial numbers, the same
    distribution for less work.
    """
    n = len(values_n)
    distinct_k, counts_k = np.unique(values_n, return_counts=True)
    if len(distinct_k) * _MULTINOMIAL_COST < n or len(distinct_k) == 1:
        return _mean(distinct_k, generator.multinomial(n, counts_k / n, samples))
    means = [values_n[generator.integers(0, n, (size, n))].mean(1) for size in _blocks(samples, n)]
    return np.concatenate(means)


def _mean(distinct_k: np.ndarray, counts_k: np.ndarray) -> np.ndarray:
    return counts_k @ distinct_k / counts_k.sum(-1)


def _blocks(samples: int, n: int) -> list[int]:
    """Sizes of the blocks in which `samples` times n numbers are drawn."""
    block = max(1, _BLOCK // n)
    return [min(block, samples - start) for start in range(0, samples, block)]


def sign_flip_p_value(weighted_n: np.ndarray, samples: int, generator: np.random.Generator) -> float:
    """Two-sided p-value of the paired randomisation test (Fisher 1935; Noreen 1989) of a sum of differences.

    If the models do not differ, each question's difference is as likely with the other sign. The p-value is the share
    of sign patterns whose sum is at least as far from 0 as the observed one: of all patterns where there are at most
    `samples`, otherwise of `samples` random ones and the observed one (Phipson and Smyth 2010), which is never 0. For
    right or wrong answers this is the exact McNemar test.

    Args:
        weighted_n: Differences, each with its weight in the statistic, shape (n,).
    """
    sizes = np.abs(weighted_n[weighted_n != 0])
    if not len(sizes):
        return 1.0
    limit = abs(weighted_n.sum()) - _ROUNDING * sizes.sum()
    if 2 ** len(sizes) <= samples:
        signs = np.arange(2 ** len(sizes))[:, None] >> np.arange(len(sizes)) & 1
        return float(np.mean(np.abs((2 * signs - 1) @ sizes) >= limit))
    extreme = 0
    for size in _blocks(samples, len(sizes)):
        signs = 2.0 * generator.integers(0, 2, (size, len(sizes)), np.int8) - 1
        extreme += np.count_nonzero(np.abs(signs @ sizes) >= limit)
    return (1 + int(extreme)) / (1 + samples)


def compare_paired(
    a: list[np.ndarray], b: list[np.ndarray], samples: int, generator: np.random.Generator
) -> dict[str, float | int]:
    """Two models on the same questions: b - a with its interval and p-value, averaged over tasks.

    Args:
        a: Values of the first model, one array per task, shape (n,) with n > 0.
        b: Those of the second, of the same questions in the same order.

    Returns:
        {"n", "difference", "low", "high" (paired bootstrap of questions, 95 %), "p_value" (`sign_flip_p_value`),
        "wins", "losses", "ties" (questions on which b scores higher, lower, the same)}.
    """
    differences = [b_n - a_n for a_n, b_n in zip(a, b, strict=True)]
    all_n = np.concatenate(differences)
    difference, low, high = mean_interval(differences, samples, generator)
    weighted_n = np.concatenate([d_n / len(d_n) / len(differences) for d_n in differences])
    return {
        "n": len(all_n), "difference": difference, "low": low, "high": high,
        "p_value": sign_flip_p_value(weighted_n, samples, generator),
        "wins": int((all_n > 0).sum()), "losses": int((all_n < 0).sum()), "ties": int((all_n == 0).sum()),
    }  # fmt: skip
