"""`unlearn run`: one erasure request from start to finish."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import click
from click.core import ParameterSource

from unlearn.cli import console, summaries
from unlearn.config import RunConfig, configure, read_yaml
from unlearn.errors import BadInput

EXAMPLES = """\b
Examples:
  unlearn run MODEL --method npo --forget forget.jsonl --retain retain.jsonl --out runs/1
  unlearn run MODEL --method ssd --data train.parquet --forget-classes cat --out runs/2
  unlearn run runs/1 --method ssd --data train.parquet --forget-ids 0:100 --out runs/3
  unlearn run --config run.yaml --set lr=2e-5 --dry-run
"""
MAPPINGS = {"set": "set_", "columns": "columns"}


def _options(function: Callable[..., None]) -> Callable[..., None]:
    """One flag per field of RunConfig, so that flags, YAML and Python never differ."""
    for name, declared in reversed(RunConfig.model_fields.items()):
        if name == "checkpoint":
            continue
        flag = f"--{name.replace('_', '-')}"
        settings: dict[str, Any] = {"help": declared.description, "default": None}
        kinds = _kinds(declared.annotation)
        choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
        if name in MAPPINGS:
            metavar = "KEY=VALUE" if name == "set" else "FIELD=COLUMN"
            settings |= {"multiple": True, "metavar": metavar}
            settings["envvar"] = f"UNLEARN_RUN_{name.upper()}"  # "set_" would miss it
            flag = "--column" if name == "columns" else flag
        elif choices:
            settings |= {"type": click.Choice(choices)}
        elif bool in kinds:
            flag = f"{flag}/--no-{name.replace('_', '-')}"
        elif int in kinds or float in kinds:
            settings |= {"type": int if int in kinds else float}
        else:
            settings |= {"type": str}
        if (
            declared.default not in (None, [], {})
            and not declared.is_required()
            and (name not in MAPPINGS)
        ):
            settings["help"] = f"{declared.description}  [default: {declared.default}]"
        function = click.option(flag, MAPPINGS.get(name, name), **settings)(function)
    return function


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


@click.command("run", epilog=EXAMPLES)
@click.argument("checkpoint", required=False)
@_options
@click.option("--config", type=click.Path(path_type=Path), help="YAML file of these settings")
@click.option("--dry-run", is_flag=True, help="check everything, print the plan and its cost")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object on stdout")
def command(config: Path | None, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Make CHECKPOINT forget, and report what is left.

    CHECKPOINT is a Hugging Face directory or hub name, the directory of an earlier run, or a
    safetensors file (with --model).
    """
    settings = _settings(click.get_current_context(), config, flags)
    if settings.get("out") is None and not dry_run:
        raise BadInput("say where the run directory goes: pass --out DIR")
    with console.progress() as progress:
        console.hush()
        if dry_run:
            from unlearn.estimate import estimate
            from unlearn.plan import plan

            summary = estimate(plan(configure(**settings)))
        else:
            import unlearn

            summary = summaries.of(unlearn.forget(progress=progress, **settings))
    if as_json:
        click.echo(json.dumps(summary, indent=2, default=str))
    elif dry_run:
        summaries.show_plan(summary)
    else:
        summaries.show(summary)


def _settings(ctx: click.Context, config: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """YAML below environment and flags; hyperparameters merge key by key."""
    settings = read_yaml(config) if config else {}
    for name, declared in {"checkpoint": "checkpoint", **{n: n for n in flags}}.items():
        field = {"set_": "set"}.get(name, name)
        value = flags.get(declared)
        if ctx.get_parameter_source(name) is ParameterSource.DEFAULT or value is None:
            continue
        if name in MAPPINGS.values():
            below = settings.get(field) or {}
            if not isinstance(below, dict):
                raise BadInput(f"{field} in {config} must hold `name: value` lines")
            settings[field] = {**below, **_pairs(value, field)}
        else:
            settings[field] = value
    if "checkpoint" not in settings:
        raise BadInput("name the checkpoint to unlearn: `unlearn run CHECKPOINT --method ...`")
    if "method" not in settings:
        raise BadInput("name the method: pass --method (`unlearn methods` lists them)")
    return settings


def _pairs(values: tuple[str, ...], field: str) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"--{field.removesuffix('s')} {text!r} is not of the form key=value")
        pairs[key.strip()] = value.strip()
    return pairs
