"""The worst moments of a series, by hand and by their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn.errors import BadInput
from unlearn.evaluations.stability import min_accuracy, windowed_forgetting, worst_case_accuracy

SERIES = [
    [0.2, 0.9, 0.6, 0.8, 0.7],
    [0.1, 0.1, 0.8, 0.3, 0.9],
    [0.0, 0.1, 0.1, 0.2, 0.5],
]
LEARNED = [(0, 2), (2, 3), (3, 5)]
RATES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_min_accuracy_is_the_mean_of_the_lowest_since() -> None:
    assert min_accuracy(SERIES, LEARNED) == pytest.approx((0.6 + 0.3) / 2)


def test_worst_case_accuracy_weighs_the_newest_task_as_one_of_all() -> None:
    assert worst_case_accuracy(SERIES, LEARNED) == pytest.approx(0.5 / 3 + 2 / 3 * 0.45)


def test_windowed_forgetting_is_the_largest_fall_within_the_window() -> None:
    row = [0.9, 0.8, 0.5, 0.7, 0.4]
    assert windowed_forgetting(row, 2) == pytest.approx(0.3)
    assert windowed_forgetting(row, 3) == pytest.approx(0.4)
    assert windowed_forgetting(row, 99) == pytest.approx(0.5)
    assert windowed_forgetting([row, [0.1] * 5], 3) == pytest.approx(0.2)


@given(RATES, st.integers(2, 13))
def test_windowed_forgetting_is_the_definition(row: list[float], window: int) -> None:
    falls = [row[m] - row[n] for n in range(len(row)) for m in range(max(0, n - window + 1), n)]
    assert windowed_forgetting(row, window) == pytest.approx(max([0.0, *falls]))


@given(RATES)
def test_a_rising_series_never_forgets(row: list[float]) -> None:
    assert windowed_forgetting(np.sort(row), 5) == 0


@pytest.mark.parametrize(
    ("series", "intervals"),
    [([[0.5, 0.5]], [(0, 1)]), (SERIES, LEARNED[:2]), (SERIES, [(0, 2), (2, 2), (3, 5)]),
     ([[0.5], [0.5]], [(0, 1), (0, 1)])],
)  # fmt: skip
def test_what_does_not_fit_is_refused(series: object, intervals: list[tuple[int, int]]) -> None:
    with pytest.raises(BadInput):
        min_accuracy(series, intervals)


def test_a_window_needs_two_evaluations() -> None:
    with pytest.raises(BadInput):
        windowed_forgetting([0.5, 0.4], 1)
