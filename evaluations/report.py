"""The audit on paper: reading a report, and the HTML page and model card section made from it.

Nothing is decided here: values, criteria and verdicts arrive as they are and are only shown.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unlearn.errors import BadInput
from unlearn.evaluations import plots
from unlearn.evaluations.page import DASH, duration, harmless, number, rendered
from unlearn.evaluations.schema import (
    BETTER,
    CHECKPOINTS,
    GROUPS,
    SCHEMA_VERSION,
    SUBSETS,
    VERDICTS,
    Checkpoint,
    Cost,
    Curve,
    Distribution,
    Example,
    Exposed,
    Finding,
    Grid,
    Group,
    Hyperparameter,
    Interval,
    Layers,
    RecordSet,
    Report,
    Strip,
    TrajectoryPoint,
    Value,
    Verdict,
)

__all__ = [
    "Cost",
    "Curve",
    "Distribution",
    "Example",
    "Exposed",
    "Finding",
    "Grid",
    "Hyperparameter",
    "Interval",
    "Layers",
    "RecordSet",
    "Report",
    "Strip",
    "TrajectoryPoint",
    "Value",
    "duration",
    "number",
    "read",
    "render_html",
    "render_markdown",
]


def read(path: str | Path) -> Report:
    """Read a report from its JSON file.

    Args:
        path: The file, usually report.json in a run directory.

    Returns:
        The report.

    Raises:
        BadInput: The file cannot be read, is not JSON, is of another version, or is no report.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise BadInput(f"{path} is not a report: it is not JSON text.") from error
    if isinstance(fields, dict) and fields.get("kind") == "memorization":
        raise BadInput(
            f"{path} is of a memorization audit, which measures one model and has no verdict: what "
            "it found is in report.html beside it."
        )
    version = fields.get("schema_version") if isinstance(fields, dict) else None
    if version is None:
        raise BadInput(f"{path} is not a report: it has no schema_version.")
    if version != SCHEMA_VERSION:
        raise BadInput(
            f"{path} is a report of version {str(version)[:20]!r}, and this release reads version "
            f"{SCHEMA_VERSION!r}; write the report again or use the release that wrote it."
        )
    try:
        return Report.model_validate(fields)
    except ValidationError as error:
        fault, *others = error.errors(include_url=False, include_input=False)
        where = ".".join(str(part) for part in fault["loc"])
        more = f" (and {len(others)} more)" if others else ""
        raise BadInput(f"{path} is not a report: {where}: {fault['msg']}{more}.") from error


def render_html(report: Report) -> str:
    """The report as one self-contained page: no script, no network, the same bytes every time.

    Args:
        report: What to show. Every text in it is escaped.

    Returns:
        An HTML document.
    """
    filters: dict[str, Callable[..., Any]] = {
        "size": _size,
        "finding_strip": _strip,
        "percent": _percent,
        "p_value": _p_value,
        "outcomes": outcomes,
    }
    return rendered(
        "report.html.j2",
        filters,
        report=report,
        groups=_groups(report),
        columns=_columns(report.findings),
        titles=_titles(report),
        ranked=[
            name
            for name in CHECKPOINTS
            if any(getattr(record, name) is not None for record in report.exposed)
        ],
        created=_moment(report),
        tally=_tally(report),
        levels=_levels(report),
        curves=_curve_figures(report),
        probes=_probe_figures(report),
        losses=_loss_figures(report),
        drawn=[
            name
            for name in CHECKPOINTS
            if any(getattr(distribution, name) for distribution in report.distributions)
        ],
        terms=_term_figures(report),
        course=_series_figure(report),
        within=_course_figure(report),
        labels={"verdicts": VERDICTS, "better": BETTER, "subsets": SUBSETS, "groups": GROUPS},
        checkpoints=CHECKPOINTS,
    )


def render_markdown(report: Report) -> str:
    """The report as a short section of a model card: what decided the verdict, and what failed.

    Args:
        report: What to show. Every text in it is escaped. Checks that are neither required nor
            failed are only counted, records are left out.

    Returns:
        Markdown that starts with a second-level heading and ends in a line break.
    """
    shown = [f for f in report.findings if f.required or f.verdict == "fail"]
    others = [f for f in report.findings if f not in shown]
    columns = _columns(shown)
    method = f"Method `{_code(report.method)}`" if report.method else "Method not stated"
    lines = [
        "## Unlearning audit",
        "",
        f"**Verdict: {report.verdict}.** {_plain(report.verdict_reason)}",
        "",
        f"{method}, {report.depth} audit of {_moment(report)[:10]}. {_tally(report)} "
        f"Checkpoint before: `{_code(report.checkpoint_in[:16])}`, "
        f"after: `{_code(report.checkpoint_out[:16])}`.",
        "",
    ]
    if shown:
        head = ["Check", "n", *(column.capitalize() for column in columns), "Rule", "Verdict"]
        lines += [_row(head), _row(["---"] * len(head))]
    for finding in (f for group in GROUPS for f in shown if f.group == group):
        unit = f" ({_plain(finding.unit)})" if finding.unit else ""
        values = [_written(getattr(finding, column)) for column in columns]
        rule = _plain(finding.criterion) or BETTER[finding.better]
        check = f"{_plain(finding.title)}{unit}, {finding.where[0].lower()}{finding.where[1:]}"
        lines.append(_row([check, f"{finding.n:,}", *values, rule, VERDICTS[finding.verdict]]))
    if others:
        counts = ", ".join(f"{count} {VERDICTS[verdict]}" for verdict, count in outcomes(others))
        lines += ["", f"Not required, and not failed: {counts}; the full report shows them."]
    if report.limits:
        lines += ["", "What this evidence does not show:", ""]
        lines += [f"- {_plain(limit)}" for limit in report.limits]
    return "\n".join(lines).rstrip() + "\n"


def _moment(report: Report) -> str:
    """When the report was made, to the minute."""
    return datetime.fromisoformat(report.created).strftime("%Y-%m-%d %H:%M")


def _size(count: int) -> str:
    """A number of bytes in binary units."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _percent(level: float) -> str:
    """A confidence level such as 95%."""
    return f"{100 * level:.4g}%"


def _p_value(p: float) -> str:
    """A p-value with its sign of relation.

    >>> _p_value(0.0123), _p_value(0.00001)
    ('= 0.012', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _groups(report: Report) -> dict[Group, list[Finding]]:
    """Findings by what they are evidence of, in the order of the groups; empty ones too."""
    return {group: [f for f in report.findings if f.group == group] for group in GROUPS}


def outcomes(findings: Iterable[Finding]) -> list[tuple[Verdict, int]]:
    """How many findings came out in which way, in the order of the verdicts; none of count 0."""
    counts = Counter(finding.verdict for finding in findings)
    return [(verdict, counts[verdict]) for verdict in VERDICTS if counts[verdict]]


def _titles(report: Report) -> dict[str, str]:
    """Names of attacks for people, as far as the report states them."""
    return {f.name: f.title for f in report.findings} | {c.attack: c.title for c in report.curves}


def _columns(findings: Iterable[Finding]) -> list[Checkpoint]:
    """Checkpoints with a value in any of the findings; the unlearned one always."""
    known = list(findings)
    return [
        checkpoint
        for checkpoint in CHECKPOINTS
        if checkpoint == "unlearned" or any(getattr(finding, checkpoint) for finding in known)
    ]


def _tally(report: Report) -> str:
    """How the checks came out, in one sentence."""
    counts = Counter(finding.verdict for finding in report.findings)
    words: dict[Verdict, str] = {"pass": "passed", "fail": "failed", "inconclusive": "inconclusive"}
    parts = [f"{counts[verdict]} {word}" for verdict, word in words.items()]
    rare: tuple[Verdict, ...] = ("invalid", "not_run")
    parts += [f"{counts[verdict]} {VERDICTS[verdict]}" for verdict in rare if counts[verdict]]
    return f"Checks: {', '.join(parts)}."


def _values(report: Report) -> Iterable[Value]:
    """Every measured value of the report."""
    for finding in report.findings:
        for checkpoint in CHECKPOINTS:
            value = getattr(finding, checkpoint)
            if value is not None:
                yield value


def _levels(report: Report) -> list[float]:
    """The confidence levels of all intervals, each once."""
    return sorted({value.interval.level for value in _values(report) if value.interval})


def _strip(finding: Finding) -> Any:
    """The values of a finding on one line."""
    marks = []
    for checkpoint in CHECKPOINTS:
        value: Value | None = getattr(finding, checkpoint)
        if value is not None:
            ends = (value.interval.low, value.interval.high) if value.interval else (None, None)
            marks.append(plots.Mark(checkpoint, value.value, *ends))
    return harmless(plots.strip(marks))  # numbers and fixed names only


def _curve_figures(report: Report) -> list[dict[str, Any]]:
    """A ROC for each attack, all on the same axes."""
    points = [p for curve in report.curves for name in CHECKPOINTS for p in getattr(curve, name)]
    finest = min((fpr for fpr, _ in points if fpr > 0), default=1.0)
    figures = []
    for curve in report.curves:
        series: dict[str, tuple[tuple[float, float], ...]] = {
            name: getattr(curve, name) for name in CHECKPOINTS if getattr(curve, name)
        }
        where = SUBSETS[curve.subset]
        label = f"{curve.title}, {where}: true against false positive rate, {', '.join(series)}"
        drawing = plots.roc(series, finest, label)
        figures.append(_figure(curve.title, drawing, where=where, names=list(series)))
    return figures


def _probe_figures(report: Report) -> list[dict[str, Any]]:
    """What each probe reads, layer by layer, as a figure and as rows of numbers."""
    figures = []
    for probe in report.layers:
        names = [name for name in (*CHECKPOINTS, "control") if getattr(probe, name)]
        series = {name: getattr(probe, name) for name in names}
        drawing = plots.by_layer(series, probe.unit, f"{probe.title}, {probe.unit} by layer")
        rows = list(zip(probe.layers, *series.values(), strict=True))
        figures.append(_figure(probe.title, drawing, unit=probe.unit, names=names, rows=rows))
    return figures


def _loss_figures(report: Report) -> list[dict[str, Any]]:
    """A histogram for each subset that has losses."""
    figures = []
    for distribution in report.distributions:
        series: dict[str, tuple[float | None, ...]] = {
            name: getattr(distribution, name) for name in CHECKPOINTS if getattr(distribution, name)
        }
        if series:
            title = SUBSETS[distribution.subset]
            label = f"{title}: distribution of losses, {', '.join(series)}"
            drawing = plots.loss_histogram(series, label)
            n = max(len(losses) for losses in series.values())
            figures.append(_figure(title, drawing, n=n, names=list(series)))
    return figures


def _term_figures(report: Report) -> list[dict[str, Any]]:
    """A curve for each training term, in order of appearance."""
    names = dict.fromkeys(name for point in report.trajectory for name in point.terms)
    figures = []
    for name in names:
        points = [point for point in report.trajectory if name in point.terms]
        label = f"Course of {name} over the training steps"
        drawing = plots.trajectory(
            [point.step for point in points], [point.terms[name] for point in points], label
        )
        figures.append(_figure(name, drawing))
    return figures


def _series_figure(report: Report) -> dict[str, Any] | None:
    """What stays and what is gone over the requests of a series."""
    if report.series is None:
        return None
    moments = report.series.moments
    retained = [moment.retain for moment in moments]
    forgotten = [[v for v in m.forget[: m.request] if v is not None] for m in moments]
    label = "Accuracy on what was forgotten and on what is retained, request by request"
    drawing = plots.over_time(retained, forgotten, report.series.unit, label)
    return _figure("Request by request", drawing, now=moments[-1].request)


def _course_figure(report: Report) -> dict[str, Any] | None:
    """What stays and what is gone over the steps of one run."""
    if report.course is None:
        return None
    looks = report.course.looks
    steps = [look.step for look in looks]
    taken = steps[-1] > 0
    drawing = plots.over_time(
        [look.retain for look in looks],
        [[] if look.forget is None else [look.forget] for look in looks],
        report.course.unit,
        "Accuracy on what is forgotten, on what is retained and on unseen records, step by step",
        at=steps if taken else None,
        unseen=[look.holdout for look in looks],
        axis="optimiser steps" if taken else "before and after",
    )
    return _figure("Step by step", drawing, steps=steps[-1])


def _figure(title: str, drawing: plots.Drawing, **more: Any) -> dict[str, Any]:
    """What the template needs to know of a drawing."""
    return {"title": title, "svg": harmless(drawing.svg), "note": drawing.note, **more}


def _written(value: Value | None) -> str:
    """A value with its interval, on one line."""
    if value is None:
        return DASH
    text = number(value.value)
    if value.interval:
        text += f" ({number(value.interval.low)} to {number(value.interval.high)})"
    return text


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    line = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(text.split()))
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _code(text: str) -> str:
    """Text that can stand between backticks, in a table and in any renderer."""
    return re.sub(r"[`|<>\s]+", " ", text)


def _row(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
