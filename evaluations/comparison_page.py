"""Several audits side by side, as a page."""

from __future__ import annotations

from pathlib import Path

from unlearn.evaluations import plots
from unlearn.evaluations.comparison import Comparison
from unlearn.evaluations.page import harmless, rendered
from unlearn.evaluations.schema import BETTER, GROUPS, VERDICTS

SIGN = '<meta name="generator" content="unlearn compare">'  # tells these pages from other files


def render_html(comparison: Comparison) -> str:
    """The comparison as one self-contained page: no script, no network, the same bytes every time.

    Args:
        comparison: What to show. Every text in it is escaped.

    Returns:
        An HTML document.
    """
    titles = {
        (row.name, row.subset): f"{row.title} ({row.where.lower()})" for row in comparison.rows
    }
    chart = _chart(comparison)
    return rendered(
        "compare.html.j2",
        comparison=comparison,
        sign=harmless(SIGN),
        groups={
            group: [row for row in comparison.rows if row.group == group]
            for group in GROUPS
            if any(row.group == group for row in comparison.rows)
        },
        references=[
            name
            for name in ("original", "retrained")
            if any(getattr(row, name) for row in comparison.rows)
        ],
        levels=sorted(
            {
                cell.value.interval.level
                for row in comparison.rows
                for cell in row.cells
                if cell and cell.value and cell.value.interval
            }
        ),
        chart=chart and {"svg": harmless(chart.svg), "note": chart.note},
        over={
            "forgetting": [titles[key] for key in comparison.forgetting_of],  # type: ignore[index]
            "utility": [titles[key] for key in comparison.utility_of],  # type: ignore[index]
        },
        labels={"verdicts": VERDICTS, "better": BETTER, "groups": GROUPS},
    )


def is_page(path: Path) -> bool:
    """Whether a file is a page of this kind, and may be replaced by one."""
    return SIGN in path.read_text(encoding="utf-8", errors="replace")


def _chart(comparison: Comparison) -> plots.Drawing | None:
    """Forgetting against utility, each run by its number."""
    runs = comparison.runs
    points = [
        (run.forgetting, run.utility)
        for run in runs
        if run.forgetting is not None and run.utility is not None
    ]
    if not points:
        return None
    return plots.trade_off(
        points,
        [bool(run.efficient) for run in runs],
        "Distance from having forgotten against share of utility kept, run by run",
    )
