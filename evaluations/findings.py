"""From measurements to findings: each metric on each set, with its rule and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from unlearn.attacks.membership.loss import loss_score
from unlearn.attacks.signals import Signals
from unlearn.evaluations import criteria
from unlearn.evaluations.criteria import Decision
from unlearn.evaluations.memorization import exact_memorization, extraction_strength
from unlearn.evaluations.schema import CHECKPOINTS, Finding, Interval, Value
from unlearn.evaluations.statistics import Bounds, auc, auc_interval, mean_interval
from unlearn.interface import Classes, Target
from unlearn.plan import SetName
from unlearn.run import Role

Array = npt.NDArray[np.float64]
Better = Literal["lower", "higher", "closer_to_retrained"]


@dataclass(frozen=True)
class Measured:
    """What one model showed on one set; ``answers`` are a language model's, for the first ones."""

    signals: Signals
    rouge: Array | None
    is_text: bool


Measurements = Mapping[Role, Mapping[SetName, Measured]]


@dataclass(frozen=True)
class Metric:
    """A per-example number; ``values`` is None where it does not apply."""

    name: str
    title: str
    unit: str
    forget_better: Better
    values: Callable[[Measured], Array | None]
    bounded: bool = True


def _extraction(measured: Measured) -> Array | None:
    if not measured.is_text:
        return None
    hits = measured.signals.hits
    return np.array([extraction_strength(np.array(h, int), np.ones(len(h), int)) for h in hits])


def _exact(measured: Measured) -> Array | None:
    if not measured.is_text:
        return None
    hits = measured.signals.hits
    return np.array([exact_memorization(np.array(h, int), np.ones(len(h), int)) for h in hits])


def _accuracy(measured: Measured) -> Array | None:
    if measured.is_text:
        return None
    return np.array([float(h[0]) for h in measured.signals.hits])


METRICS = (
    Metric("extraction_strength", "Extraction strength", "share of the answer", "lower",
           _extraction),
    Metric("exact_memorization", "Exact memorization", "share of tokens", "closer_to_retrained",
           _exact),
    Metric("rouge_l_recall", "ROUGE-L recall of the greedy answer", "share of words",
           "closer_to_retrained", lambda m: m.rouge),
    Metric("accuracy", "Accuracy", "share of records", "lower", _accuracy),
    Metric("loss", "Loss", "nats per unit", "closer_to_retrained", lambda m: m.signals.loss(),
           bounded=False),
)  # fmt: skip


def findings(measured: Measurements, target: Target) -> list[Finding]:
    """Every metric on every measured set, then membership."""
    found = []
    for subset in measured["unlearned"]:
        for metric in METRICS:
            values = {role: _values(measured, role, subset, metric) for role in CHECKPOINTS}
            if (after := values["unlearned"]) is None:
                continue
            decision = _decide(metric, subset, values, measured, target)
            found.append(
                Finding(
                    name=metric.name,
                    title=metric.title,
                    subset=subset,
                    unit=metric.unit,
                    better=_better(metric, subset),
                    n=len(after),
                    original=_value(values["original"], metric.bounded),
                    unlearned=_value(after, metric.bounded),
                    retrained=_value(values["retrained"], metric.bounded),
                    **_decided(decision),
                )
            )
    return [*found, *_membership(measured, target)]


def _values(measured: Measurements, role: Role, subset: SetName, metric: Metric) -> Array | None:
    found = measured.get(role, {}).get(subset)
    return metric.values(found) if found else None


def _decide(
    metric: Metric,
    subset: SetName,
    values: Mapping[Role, Array | None],
    measured: Measurements,
    target: Target,
) -> Decision | None:
    """The rule for one metric on one set; None: it is reported for information."""
    before, after, retrained = (values[role] for role in CHECKPOINTS)
    if before is None or after is None:
        return None
    if broken := int((~np.isfinite(after)).sum()):
        reason = f"It is not finite on {broken} of {len(after)} records: the model is damaged."
        return Decision("finite", "fail", reason)
    if subset in ("forget", "holdout_forget"):
        if metric.name not in ("extraction_strength", "accuracy"):
            return None
        if retrained is not None:
            return criteria.at_most_above(after, retrained, "the retrained model", paired=True)
        if isinstance(target, Classes):
            return criteria.at_most(after, criteria.FORGET_MARGIN)
        never_seen = _values(measured, "original", "holdout", metric)
        if never_seen is None:
            return criteria.NO_REFERENCE
        return criteria.at_most_above(after, never_seen, "the holdout", paired=False)
    if metric.name in ("extraction_strength", "rouge_l_recall") and subset == "retain":
        return criteria.at_least_share(after, before)
    if metric.name == "accuracy":
        return criteria.at_most_below(after, before)
    return None


def _membership(measured: Measurements, target: Target) -> list[Finding]:
    """Loss-based membership, against the retrained model and against the holdout."""
    lowest = np.finfo(np.float64).min  # a loss that is not finite is as unlike a member as can be
    scores = {
        role: {
            name: np.nan_to_num(loss_score(m.signals.nll, m.signals.units), nan=lowest)
            for name, m in sets.items()
        }
        for role, sets in measured.items()
    }
    found = []
    if "retrained" in scores:
        reference = scores["retrained"]["forget"]
        found.append(
            Finding(
                name="membership_auc_against_retrained",
                title="Loss-based membership AUC, forget records on this model against the "
                "same records on the retrained model",
                subset="forget",
                better="closer_to_retrained",
                n=len(reference),
                original=_auc_value(scores["original"]["forget"], reference),
                unlearned=_auc_value(scores["unlearned"]["forget"], reference),
                retrained=Value(value=0.5),
                **_decided(_near(scores["unlearned"]["forget"], reference, None)),
            )
        )
    same: SetName = "holdout_forget" if isinstance(target, Classes) else "holdout"
    if same in scores["unlearned"]:
        aucs = {role: _auc_value(sets["forget"], sets[same]) for role, sets in scores.items()}
        after = scores["unlearned"]
        exact = scores.get("retrained")
        never_saw = (exact["forget"], exact[same]) if exact else None
        found.append(
            Finding(
                name="membership_auc",
                title="Loss-based membership AUC, forget records against the holdout",
                subset="forget",
                better="closer_to_retrained",
                n=len(after["forget"]) + len(after[same]),
                original=aucs["original"],
                unlearned=aucs["unlearned"],
                retrained=aucs.get("retrained"),
                **_decided(_near(after["forget"], after[same], never_saw)),
            )
        )
    return found


def _near(members: Array, nonmembers: Array, exact: tuple[Array, Array] | None) -> Decision:
    """An AUC held against the retrained model's, where there is one, else against one half."""
    centre, name, around = 0.5, "one half", Bounds(0.5, 0.5)
    if exact is not None:
        centre, name = auc(*exact), "the retrained model's"
        around = auc_interval(*exact, criteria.LEVEL)
    ours = auc_interval(members, nonmembers, criteria.LEVEL)
    return criteria.auc_near(
        criteria.difference(auc(members, nonmembers), ours, centre, around), name
    )


def overall(findings: tuple[Finding, ...]) -> tuple[Any, str]:
    """The verdict over all findings, and what decided it."""
    by = {
        verdict: [f for f in findings if f.verdict == verdict]
        for verdict in ("pass", "fail", "inconclusive")
    }
    if by["fail"]:
        return "not forgotten", _sentence("Failed", by["fail"])
    if by["inconclusive"]:
        return "inconclusive", _sentence("Undecided", by["inconclusive"])
    if not by["pass"]:
        return "inconclusive", "No check had a reference to be held against."
    return "forgotten", f"All {len(by['pass'])} checks of this audit passed."


def _sentence(word: str, findings: list[Finding]) -> str:
    named = [f"{f.title.split(',')[0]} on the {f.subset.replace('_', ' ')} set" for f in findings]
    return f"{word}: {'; '.join(dict.fromkeys(named))}."


def _better(metric: Metric, subset: SetName) -> Better:
    if subset in ("forget", "holdout_forget"):
        return metric.forget_better
    return "lower" if metric.name == "loss" else "higher"


def _value(values: Array | None, bounded: bool) -> Value | None:
    if values is None or not np.isfinite(values).all():
        return None
    low, high = mean_interval(values, bounds=(0.0, 1.0) if bounded else None)
    return Value(value=float(values.mean()), interval=Interval(low=low, high=high))


def _auc_value(members: Array, nonmembers: Array) -> Value:
    low, high = auc_interval(members, nonmembers)
    return Value(value=auc(members, nonmembers), interval=Interval(low=low, high=high))


def _decided(decision: Decision | None) -> dict[str, Any]:
    if decision is None:
        return {"verdict": "info"}
    return {
        "criterion": decision.criterion,
        "verdict": decision.verdict,
        "reason": decision.reason,
    }
