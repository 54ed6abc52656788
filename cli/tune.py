"""`unlearn tune`: search over a method's hyperparameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unlearn.cli import console, settings
from unlearn.config import UNREAD, TuneConfig, configure
from unlearn.errors import BadInput

if TYPE_CHECKING:
    from unlearn.evaluations.tuned import Tuned

EXAMPLES = """\b
Examples:
  unlearn tune MODEL --method npo --forget forget.jsonl --retain retain.jsonl \\
      --retrained CLEAN --trials 30 --out tuned/1
  unlearn tune MODEL --method ssd --data train.parquet --forget-classes cat \\
      --range percentile=90:99.9 --range dampening=0.5,1,2 --set batch_size=128 --out tuned/2
  unlearn tune MODEL --method npo ... --storage sqlite:///trials.db --out tuned/worker-2
  unlearn run MODEL --config tuned/1/best.yaml --forget forget.jsonl --retain retain.jsonl \\
      --out runs/1
"""


@click.command("tune", epilog=EXAMPLES)
@click.argument("checkpoint", required=False)
@settings.options(TuneConfig, "tune", ("checkpoint",), hidden=UNREAD)
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of these settings")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object on stdout")
def command(
    checkpoint: str | None,
    config: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Search for settings of a method that forget much and lose little.

    Every trial is a run from CHECKPOINT with a quick audit. DIR then holds best.yaml, a recipe for
    `unlearn run --config`, with trials.json and tune.html. The same command goes on where it
    stopped; several with the same --storage share the trials.
    """
    given = settings.gathered(config, {"checkpoint": checkpoint}, flags)
    for name, how in (("checkpoint", "`unlearn tune CHECKPOINT --method ...`"),
                      ("method", "pass --method (`unlearn methods` lists them)"),
                      ("out", "pass --out DIR")):  # fmt: skip
        if given.get(name) is None:
            raise BadInput(f"a search needs a {name}: {how}")
    with console.progress() as progress:
        console.hush()
        from unlearn.evaluations import tuned, tuning

        done = tuning.search(configure(TuneConfig, **given), progress)
    if as_json:
        click.echo(json.dumps(tuned.plain(done), indent=2, default=str))
    else:
        _show(done)


def _show(done: Tuned) -> None:
    """The front, the best in bold, and where things are."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    out = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("trial", *done.words, "from", "settings"):
        table.add_column(column, justify="right" if column in ("trial", *done.words) else "left")
    for row in sorted(done.front, key=lambda row: row.objectives.forgetting):
        numbers = (f"{value:.3f}" for value in row.objectives.point)
        style = "bold" if row == done.best else None
        table.add_row(str(row.number), *numbers, escape(row.origin), escape(row.words), style=style)
    out.print(table)
    lost = sum(bool(row.rejected) for row in done.rows)
    best = f", and the best is number {done.best.number}" if done.best else ""
    out.print(
        f"\n{len(done.rows)} trials, {lost} of them given up; these {len(done.front)} are beaten "
        f"by none{best}."
    )
    out.print(f"Recipe: {escape(str(done.directory / 'best.yaml'))}", soft_wrap=True)
    out.print(f"Report: {escape(str(done.directory / 'tune.html'))}", soft_wrap=True)
