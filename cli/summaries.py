"""What a finished run or a plan looks like: as a mapping for `--json`, as tables for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unlearn.evaluations.schema import CHECKPOINTS

if TYPE_CHECKING:
    from unlearn.run import Result

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def of(result: Result) -> dict[str, Any]:
    """A result as plain values."""
    report, outcome = result.report, result.outcome
    return {
        "directory": str(result.directory),
        "verdict": report.verdict if report else None,
        "verdict_reason": report.verdict_reason if report else None,
        "fingerprint_in": outcome.fingerprint_in,
        "fingerprint_out": outcome.fingerprint_out,
        "seconds": outcome.seconds,
        "peak_memory_bytes": outcome.peak_memory,
        "notes": outcome.notes,
        "findings": [f.model_dump(mode="json") for f in report.findings] if report else [],
    }


def show(summary: dict[str, Any]) -> None:
    """Findings, verdict, and where things are."""
    out = Console(highlight=False)
    directory = Path(summary["directory"])
    if summary["findings"]:
        out.print(_findings(summary["findings"]))
        out.print(
            f"\n[bold]{escape(summary['verdict'].capitalize())}.[/] "
            f"{escape(summary['verdict_reason'])}",
            soft_wrap=True,
        )
    out.print(f"Model:  {escape(str(directory / 'model'))}", soft_wrap=True)
    if summary["findings"]:
        out.print(f"Report: {escape(str(directory / 'report.html'))}", soft_wrap=True)


def _findings(findings: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("set", "finding", *CHECKPOINTS, "rule", "verdict"):
        table.add_column(column, justify="right" if column in CHECKPOINTS else "left")
    for found in findings:
        values = [f"{found[role]['value']:.3f}" if found[role] else "-" for role in CHECKPOINTS]
        verdict = found["verdict"]
        shown = "" if verdict == "info" else f"[{COLOURS.get(verdict, 'default')}]{verdict}[/]"
        subset = found["subset"].replace("_", " ")
        name = found["name"].replace("_", " ")
        table.add_row(subset, escape(name), *values, escape(found["criterion"]), shown)
    return table


def show_plan(plan: dict[str, Any]) -> None:
    """What would be done, and what it would cost."""
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for section, values in plan.items():
        rows = values.items() if isinstance(values, dict) else [("", values)]
        for number, (name, value) in enumerate(rows):
            head = f"[bold]{escape(section.replace('_', ' '))}[/]" if number == 0 else ""
            table.add_row(head, escape(f"{name}"), escape(f"{value}"))
    Console(highlight=False).print(table)
