"""What a finished run or a plan looks like: as a mapping for `--json`, as tables for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from unlearn.evaluations.schema import CHECKPOINTS

if TYPE_CHECKING:
    from unlearn.evaluations.schema import Report
    from unlearn.evaluations.series import Outcomes
    from unlearn.run import Result

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow", "invalid": "magenta"}
WIDE = 120  # columns of a terminal that has room for the rules
CODES = {"forgotten": 0, "not forgotten": 3, "inconclusive": 4}


def of_run(result: Result) -> dict[str, Any]:
    """A run's result as plain values."""
    outcome = result.outcome
    return {
        **of_report(result.report, result.directory),
        "model": str(result.directory / "model") if result.directory else None,
        "fingerprint_in": outcome.fingerprint_in,
        "fingerprint_out": outcome.fingerprint_out,
        "seconds": outcome.seconds,
        "peak_memory_bytes": outcome.peak_memory,
        "notes": outcome.notes,
    }


def of_series(done: Outcomes) -> dict[str, Any]:
    """A series of requests as plain values."""
    return {
        "directory": str(done.directory),
        "verdict": done.verdict,
        "verdicts": done.verdicts,
        **done.series.model_dump(mode="json"),
    }


def of_report(report: Report | None, directory: Path | None) -> dict[str, Any]:
    """An audit's outcome as plain values."""
    return {
        "directory": str(directory),
        "verdict": report.verdict if report else None,
        "verdict_reason": report.verdict_reason if report else None,
        "findings": [f.model_dump(mode="json") for f in report.findings] if report else [],
    }


def leave(summary: dict[str, Any]) -> None:
    """End the command with the exit code of the verdict; 0 where there is none."""
    click.get_current_context().exit(CODES.get(summary.get("verdict") or "", 0))


def show(summary: dict[str, Any]) -> None:
    """Findings, verdict, and where things are."""
    out = Console(highlight=False)
    directory = Path(summary["directory"])
    if summary["findings"]:
        table = _findings(summary["findings"], out.width)
        out.print(table)
        if rest := len(summary["findings"]) - table.row_count:
            out.print(f"and {rest} more in the report, for information or not run")
        out.print(
            f"\n[bold]{escape(summary['verdict'].capitalize())}.[/] "
            f"{escape(summary['verdict_reason'])}",
            soft_wrap=True,
        )
    if summary.get("model"):
        out.print(f"Model:  {escape(summary['model'])}", soft_wrap=True)
    if summary["findings"]:
        out.print(f"Report: {escape(str(directory / 'report.html'))}", soft_wrap=True)


def show_series(summary: dict[str, Any]) -> None:
    """Every request, the worst moments, and where things are."""
    out = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("request", justify="right")
    table.add_column("to be forgotten")
    for column in ("its records", "worst of all forgotten", "retained", "holdout", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for moment in summary["moments"]:
        done = moment["request"]
        gone = moment["forget"][:done]
        verdict = (summary["verdicts"][done - 1] if done else "") or ""
        numbers = [*([gone[-1], max(gone)] if gone else [None, None]), moment["retain"],
                   moment["holdout"]]  # fmt: skip
        seconds = moment["seconds"]
        table.add_row(
            str(done or "before"), escape(moment["target"]),
            *("-" if n is None else f"{n:.3f}" for n in numbers),
            "-" if seconds is None else f"{seconds:.1f}", verdict,
        )  # fmt: skip
    out.print(table)
    out.print(f"\nValues: {summary['unit']}.")
    for name, value in summary["worst"].items():
        out.print(f"{name[0].upper()}{name[1:]}: {value:.3f}", soft_wrap=True)
    last = Path(summary["directory"]) / f"{len(summary['verdicts']):03d}"
    out.print(f"\nModel:  {escape(str(last / 'model'))}", soft_wrap=True)
    if summary["verdict"]:
        out.print(f"Report: {escape(str(last / 'report.html'))}", soft_wrap=True)


def _findings(findings: list[dict[str, Any]], width: int) -> Table:
    """The findings that were decided; the report holds the others, too."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    rules = width >= WIDE
    for column in ("set", "finding", *CHECKPOINTS, *(["rule"] if rules else []), "verdict"):
        number = column in CHECKPOINTS
        table.add_column(column, justify="right" if number else "left", no_wrap=column != "rule")
    for found in findings:
        verdict = found["verdict"]
        if verdict == "info" or (verdict == "not_run" and not found["required"]):
            continue
        values = [f"{found[role]['value']:.3f}" if found[role] else "-" for role in CHECKPOINTS]
        colour, word = COLOURS.get(verdict, "default"), verdict.replace("_", " ")
        mark = "" if found["required"] else " (optional)"
        rule = [escape(found["criterion"].removesuffix(", on either side"))] if rules else []
        table.add_row(
            found["subset"].replace("_", " "), escape(found["name"].replace("_", " ")), *values,
            *rule, f"[{colour}]{word}[/]{mark}",
        )  # fmt: skip
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
