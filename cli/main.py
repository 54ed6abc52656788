"""`unlearn`: the command group. Each command lives in its own file and is imported when called."""

from __future__ import annotations

import importlib
import os

import click

from unlearn.errors import UnlearnError

COMMANDS = {
    "run": "Make a checkpoint forget, and report what is left.",
    "audit": "Try to get forgotten data back, and say whether it is gone.",
    "tune": "Search over a method's hyperparameters.",
    "methods": "List the methods, or show one with its needs and settings.",
    "attacks": "List what an audit tries: membership attacks and searches.",
    "verify": "Check that no byte of a run directory has changed.",
    "report": "Render the report of a run again.",
    "compare": "Lay the findings of several runs side by side.",
    "demo": "Build a tiny world, erase two people from it, and show the report.",
}


class Commands(click.Group):
    """Imports a command when it is asked for, and prints our errors as sentences."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order a newcomer needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of ``unlearn/cli/<name>.py``."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"unlearn.cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One line each, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> None:
        """Run, and end with the documented exit code."""
        try:
            super().invoke(ctx)
        except UnlearnError as error:
            for line in str(error).splitlines():
                click.echo(f"Error: {line}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted. The same command goes on where it stopped.", err=True)
            ctx.exit(130)


@click.group(
    cls=Commands,
    context_settings={"auto_envvar_prefix": "UNLEARN", "help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done (and forgotten, where that was examined), 1 the run failed, "
    "2 bad usage or input, 3 not forgotten, 4 inconclusive, 130 interrupted.",
)
@click.version_option(package_name="unlearn-toolkit")
def cli() -> None:
    """Make a trained PyTorch model forget chosen data, and prove how well it did."""


def main() -> None:
    """Console script; every process of a launch comes through here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        cli(prog_name="unlearn")
        return
    from unlearn import distributed

    with distributed.launched():
        cli(prog_name="unlearn")


if __name__ == "__main__":
    main()
