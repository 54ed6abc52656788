"""U-LiRA on a pool of models small enough to be trained and unlearned exactly."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.attacks.membership import lira, u_lira
from unlearn.errors import BadInput
from unlearn.evaluations.statistics import auc

pytestmark = pytest.mark.filterwarnings("error")

MODELS, EXAMPLES, KEPT, WIDTH = 25, 60, 40, 60


def one_pool(unlearn):
    """Statistics after unlearning, shape (models, examples), and who had to forget what.

    Ridge regressions, each trained on shared retained rows and a random half of the examples.
    ``unlearn(gram, moment, own, retained)`` gets the sufficient statistics of all training rows
    and of either part and returns the weights; the statistic is minus the squared error.
    """
    rng = np.random.default_rng(0)
    truth = rng.normal(size=WIDTH)
    member = np.argsort(rng.random((MODELS, EXAMPLES)), axis=0) < MODELS // 2
    x = rng.normal(size=(EXAMPLES, WIDTH))
    y = x @ truth + 2.0 * rng.normal(size=EXAMPLES)
    statistics = []
    for half in member:
        rows = rng.normal(size=(KEPT, WIDTH))
        values = rows @ truth + 2.0 * rng.normal(size=KEPT)
        retained = rows.T @ rows + np.eye(WIDTH), rows.T @ values
        own = x[half].T @ x[half], x[half].T @ y[half]
        statistics.append(-np.abs(x @ unlearn(own, retained) - y))
    return np.array(statistics), member


def nothing(own, retained):
    return np.linalg.solve(own[0] + retained[0], own[1] + retained[1])


def exactly(own, retained):
    return np.linalg.solve(*retained)


def by_a_fifth(own, retained):
    return 0.8 * nothing(own, retained) + 0.2 * exactly(own, retained)


def test_a_model_that_forgot_nothing_is_seen_through():
    statistics, member = one_pool(nothing)
    scores = lira.leave_one_out(statistics, member, attack=u_lira.score)
    assert auc(scores[member], scores[~member]) > 0.75
    assert u_lira.attack_accuracy(scores, member) > 0.65


def test_a_model_that_forgot_exactly_leaves_a_coin_to_toss():
    statistics, member = one_pool(exactly)
    scores = lira.leave_one_out(statistics, member, attack=u_lira.score)
    assert auc(scores[member], scores[~member]) == pytest.approx(0.5, abs=0.05)
    assert u_lira.attack_accuracy(scores, member) == pytest.approx(0.5, abs=0.05)


def test_half_measures_lie_between():
    accuracy = [
        u_lira.attack_accuracy(lira.leave_one_out(s, m, attack=u_lira.score), m)
        for s, m in map(one_pool, (nothing, by_a_fifth, exactly))
    ]
    assert accuracy[0] > accuracy[1] > accuracy[2] + 0.05


def test_overshooting_gives_a_member_away_too():
    """Unlearned examples fit *worse* than unseen ones: a low statistic is then the evidence."""
    rng = np.random.default_rng(1)
    member = np.argsort(rng.random((16, 80)), axis=0) < 8
    statistics = rng.normal(size=(16, 80)) - 2.0 * member
    scores = lira.leave_one_out(statistics, member, attack=u_lira.score)
    assert auc(statistics[member], statistics[~member]) < 0.1
    assert auc(scores[member], scores[~member]) > 0.85


def test_an_effect_on_everything_is_no_evidence():
    statistics, member = one_pool(exactly)
    args = statistics[-1], statistics[:-1], member[:-1]
    ruined = u_lira.score(args[0] - 5.0, args[1] - 5.0, args[2])
    assert ruined == pytest.approx(u_lira.score(*args), abs=1e-9)


@pytest.mark.parametrize("variance", ["shrunk", "pooled", "example"])
def test_the_score_is_the_log_ratio_of_two_laws(variance):
    unlearned = np.array([[2.0], [4.0], [-1.0], [1.0]])
    member = np.array([[True], [True], [False], [False]])
    score = u_lira.score([2.0], unlearned, member, variance)
    if variance == "shrunk":
        assert score > 0
    else:  # variances 2 and 2, distances 1 and 2
        assert score == pytest.approx([(4 - 1) / 4])
    queries = u_lira.score(
        torch.tensor([[2.0, 2.0]]), np.repeat(unlearned[:, :, None], 2, axis=2), member, variance
    )
    assert queries == pytest.approx(score)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_order_of_shadows_and_examples_does_not_matter(seed):
    statistics, member = one_pool(nothing)
    target, pool, had = statistics[-1], statistics[:-1], member[:-1]
    rng = np.random.default_rng(seed)
    i, j = rng.permutation(MODELS - 1), rng.permutation(EXAMPLES)
    assert u_lira.score(target[j], pool[i][:, j], had[i][:, j]) == pytest.approx(
        u_lira.score(target, pool, had)[j], abs=1e-7
    )


def test_accuracy_weighs_both_kinds_equally():
    # all of 1 unlearned found, 1 of 4 unseen taken for unlearned
    scores, member = [1.0, 1.0, -1.0, -1.0, -1.0], [True, False, False, False, False]
    assert u_lira.attack_accuracy(scores, member) == pytest.approx((1 + 3 / 4) / 2)
    assert u_lira.attack_accuracy([1.0, 0.0], [True, False]) == 0.75
    assert u_lira.attack_accuracy([[1e-9, -1e9]], [[1, 0]]) == 1.0
    assert u_lira.attack_accuracy([-1.0, 1.0], [True, False]) == 0.0


def test_bad_input_is_refused():
    with pytest.raises(BadInput, match="only one kind"):
        u_lira.attack_accuracy([1.0, 2.0], [True, True])
    with pytest.raises(BadInput, match="only one kind"):
        u_lira.attack_accuracy([], np.zeros(0, dtype=bool))
    with pytest.raises(BadInput, match="member must have shape"):
        u_lira.attack_accuracy([1.0, 2.0], [True])
    with pytest.raises(BadInput, match="NaN"):
        u_lira.attack_accuracy([1.0, math.nan], [True, False])
    with pytest.raises(BadInput, match=r"fewer than 2 IN models \(example 0 has 1\)"):
        u_lira.score([1.0], [[1.0], [2.0], [3.0]], [[True], [False], [False]])
    with pytest.raises(BadInput, match="fewer than 2 OUT"):
        u_lira.score([1.0], [[1.0], [2.0], [3.0]], [[True], [True], [False]])
