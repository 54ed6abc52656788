"""Several audits side by side: who is better where, and where no difference can be shown.

A number is compared with the best of its row, never with the row's mean or a neighbour's. Whether
two differ follows from the intervals that the reports hold (Zou and Donner 2008, the MOVER), as if
the runs had been measured on records of their own; they share their records, so a difference that
stands here stands.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from unlearn.errors import BadInput
from unlearn.evaluations import objectives
from unlearn.evaluations.report import read
from unlearn.evaluations.schema import (
    GROUPS,
    Finding,
    Group,
    Hyperparameter,
    Report,
    Subset,
    Value,
    Verdict,
)
from unlearn.evaluations.statistics import Bounds, difference_interval

Key = tuple[str, Subset]
Mark = Literal["best", "level", "behind", ""]
ALIKE = 1e-3  # relative: the same model on the same records, perhaps on another machine


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Compared(_Record):
    """One run or audit.

    Attributes:
        name: of its directory, with as many folders before it as tell it from the others.
        directory: where it is.
        method: empty where it is unknown.
        settings: of the method, those that its user gave.
        verdict: of its report.
        reason: what decided that.
        created: when it was written.
        seconds: that the method took; None for an audit.
        forgetting: distance from having forgotten, over the findings that all runs share; None
            where they share none. See :func:`unlearn.evaluations.objectives.distances`.
        utility: share kept of what the original could, in the same way.
        efficient: whether no other run is as good in both and better in one; None without both.
    """

    name: str
    directory: str
    method: str
    settings: tuple[Hyperparameter, ...]
    verdict: str
    reason: str
    created: str
    seconds: float | None
    forgetting: float | None = None
    utility: float | None = None
    efficient: bool | None = None


class Cell(_Record):
    """What one run says in one row.

    Attributes:
        value: of the unlearned model; None if not measured.
        verdict: of the finding.
        mark: "best" where every other run of the row is clearly worse; "level" where no difference
            from the best can be shown; "behind" where the best is clearly better; empty where this
            cannot be said.
    """

    value: Value | None
    verdict: Verdict
    mark: Mark = ""


class Row(_Record):
    """One finding in all runs.

    Attributes:
        name: key of the finding.
        title: for people.
        subset: the records.
        where: the same, for people.
        unit: of the values.
        better: which way is better.
        group: what it is evidence of.
        required: whether the verdict of any run hangs on it.
        criterion: the rule, where all runs that have one agree.
        original: of the checkpoint all runs came from; None where there is no such value.
        retrained: of the reference they share; likewise.
        cells: one per run; None where its report does not have the finding.
    """

    name: str
    title: str
    subset: Subset
    where: str
    unit: str
    better: str
    group: Group
    required: bool
    criterion: str
    original: Value | None
    retrained: Value | None
    cells: tuple[Cell | None, ...]


class Comparison(_Record):
    """Runs side by side.

    Attributes:
        runs: in the order they were named.
        rows: the findings of any of them, group by group.
        warnings: why some of their numbers cannot be compared, one sentence each.
        forgetting_of: the findings (name, subset) that ``forgetting`` is the mean over.
        utility_of: those of ``utility``.
    """

    runs: tuple[Compared, ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    forgetting_of: tuple[tuple[str, str], ...]
    utility_of: tuple[tuple[str, str], ...]


def compare(directories: Sequence[str | Path]) -> Comparison:
    """Lay the findings of several run or audit directories side by side.

    Args:
        directories: at least two, each with a report.json.

    Returns:
        The comparison; its warnings say what the runs do not have in common.

    Raises:
        BadInput: fewer than two, one twice, a directory that holds no report, or reports without
            any finding in common.
    """
    places = located(directories)
    reports = [read(place / "report.json") for place in places]
    found = [{(f.name, f.subset): f for f in report.findings} for report in reports]
    measured = [{key for key, f in each.items() if f.unlearned} for each in found]
    names = unique_names(places)
    if not set.intersection(*measured):
        raise BadInput(
            f"{', '.join(names)} have no measured finding in common: compare runs of one model "
            "family, audited alike"
        )
    shared = _Shared(names, reports, [_facts(place) for place in places])
    keys = list(dict.fromkeys(key for each in found for key in each))
    mixed = {key for key in keys if _mixed([each.get(key) for each in found])}
    forgotten = _mean_over_shared(
        [objectives.distances(report.findings) for report in reports], mixed
    )
    kept = _mean_over_shared([objectives.shares(report.findings) for report in reports])
    efficient: list[bool] | list[None] = [None] * len(reports)
    if forgotten.means and kept.means:
        efficient = objectives.pareto(list(zip(forgotten.means, kept.means, strict=True)))
    runs = tuple(
        Compared(
            name=names[i],
            directory=str(places[i]),
            method=report.method,
            settings=tuple(h for h in report.hyperparameters if h.given),
            verdict=report.verdict,
            reason=report.verdict_reason,
            created=report.created,
            seconds=report.cost.seconds.get("unlearn"),
            forgetting=forgotten.means[i] if forgotten.means else None,
            utility=kept.means[i] if kept.means else None,
            efficient=efficient[i],
        )
        for i, report in enumerate(reports)
    )
    rows = [_row([each.get(key) for each in found], shared) for key in keys]
    return Comparison(
        runs=runs,
        rows=tuple(row for group in GROUPS for row in rows if row.group == group),
        warnings=tuple(shared.warnings()),
        forgetting_of=forgotten.keys,
        utility_of=kept.keys,
    )


def located(directories: Sequence[str | Path]) -> list[Path]:
    """The directories, each of which is there and has a report.json.

    Raises:
        BadInput: one is not or has none; fewer than two; one twice.
    """
    places = [Path(directory) for directory in directories]
    for place in places:
        if not (place / "report.json").is_file():
            what = "has no report.json" if place.is_dir() else "is no directory"
            raise BadInput(f"{place} {what}: pass run or audit directories made with an audit")
    if len(places) < 2:
        raise BadInput("a comparison needs at least two run or audit directories")
    if len({place.resolve() for place in places}) < len(places):
        raise BadInput("a directory is named twice: name every run once")
    return places


def unique_names(places: Sequence[Path]) -> list[str]:
    """The last folder of each path, with as many before it as tell them apart.

    >>> unique_names([Path("a/run"), Path("b/run"), Path("b/other")])
    ['a/run', 'b/run', 'other']
    """
    parts = [place.resolve().parts for place in places]

    def name(i: int) -> str:
        for length in range(1, len(parts[i])):
            mine = parts[i][-length:]
            if not any(j != i and other[-length:] == mine for j, other in enumerate(parts)):
                return "/".join(mine)
        return str(places[i].resolve())

    return [name(i) for i in range(len(parts))]


def _facts(place: Path) -> str | None:
    """Fingerprint of the retrained reference, which a report does not hold; None: unknown."""
    for file, path in (("run.json", ("retrained",)), ("audit.json", ("fingerprints", "retrained"))):
        try:
            value = json.loads((place / file).read_text(encoding="utf-8"))
            for key in path:
                value = value.get(key)
        except (OSError, ValueError, AttributeError):
            continue
        return value if isinstance(value, str) else None
    return None


class _Means(_Record):
    means: tuple[float, ...] = ()
    keys: tuple[tuple[str, str], ...] = ()


def _mean_over_shared(
    numbers: Sequence[dict[tuple[str, str], float]], without: Container[tuple[str, str]] = ()
) -> _Means:
    """The mean of each mapping, over the keys that all of them have, but for some."""
    keys = tuple(k for k in numbers[0] if k not in without and all(k in each for each in numbers))
    if not keys:
        return _Means()
    return _Means(means=tuple(sum(n[k] for k in keys) / len(keys) for n in numbers), keys=keys)


class _Shared:
    """What runs have in common, as far as their reports tell."""

    def __init__(
        self, names: Sequence[str], reports: Sequence[Report], retrained: Sequence[str | None]
    ) -> None:
        self.names, self.reports, self.references = names, reports, retrained
        self.targets = [same_records(reports[0], report, "forget") for report in reports]
        alike = False not in self.targets
        self.original = alike and len({report.checkpoint_in for report in reports}) == 1
        known = {reference for reference in retrained if reference is not None}
        self.held = [
            fingerprint is not None or any(f.retrained for f in report.findings)
            for fingerprint, report in zip(retrained, reports, strict=True)
        ]  # against a retrained model
        self.retrained = alike and len(known) <= 1 and len(set(self.held)) == 1

    def warnings(self) -> list[str]:
        """What they do not have in common."""
        found = []
        if others := [n for n, same in zip(self.names, self.targets, strict=True) if same is False]:
            found.append(
                f"{', '.join(others)} had other records or concepts to forget than "
                f"{self.names[0]}: numbers on the forget set cannot be compared."
            )
        elif None in self.targets:
            found.append(
                "Whether all had the same records to forget cannot be told from their reports."
            )
        for what, values, consequence in (
            ("different checkpoints", [r.checkpoint_in[:16] for r in self.reports],
             "what each of them lost or kept is not held against the same model"),
            ("audits of different depth", [r.depth for r in self.reports],
             "rows that only some of them have are empty in the others"),
            ("different criteria", [r.criteria_digest[:16] for r in self.reports],
             "verdicts follow from different rules"),
        ):  # fmt: skip
            if kinds := self._differing(values):
                found.append(f"These are runs with {what} ({kinds}): {consequence}.")
        for name in ("retain", "holdout", "holdout_forget"):
            sizes = [next((s.n for s in r.sets if s.name == name), 0) for r in self.reports]
            if kinds := self._differing([f"{n:,} records" for n in sizes]):
                found.append(f"The {name.replace('_', ' ')} sets differ ({kinds}).")
        if len(set(self.held)) > 1:
            without = [n for n, held in zip(self.names, self.held, strict=True) if not held]
            found.append(
                f"{', '.join(without)} had no retrained model to be held against, and others had "
                "one: what is measured from it is marked in no row and part of no mean."
            )
        elif not self.retrained and not others:
            found.append("They were held against different retrained models.")
        return found

    def _differing(self, values: Sequence[str]) -> str:
        """Who has which; empty where all have the same."""
        if len(set(values)) == 1:
            return ""
        pairs = list(zip(self.names, values, strict=True))
        return "; ".join(
            f"{value or 'not stated'}: {', '.join(n for n, v in pairs if v == value)}"
            for value in dict.fromkeys(values)
        )


def same_records(one: Report, other: Report, subset: Subset) -> bool | None:
    """Whether two reports are about the same records of a set; None where they do not tell.

    Fingerprints of sets are keyed, and every lineage has a key of its own: only equal ones tell
    something. Where they differ, the losses of the original model tell: the same model has the
    same losses on the same records, up to ``ALIKE``.
    """
    mine, theirs = ({s.name: s for s in r.sets}.get(subset) for r in (one, other))
    if subset == "forget":
        asked = [r.request.get("to be forgotten") for r in (one, other)]
        if None not in asked and asked[0] != asked[1]:
            return False
        if None not in asked and mine and theirs and mine.n == theirs.n == 0:
            return True
    if mine is None or theirs is None:
        return None
    if mine.n != theirs.n or mine.fingerprint == theirs.fingerprint:
        return mine.n == theirs.n
    if one.checkpoint_in != other.checkpoint_in:
        return None
    a, b = _original_losses(one, subset), _original_losses(other, subset)
    if a is None or b is None:
        return None
    return a.shape == b.shape and np.allclose(a, b, rtol=ALIKE, atol=ALIKE, equal_nan=True)


def _original_losses(report: Report, subset: Subset) -> npt.NDArray[np.float64] | None:
    """Of the original model on a set, ascending; None where the report does not have them."""
    for found in report.distributions:
        if found.subset == subset and found.original:
            return np.sort([math.nan if v is None else v for v in found.original])
    return None


def _mixed(findings: Sequence[Finding | None]) -> bool:
    """Whether some values of a row are measured from a retrained model, and others are not."""
    held = {finding.retrained is not None for finding in findings if finding and finding.unlearned}
    return len(held) > 1


def _row(findings: Sequence[Finding | None], shared: _Shared) -> Row:
    known = [finding for finding in findings if finding is not None]
    first = known[0]
    rules = {finding.criterion for finding in known if finding.criterion}
    marks = _marks(findings)
    return Row(
        name=first.name,
        title=first.title,
        subset=first.subset,
        where=first.where,
        unit=first.unit,
        better=first.better,
        group=first.group,
        required=any(finding.required for finding in known),
        criterion=rules.pop() if len(rules) == 1 else "",
        original=_agreed([f.original for f in known]) if shared.original else None,
        retrained=_agreed([f.retrained for f in known]) if shared.retrained else None,
        cells=tuple(
            Cell(value=f.unlearned, verdict=f.verdict, mark=mark) if f is not None else None
            for f, mark in zip(findings, marks, strict=True)
        ),
    )


def _agreed(values: Sequence[Value | None]) -> Value | None:
    """The value all reports give that give one; None where they disagree."""
    known = [value for value in values if value is not None]
    if not known or not all(
        math.isclose(value.value, known[0].value, rel_tol=ALIKE, abs_tol=ALIKE) for value in known
    ):
        return None
    return known[0]


def _marks(findings: Sequence[Finding | None]) -> list[Mark]:
    """Who is best in a row, who cannot be told from the best, who is clearly behind."""
    marks: list[Mark] = [""] * len(findings)
    first = next(finding for finding in findings if finding is not None)
    if first.better == "closer_to_retrained" and _mixed(findings):
        return marks  # distances from different things
    worse = {i: w for i, f in enumerate(findings) if f and (w := badness(f)) is not None}
    values = [f.unlearned for i, f in enumerate(findings) if f and i in worse]
    levels = {value.interval.level for value in values if value and value.interval}
    if len(worse) < 2 or len(levels) > 1:
        return marks
    best = min(worse, key=lambda i: worse[i][0])
    for i, (value, bounds) in worse.items():
        apart = difference_interval(value, bounds, *worse[best])
        marks[i] = "behind" if apart.low > 0 else "level"
    if [marks[i] for i in worse].count("level") == 1:
        marks[best] = "best"
    return marks


def badness(finding: Finding) -> tuple[float, Bounds] | None:
    """A finding turned so that lower is better, with its interval.

    What is best close to the retrained model counts by its distance from that (for membership
    attacks without one, from one half): the reference as a fixed number, the interval as wide as
    the value's own. None without a number to rely on, an interval or a reference.
    """
    value = finding.unlearned
    if value is None or value.interval is None or finding.verdict == "invalid":
        return None
    low, high = value.interval.low, value.interval.high
    if finding.better == "lower":
        return value.value, Bounds(low, high)
    if finding.better == "higher":
        return -value.value, Bounds(-high, -low)
    target = objectives.exact(finding)
    if target is None:
        return None
    if value.value >= target:
        return value.value - target, Bounds(low - target, high - target)
    return target - value.value, Bounds(target - high, target - low)
