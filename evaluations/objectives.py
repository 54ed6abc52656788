"""An audit in two numbers: how far from forgotten, and how much was kept.

They are for laying runs beside each other (`unlearn compare`) and for choosing hyperparameters
(`unlearn tune`), not for deciding: the verdict of a report follows from its criteria, check by
check. Both are plain means of what the findings hold, so they tell runs apart that have the same
verdict.

==========  =====================================  ===========================================
family      ``forgetting`` (required, forget set)  ``utility`` (required, sets that must stay)
==========  =====================================  ===========================================
texts       extraction strength, membership,       extraction strength and ROUGE-L on the
            lens, relearning                       retain set, answers about neighbours
classifier  accuracy, membership, probes,          accuracy on the retain set and the holdout
            relearning
diffusion   unlearning accuracy, picture quality,  retained accuracy of pictures
            copies of records, membership
==========  =====================================  ===========================================

Which of them there are depends on the depth of an audit, its sets and its criteria: compare numbers
of audits that agree in these, or of the findings that they share (:func:`distances`,
:func:`shares`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from unlearn.errors import MissingNeed
from unlearn.evaluations.schema import EVIDENCE, FORGOTTEN, Finding

Key = tuple[str, str]  # name and subset of a finding
Point = tuple[float, float]  # forgetting, better when lower, and utility, better when higher

QUALITY = "picture_quality"  # a guard by its group: noise is nobody's idea of forgetting
UNUSABLE = ("invalid", "not_run")
BROKEN = 1.0  # distance of a number that a damaged model does not have; shares lie no farther apart
ENOUGH = 0.95  # of the original's utility, which the best point keeps if any of the front does


@dataclass(frozen=True)
class Objectives:
    """What one run is worth.

    Attributes:
        forgetting: mean distance from a model that never saw what had to go, at least 0: 0 is like
            it. As shares, hit rates and AUCs lie between 0 and 1, so does this.
        utility: mean share that is left of what the original could do: 1 is all of it.
        parts: what they are means of, as "name.subset".
    """

    forgetting: float
    utility: float
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def point(self) -> Point:
        """Both numbers."""
        return self.forgetting, self.utility


def objectives(findings: Sequence[Finding]) -> Objectives:
    """The means of :func:`distances` and :func:`shares`.

    Args:
        findings: of one audit.

    Raises:
        MissingNeed: no finding says how far the model is from having forgotten, or what it kept.
    """
    away, kept = distances(findings), shares(findings)
    if not away:
        raise MissingNeed(
            "nothing says how a model that forgot would look: pass --retrained, a --holdout of the "
            "same kind or, for a model that draws, --data or a --classifier that knows the pictures"
        )
    if not kept:
        raise MissingNeed("nothing says what must stay: pass --retain, --data or --holdout")
    parts = {".".join(key): value for key, value in (away | kept).items()}
    means = [float(np.mean(list(found.values()))) for found in (away, kept)]
    return Objectives(means[0], means[1], parts)


def pareto(points: Sequence[Point]) -> list[bool]:
    """Which points no other one beats: none is as good in both and better in one.

    Returns:
        One truth value per point; equal points stand or fall together.

    >>> pareto([(0.1, 0.9), (0.2, 0.8), (0.0, 0.5), (0.1, 0.9)])
    [True, False, True, True]
    """
    return [
        not any(f <= far and u >= kept and (f, u) != (far, kept) for f, u in points)
        for far, kept in points
    ]


def best(points: Sequence[Point]) -> int:
    """The point to take: of the front, who forgets most and keeps enough; else the knee.

    Enough is ``ENOUGH`` of the original's utility. The knee is the point of the front that is
    nearest to its best corner, each number measured in its spread over the front.

    Args:
        points: at least one.

    Returns:
        Its position; of equals the first.

    >>> best([(0.6, 1.0), (0.4, 0.95), (0.1, 0.94)])
    1
    """
    front = [i for i, unbeaten in enumerate(pareto(points)) if unbeaten]
    if good := [i for i in front if points[i][1] >= ENOUGH]:
        return min(good, key=lambda i: points[i][0])
    badness = np.array([(points[i][0], -points[i][1]) for i in front])
    spread = np.ptp(badness, axis=0)
    scaled = (badness - badness.min(0)) / np.where(spread > 0, spread, 1.0)
    return front[int(np.argmin((scaled**2).sum(1)))]


def distances(findings: Sequence[Finding]) -> dict[Key, float]:
    """How far each finding that decides about forgetting is from its reference.

    They are the required findings on the forget set and on the holdout of the forgotten kind; where
    no required one can be measured against anything, those that have a rule.

    The reference is the retrained model's value; else one half for the AUC of a membership attack,
    the original's value on the holdout where the rule speaks of the holdout, and the best possible
    value (0, or 1 where higher is better) for everything else that has a better end. Pictures need
    be no better than those of the original, or of the retrained model if its are worse. A finding
    of which only the wrong side is bad has the distance 0 on the other side. A number that cannot
    be relied on (verdict "invalid") is left out; one that a damaged model does not have counts as
    1. The quality of pictures counts beside other findings only: a good picture does not say that
    something is gone.

    Returns:
        Distances in the unit of the values, by name and subset; empty where nothing can be said.
    """

    def distance(finding: Finding) -> float | None:
        if finding.unlearned is None:
            return BROKEN if finding.verdict == "fail" else None
        reference = _reference(finding, findings)
        if reference is None:
            return None
        above = finding.unlearned.value - reference
        if finding.better == "higher":
            return max(0.0, -above)
        if finding.better == "lower" or finding.criterion.startswith("at most"):
            return max(0.0, above)  # probes and relearning: less than the retrained is no harm
        return abs(above)

    evidence = [
        finding
        for finding in findings
        if finding.subset in FORGOTTEN
        and (finding.group in EVIDENCE or finding.name == QUALITY)
        and finding.verdict not in UNUSABLE
    ]
    found = _first(evidence, distance, (_required, _ruled))
    return found if any(name != QUALITY for name, _ in found) else {}


def shares(findings: Sequence[Finding]) -> dict[Key, float]:
    """What is left of the original's value in each finding on what must stay.

    They are the required findings; where none is required, those that have a rule, and else all
    that are better when higher. A gain counts as 1, so that it hides no loss elsewhere. Findings
    that are better when lower (losses, distances) and those of which the original has nothing are
    left out; a number that cannot be relied on is, too, and one that a damaged model does not have
    counts as 0.

    Returns:
        Shares from 0 to 1, by name and subset; empty where nothing can be said.
    """

    def share(finding: Finding) -> float | None:
        if finding.original is None or finding.original.value <= 0:
            return None
        if finding.unlearned is None:
            return 0.0 if finding.verdict == "fail" else None
        return min(1.0, max(0.0, finding.unlearned.value / finding.original.value))

    kept = [
        finding
        for finding in findings
        if finding.group == "utility"
        and finding.subset not in FORGOTTEN
        and finding.better == "higher"
        and finding.verdict not in UNUSABLE
    ]
    return _first(kept, share, (_required, _ruled, lambda _: True))


def exact(finding: Finding) -> float | None:
    """Its value for a model that never saw the forgotten: the retrained one, or a coin's AUC."""
    if finding.retrained is not None:
        return finding.retrained.value
    return 0.5 if finding.name.startswith("membership_") else None


def _reference(finding: Finding, findings: Sequence[Finding]) -> float | None:
    """Where a model that never saw the forgotten would stand; None: nothing says."""
    if finding.name == QUALITY:
        return min((v.value for v in (finding.original, finding.retrained) if v), default=None)
    if (value := exact(finding)) is not None:
        return value
    if "the holdout" in finding.criterion:
        unseen = [f for f in findings if (f.name, f.subset) == (finding.name, "holdout")]
        if unseen and unseen[0].original is not None:
            return unseen[0].original.value
    return {"lower": 0.0, "higher": 1.0}.get(finding.better)


def _required(finding: Finding) -> bool:
    return finding.required


def _ruled(finding: Finding) -> bool:
    return bool(finding.criterion)


def _first(
    findings: Sequence[Finding],
    number: Callable[[Finding], float | None],
    choices: Sequence[Callable[[Finding], bool]],
) -> dict[Key, float]:
    """The numbers of the findings of the first choice that leaves any."""
    for chosen in choices:
        found = {(f.name, f.subset): number(f) for f in findings if chosen(f)}
        known: dict[Key, float] = {k: value for k, value in found.items() if value is not None}
        if known:
            return known
    return {}
