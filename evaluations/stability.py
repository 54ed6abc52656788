"""The worst moment along the way, not only the end (De Lange et al., ICLR 2023, arXiv 2205.13452).

A model that is measured only when a request is finished can look stable while it was not. These
numbers take a whole series of measurements: accuracy of several tasks (here: what must stay, or
how well each request stays forgotten) at every evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from unlearn.errors import BadInput

Array = npt.NDArray[np.float64]


def min_accuracy(series: Any, intervals: Sequence[tuple[int, int]]) -> float:
    """Mean over the earlier tasks of the lowest accuracy since each was learned (eq. 3: min-ACC).

    Args:
        series: accuracy of every task at every evaluation, shape (tasks, evaluations).
        intervals: per task the evaluations [start, end) during which it was learned, in order;
            its minimum is over the evaluations from ``end`` on.

    Returns:
        The mean over all tasks but the last; those nothing was measured of since do not count.

    Raises:
        BadInput: fewer than two tasks, shapes that do not fit, or nothing measured since.

    >>> min_accuracy([[0.9, 0.4, 0.8], [0.1, 0.5, 0.9]], [(0, 1), (1, 3)])
    0.4
    """
    values, ends = _checked(series, intervals)
    since = [row[end:] for row, end in zip(values[:-1], ends, strict=False)]
    lowest = [part.min() for part in since if part.size]
    if not lowest:
        raise BadInput("min-ACC needs a task that was measured after it was learned")
    return float(np.mean(lowest))


def worst_case_accuracy(series: Any, intervals: Sequence[tuple[int, int]]) -> float:
    """What can be relied on at any moment (eq. 4: WC-ACC).

    The accuracy of the last of k tasks now, weighted 1/k, with the min-ACC of all others.

    Args:
        series: accuracy of every task at every evaluation, shape (tasks, evaluations).
        intervals: as in :func:`min_accuracy`.

    Raises:
        BadInput: as :func:`min_accuracy`.

    >>> round(worst_case_accuracy([[0.9, 0.4, 0.8], [0.1, 0.5, 0.9]], [(0, 1), (1, 3)]), 3)
    0.65
    """
    values, _ = _checked(series, intervals)
    newest = 1 / len(values)
    return float(newest * values[-1, -1] + (1 - newest) * min_accuracy(series, intervals))


def windowed_forgetting(series: Any, window: int) -> float:
    """The largest fall of accuracy within ``window`` evaluations in a row (eq. 5: WF).

    Args:
        series: accuracy at every evaluation, shape (evaluations,), or of several tasks, shape
            (tasks, evaluations), over which the mean is taken.
        window: evaluations a fall may stretch over, at least 2.

    Returns:
        At least 0: a series that never falls has none.

    Raises:
        BadInput: a window below 2, or no evaluations.

    >>> round(windowed_forgetting([0.9, 0.8, 0.5, 0.7], window=2), 3)
    0.3
    """
    values = np.atleast_2d(np.asarray(series, dtype=np.float64))
    if window < 2 or values.ndim != 2 or not values.size:
        raise BadInput("windowed forgetting needs evaluations, and a window of at least 2")
    falls = np.zeros(len(values))
    for distance in range(1, min(window, values.shape[1])):
        falls = np.maximum(falls, (values[:, :-distance] - values[:, distance:]).max(1))
    return float(falls.mean())


def _checked(series: Any, intervals: Sequence[tuple[int, int]]) -> tuple[Array, list[int]]:
    values = np.asarray(series, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2 or len(intervals) != len(values):
        raise BadInput(
            "accuracies must have the shape (tasks, evaluations), with at least two tasks and one "
            "interval for each"
        )
    if any(not 0 <= start < end <= values.shape[1] for start, end in intervals):
        raise BadInput("an interval must lie within the evaluations and hold at least one")
    return values, [end for _, end in intervals]
