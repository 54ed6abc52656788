"""What a memorization audit found, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unlearn.evaluations import plots
from unlearn.evaluations.extractable import Estimate, Row
from unlearn.evaluations.memorization_schema import Memorization
from unlearn.evaluations.page import harmless, rendered

FEW = 10  # texts below which a share says little
Series = dict[str, list[Estimate | None]]


def render(report: Memorization) -> str:
    """The report as one self-contained page: no script, no network, every text escaped."""
    found = report.extractable
    return rendered(
        "memorization.html.j2",
        {"copies": copies_of},
        report=report,
        headline=next(row for row in found.by_prefix if row.prefix == found.prefix),
        figures=_figures(report),
        few=FEW,
    )


def copies_of(row: Row) -> str:
    """How often the texts of a row occur.

    >>> copies_of(Row(8, 3, 4, None))
    '3\N{EN DASH}4'
    """
    if row.most is None:
        return "any"
    return str(row.least) if row.least == row.most else f"{row.least}\N{EN DASH}{row.most}"


def _figures(report: Memorization) -> dict[str, Any]:
    """The drawings, by the section they belong to; none where there are no two points."""
    found, headline = report.extractable, report.extractable.prefix
    groups = [row for row in found.by_copies if row.prefix == headline]
    series: Series = {"data": [row.share for row in found.by_prefix]}
    if report.unseen is not None:
        series["holdout, never seen"] = [row.share for row in report.unseen.by_prefix]
    steps = [point.step for point in report.retention]
    remembered: Series = {
        "recognised among unseen texts": [point.foils for point in report.retention],
        "recognised beside minimal edits": [point.edits for point in report.retention],
        "recalled exactly": [point.exact for point in report.retention],
        "ROUGE-L of what is recalled": [point.rouge for point in report.retention],
    }
    return {
        "prefix": _curves([r.prefix for r in found.by_prefix], series, "tokens of the beginning",
                          "Extractable share by length of the prefix"),
        "copies": _curves([copies_of(r) for r in groups], {"data": [r.share for r in groups]},
                          "copies in the data", "Extractable share by number of copies"),
        "retention": _curves(steps, remembered, "training steps on other texts",
                             "What is recognised and recalled after training on other texts"),
    }  # fmt: skip


def _curves(
    places: Sequence[Any], series: Series, across: str, label: str
) -> dict[str, Any] | None:
    """Shares with their intervals; None where there is nothing to join."""
    known = {
        name: [(e.value, e.low, e.high) if e else None for e in values]
        for name, values in series.items()
        if any(values)
    }
    if len(places) < 2 or not known:
        return None
    drawing = plots.shares(places, known, across, label)
    legend = list(zip(known, plots.CURVES, strict=False))
    return {"title": label, "svg": harmless(drawing.svg), "legend": legend}
