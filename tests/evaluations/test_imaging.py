"""Distances between collections of pictures, on cases that can be computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from unlearn.errors import BadInput
from unlearn.evaluations import imaging

DRAW = np.random.default_rng(0)


def test_frechet_distance_of_samples_with_known_moments() -> None:
    # means (0, 0) and (3, 4); variances 2 and 8 on the first axis, 0 and 2 on the second
    a = np.array([[-1.0, 0.0], [1.0, 0.0]])
    b = np.array([[1.0, 4.0], [5.0, 4.0], [1.0, 4.0], [5.0, 4.0], [3.0, 2.0], [3.0, 6.0]])
    variances_a, variances_b = a.var(0, ddof=1), b.var(0, ddof=1)
    expected = 25 + ((np.sqrt(variances_a) - np.sqrt(variances_b)) ** 2).sum()
    assert imaging.frechet_distance(a, b) == pytest.approx(expected)


def test_frechet_distance_agrees_with_the_matrix_square_root() -> None:
    a, b = DRAW.normal(size=(60, 5)), DRAW.normal(size=(40, 5)) @ DRAW.normal(size=(5, 5)) + 1
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert imaging.frechet_distance(a, b) == pytest.approx(expected)
    assert imaging.frechet_distance(torch.tensor(b), a.tolist()) == pytest.approx(expected)


def test_frechet_distance_of_fewer_samples_than_features() -> None:
    a = DRAW.normal(size=(6, 50))
    assert imaging.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert imaging.frechet_distance(a, a + 2) == pytest.approx(50 * 4)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 9), m=st.integers(2, 9), d=st.integers(1, 6))
def test_frechet_distance_is_symmetric_and_no_rotation_changes_it(
    seed: int, n: int, m: int, d: int
) -> None:
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(n, d)), draw.normal(size=(m, d))
    turned = np.linalg.qr(draw.normal(size=(d, d)))[0]
    there = imaging.frechet_distance(a, b)
    assert there >= 0
    assert imaging.frechet_distance(b, a) == pytest.approx(there, abs=1e-9)
    assert imaging.frechet_distance(a @ turned, b @ turned) == pytest.approx(there, abs=1e-9)


def test_kernel_distance_by_hand() -> None:
    # k(1, 2) = 27, k(-1, 0) = 1; across: k(1,-1) = 0, k(1,0) = 1, k(2,-1) = -1, k(2,0) = 1
    assert imaging.kernel_distance([[1.0], [2.0]], [[-1.0], [0.0]]) == pytest.approx(28 - 2 / 4)


def test_kernel_distance_is_unbiased() -> None:
    found = [
        imaging.kernel_distance(DRAW.normal(size=(12, 3)), DRAW.normal(size=(9, 3)))
        for _ in range(400)
    ]
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found)) < 4 * error
    assert min(found) < 0


def test_kernel_distance_of_large_samples_is_a_mean_over_parts() -> None:
    a, b = DRAW.normal(size=(300, 2)), DRAW.normal(size=(300, 2)) + 1
    whole = imaging.kernel_distance(a, b)
    parts = imaging.kernel_distance(a, b, subsets=200, size=50, seed=1)
    assert parts == pytest.approx(whole, rel=0.15)
    assert parts == imaging.kernel_distance(a, b, subsets=200, size=50, seed=1)
    assert parts != imaging.kernel_distance(a, b, subsets=200, size=50, seed=2)


LINE = [[0.0], [1.0], [2.0], [3.0], [4.0]]


def test_radii_and_manifold_by_hand() -> None:
    assert imaging.radii(LINE, 3).tolist() == [3.0, 2.0, 2.0, 2.0, 3.0]
    points = [[-3.0], [-3.1], [7.0], [7.1], [2.5]]
    assert imaging.within(points, LINE, 3).tolist() == [True, False, True, False, True]


def test_precision_and_recall_of_identical_and_of_disjoint_sets() -> None:
    a = DRAW.normal(size=(20, 4))
    assert imaging.precision_recall(a, a) == (1.0, 1.0)
    assert imaging.precision_recall(a, a + 100) == (0.0, 0.0)


def test_precision_without_recall() -> None:
    real = [[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]]
    generated = [[0.0], [0.1], [0.2], [0.3]]  # of the left half alone
    found = imaging.precision_recall(generated, real, 1)
    assert found.precision == 1.0
    assert found.recall == pytest.approx(1 / 6)


def test_a_point_left_out_of_its_own_manifold() -> None:
    points = DRAW.normal(size=(15, 2))
    expected = [bool(imaging.within(points[[i]], np.delete(points, i, 0), 3)[0]) for i in range(15)]
    assert imaging.among_themselves(points, 3).tolist() == expected
    assert imaging.among_themselves([[0.0], [1.0], [2.0], [99.0]], 1).tolist() == [
        True, True, True, False,
    ]  # fmt: skip


def test_clip_score() -> None:
    a, b = [[3.0, 4.0], [0.0, 0.0]], [[4.0, 3.0], [1.0, 0.0]]
    assert imaging.clip_score(a, b).tolist() == pytest.approx([2.5 * 24 / 25, 0.0])
    with pytest.raises(BadInput, match="one per picture"):
        imaging.clip_score(a, b[:1])


def test_the_nearest_training_picture() -> None:
    training = torch.zeros(3, 1, 2, 2)
    training[1] += 0.5
    training[2, 0, 0, 0] = 1.0
    found = imaging.nearest(torch.full((1, 1, 2, 2), 0.4), training)
    assert found.which.tolist() == [1]
    assert found.distance == pytest.approx([0.1])
    others = [0.4, 0.1, np.sqrt((0.36 + 3 * 0.16) / 4)]
    assert found.ratio == pytest.approx([0.1 / (np.mean(others) / 2)])


def test_the_adaptive_ratio_looks_at_the_nearest_only() -> None:
    training = np.concatenate([np.full(50, 1.0), np.full(500, 100.0)])[:, None]
    assert imaging.nearest([[0.0]], training).ratio == pytest.approx([2.0])
    copied = np.concatenate([[0.01], training[:, 0]])[:, None]
    assert imaging.nearest([[0.0]], copied).ratio == pytest.approx([0.01 / (49.01 / 50 / 2)])


def test_what_has_no_distance_is_refused() -> None:
    with pytest.raises(BadInput, match="columns"):
        imaging.frechet_distance(np.zeros((3, 2)), np.zeros((3, 3)))
    with pytest.raises(BadInput, match="2 rows"):
        imaging.kernel_distance(np.zeros((1, 2)), np.zeros((3, 2)))
    with pytest.raises(BadInput, match="not finite"):
        imaging.frechet_distance(np.full((3, 2), np.nan), np.zeros((3, 2)))
    with pytest.raises(BadInput, match="neighbours"):
        imaging.precision_recall(np.zeros((3, 2)), np.zeros((3, 2)))
