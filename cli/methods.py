"""`unlearn methods`: what there is, what it needs, and what can be set."""

from __future__ import annotations

import inspect
import json
import sys
from importlib import resources
from typing import Any

import click


@click.command("methods")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="print JSON on stdout")
def command(name: str | None, as_json: bool) -> None:
    """List the methods, or show NAME with its needs, settings and recipes."""
    from unlearn import registry

    described = [_described(n) for n in ([name] if name else registry.names())]
    if as_json:
        click.echo(json.dumps(described[0] if name else described, indent=2, default=str))
    elif name:
        _show_one(described[0])
    else:
        _show_all(described)


def _described(name: str) -> dict[str, Any]:
    from unlearn import ranges, registry

    cls = registry.method_class(name)
    needs = cls().needs
    looked = ranges.space(cls)
    return {
        "name": name,
        "summary": (inspect.getdoc(cls) or "").splitlines()[0],
        "about": inspect.getdoc(sys.modules[cls.__module__]) or "",
        "needs": {
            "forget set": needs.forget.value,
            "retain set": needs.retain.value,
            "state of an earlier run": needs.state.value,
            "at least one of": " or ".join(needs.either) or None,
            "tasks": ", ".join(needs.tasks),
        },
        "hyperparameters": [
            vars(h) | {"range": str(looked[h.name]) if h.name in looked else None}
            for h in registry.hyperparameters(cls)
        ],
        "recipes": recipes(name),
    }


def recipes(method: str) -> list[dict[str, str]]:
    """The shipped YAML files for a method: path and first comment line."""
    found = []
    for file in sorted(resources.files("unlearn.recipes").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml") and f"\nmethod: {method}\n" in (text := file.read_text()):
            found.append({"path": str(file), "about": text.splitlines()[0].lstrip("# ")})
    return found


def _show_all(described: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "what it does", "retain set"):
        table.add_column(column, no_wrap=column == "method")
    for one in described:
        table.add_row(one["name"], one["summary"], one["needs"]["retain set"])
    out = Console(highlight=False)
    out.print(table)
    out.print("\n`unlearn methods NAME` shows needs, settings, paper and recipes.")


def _show_one(one: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    out = Console(highlight=False, soft_wrap=True)
    out.print(escape(one["about"]))
    out.print("\n[bold]Needs[/]")
    for what, how in one["needs"].items():
        if how is not None:
            out.print(f"  {what}: {escape(str(how))}")
    out.print("\n[bold]Settings[/] (--set name=value)")
    for h in one["hyperparameters"]:
        value, kind = escape(str(h["default"])), escape(h["type"])
        out.print(f"  [bold]{h['name']}[/] = {value}  [dim]{kind}[/]\n      {escape(h['meaning'])}")
        if h["range"]:
            out.print(f"      [dim]tune looks in {escape(h['range'])}[/]")
    if one["recipes"]:
        out.print("\n[bold]Recipes[/] (--config FILE)")
        for recipe in one["recipes"]:
            out.print(f"  {escape(recipe['path'])}\n      {escape(recipe['about'])}")
