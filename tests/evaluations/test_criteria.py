"""Rules decide from confidence bounds: too little evidence neither passes nor fails."""

from __future__ import annotations

import numpy as np
import pytest

from unlearn.evaluations import criteria
from unlearn.evaluations.findings import overall
from unlearn.evaluations.report import Finding, Value
from unlearn.evaluations.statistics import Bounds


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0.1, 0.2, "pass"), (0.6, 0.8, "fail"), (0.4, 0.6, "inconclusive"), (-0.3, -0.2, "fail")],
)
def test_an_interval_inside_passes_outside_fails_across_is_undecided(
    low: float, high: float, wanted: str
) -> None:
    assert criteria.decide(Bounds(low, high), 0.0, 0.5) == wanted


def test_the_same_mean_passes_with_many_records_and_not_with_few() -> None:
    draw = np.random.default_rng(0)
    many = draw.uniform(0, 0.1, 400)
    assert criteria.at_most(many, 0.1).verdict == "pass"
    assert criteria.at_most(np.array([0.0, 0.12, 0.03]), 0.1).verdict == "inconclusive"
    assert criteria.at_most(draw.uniform(0.5, 0.6, 400), 0.1).verdict == "fail"


def test_pairing_removes_what_both_models_share() -> None:
    hard = np.tile([0.0, 1.0], 20)
    slightly_more = 0.03 + 0.95 * hard
    paired = criteria.at_most_above(slightly_more, hard, "the retrained model", paired=True)
    assert paired.verdict == "pass"
    assert paired.criterion == "at most 0.10 above the retrained model"
    apart = criteria.at_most_above(slightly_more, hard, "the holdout", paired=False)
    assert apart.verdict == "inconclusive"
    assert "more records" in apart.reason


def test_overshooting_leaks_too() -> None:
    assert criteria.auc_near(Bounds(-0.48, -0.4), "one half").verdict == "fail"
    assert criteria.auc_near(Bounds(-0.05, 0.05), "one half").verdict == "pass"
    assert criteria.auc_near(Bounds(0.4, 0.49), "one half").verdict == "fail"


def finding(verdict: str) -> Finding:
    return Finding(
        name="accuracy", title="Accuracy", subset="forget", better="lower", n=10,
        unlearned=Value(value=0.5), verdict=verdict,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("verdicts", "wanted"),
    [
        (["pass", "pass", "info"], "forgotten"),
        (["pass", "inconclusive"], "inconclusive"),
        (["pass", "inconclusive", "fail"], "not forgotten"),
        (["info"], "inconclusive"),
        ([], "inconclusive"),
    ],
)
def test_every_check_must_pass(verdicts: list[str], wanted: str) -> None:
    verdict, reason = overall(tuple(finding(v) for v in verdicts))
    assert verdict == wanted
    assert reason


def test_a_difference_is_no_surer_than_either_side() -> None:
    ours, theirs = Bounds(0.4, 0.6), Bounds(0.2, 0.4)
    both = criteria.difference(0.5, ours, 0.3, theirs)
    assert both.low == pytest.approx(0.2 - np.hypot(0.1, 0.1))
    assert both.high == pytest.approx(0.2 + np.hypot(0.1, 0.1))
    fixed = criteria.difference(0.5, ours, 0.3, Bounds(0.3, 0.3))
    assert fixed == pytest.approx((0.1, 0.3))
