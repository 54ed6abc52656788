"""`unlearn audit`: examine a checkpoint that was made to forget, or what a model memorised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from unlearn.cli import console, memorization, settings, summaries
from unlearn.config import AuditConfig, MemorizationConfig, as_flags, configure
from unlearn.errors import BadInput

EXAMPLES = """\b
Examples:
  unlearn audit --original MODEL --unlearned runs/1 --retrained CLEAN \\
      --forget forget.jsonl --retain retain.jsonl --holdout holdout.jsonl --out audits/1
  unlearn audit --original MODEL --unlearned runs/1 --data train.parquet \\
      --forget-ids 0:5000 --holdout test.parquet --audit deep \\
      --training lr=0.1 --training epochs=12 --out audits/2
  unlearn audit --only memorization MODEL train.jsonl --holdout unseen.jsonl --out audits/3
"""
SHARED = (*AuditConfig.model_fields, "checkpoint")  # flags that an audit has anyway, or arguments


@click.command("audit", epilog=EXAMPLES)
@click.argument("model", required=False, metavar="[MODEL")
@click.argument("data", required=False, metavar="DATA]")
@click.option(
    "--only",
    type=click.Choice(["memorization"]),
    help="measure how much of the texts in DATA the language model MODEL has memorised, instead",
)
@settings.options(AuditConfig, "audit")
@settings.options(MemorizationConfig, "audit", SHARED)
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of these settings")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object on stdout")
def command(
    model: str | None,
    data: str | None,
    only: str | None,
    config: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Try to get forgotten data back, weigh what is found, and report.

    With --only memorization: measure what of DATA a model has memorised, whoever is to forget it.

    Exit codes: 0 forgotten (or measured), 3 not forgotten, 4 inconclusive.
    """
    given = settings.gathered(config, {}, flags)
    if only == "memorization":
        _memorization(model, data, given, as_json)
        return
    if model is not None:
        raise BadInput(
            f"{model} stands without a flag: an audit takes --original and --unlearned, and MODEL "
            "DATA only with --only memorization"
        )
    own = set(MemorizationConfig.model_fields) - set(AuditConfig.model_fields)
    if odd := own & given.keys():
        raise BadInput(f"{as_flags(odd)}: only with --only memorization, or leave it out")
    from unlearn.evaluations import examination

    for name in ("original", "unlearned", "out"):
        if name not in given:
            raise BadInput(f"an audit needs --original, --unlearned and --out: pass --{name}")
    with console.progress() as progress:
        console.hush()
        report, directory = examination.audit(configure(AuditConfig, **given), progress)
    summary = summaries.of_report(report, directory)
    if as_json:
        click.echo(json.dumps(summary, indent=2, default=str))
    else:
        summaries.show(summary)
    summaries.leave(summary)


def _memorization(
    model: str | None, data: str | None, given: dict[str, Any], as_json: bool
) -> None:
    """Measure memorization; it has no verdict, so the exit code is 0."""
    from unlearn.evaluations import memorizing

    for name, value in (("checkpoint", model), ("data", data)):
        if value is not None and name in given:
            raise BadInput(f"{name} is given twice: by position and by name")
        if value is not None:
            given[name] = value
    if "checkpoint" not in given or "data" not in given:
        raise BadInput(
            "name the model and what it was trained on: `unlearn audit --only memorization MODEL "
            "DATA --out DIR`"
        )
    if "out" not in given:
        raise BadInput("say where the report goes: pass --out DIR")
    with console.progress() as progress:
        console.hush()
        report, directory = memorizing.memorization(
            configure(MemorizationConfig, **given), progress
        )
    if as_json:
        click.echo(json.dumps(memorization.of_memorization(report, directory), indent=2))
    else:
        memorization.show(report, directory)
