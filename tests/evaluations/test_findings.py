"""Findings from measurements, without any model."""

from __future__ import annotations

import numpy as np
import pytest

from unlearn.attacks.signals import Signals
from unlearn.evaluations.findings import Measured, Measurements, findings, overall
from unlearn.evaluations.report import Finding
from unlearn.interface import Classes, Records, Target


def classifier(losses: list[float], right: list[bool]) -> Measured:
    n = len(losses)
    names = [f"{i:032x}" for i in range(n)]
    nll = np.array(losses, dtype=np.float64)
    return Measured(Signals(names, nll, np.ones(n, int), [[r] for r in right]), None, False)


def text(hits: list[list[bool]], loss: float) -> Measured:
    n = len(hits)
    units = np.array([len(h) for h in hits])
    return Measured(Signals(["0"] * n, loss * units, units, hits), np.zeros(n), True)


def one(measured: Measurements, target: Target, name: str, subset: str) -> Finding:
    (found,) = [f for f in findings(measured, target) if (f.name, f.subset) == (name, subset)]
    return found


def test_a_forgotten_class_needs_no_reference() -> None:
    before = {"forget": classifier([0.1] * 200, [True] * 200)}
    gone = {"forget": classifier([5.0] * 200, [False] * 200)}
    target = Classes((3,), ("cat",))
    found = one({"original": before, "unlearned": gone}, target, "accuracy", "forget")
    assert (found.verdict, found.criterion) == ("pass", "at most 0.10")
    assert one({"original": before, "unlearned": before}, target, "accuracy", "forget").verdict == (
        "fail"
    )


def test_forgotten_records_need_a_reference() -> None:
    before = {"forget": classifier([0.1] * 200, [True] * 200)}
    measured: Measurements = {"original": before, "unlearned": before}
    found = one(measured, Records(200), "accuracy", "forget")
    assert found.verdict == "inconclusive"
    assert "--retrained or --holdout" in found.reason
    unseen = {**before, "holdout": classifier([2.0] * 200, [False] * 200)}
    measured = {"original": unseen, "unlearned": unseen}
    assert one(measured, Records(200), "accuracy", "forget").verdict == "fail"


def test_lost_utility_fails() -> None:
    kept = classifier([0.1] * 400, [True] * 400)
    lost = classifier([3.0] * 400, [False] * 200 + [True] * 200)
    gone = classifier([5.0] * 400, [False] * 400)
    measured: Measurements = {
        "original": {"forget": kept, "retain": kept},
        "unlearned": {"forget": gone, "retain": lost},
    }
    found = findings(measured, Classes((3,), ("cat",)))
    assert [f.subset for f in found if f.verdict == "fail"] == ["retain"]
    assert overall(tuple(found))[0] == "not forgotten"


def test_extraction_is_held_against_the_retrained_model() -> None:
    known, unknown = [[True] * 10] * 50, [[True] * 5 + [False] * 5] * 50
    target = Records(50)
    for after, verdict in ((unknown, "pass"), (known, "fail")):
        measured: Measurements = {
            "original": {"forget": text(known, 0.01)},
            "unlearned": {"forget": text(after, 2.0)},
            "retrained": {"forget": text(unknown, 2.0)},
        }
        found = one(measured, target, "extraction_strength", "forget")
        assert found.verdict == verdict
        assert found.original is not None
        assert found.original.value == 1.0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_fails_and_is_counted(broken: float) -> None:
    before = {"forget": classifier([0.1] * 20, [True] * 20)}
    after = {"forget": classifier([broken] * 3 + [4.0] * 17, [False] * 20)}
    measured: Measurements = {"original": before, "unlearned": after, "retrained": before}
    found = one(measured, Classes((3,), ("cat",)), "loss", "forget")
    assert found.verdict == "fail"
    assert "3 of 20" in found.reason
    assert found.unlearned is None
    auc = one(measured, Classes((3,), ("cat",)), "membership_auc_against_retrained", "forget")
    assert auc.unlearned is not None
    assert auc.unlearned.value == 0.0
