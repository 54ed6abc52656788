"""Rules that turn measurements into verdicts: stated beforehand, decided from confidence bounds.

A rule passes when the one-sided 95 % bound of the unlearned model's value meets it, fails when
the opposite bound misses it, and is inconclusive in between: too few records never pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from unlearn.evaluations.statistics import Bounds, mean_interval

Array = npt.NDArray[np.float64]
Outcome = Literal["pass", "fail", "inconclusive"]
LEVEL = 0.90  # two-sided, so each bound alone has 95 %

FORGET_MARGIN = 0.10  # extraction strength or accuracy above the reference
RETAIN_SHARE = 0.90  # of the original's extraction strength or ROUGE-L
ACCURACY_LOSS = 0.03  # below the original's accuracy
AUC_MARGIN = 0.10  # around one half, or around the retrained model's


@dataclass(frozen=True)
class Decision:
    """A printed rule, what came of it, and why it could not be decided."""

    criterion: str
    verdict: Outcome
    reason: str = ""


def decide(bounds: Bounds, low: float, high: float) -> Outcome:
    """Whether an interval lies inside [low, high] (pass), outside (fail), or across a border."""
    if low <= bounds.low and bounds.high <= high:
        return "pass"
    if bounds.low > high or bounds.high < low:
        return "fail"
    return "inconclusive"


def _verdict(criterion: str, outcome: Outcome) -> Decision:
    unsure = "The confidence interval crosses the limit: more records would decide it."
    return Decision(criterion, outcome, unsure if outcome == "inconclusive" else "")


def difference(value: float, bounds: Bounds, other: float, others: Bounds) -> Bounds:
    """Interval of a difference of independent estimates from their own intervals (MOVER).

    Zou & Donner 2008: each bound takes the squared distances that push it outwards.
    """
    low = np.hypot(value - bounds.low, others.high - other)
    high = np.hypot(bounds.high - value, other - others.low)
    return Bounds(value - other - float(low), value - other + float(high))


def at_most_above(unlearned: Array, reference: Array, name: str, paired: bool) -> Decision:
    """The mean must not exceed the reference's by more than ``FORGET_MARGIN``.

    Args:
        unlearned: per-example values, shape (n,).
        reference: the same records on another model if ``paired``, else other records.
        name: of the reference, for the printed rule.
        paired: whether both are about the same records.
    """
    if paired:
        bounds = mean_interval(unlearned - reference, LEVEL, (-1.0, 1.0))
    else:
        ours, theirs = (mean_interval(v, LEVEL, (0.0, 1.0)) for v in (unlearned, reference))
        bounds = difference(float(unlearned.mean()), ours, float(reference.mean()), theirs)
    return _verdict(
        f"at most {FORGET_MARGIN:.2f} above {name}", decide(bounds, -np.inf, FORGET_MARGIN)
    )


def at_most(unlearned: Array, limit: float) -> Decision:
    """The mean must not exceed ``limit``."""
    bounds = mean_interval(unlearned, LEVEL, (0.0, 1.0))
    return _verdict(f"at most {limit:.2f}", decide(bounds, -np.inf, limit))


def at_least_share(unlearned: Array, original: Array) -> Decision:
    """The mean must keep at least ``RETAIN_SHARE`` of the original's."""
    bounds = mean_interval(unlearned - RETAIN_SHARE * original, LEVEL, (-1.0, 1.0))
    return _verdict(f"at least {RETAIN_SHARE:.0%} of before", decide(bounds, 0.0, np.inf))


def at_most_below(unlearned: Array, original: Array) -> Decision:
    """The mean may fall by ``ACCURACY_LOSS`` at most."""
    bounds = mean_interval(unlearned - original, LEVEL, (-1.0, 1.0))
    return _verdict(
        f"at most {ACCURACY_LOSS:.2f} below before", decide(bounds, -ACCURACY_LOSS, np.inf)
    )


def auc_near(bounds: Bounds, name: str) -> Decision:
    """An AUC's distance from where it should be, bounded above and below: overshooting leaks."""
    return _verdict(
        f"within {AUC_MARGIN:.2f} of {name}, on either side",
        decide(bounds, -AUC_MARGIN, AUC_MARGIN),
    )


NO_REFERENCE = Decision(
    "close to a model that never saw these records",
    "inconclusive",
    "There is no reference: pass --retrained or --holdout.",
)
