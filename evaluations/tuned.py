"""What a search found: its trials, the best of them, and the files that hold both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from unlearn.evaluations import objectives, plots
from unlearn.evaluations.objectives import Objectives
from unlearn.evaluations.page import harmless, rendered
from unlearn.workplace import written_whole

FILE = "trials.json"


@dataclass(frozen=True)
class Row:
    """One finished trial.

    Attributes:
        number: in the study.
        origin: "defaults", "recipe NAME" or "search".
        settings: hyperparameters that differ from the method's defaults, or were proposed.
        objectives: what it is judged by.
        rejected: why it was given up; "" for a trial that was audited.
        seconds: what it took.
    """

    number: int
    origin: str
    settings: Mapping[str, Any]
    objectives: Objectives
    rejected: str = ""
    seconds: float = 0.0

    @property
    def words(self) -> str:
        """The settings on one line."""
        return ", ".join(f"{name}={short(value)}" for name, value in self.settings.items())


@dataclass(frozen=True)
class Tuned:
    """What a search returns.

    Attributes:
        directory: holds best.yaml, trials.json and tune.html.
        method: its name.
        words: what the two objectives are called.
        rows: all finished trials, in order.
        seed: of every trial.
    """

    directory: Path
    method: str
    words: tuple[str, str]
    rows: tuple[Row, ...]
    seed: int = 0

    @property
    def front(self) -> list[Row]:
        """The audited trials that no other beats."""
        return front(self.rows)

    @property
    def best(self) -> Row | None:
        """The one that best.yaml holds."""
        return best(self.rows)

    @property
    def recipe(self) -> dict[str, Any]:
        """What ``unlearn run --config`` and :func:`unlearn.forget` take; empty without a best."""
        if self.best is None:
            return {}
        seed = {"seed": self.seed} if self.seed else {}
        return {"method": self.method, "set": dict(self.best.settings), **seed}


def front(rows: Sequence[Row]) -> list[Row]:
    """The audited trials that no other beats, by :func:`unlearn.evaluations.objectives.pareto`."""
    audited = [row for row in rows if not row.rejected]
    unbeaten = objectives.pareto([row.objectives.point for row in audited])
    return [row for row, stands in zip(audited, unbeaten, strict=True) if stands]


def best(rows: Sequence[Row]) -> Row | None:
    """By :func:`unlearn.evaluations.objectives.best`; None where all were given up."""
    audited = [row for row in rows if not row.rejected]
    return audited[objectives.best([r.objectives.point for r in audited])] if audited else None


def short(value: Any) -> str:
    """A setting for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(done: Tuned) -> dict[str, Any]:
    """A search as plain values."""
    return {
        "directory": str(done.directory),
        "method": done.method,
        "objectives": list(done.words),
        "best": done.best.number if done.best else None,
        "front": [row.number for row in done.front],
        "recipe": done.recipe,
        "trials": [asdict(row) for row in done.rows],
    }


def write(done: Tuned, identity: str, worker: str, target: str) -> None:
    """best.yaml, tune.html and trials.json; each replaces what an earlier call left.

    Args:
        done: the search.
        identity: of the request, by which a repeated command knows it.
        worker: that did it, by which a repeated command knows its trials.
        target: what is forgotten, for people.
    """
    out, found, words = done.directory, done.best, done.words
    (out / "best.yaml").unlink(missing_ok=True)
    if found is not None:
        at = found.objectives
        about = (
            f"# {done.method}, trial {found.number} of {len(done.rows)} of unlearn tune: "
            f"{words[0]} {at.forgetting:.3f}, {words[1]} {at.utility:.3f}\n"
        )
        with written_whole(out / "best.yaml") as new:
            new.write_text(about + yaml.safe_dump(done.recipe, sort_keys=False))
    with written_whole(out / "tune.html") as new:
        new.write_text(render(done, target))
    with written_whole(out / FILE) as new:  # last: it says that the others are there
        record = {"schema_version": "1", "status": "complete", "identity": identity,
                  "worker": worker, **plain(done)}  # fmt: skip
        new.write_text(json.dumps(record, indent=2) + "\n")


def render(done: Tuned, target: str) -> str:
    """The search as one self-contained page: no script, no network."""
    drawing = _figure(done)
    return rendered(
        "tune.html.j2",
        {"short": short},
        done=done,
        best=done.best,
        front=done.front,
        target=target,
        names=list(dict.fromkeys(name for row in done.rows for name in row.settings)),
        parts=list(dict.fromkeys(part for row in done.rows for part in row.objectives.parts)),
        recipe=yaml.safe_dump(done.recipe, sort_keys=False),
        figure=drawing and harmless(drawing.svg),
        note=drawing and drawing.note,
        enough=objectives.ENOUGH,
    )


def _figure(done: Tuned) -> plots.Drawing | None:
    """Every audited trial by its number."""
    shown, unbeaten, found = [row for row in done.rows if not row.rejected], done.front, done.best
    if found is None:
        return None
    return plots.trade_off(
        [row.objectives.point for row in shown],
        [row in unbeaten for row in shown],
        f"{done.words[1].capitalize()} against {done.words[0]}, trial by trial",
        (f"{done.words[0]}: lower is better", f"{done.words[1]}: higher is better"),
        [f"{row.number} (best)" if row is found else str(row.number) for row in shown],
    )
