"""`unlearn attacks`: what an audit tries."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("attacks")
@click.option("--json", "as_json", is_flag=True, help="print JSON on stdout")
def command(as_json: bool) -> None:
    """List the membership attacks and searches: what they need, and which audits run them."""
    from unlearn.attacks.interface import Attack, Search
    from unlearn.attacks.membership import attacks
    from unlearn.evaluations import side_effects
    from unlearn.evaluations.robustness import SEARCHES, compressed

    found: list[tuple[str, Attack | Search]] = [
        *(("membership", attack) for attack in attacks()),
        *(("search", search) for search in (*SEARCHES, compressed(1), side_effects.SEARCH)),
    ]
    described: list[dict[str, Any]] = [
        {
            "name": attack.name,
            "kind": kind,
            "title": attack.title,
            "source": attack.source,
            "audit": attack.depth,
            "tasks": attack.tasks,
            "needs": attack.needs,
        }
        for kind, attack in found
    ]
    if as_json:
        click.echo(json.dumps(described, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("attack", "kind", "from audit", "what it is", "needs"):
        table.add_column(column, no_wrap=column == "attack")
    for one in described:
        table.add_row(one["name"], one["kind"], one["audit"], one["title"], ", ".join(one["needs"]))
    out = Console(highlight=False)
    out.print(table)
    out.print("\nSources and model families: `unlearn attacks --json`. Searches count beside a")
    out.print("retrained model only (side effects beside the original); membership attacks beside")
    out.print("one or a holdout.")
