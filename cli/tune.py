"""`unlearn tune`: search over a method's hyperparameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unlearn.cli import console, settings
from unlearn.config import TuneConfig, configure
from unlearn.errors import BadInput

if TYPE_CHECKING:
    from unlearn.evaluations.tuning import Tuned

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
@settings.options(TuneConfig, "tune", ("checkpoint", "range"))
@click.option(
    "--range",
    "ranges",
    multiple=True,
    metavar="KEY=RANGE",
    help=TuneConfig.model_fields["range"].description,
)
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of these settings")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object on stdout")
def command(
    checkpoint: str | None,
    ranges: tuple[str, ...],
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
    if ranges:
        below = given.get("range") or {}
        if not isinstance(below, dict):
            raise BadInput(f"range in {config} must hold `name: range` lines")
        given["range"] = below | settings._pairs(ranges, "range")
    for name, how in (("checkpoint", "`unlearn tune CHECKPOINT --method ...`"),
                      ("method", "pass --method (`unlearn methods` lists them)"),
                      ("out", "pass --out DIR")):  # fmt: skip
        if given.get(name) is None:
            raise BadInput(f"a search needs a {name}: {how}")
    with console.progress() as progress:
        console.hush()
        from unlearn.evaluations import tuning

        done = tuning.search(configure(TuneConfig, **given), progress)
    if as_json:
        click.echo(json.dumps(tuning.plain(done), indent=2, default=str))
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
    best = done.best.number if done.best else None
    for row in sorted(done.rows, key=lambda row: row.objectives.forgetting):
        if row.number in done.front:
            at = row.objectives
            words = "  ".join(
                f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}"
                for k, v in row.settings.items()
            )
            table.add_row(
                str(row.number), f"{at.forgetting:.3f}", f"{at.utility:.3f}", escape(row.origin),
                escape(words), style="bold" if row.number == best else None,
            )  # fmt: skip
    out.print(table)
    lost = sum(bool(row.rejected) for row in done.rows)
    out.print(
        f"\n{len(done.rows)} trials, {lost} of them given up; these {len(done.front)} are beaten "
        f"by none, and the best is number {best}."
    )
    out.print(f"Recipe: {escape(str(done.directory / 'best.yaml'))}", soft_wrap=True)
    out.print(f"Report: {escape(str(done.directory / 'tune.html'))}", soft_wrap=True)
