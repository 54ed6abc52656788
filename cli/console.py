"""What a person sees while a run goes on: bars on a terminal, plain lines elsewhere, on stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET_SECONDS = 10.0  # between plain lines of one phase


def stderr() -> Console:
    """A console for people; stdout stays free for results."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


class Plain:
    """Progress as lines: the first and last step of a phase, and every ten seconds between."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last = 0.0

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """Print now and then."""
        if done == total or time.monotonic() - self.last > QUIET_SECONDS:
            self.last = time.monotonic()
            self.console.print(f"{phase}: {done}/{total}{_shown(numbers)}", markup=False)

    def say(self, sentence: str) -> None:
        """Print a sentence."""
        self.console.print(sentence, markup=False)


class Bars:
    """Progress as bars, one per phase."""

    def __init__(self, console: Console) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )
        self.phases: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """Move the bar of this phase."""
        if phase not in self.phases:
            self.phases[phase] = self.bars.add_task(phase, total=total, numbers="")
        self.bars.update(self.phases[phase], completed=done, total=total, numbers=_shown(numbers))

    def say(self, sentence: str) -> None:
        """Print a sentence above the bars."""
        self.bars.console.print(sentence, markup=False)


def progress() -> Plain | Bars:
    """Bars on a terminal, lines elsewhere."""
    console = stderr()
    return Bars(console) if console.is_terminal else Plain(console)


def _shown(numbers: Mapping[str, Any]) -> str:
    return "".join(f"  {name} {value:.3g}" for name, value in numbers.items() if "_nll" in name)


def hush() -> None:
    """Keep other libraries' bars and advice off the terminal; ours say what is going on."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
