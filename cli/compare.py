"""`unlearn compare`: several runs side by side."""

from __future__ import annotations

from pathlib import Path

import click

from unlearn.errors import BadInput


@click.command("compare")
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), help="HTML page to write")
@click.option("--json", "as_json", is_flag=True, help="print the comparison as one JSON object")
def command(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Lay the findings of the run or audit directories RUNS side by side.

    A warning tells where they cannot be compared: other checkpoints, forget sets, depths or rules.
    """
    if out is None and not as_json:
        raise BadInput("say where the page goes: pass --out page.html (or --json)")
    from unlearn.evaluations.comparison import compare, render_html

    comparison = compare(runs)
    for warning in comparison.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if out is not None:
        try:
            out.write_text(render_html(comparison), encoding="utf-8")
        except OSError as error:
            raise BadInput(f"{out} cannot be written: {error.strerror}") from error
    if as_json:
        click.echo(comparison.model_dump_json(indent=2))
    else:
        click.echo(f"Comparison: {out}")
