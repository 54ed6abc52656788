"""Intervals and rates against brute force, reference implementations and simulated coverage."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from sklearn.metrics import roc_auc_score

from unlearn.evaluations.statistics import (
    auc,
    auc_interval,
    clopper_pearson,
    mean_interval,
    tpr_at_fpr,
)

pytestmark = pytest.mark.filterwarnings("error")

SCORES = st.lists(st.integers(-4, 4), min_size=1, max_size=25)


def wins(members, nonmembers):
    """1, 1/2 or 0 for each pair, shape (m, n)."""
    a, b = np.asarray(members, float)[:, None], np.asarray(nonmembers, float)[None, :]
    return (a > b) + (a == b) / 2


@given(SCORES, SCORES)
def test_auc_equals_scikit_learn_with_ties(members, nonmembers):
    labels = [1] * len(members) + [0] * len(nonmembers)
    assert auc(members, nonmembers) == pytest.approx(
        roc_auc_score(labels, members + nonmembers), abs=1e-12
    )


@given(SCORES, SCORES, st.randoms())
def test_auc_depends_on_ranks_only(members, nonmembers, random):
    plain, interval = auc(members, nonmembers), auc_interval(members, nonmembers)
    curve = [math.exp(x) + x for x in members], [math.exp(x) + x for x in nonmembers]
    assert auc(*curve) == plain
    assert auc_interval(*curve) == interval
    random.shuffle(members)
    random.shuffle(nonmembers)
    assert auc(members, nonmembers) == pytest.approx(plain, abs=1e-15)
    assert auc_interval(members, nonmembers) == pytest.approx(interval, abs=1e-12)


@given(SCORES, SCORES)
def test_auc_mirrors_when_the_groups_are_exchanged(members, nonmembers):
    low, high = auc_interval(members, nonmembers)
    assert 0 <= low <= auc(members, nonmembers) <= high <= 1
    assert auc(nonmembers, members) == pytest.approx(1 - auc(members, nonmembers), abs=1e-12)
    assert auc_interval(nonmembers, members) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_auc_ranks_infinite_scores():
    assert auc([math.inf, 1.0], [-math.inf, 0.0]) == 1.0


def test_torch_tensors_and_half_precision_are_read():
    a, b = torch.tensor([3.0, 2.0], dtype=torch.bfloat16, requires_grad=True), torch.tensor([1, 2])
    assert auc(a, b) == 0.875


def test_delong_standard_error_matches_all_pairs():
    rng = np.random.default_rng(5)
    members, nonmembers = rng.integers(0, 12, 37) + 2, rng.integers(0, 12, 53)
    pairs = wins(members, nonmembers)
    area = pairs.mean()
    spread = math.sqrt(
        pairs.mean(axis=1).var(ddof=1) / len(members)
        + pairs.mean(axis=0).var(ddof=1) / len(nonmembers)
    )
    low, high = auc_interval(members, nonmembers, level=0.9)
    width = math.log(high / (1 - high)) - math.log(low / (1 - low))
    expected = 2 * norm.ppf(0.95) * spread / (area * (1 - area))
    assert width == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("area", "m", "n"), [(0.5, 40, 40), (0.75, 30, 80), (0.95, 60, 60)])
def test_auc_interval_covers(area, m, n):
    rng, shift = np.random.default_rng(11), norm.ppf(area) * math.sqrt(2)
    intervals = [auc_interval(rng.normal(shift, 1, m), rng.normal(0, 1, n)) for _ in range(600)]
    covered = np.mean([low <= area <= high for low, high in intervals])
    assert 0.925 <= covered <= 0.985


def test_separated_groups_get_the_exact_bound():
    low, high = auc_interval([5.0, 6.0, 7.0], [1.0, 2.0, 3.0, 4.0])
    assert (low, high) == (pytest.approx(clopper_pearson(3, 3).low), 1.0)
    low, high = auc_interval([1.0, 2.0], [5.0, 6.0, 7.0])
    assert (low, high) == (0.0, pytest.approx(clopper_pearson(0, 2).high))


def test_exact_bound_covers_where_it_is_tight():
    """One group constant, the other above it with probability 1 - area: separation is likeliest."""
    rng, area, n = np.random.default_rng(2), 0.7, 8
    assert area**n > 0.05  # separation is no rare event here
    outside = rng.random((2000, n)) > area
    covered = [
        low <= area <= high
        for low, high in (auc_interval(np.zeros(n), np.where(row, 1.0, -1.0)) for row in outside)
    ]
    assert np.mean(covered) >= 0.95


def test_equal_scores_and_single_scores_stay_undecided():
    low, high = auc_interval([1.0] * 6, [1.0] * 9)
    assert low == pytest.approx(1 - high)
    assert low < 0.3
    low, high = auc_interval([2.5], range(10))
    assert low < 0.02
    assert high > 0.98
    assert auc_interval([1.0], [0.0]) == pytest.approx((0.025, 1.0))


@given(SCORES, SCORES, st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.29, 0.5, 1.0]))
def test_tpr_at_fpr_tries_every_threshold(members, nonmembers, fpr):
    a, b = np.array(members), np.array(nonmembers)
    thresholds = [*np.concatenate([a, b]), math.inf]
    best = max((a >= t).mean() for t in thresholds if (b >= t).mean() <= fpr)
    assert tpr_at_fpr(members, nonmembers, fpr) == best


def test_tpr_at_fpr_is_exact_where_the_product_rounds():
    nonmembers = np.arange(100.0)
    assert math.floor(0.29 * 100) == 28
    assert tpr_at_fpr([70.5, 71.5], nonmembers, 0.29) == 1.0  # 71 to 99 are 29 false positives
    assert tpr_at_fpr([70.5, 71.5], nonmembers, 0.2899) == 0.5


@given(st.integers(1, 60), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
@settings(max_examples=60)
def test_clopper_pearson_equals_scipy(trials, data, level):
    successes = data.draw(st.integers(0, trials))
    expected = binomtest(successes, trials).proportion_ci(level, method="exact")
    assert clopper_pearson(successes, trials, level) == pytest.approx(tuple(expected), abs=1e-9)


def test_no_false_positive_needs_299_nonmembers_for_one_percent():
    assert clopper_pearson(0, 299, level=0.9).high <= 0.01 < clopper_pearson(0, 298, level=0.9).high


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_mean_interval_of_shares_holds_the_mean_and_stays_inside(values):
    low, high = mean_interval(values, bounds=(0.0, 1.0))
    mean = np.mean(values)
    assert 0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=30), st.integers(-9, 9))
def test_mean_interval_moves_and_flips_with_the_values(values, shift):
    x = np.array(values, float)
    low, high = mean_interval(x)
    assert mean_interval(x + shift) == pytest.approx((low + shift, high + shift), abs=1e-7)
    assert mean_interval(-x) == pytest.approx((-high, -low), abs=1e-7)


def test_mean_interval_of_symmetric_values_is_students():
    x = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    reach = 2.7764451052 * x.std(ddof=1) / math.sqrt(5)
    assert mean_interval(x) == pytest.approx((-reach, reach), rel=1e-9)


@pytest.mark.parametrize("n", [12, 40])
def test_mean_interval_covers_where_most_values_are_zero(n):
    rng, mean = np.random.default_rng(7), 0.25 * 2 / 7
    samples = (rng.random((1500, n)) < 0.25) * rng.beta(2, 5, (1500, n))
    covered = [
        low <= mean <= high for low, high in (mean_interval(x, bounds=(0, 1)) for x in samples)
    ]
    assert np.mean(covered) >= 0.93


def test_constant_and_single_values():
    assert mean_interval([0.0] * 40, bounds=(0, 1)) == pytest.approx(clopper_pearson(0, 40))
    assert mean_interval([1.0] * 40, bounds=(0, 1)) == pytest.approx(clopper_pearson(40, 40))
    assert mean_interval([0.4], bounds=(0, 1)) == pytest.approx((0.01, 0.985))
    assert mean_interval([3.2]) == (3.2, 3.2)
    assert mean_interval([0.1] * 7) == (0.1, 0.1)
    nearly = mean_interval([0.1 + 0.2, 0.3, 0.3])  # equal but for rounding
    assert nearly == pytest.approx((0.3, 0.3))


@pytest.mark.parametrize(
    "call",
    [
        lambda: auc([], [1.0]),
        lambda: auc([[1.0]], [1.0]),
        lambda: auc([math.nan], [1.0]),
        lambda: auc_interval([1.0, math.nan], [1.0]),
        lambda: auc_interval([1.0], [1.0], level=1.0),
        lambda: tpr_at_fpr([1.0], [math.nan], 0.1),
        lambda: tpr_at_fpr([1.0], [1.0], 1.5),
        lambda: clopper_pearson(3, 2),
        lambda: clopper_pearson(0, 0),
        lambda: mean_interval([]),
        lambda: mean_interval([1.0, math.inf]),
        lambda: mean_interval([1.5], bounds=(0, 1)),
    ],
)
def test_unusable_input_is_refused(call):
    with pytest.raises(ValueError):
        call()


def test_nan_is_named():
    with pytest.raises(ValueError, match="members holds 1 NaN among 2 values"):
        auc([1.0, math.nan], [0.0])
