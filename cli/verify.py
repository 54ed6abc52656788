"""`unlearn verify`: has any byte of a run directory changed?"""

from __future__ import annotations

from pathlib import Path

import click


@click.command("verify")
@click.argument("run", type=click.Path(path_type=Path))
@click.pass_context
def command(ctx: click.Context, run: Path) -> None:
    """Check every file of the directory RUN against the checksums written with it.

    Exit code 1 when a file was changed, added or removed.
    """
    from unlearn import manifest

    faults = manifest.faults(run)
    for fault in faults:
        click.echo(f"{run}: {fault}")
    if faults:
        ctx.exit(1)
    click.echo(f"{run}: every byte is as it was written")
