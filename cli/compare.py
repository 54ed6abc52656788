"""`unlearn compare`: several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
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
    from unlearn.evaluations.comparison import compare, located
    from unlearn.evaluations.comparison_page import render_html

    places = located(runs)
    if out is None and not as_json:
        raise BadInput("say where the page goes: pass --out page.html (or --json)")
    if out is not None:
        _check_free(out, places)
    comparison = compare(places)
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


def _check_free(out: Path, places: Sequence[Path]) -> None:
    """Refuse a place that belongs to a run, or that something else is at.

    Raises:
        BadInput: which one.
    """
    from unlearn.evaluations.comparison_page import is_page

    for place in places:
        if out.resolve().is_relative_to(place.resolve()):
            raise BadInput(f"{out} lies within {place}, which must stay as it is: name another")
    if not out.absolute().parent.is_dir():
        raise BadInput(f"the folder {out.absolute().parent} does not exist: create it first")
    try:
        taken = out.exists() and (not out.is_file() or not is_page(out))
    except OSError as error:
        raise BadInput(f"{out} cannot be read: {error.strerror}") from error
    if taken:
        raise BadInput(f"{out} exists and is no page of a comparison: choose another --out")
