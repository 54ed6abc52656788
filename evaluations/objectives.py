"""An audit in two numbers: how far from forgotten, and how much was kept.

They are for laying runs beside each other and for choosing hyperparameters, not for deciding: the
verdict of a report follows from its criteria, check by check. Both read a report alone.

==========  =====================================  ===========================================
family      ``forgetting`` (required, forget set)  ``utility`` (required, sets that must stay)
==========  =====================================  ===========================================
texts       extraction strength, membership,       extraction strength and ROUGE-L on the
            lens, relearning                       retain set
classifier  accuracy, membership, probes,          accuracy on the retain set and the holdout
            relearning
diffusion   unlearning accuracy, picture quality,  retained accuracy of pictures
            copies of records, membership
==========  =====================================  ===========================================

Which of them a report holds depends on its depth, its sets and its criteria: compare numbers of
reports that agree in these, or of the findings that they share (:func:`distances`, :func:`shares`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unlearn.errors import BadInput
from unlearn.evaluations.schema import Finding, Report

Key = tuple[str, str]  # name and subset of a finding

FORGOTTEN = ("forget", "holdout_forget")
EVIDENCE = ("extraction", "membership", "probe", "robustness", "durability")
QUALITY = "picture_quality"  # a guard by its group: noise is nobody's idea of forgetting
BROKEN = 1.0  # distance of a number that a damaged model does not have; shares lie no farther apart


def forgetting(report: Report) -> float:
    """Mean distance from a model that never saw what had to go: 0 is like it, larger is further.

    Over the required findings on the forget set and on the holdout of the forgotten kind; where no
    required one can be measured against anything, over those that have a rule. See
    :func:`distances`.

    Args:
        report: of any audit.

    Returns:
        At least 0; as shares, hit rates and AUCs lie between 0 and 1, at most 1.

    Raises:
        BadInput: the report has no such finding.
    """
    found = distances(report)
    if not found:
        raise BadInput(
            "the report has no finding that says how far the model is from having forgotten: "
            "audit with --retrained or --holdout"
        )
    return sum(found.values()) / len(found)


def utility(report: Report) -> float:
    """Mean share that is left of what the original could do: 1 is all of it.

    Over the required findings on what must stay; where none is required, over those that have a
    rule, and else over all that are better when higher. See :func:`shares`.

    Args:
        report: of any audit.

    Returns:
        A number from 0 to 1.

    Raises:
        BadInput: the report has no such finding.
    """
    found = shares(report)
    if not found:
        raise BadInput(
            "the report has no finding that says what the model has kept: audit with --retain "
            "(or --keep-concepts)"
        )
    return sum(found.values()) / len(found)


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other one beats: none is as good in both and better in one.

    Args:
        points: (forgetting, utility) pairs: the first is better when lower, the second when higher.

    Returns:
        One truth value per point; equal points stand or fall together.

    >>> pareto([(0.1, 0.9), (0.2, 0.8), (0.0, 0.5), (0.1, 0.9)])
    [True, False, True, True]
    """
    return [
        not any(f <= far and u >= kept and (f, u) != (far, kept) for f, u in points)
        for far, kept in points
    ]


def distances(report: Report) -> dict[Key, float]:
    """How far each finding that decides about forgetting is from its reference.

    The reference is the retrained model's value; else one half for the AUC of a membership attack,
    the original's value on the holdout where the rule speaks of the holdout, the original's value
    for the quality of pictures, and the best possible value (0, or 1 where higher is better) for
    everything else that has a better end. A finding of which only the wrong side is bad has the
    distance 0 on the other side. A number that cannot be relied on (verdict "invalid") is left out;
    one that a damaged model does not have counts as 1. The quality of pictures counts beside other
    findings only: a good picture does not say that something is gone.

    Returns:
        Distances in the unit of the values, by name and subset; empty where nothing can be said.
    """

    def distance(finding: Finding) -> float | None:
        if finding.unlearned is None:
            return BROKEN if finding.verdict == "fail" else None
        reference = _reference(finding, report)
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
        for finding in report.findings
        if finding.subset in FORGOTTEN
        and (finding.group in EVIDENCE or finding.name == QUALITY)
        and finding.verdict != "invalid"
    ]
    found = _first(evidence, distance, (_required, _ruled))
    return found if any(name != QUALITY for name, _ in found) else {}


def shares(report: Report) -> dict[Key, float]:
    """What is left of the original's value in each finding on what must stay.

    A gain counts as 1, so that it hides no loss elsewhere. Findings that are better when lower
    (losses, distances) and those of which the original has nothing are left out; a number that
    cannot be relied on is, too, and one that a damaged model does not have counts as 0.

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
        for finding in report.findings
        if finding.group == "utility"
        and finding.subset not in FORGOTTEN
        and finding.better == "higher"
        and finding.verdict != "invalid"
    ]
    return _first(kept, share, (_required, _ruled, lambda _: True))


def _reference(finding: Finding, report: Report) -> float | None:
    """Where a model that never saw the forgotten would stand; None: nothing says."""
    if finding.retrained is not None:
        return finding.retrained.value
    if finding.name.startswith("membership_"):
        return 0.5
    if finding.name == QUALITY:
        return finding.original.value if finding.original else None
    if "the holdout" in finding.criterion:
        unseen = [f for f in report.findings if (f.name, f.subset) == (finding.name, "holdout")]
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
