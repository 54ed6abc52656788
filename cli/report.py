"""`unlearn report`: render a run's report again, from its JSON."""

from __future__ import annotations

from pathlib import Path

import click

from unlearn.errors import BadInput


@click.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format", "kind", type=click.Choice(["html", "md", "json"]), default="html", show_default=True
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="file to write; default: report.html in RUN"
    ", stdout for md and json"
)  # fmt: skip
def command(run: Path, kind: str, out: Path | None) -> None:
    """Render the report of the directory RUN again.

    Inside RUN the checksums are renewed, so RUN must verify first.
    """
    from unlearn import manifest
    from unlearn.evaluations import report as reports

    source = run / "report.json"
    if not source.is_file():
        raise BadInput(f"{run} has no report.json: pass a run directory made with an audit")
    report = reports.read(source)
    if kind == "html":
        text = reports.render_html(report)
    elif kind == "md":
        text = reports.render_markdown(report)
    else:
        text = report.model_dump_json(indent=2) + "\n"
    if out is None and kind != "html":
        click.echo(text, nl=False)
        return
    out = out or run / "report.html"
    inside = out.resolve().is_relative_to(run.resolve())
    if inside and (faults := manifest.faults(run)):
        raise BadInput(f"{run} does not verify ({faults[0]}): pass --out to render elsewhere")
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{out} cannot be written: {error.strerror}") from error
    if inside:
        manifest.write(run)
    click.echo(f"Report: {out}")
