"""LiRA against hand computation, its own derivations, and the slips of published code."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit

from unlearn.attacks.membership import lira
from unlearn.errors import BadInput
from unlearn.evaluations.statistics import auc

pytestmark = pytest.mark.filterwarnings("error")

VARIANCES = ("shrunk", "pooled", "example")
ATTACKS = [lira.online, lira.offline, partial(lira.offline, one_sided=False)]
SEEDS = st.integers(0, 2**32 - 1)


def pool(seed, s=10, n=12, q=2, gap=1.0, spread=0.5, extra=1):
    """Statistics (s + extra, n, q) of overfitted models, membership; every side has 2 or more."""
    rng = np.random.default_rng(seed)
    member = np.argsort(rng.random((s, n)), axis=0) < rng.integers(2, s - 1, n)
    member = np.concatenate([member, rng.random((extra, n)) < 0.5])
    center = rng.normal(0, 3, (n, 1))
    deviation = np.exp(spread * rng.normal(size=(n, 1)))
    noise = deviation * rng.normal(size=(s + extra, n, q))
    return center + gap * member[:, :, None] + noise, member


def split(statistics, member):
    """The last model is the audited one."""
    return statistics[-1], statistics[:-1], member[:-1]


# the statistic


def test_scaled_logits_are_the_log_odds_of_the_label():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 2, (4, 5, 7)), rng.integers(0, 7, (4, 5))
    odds = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    p = np.take_along_axis(odds, labels[..., None], -1)[..., 0]
    assert lira.logit_scale(logits, labels) == pytest.approx(np.log(p / (1 - p)), abs=1e-12)
    shifted = torch.tensor(logits + 1000.0)
    assert lira.logit_scale(shifted, torch.tensor(labels)) == pytest.approx(
        lira.logit_scale(logits, labels), abs=1e-9
    )


def test_scaled_logits_survive_a_probability_that_rounds_to_one():
    logits = np.array([[90.0, 0.0], [95.0, 0.0]], dtype=np.float32)
    assert (torch.tensor(logits).softmax(-1)[:, 0] == 1).all()
    assert lira.logit_scale(logits, [0, 0]).tolist() == [90.0, 95.0]
    assert logits[0, 0] == 90.0  # the caller's array is left alone


def test_scaled_logits_take_half_precision_tensors():
    assert lira.logit_scale(torch.tensor([[2.0, 1.0]]).bfloat16(), torch.tensor([1])) == [-1.0]


@pytest.mark.parametrize(
    ("logits", "labels", "match"),
    [
        ([[1.0, 2.0]], [2], "outside the 2 classes"),
        ([[1.0, 2.0]], [-1], "outside the 2 classes"),
        ([[1.0, 2.0]], [0, 1], "labels' shape"),
        ([[1.0]], [0], "two or more classes"),
        ([[1.0, 2.0]], [0.0], "integers"),
        ([[math.nan, 2.0]], [1], "diverged"),
        ([[1.0, -math.inf]], [0], "NaN or infinite"),
    ],
)
def test_scaled_logits_refuse(logits, labels, match):
    with pytest.raises(BadInput, match=match):
        lira.logit_scale(logits, labels)


@given(st.floats(-30, 30))
def test_scaled_logprob_inverts_the_sigmoid(phi):
    logp = -math.log1p(math.exp(-phi)) if phi > -30 else phi
    assert lira.logit_scale_logprob(logp) == pytest.approx(phi, abs=1e-2 if phi > 25 else 1e-4)


def test_scaled_logprob_keeps_digits_near_one():
    logp = np.array([-1e-6, -1e-10, -1e-14])
    expected = -np.log(-logp) + logp / 2  # log p - log(1 - p) with 1 - p = -logp (1 + logp/2)
    assert lira.logit_scale_logprob(logp) == pytest.approx(expected, rel=1e-12)
    assert lira.logit_scale_logprob([-800.0]) == [-800.0]  # exp(-800) underflows
    held = lira.logit_scale_logprob([0.0, -1e-30, -(2.0**-53)])
    assert held == pytest.approx([53 * math.log(2)] * 3)


def test_both_scalings_agree_on_one_token():
    logits = np.random.default_rng(1).normal(0, 3, (20, 5))
    logp = torch.tensor(logits).log_softmax(-1)[:, 2]
    assert lira.logit_scale_logprob(logp) == pytest.approx(
        lira.logit_scale(logits, np.full(20, 2)), abs=1e-9
    )


def test_scaled_logprob_refuses_losses():
    with pytest.raises(BadInput, match="at most 0"):
        lira.logit_scale_logprob([0.7])
    with pytest.raises(BadInput, match="NaN"):
        lira.logit_scale_logprob([math.nan])


# the attacks


@settings(max_examples=25)
@given(SEEDS)
def test_per_example_scores_equal_a_loop_over_normal_laws(seed):
    target, shadows, member = split(*pool(seed))
    online, one_sided, two_sided = (np.zeros(target.shape) for _ in range(3))
    for i, j in np.ndindex(*target.shape):
        seen, unseen = shadows[member[:, i], i, j], shadows[~member[:, i], i, j]
        q_in = stats.norm(np.mean(seen), np.std(seen, ddof=1))
        q_out = stats.norm(np.mean(unseen), np.std(unseen, ddof=1))
        online[i, j] = q_in.logpdf(target[i, j]) - q_out.logpdf(target[i, j])
        one_sided[i, j], two_sided[i, j] = q_out.logcdf(target[i, j]), -q_out.logpdf(target[i, j])
    args = target, shadows, member
    assert lira.online(*args, variance="example") == pytest.approx(online.mean(1), abs=1e-9)
    assert lira.offline(*args, variance="example") == pytest.approx(one_sided.mean(1), abs=1e-9)
    assert lira.offline(*args, one_sided=False, variance="example") == pytest.approx(
        two_sided.mean(1), abs=1e-9
    )


def test_pooled_deviation_is_centred_and_each_side_has_its_own():
    # IN: pairs at distance 2 around 0 and 100. OUT: pairs at distance 6 around -10 and 50.
    shadows = np.array([[-1.0, 99.0], [1.0, 101.0], [-13.0, 47.0], [-7.0, 53.0]])
    member = np.array([[True, True], [True, True], [False, False], [False, False]])
    target = np.array([0.0, 50.0])
    # sums of squares 2 + 2 and 18 + 18, each over 2 degrees of freedom
    q_in, q_out = stats.norm([0, 100], math.sqrt(2)), stats.norm([-10, 50], math.sqrt(18))
    expected = q_in.logpdf(target) - q_out.logpdf(target)
    assert lira.online(target, shadows, member, "pooled") == pytest.approx(expected, abs=1e-9)

    # the slip: both deviations from the uncentred statistics of the IN models
    slip = np.std(shadows[:2])
    wrong = stats.norm([0, 100], slip).logpdf(target) - stats.norm([-10, 50], slip).logpdf(target)
    assert np.abs(wrong - expected).min() > 1.0


def test_pooled_deviation_counts_degrees_of_freedom():
    rng = np.random.default_rng(3)
    shadows, member = rng.normal(0, 2.0, (4, 20_000)), np.zeros((4, 20_000), dtype=bool)
    member[:2] = True
    # the mean of two models is sqrt(1/2) deviations off, so the score at the centre is known
    scores = lira.offline(shadows[2:].mean(0), shadows, member, one_sided=False, variance="pooled")
    assert scores[0] == pytest.approx(0.5 * math.log(2 * math.pi * 4.0), abs=0.02)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("attack", ATTACKS)
@settings(max_examples=15)
@given(seed=SEEDS)
def test_order_does_not_matter(attack, variance, seed):
    target, shadows, member = split(*pool(seed))
    scores = attack(target, shadows, member, variance=variance)
    rng = np.random.default_rng(seed)
    rows, examples, queries = (rng.permutation(k) for k in shadows.shape)
    shuffled = attack(
        target[examples][:, queries],
        shadows[rows][:, examples][:, :, queries],
        member[rows][:, examples],
        variance=variance,
    )
    assert shuffled == pytest.approx(scores[examples], rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("variance", VARIANCES)
@settings(max_examples=15)
@given(seed=SEEDS)
def test_scores_do_not_depend_on_units_or_difficulty(variance, seed):
    target, shadows, member = split(*pool(seed))
    shift = np.random.default_rng(seed).normal(0, 5, (target.shape[0], 1))
    plain = lira.online(target, shadows, member, variance)
    moved = lira.online(3 * target + shift, 3 * shadows + shift, member, variance)
    assert moved == pytest.approx(plain, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("variance", VARIANCES)
@settings(max_examples=15)
@given(seed=SEEDS)
def test_swapping_the_sides_negates_the_ratio(variance, seed):
    target, shadows, member = split(*pool(seed))
    assert lira.online(target, shadows, ~member, variance) == pytest.approx(
        -lira.online(target, shadows, member, variance), abs=1e-9
    )


@pytest.mark.parametrize("variance", VARIANCES)
def test_one_query_may_be_given_without_its_axis(variance):
    target, shadows, member = split(*pool(5, q=1))
    flat = target[:, 0].tolist(), torch.tensor(shadows[:, :, 0]), torch.tensor(member)
    for attack in ATTACKS:
        assert attack(*flat, variance=variance).tolist() == pytest.approx(
            attack(target, shadows, member.astype(int), variance=variance).tolist()
        )


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_queries_are_averaged(attack, variance):
    target, shadows, member = split(*pool(6, q=3))
    single = [attack(target[:, j], shadows[:, :, j], member, variance=variance) for j in range(3)]
    together = attack(target, shadows, member, variance=variance)
    assert together == pytest.approx(np.mean(single, axis=0), abs=1e-9)


@pytest.mark.parametrize("variance", VARIANCES)
def test_offline_ignores_models_trained_on_the_example(variance):
    target, shadows, member = split(*pool(7))
    other = np.where(member[:, :, None], 1e6, shadows)
    for attack in ATTACKS[1:]:
        assert attack(target, other, member, variance=variance) == pytest.approx(
            attack(target, shadows, member, variance=variance), abs=1e-9
        )


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_two_offline_attacks_disagree_below_the_centre(variance):
    shadows = np.random.default_rng(8).normal(0, 1, (8, 3))
    never = np.zeros((8, 3), dtype=bool)
    low, high = np.full(3, -4.0), np.full(3, 4.0)
    one, two = (partial(lira.offline, one_sided=o, variance=variance) for o in (True, False))
    middle = shadows.mean(0)
    assert (one(low, shadows, never) < one(middle, shadows, never)).all()
    assert (two(low, shadows, never) > two(middle, shadows, never)).all()
    assert (one(high, shadows, never) > one(middle, shadows, never)).all()
    assert (two(high, shadows, never) > two(middle, shadows, never)).all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_one_sided_scores_grow_far_into_both_tails(variance):
    shadows = np.tile(np.linspace(-1, 1, 6)[:, None], 40) * np.linspace(0.8, 1.2, 40)
    never = np.zeros(shadows.shape, dtype=bool)
    ladder = np.concatenate([-np.logspace(12, 0, 60), np.linspace(-0.9, 20, 40)])
    scores = np.array(
        [lira.offline(np.full(40, x), shadows, never, True, variance) for x in ladder]
    )
    assert np.isfinite(scores).all()
    assert (np.diff(scores, axis=0) > 0).all()


@pytest.mark.parametrize("freedom", [3.0, 60.0, 2000.0, 20000.0])
def test_student_log_probability_passes_underflow_without_a_seam(freedom):
    edge = math.sqrt(freedom * math.expm1(2 * 708 / freedom))  # about where 1e-308 is reached
    z = -np.concatenate([np.linspace(0.5, 1.5, 401) * edge])
    log_tail = lira._t_logcdf(z, np.full(z.shape, freedom))
    slope = np.gradient(log_tail, z)[1:-1]
    hazard = np.exp(stats.t.logpdf(z, freedom) - log_tail)[1:-1]  # its derivative
    assert slope == pytest.approx(hazard, rel=1e-4)
    far = lira._t_logcdf(np.array([-1e8, -1e9]), np.full(2, freedom))
    assert np.diff(far) == pytest.approx(-freedom * math.log(10), rel=1e-9)


def test_student_log_probability_equals_scipy_where_scipy_has_one():
    z = np.linspace(-30, 30, 121)
    assert lira._t_logcdf(z, np.full(z.shape, 7.0)) == pytest.approx(
        stats.t.logcdf(z, 7.0), rel=1e-10, abs=1e-15
    )


# shrinkage


def test_shrunk_law_is_the_posterior_predictive():
    """Against numerical integration over the unknown mean and variance."""
    rng = np.random.default_rng(9)
    shadows = rng.normal(0, np.exp(0.6 * rng.normal(size=40)), (4, 40))
    law = lira._law(shadows[:, :, None], np.ones((4, 40), dtype=bool), "shrunk", "IN")
    squares = ((shadows - shadows.mean(0)) ** 2).sum(0)
    freedom = law.freedom[0, 0]
    a = (freedom - 3) / 2
    s = (law.deviation[0, 0] ** 2 * freedom / (1 + 1 / 4) - squares[0]) / (2 * a)
    assert 0.5 < a < 50
    assert s > 0
    log_v = np.linspace(-14, 14, 4001)
    v = np.exp(log_v)
    for i in (0, 7, 23):
        x = shadows[:, i].mean() + np.array([-3.0, 0.0, 0.4, 2.0])
        # given v: the sum of squares is v chi2(3), a new model is off the mean by v (1 + 1/4)
        weight = stats.invgamma.pdf(v, a, scale=a * s) * v * stats.chi2.pdf(squares[i] / v, 3) / v
        density = stats.norm.pdf(x[:, None], shadows[:, i].mean(), np.sqrt(1.25 * v))
        expected = (density * weight).sum(1) / weight.sum()
        assert np.exp(law.logpdf(np.broadcast_to(x[:, None, None], (4, 40, 1))))[
            :, i, 0
        ] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("models", [2, 3, 6])
def test_the_prior_is_recovered_from_many_examples(models):
    rng = np.random.default_rng(10)
    a, s, n = 3.0, 2.0, 40_000
    v = stats.invgamma.rvs(a, scale=a * s, size=n, random_state=rng)
    shadows = rng.normal(0, np.sqrt(v), (models, n))
    squares = ((shadows - shadows.mean(0)) ** 2).sum(0)[:, None]
    law = lira._shrunk(shadows.mean(0)[:, None], squares, np.full((n, 1), models))
    assert law.freedom[0, 0] == pytest.approx(2 * a + models - 1, rel=0.1)
    share = law.deviation**2 * law.freedom / (1 + 1 / models) - squares
    assert share / (law.freedom - models + 1) == pytest.approx(s, rel=0.05)


def test_shrunk_variances_lie_between_the_example_and_the_others():
    rng = np.random.default_rng(11)
    shadows = rng.normal(0, np.exp(0.5 * rng.normal(size=300)), (5, 300))
    own = shadows.var(0, ddof=1)
    law = lira._law(shadows[:, :, None], np.ones((5, 300), dtype=bool), "shrunk", "IN")
    shrunk = law.deviation[:, 0] ** 2 / (1 + 1 / 5)
    order = np.argsort(own)
    assert (np.diff(shrunk[order]) >= 0).all()  # keeps their order
    assert shrunk.min() > own.min()
    assert shrunk.max() < own.max()


def test_examples_that_vary_alike_share_the_pooled_variance():
    rng = np.random.default_rng(12)
    base = rng.normal(0, 1, (6, 1))
    shadows = base + rng.normal(0, 5, 30)  # identical spread around 30 centres
    law = lira._law(shadows[:, :, None], np.ones((6, 30), dtype=bool), "shrunk", "IN")
    assert law.deviation == pytest.approx(math.sqrt(base.var(ddof=1) * (1 + 1 / 6)), rel=1e-6)
    assert (law.freedom > 1e4).all()


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("side", [3, 6])
def test_shrinkage_keeps_up_with_the_better_alternative(spread, side):
    rng = np.random.default_rng(13)
    found = {variance: [] for variance in VARIANCES}
    for _ in range(4):
        n, s = 1500, 2 * side
        member = np.argsort(rng.random((s, n)), axis=0) < side
        truth = rng.random(n) < 0.5
        deviation = np.exp(spread * rng.normal(size=n))
        center, gap = rng.normal(0, 3, n), rng.exponential(1.0, n)
        shadows = center + gap * member + deviation * rng.normal(size=(s, n))
        target = center + gap * truth + deviation * rng.normal(size=n)
        for variance in VARIANCES:
            scores = lira.online(target, shadows, member, variance)
            found[variance].append(auc(scores[truth], scores[~truth]))
    mean = {variance: np.mean(values) for variance, values in found.items()}
    assert mean["shrunk"] > max(mean["pooled"], mean["example"]) - 0.005
    assert mean["shrunk"] > min(mean["pooled"], mean["example"]) + 0.01


# what can be asked of every attack


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("attack", ATTACKS)
def test_members_of_overfitted_models_score_higher(attack, variance):
    statistics, member = pool(14, s=16, n=300, q=1, gap=3.0)
    scores = attack(*split(statistics, member), variance=variance)
    assert auc(scores[member[-1]], scores[~member[-1]]) > 0.6


@pytest.mark.parametrize("variance", VARIANCES)
def test_without_a_signal_the_attack_finds_nothing(variance):
    statistics, member = pool(15, s=16, n=4000, q=1, gap=0.0)
    scores = lira.online(*split(statistics, member), variance=variance)
    assert auc(scores[member[-1]], scores[~member[-1]]) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("variance", VARIANCES)
def test_models_that_agree_exactly_give_finite_scores(variance):
    shadows = np.array([[5.1, 1.0], [5.1, 1.0], [5.1, 1.0], [0.3, 1.0], [0.3, 1.0], [0.3, 1.0]])
    member = np.arange(6)[:, None] < [3, 3]
    target = np.array([5.1, 1.0])
    scores = lira.online(target, shadows, member, variance)
    assert scores[0] > 10
    assert scores[1] == pytest.approx(0.0, abs=1e-6)
    assert np.isfinite(lira.offline(target, shadows, member, variance=variance)).all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_one_saturated_example_does_not_spoil_the_others(variance):
    statistics, member = pool(16, n=200, q=1, spread=0.0)
    target, shadows, member = split(statistics, member)
    plain = lira.online(target, shadows, member, variance)
    shadows[:, 0], target[0] = 2.0, 2.0
    scores = lira.online(target, shadows, member, variance)
    assert np.isfinite(scores).all()
    assert scores[1:] == pytest.approx(plain[1:], abs=0.3)


@pytest.mark.parametrize("q", [None, 2])
def test_leave_one_out_sets_one_model_aside_on_either_side(q):
    rng = np.random.default_rng(17)
    statistics = rng.normal(size=(10, 9) if q is None else (10, 9, q))
    member = np.argsort(rng.random((10, 9)), axis=0) < rng.integers(3, 8, 9)
    for attack in (*ATTACKS, partial(lira.online, variance="example")):
        scores = lira.leave_one_out(statistics, member, attack)
        assert scores.shape == (10, 9)
        for i in (0, 4, 9):
            shadows, trained = [], []
            for x in range(9):
                after = [k % 10 for k in range(i + 1, i + 10)]
                after.remove(next(k for k in after if member[k, x] != member[i, x]))
                shadows.append(statistics[after, x])
                trained.append(member[after, x])
            expected = attack(statistics[i], np.stack(shadows, 1), np.stack(trained, 1))
            assert scores[i] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("models", [6, 16])
def test_leave_one_out_finds_nothing_where_nothing_is(models, variance):
    """In a pool where each example is in exactly half, plain leave-one-out falls below chance."""
    rng = np.random.default_rng(18)
    statistics = rng.normal(size=(models, 3000))
    member = np.argsort(rng.random(statistics.shape), axis=0) < models // 2
    attack = partial(lira.online, variance=variance)
    scores = lira.leave_one_out(statistics, member, attack)
    assert auc(scores[member], scores[~member]) == pytest.approx(0.5, abs=0.015)
    assert (scores[member] > 0).mean() == pytest.approx((scores[~member] > 0).mean(), abs=0.02)
    rest = ~np.eye(models, dtype=bool)
    plain = np.stack([attack(statistics[i], statistics[o], member[o]) for i, o in enumerate(rest)])
    assert auc(plain[member], plain[~member]) < 0.495


def test_leave_one_out_finds_a_signal():
    rng = np.random.default_rng(18)
    member = np.argsort(rng.random((20, 300)), axis=0) < 10
    scores = lira.leave_one_out(rng.normal(size=(20, 300)) + 2.0 * member, member)
    assert auc(scores[member], scores[~member]) > 0.85


def test_leave_one_out_needs_three_on_each_side():
    member = np.arange(6)[:, None] < [3, 2]
    with pytest.raises(BadInput, match=r"1 of 2 .* \(example 1 has 1\)"):
        lira.leave_one_out(np.zeros((6, 2)), member)
    scores = lira.leave_one_out(np.zeros((6, 1)), member[:, :1])
    assert scores == pytest.approx(np.zeros((6, 1)))


def test_too_few_models_are_named():
    target, shadows, member = split(*pool(19, s=6, n=5, q=1))
    member[:, :] = np.arange(6)[:, None] < 3
    member[:, 3] = [True, False, False, False, False, False]
    with pytest.raises(BadInput, match=r"1 of 5 .* fewer than 2 IN models \(example 3 has 1\)"):
        lira.online(target, shadows, member)
    lira.offline(target, shadows, member)
    member[:, 1:3] = True
    for attack in ATTACKS:
        with pytest.raises(BadInput, match="fewer than 2"):
            attack(target, shadows, member)
    with pytest.raises(BadInput, match=r"2 of 5 .* 2 OUT models \(example 1 has 0\)"):
        lira.offline(target, shadows, member)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    target, shadows, member = split(*pool(20))
    broken = shadows.copy()
    broken[0, 0, 0] = bad
    for attack in ATTACKS:
        with pytest.raises(BadInput, match="shadows holds 1 NaN or infinite"):
            attack(target, broken, member)
        with pytest.raises(BadInput, match="target holds"):
            attack(target * bad, shadows, member)


def test_shapes_and_names_are_checked():
    target, shadows, member = split(*pool(21))
    with pytest.raises(BadInput, match="behind an axis of models"):
        lira.online(target, shadows[:, :-1], member)
    with pytest.raises(BadInput, match="behind an axis of models"):
        lira.online(target[:, 0], shadows, member)
    with pytest.raises(BadInput, match="member must have shape"):
        lira.online(target, shadows, member.T)
    with pytest.raises(BadInput, match="true and false"):
        lira.online(target, shadows, member + 1)
    with pytest.raises(BadInput, match="empty"):
        lira.online([], np.zeros((4, 0)), np.zeros((4, 0)))
    with pytest.raises(BadInput, match="pooled"):
        lira.online(target, shadows, member, variance="poled")


def test_log_odds_of_confidence_are_what_the_attack_was_made_for():
    """End to end on probabilities: phi turns skewed confidences into Gaussian ones."""
    statistics, member = pool(22, s=16, n=400, q=1, gap=2.0)
    p = expit(statistics[..., 0])
    logits = np.stack([np.log(p), np.log1p(-p)], axis=-1)
    phi = lira.logit_scale(logits, np.zeros(p.shape, dtype=int))
    assert lira.online(*split(phi, member)) == pytest.approx(
        lira.online(*split(statistics, member)), abs=1e-6
    )
