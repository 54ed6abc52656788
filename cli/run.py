"""`unlearn run`: one erasure request from start to finish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from unlearn.cli import console, settings, summaries
from unlearn.config import RunConfig, configure, read_list
from unlearn.errors import BadInput

EXAMPLES = """\b
Examples:
  unlearn run MODEL --method npo --forget forget.jsonl --retain retain.jsonl --out runs/1
  unlearn run MODEL --method ssd --data train.parquet --forget-classes cat --out runs/2
  unlearn run runs/1 --method ssd --data train.parquet --forget-ids 0:100 --out runs/3
  unlearn run --config run.yaml --set lr=2e-5 --dry-run
  unlearn run MODEL --method acu --data train.parquet --requests requests.yaml --out runs/series
"""


@click.command("run", epilog=EXAMPLES)
@click.argument("checkpoint", required=False)
@settings.options(RunConfig, "run", ("checkpoint",))
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of these settings")
@click.option(
    "--requests",
    type=click.Path(path_type=Path),
    help="YAML list of requests, each a mapping such as `forget_ids: '0:10'`: carried out in turn, "
    "every run on the output of the one before",
)
@click.option("--dry-run", is_flag=True, help="check everything, print the plan and its cost")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object on stdout")
def command(
    checkpoint: str | None,
    config: Path | None,
    requests: Path | None,
    dry_run: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Make CHECKPOINT forget, and report what is left.

    CHECKPOINT is a Hugging Face directory or hub name, the directory of an earlier run, or a
    safetensors file (with --model).
    """
    given = settings.gathered(config, {"checkpoint": checkpoint}, flags)
    if "checkpoint" not in given:
        raise BadInput("name the checkpoint to unlearn: `unlearn run CHECKPOINT --method ...`")
    if "method" not in given:
        raise BadInput("name the method: pass --method (`unlearn methods` lists them)")
    if given.get("out") is None and not dry_run:
        raise BadInput("say where the run directory goes: pass --out DIR")
    if requests and dry_run:
        raise BadInput("--dry-run is for a single request: a series checks all of its own first")
    with console.progress() as progress:
        console.hush()
        if dry_run:
            from unlearn.estimate import estimate
            from unlearn.plan import plan

            summary = estimate(plan(configure(RunConfig, **given)))
        elif requests:
            from unlearn.evaluations.series import forget_all

            done = forget_all(requests=read_list(requests), progress=progress, **given)
            summary = summaries.of_series(done)
        else:
            import unlearn

            summary = summaries.of_run(unlearn.forget(progress=progress, **given))
    if as_json:
        click.echo(json.dumps(summary, indent=2, default=str))
    elif dry_run:
        summaries.show_plan(summary)
    elif requests:
        summaries.show_series(summary)
    else:
        summaries.show(summary)
    summaries.leave(summary)
