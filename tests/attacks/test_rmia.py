"""RMIA against its definition written out as a matrix, and BASE beside it."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from unlearn.attacks.membership import base, rmia
from unlearn.errors import BadInput
from unlearn.evaluations.statistics import auc

pytestmark = pytest.mark.filterwarnings("error")

SEEDS = st.integers(0, 2**32 - 1)


def world(seed, n=20, r=5, z=15, gap=0.5, offline_only=False):
    """Probabilities of overfitted models, with an unbalanced membership, and who is in."""
    rng = np.random.default_rng(seed)
    member = np.argsort(rng.random((n, r)), axis=1) < rng.integers(
        0 if offline_only else 1, r, (n, 1)
    )
    truth = rng.random(n) < 0.5
    hard, z_hard = rng.normal(0, 2, (n, 1)), rng.normal(0, 2, (z, 1))
    logits = hard + gap * np.column_stack([truth, member]) + 0.5 * rng.normal(size=(n, r + 1))
    p, z_p = expit(logits), expit(z_hard + 0.5 * rng.normal(size=(z, r + 1)))
    return (p[:, 0], p[:, 1:], member, z_p[:, 0], z_p[:, 1:]), truth


def by_definition(args, a=None, gamma=1.0):
    """Zarifzadeh et al.: the whole matrix of ratios, means over loops."""
    target, references, member, z_target, z_references = args
    ratio, z_ratio = [], []
    for p, row, trained in zip(target, references, member, strict=True):
        seen, unseen = row[trained], row[~trained]
        mean_in = np.mean(seen) if a is None else a * np.mean(unseen) + (1 - a)
        ratio.append(p / ((mean_in + np.mean(unseen)) / 2))
    for p, row in zip(z_target, z_references, strict=True):
        mean_in = np.mean(row) if a is None else a * np.mean(row) + (1 - a)
        z_ratio.append(p / ((mean_in + np.mean(row)) / 2))
    return (np.array(ratio)[:, None] / np.array(z_ratio)[None, :] > gamma).mean(axis=1)


@settings(max_examples=50)
@given(SEEDS, st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1.0, 1.37, 2.0]))
def test_sorting_gives_the_scores_of_the_whole_matrix(seed, a, gamma):
    args, _ = world(seed)
    assert rmia.offline(*args, a=a, gamma=gamma).tolist() == by_definition(args, a, gamma).tolist()
    assert rmia.online(*args, gamma=gamma).tolist() == by_definition(args, None, gamma).tolist()


def test_a_population_point_with_the_same_ratio_is_not_exceeded():
    """Dyadic probabilities, so that ties are exact: ratios 1, 2 and 1/2 against 1, 1, 2, 1/2."""
    never = np.zeros((3, 1), dtype=bool)
    args = [0.25, 0.5, 0.25], [[0.25], [0.25], [0.5]], never
    population = [0.5, 0.125, 0.5, 0.25], [[0.5], [0.125], [0.25], [0.5]]
    assert rmia.offline(*args, *population, a=1.0).tolist() == [0.25, 0.75, 0.0]
    # gamma = 2: 1 against 1/2 is exactly twice, not more
    assert rmia.offline(*args, *population, a=1.0, gamma=2.0).tolist() == [0.0, 0.25, 0.0]


def test_every_reference_counts_at_population_points_and_only_outsiders_offline():
    """Published code averages the upper half of the references, and pads or cuts the others."""
    args = [0.6], [[0.1, 0.3, 0.9, 0.2]], [[False, False, True, False]]
    # a = 1: ratio(x) = 0.6 / 0.2 = 3
    z_target, z_references = [0.625, 0.875], [[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.5]]
    # ratios 2.5 and 2.8; over the upper half of the references 1.25 and 2.33
    for gamma, expected in [(1.0, 1.0), (1.1, 0.5), (1.5, 0.0)]:
        assert rmia.offline(*args, z_target, z_references, a=1.0, gamma=gamma) == [expected]
    # online: Pr(x) = (0.9 + 0.2) / 2, though three of four references never saw x
    low, high = [0.6 / 0.55 * 0.4 - 1e-9, 1.0], [0.6 / 0.55 * 0.4 + 1e-9, 1.0]
    for z_target, expected in [(low, 0.5), (high, 0.0)]:
        z_references = [[0.4] * 4, [0.1] * 4]
        assert rmia.online(*args, z_target, z_references) == [expected]


@settings(max_examples=25)
@given(SEEDS)
def test_order_does_not_matter(seed):
    args, _ = world(seed)
    target, references, member, z_target, z_references = args
    rng = np.random.default_rng(seed)
    i, j, k = (rng.permutation(size) for size in (20, 5, 15))
    shuffled = (
        target[i],
        references[i][:, j],
        member[i][:, j],
        z_target[k],
        z_references[k][:, j],
    )
    for attack in (rmia.offline, rmia.online):
        assert attack(*shuffled) == pytest.approx(attack(*args)[i], abs=1e-12)
    log = np.log(target), np.log(references), member
    log_shuffled = np.log(shuffled[0]), np.log(shuffled[1]), shuffled[2]
    for attack in (base.offline, base.online):
        assert attack(*log_shuffled) == pytest.approx(attack(*log)[i], abs=1e-12)


@settings(max_examples=25)
@given(SEEDS)
def test_offline_ignores_references_that_saw_the_example(seed):
    args, _ = world(seed, offline_only=True)
    target, references, member, *population = args
    other = np.where(member, 1e-3, references)
    assert rmia.offline(target, other, member, *population).tolist() == (
        rmia.offline(*args).tolist()
    )
    assert base.offline(np.log(target), np.log(other), member) == pytest.approx(
        base.offline(np.log(target), np.log(references), member), abs=1e-12
    )


def test_inputs_may_be_lists_or_tensors_of_low_precision():
    args, _ = world(1)
    lists = [value.tolist() for value in args]
    tensors = [torch.tensor(value) for value in args]
    for attack in (rmia.offline, rmia.online):
        assert attack(*lists).tolist() == attack(*args).tolist() == attack(*tensors).tolist()
    half = [t.bfloat16() if t.is_floating_point() else t for t in tensors]
    assert rmia.online(*half) == pytest.approx(rmia.online(*args), abs=0.2)


@pytest.mark.parametrize("attack", [rmia.offline, rmia.online])
def test_points_that_no_model_gives_any_probability_are_ranked(attack):
    references = [[0.0, 0.0], [0.0, 0.0], [0.2, 0.2]]
    member = [[True, False]] * 3
    population = [0.3, 0.5], [[0.3, 0.3], [0.5, 0.5]]
    options = {"a": 1.0} if attack is rmia.offline else {}
    scores = attack([0.0, 0.1, 0.1], references, member, *population, **options)
    assert scores.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("attack", [rmia.offline, rmia.online])
def test_members_of_overfitted_models_score_higher(attack):
    args, truth = world(2, n=600, r=8, z=400, gap=1.5)
    scores = attack(*args)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert auc(scores[truth], scores[~truth]) > 0.7
    shifted = attack(*world(2, n=600, r=8, z=400, gap=0.0)[0])
    assert auc(shifted[truth], shifted[~truth]) == pytest.approx(0.5, abs=0.06)


def test_nonmembers_score_like_the_population():
    """Offline, both are seen by the same formula: the score is one minus a p-value."""
    (target, references, _, z_target, z_references), _ = world(3, n=4000, z=4000, r=4, gap=0.0)
    never = np.zeros(references.shape, dtype=bool)
    scores = rmia.offline(target, references, never, z_target, z_references)
    assert np.quantile(scores, [0.1, 0.5, 0.9, 0.99]) == pytest.approx(
        [0.1, 0.5, 0.9, 0.99], abs=0.03
    )


# tuning


def tuned_by_definition(references, member, z_references):
    means = []
    for a in np.arange(11) / 10:
        aucs = []
        for i in range(references.shape[1]):
            rest = np.delete(np.arange(references.shape[1]), i)
            rows = [x for x in range(len(references)) if not member[x, rest].all()]
            scores = by_definition(
                (
                    references[rows, i],
                    references[rows][:, rest],
                    member[rows][:, rest],
                    z_references[:, i],
                    z_references[:, rest],
                ),
                a,
            )
            truth = member[rows, i]
            if truth.any() and not truth.all():
                aucs.append(auc(scores[truth], scores[~truth]))
        means.append(np.mean(aucs))
    return np.array(means)


@pytest.mark.parametrize("seed", range(6))
def test_tuned_a_is_the_best_of_the_grid(seed):
    (_, references, member, _, z_references), _ = world(seed, n=60, r=4, z=80, gap=2.0)
    means = tuned_by_definition(references, member, z_references)
    chosen = rmia.tune_a(references, member, z_references)
    assert chosen in rmia.GRID
    assert means[round(chosen * 10)] == pytest.approx(means.max(), abs=1e-9)


def test_tuning_finds_how_far_members_move():
    """If training lifts p to a p + (1 - a) for a small a, a large a ranks worse, and conversely."""
    rng = np.random.default_rng(4)
    member = np.argsort(rng.random((1500, 6)), axis=1) < 3
    hard, z_hard = rng.uniform(0.02, 0.98, (1500, 1)), rng.uniform(0.02, 0.98, (500, 1))
    chosen = {}
    for a in (0.1, 0.9):
        mean = np.where(member, a * hard + 1 - a, hard)
        chosen[a] = rmia.tune_a(
            mean * np.exp(0.3 * rng.normal(size=mean.shape) - 0.4).clip(max=1 / mean),
            member,
            z_hard * np.exp(0.3 * rng.normal(size=(500, 6)) - 0.4).clip(max=1 / z_hard),
        )
    assert chosen[0.1] < chosen[0.9]


def test_tuning_needs_references_that_can_be_attacked():
    p = np.full((4, 2), 0.5)
    half = np.array([[True, False], [False, True]] * 2)  # whom one never saw, the other did
    for references, member in [(p[:, :1], half[:, :1]), (p, half), (p, np.zeros((4, 2)))]:
        with pytest.raises(BadInput, match="none of the"):
            rmia.tune_a(references, member, np.full((3, references.shape[1]), 0.5))
    third = np.column_stack([half, np.zeros(4, dtype=bool)])
    rmia.tune_a(np.full((4, 3), 0.5), third, np.full((3, 3), 0.5))
    with pytest.raises(BadInput, match=r"population_references must have shape \(any, 2\)"):
        rmia.tune_a(p, half, np.full((3, 3), 0.5))


# refusals


def changed(args, position, value):
    return [value if i == position else x for i, x in enumerate(args)]


def test_bad_input_is_refused():
    args, _ = world(5)
    target, references, member, _, z_references = args
    for attack in (rmia.offline, rmia.online):
        for position in (0, 1, 3, 4):
            broken = args[position].copy()
            broken[0] = math.nan
            with pytest.raises(BadInput, match="NaN"):
                attack(*changed(args, position, broken))
            with pytest.raises(BadInput, match="probabilities"):
                attack(*changed(args, position, -args[position]))
            with pytest.raises(BadInput, match=r"must have|empty"):
                attack(*changed(args, position, args[position][:0]))
        with pytest.raises(BadInput, match="probabilities"):
            attack(*changed(args, 0, target + 1.0))
        with pytest.raises(BadInput, match=r"references must have shape \(20, any\)"):
            attack(*changed(args, 1, references.T))
        with pytest.raises(BadInput, match="member must have shape"):
            attack(*changed(args, 2, member.T))
        with pytest.raises(BadInput, match=r"population_references must have shape \(15, 5\)"):
            attack(*changed(args, 4, z_references[:, 1:]))
        with pytest.raises(BadInput, match="gamma must be at least 1"):
            attack(*args, gamma=0.9)
        all_in = member.copy()
        all_in[3] = True
        with pytest.raises(BadInput, match=r"1 of 20 .* 1 OUT models \(example 3 has 0\)"):
            attack(*changed(args, 2, all_in))
    for a in (-0.1, 1.1, math.nan):
        with pytest.raises(BadInput, match="a must lie"):
            rmia.offline(*args, a=a)
    with pytest.raises(BadInput, match="1 IN models"):
        rmia.online(*changed(args, 2, np.zeros(member.shape)))
    rmia.offline(*changed(args, 2, np.zeros(member.shape)))
    assert (rmia.online(*changed(args, 0, np.full(20, 1.0 + 5e-7))) > 0.5).any()  # float32 softmax


# BASE


@settings(max_examples=25)
@given(SEEDS)
def test_base_by_definition(seed):
    (target, references, member, *_), _ = world(seed)
    mean_in = [row[m].mean() for row, m in zip(references, member, strict=True)]
    mean_out = [row[~m].mean() for row, m in zip(references, member, strict=True)]
    args = np.log(target), np.log(references), member
    expected = np.log(target / ((np.array(mean_in) + mean_out) / 2))
    assert base.online(*args) == pytest.approx(expected, abs=1e-12)
    for c in (0.0, 0.33, 1.0):
        expected = np.log(target) - c * np.log(mean_out)
        assert base.offline(*args, c=c) == pytest.approx(expected, abs=1e-12)


def test_base_with_balanced_references_is_the_plain_mean_of_the_paper():
    (target, references, *_), _ = world(6, r=6)
    member = np.tile([True, False] * 3, (20, 1))
    expected = np.log(target) - np.log(references.mean(1))
    assert base.online(np.log(target), np.log(references), member) == pytest.approx(expected)


@settings(max_examples=25)
@given(SEEDS)
def test_base_and_rmia_rank_alike(seed):
    args, _ = world(seed, n=50, z=300)
    log_ratio = base.online(np.log(args[0]), np.log(args[1]), args[2])
    assert (np.diff(rmia.online(*args)[np.argsort(log_ratio)]) >= 0).all()


@pytest.mark.parametrize("attack", [base.online, base.offline, partial(base.offline, c=1.0)])
def test_base_scores_members_of_overfitted_models_higher(attack):
    args, truth = world(7, n=600, r=8, gap=1.5)
    scores = attack(np.log(args[0]), torch.tensor(args[1]).log(), args[2].tolist())
    assert auc(scores[truth], scores[~truth]) > 0.55


def test_base_does_not_underflow():
    member = [[True, False], [True, False]]
    scores = base.online([-2000.0, -1000.0], [[-2000.0, -2000.0]] * 2, member)
    assert scores == pytest.approx([0.0, 1000.0])


def test_base_refuses():
    logp, member = np.full((3, 2), -1.0), np.array([[True, False]] * 3)
    for attack in (base.online, base.offline):
        with pytest.raises(BadInput, match="NaN"):
            attack(np.full(3, math.nan), logp, member)
        with pytest.raises(BadInput, match="one row an example"):
            attack(logp[:, 0], logp.T, member.T)
        with pytest.raises(BadInput, match="member must have shape"):
            attack(logp[:, 0], logp, member[:, :1])
        with pytest.raises(BadInput, match="3 of 3 examples have fewer than 1 OUT"):
            attack(logp[:, 0], logp, member | True)
    with pytest.raises(BadInput, match="fewer than 1 IN"):
        base.online(logp[:, 0], logp, member & False)
    with pytest.raises(BadInput, match="c must lie"):
        base.offline(logp[:, 0], logp, member, c=1.5)
