"""What `unlearn audit --only memorization` prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from unlearn.evaluations.extractable import Estimate
    from unlearn.evaluations.memorization_schema import Memorization


def of_memorization(report: Memorization, directory: Path | None) -> dict[str, Any]:
    """A report as plain values."""
    return {
        "directory": str(directory) if directory else None,
        **report.model_dump(mode="json", exclude={"examples": True, "verbatim": {"examples"}}),
    }


def show(report: Memorization, directory: Path | None) -> None:
    """The main numbers, what was not measured, and where the rest is."""
    out = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("measured")
    for column in ("share", "95% interval", "texts"):
        table.add_column(column, justify="right", no_wrap=True)
    found, now = report.extractable, report.recollection
    for row in found.by_prefix:
        _row(table, f"extractable, {found.suffix} tokens after {row.prefix}", row.share)
    several = len({row.least for row in found.by_copies}) > 1
    for row in found.by_copies if several else ():
        if row.prefix == found.prefix:
            least, most = row.least, row.most
            copies = f"{least}" if least == most else f"{least} to {most}"
            _row(table, f"  after {row.prefix}, {copies} in the data", row.share)
    _row(table, "  more with each doubling of the copies", found.slope[found.prefix])
    _row(table, "recognised among unseen texts", now.foils)
    _row(table, "recognised beside minimal edits", now.edits)
    _row(table, "  unseen texts beside their edits", now.edits_unseen)
    _row(table, "recalled exactly", now.exact)
    _row(table, "ROUGE-L of what is recalled", now.rouge)
    if report.retention:
        last = report.retention[-1]
        _row(table, f"  recalled exactly after {last.step} steps on other texts", last.exact)
        _row(table, f"  recognised beside edits after {last.step} steps", last.edits)
    if report.verbatim:
        _row(table, "  of a generated text, found word for word", report.verbatim.covered)
    if report.counterfactual:
        _row(table, "counterfactual memorization", report.counterfactual.memory)
    out.print(table)
    for name, why in report.not_run.items():
        out.print(f"Not measured: {escape(name)}: {escape(why)}", soft_wrap=True)
    if directory:
        out.print(f"Report: {escape(str(directory / 'report.html'))}", soft_wrap=True)


def _row(table: Table, name: str, found: Estimate | None) -> None:
    if found is not None:
        span = f"{found.low:.3f} to {found.high:.3f}"
        table.add_row(name, f"{found.value:.3f}", span, f"{found.n:,}")
