"""The worst moment along the way, not only the end (De Lange et al., ICLR 2023, arXiv 2205.13452).

A model that is measured only when a request is finished can look stable while it was not. These
numbers take a whole series of measurements: accuracy of several tasks (here: what must stay, or
how well each request stays forgotten) at every evaluation. :mod:`unlearn.evaluations.series` takes
them after every request; :class:`Watch` takes them within one run, every few optimiser steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from unlearn import distributed
from unlearn.case import Case
from unlearn.errors import BadInput
from unlearn.evaluations.schema import Course, Look
from unlearn.interface import Need
from unlearn.run import Run
from unlearn.tasks.base import IGNORED, Encoded, evaluating
from unlearn.tasks.classification import Classification

Array = npt.NDArray[np.float64]
LOOKED_AT = 200  # records per set and look
SETS = ("forget", "retain", "holdout")


def min_accuracy(series: Any, intervals: Sequence[tuple[int, int]]) -> float:
    """Mean over the earlier tasks of the lowest accuracy since each was learned (eq. 3: min-ACC).

    Args:
        series: accuracy of every task at every evaluation, shape (tasks, evaluations).
        intervals: per task the evaluations [start, end) during which it was learned, in order;
            its minimum is over the evaluations from ``end`` on.

    Returns:
        The mean over all tasks but the last; those nothing was measured of since do not count.

    Raises:
        BadInput: fewer than two tasks, shapes that do not fit, or nothing measured since.

    >>> min_accuracy([[0.9, 0.4, 0.8], [0.1, 0.5, 0.9]], [(0, 1), (1, 3)])
    0.4
    """
    values, ends = _checked(series, intervals)
    since = [row[end:] for row, end in zip(values[:-1], ends, strict=False)]
    lowest = [part.min() for part in since if part.size]
    if not lowest:
        raise BadInput("min-ACC needs a task that was measured after it was learned")
    return float(np.mean(lowest))


def worst_case_accuracy(series: Any, intervals: Sequence[tuple[int, int]]) -> float:
    """What can be relied on at any moment (eq. 4: WC-ACC).

    The accuracy of the last of k tasks now, weighted 1/k, with the min-ACC of all others.

    Args:
        series: accuracy of every task at every evaluation, shape (tasks, evaluations).
        intervals: as in :func:`min_accuracy`.

    Raises:
        BadInput: as :func:`min_accuracy`.

    >>> round(worst_case_accuracy([[0.9, 0.4, 0.8], [0.1, 0.5, 0.9]], [(0, 1), (1, 3)]), 3)
    0.65
    """
    values, _ = _checked(series, intervals)
    newest = 1 / len(values)
    return float(newest * values[-1, -1] + (1 - newest) * min_accuracy(series, intervals))


def windowed_forgetting(series: Any, window: int) -> float:
    """The largest fall of accuracy within ``window`` evaluations in a row (eq. 5: WF).

    Args:
        series: accuracy at every evaluation, shape (evaluations,), or of several tasks, shape
            (tasks, evaluations), over which the mean is taken.
        window: evaluations a fall may stretch over, at least 2.

    Returns:
        At least 0: a series that never falls has none.

    Raises:
        BadInput: a window below 2, or no evaluations.

    >>> round(windowed_forgetting([0.9, 0.8, 0.5, 0.7], window=2), 3)
    0.3
    """
    values = np.atleast_2d(np.asarray(series, dtype=np.float64))
    if window < 2 or values.ndim != 2 or not values.size:
        raise BadInput("windowed forgetting needs evaluations, and a window of at least 2")
    falls = np.zeros(len(values))
    for distance in range(1, min(window, values.shape[1])):
        falls = np.maximum(falls, (values[:, :-distance] - values[:, distance:]).max(1))
    return float(falls.mean())


def falls(kept: Sequence[float], one: str, whole: str) -> dict[str, float]:
    """How low what is retained got, and how fast, by what the numbers mean.

    Args:
        kept: accuracy on the retain set at every evaluation.
        one: what lies between two evaluations, such as "request".
        whole: what all of them make, such as "series".
    """
    return {
        "lowest accuracy on the retain set": min(kept),
        f"largest fall on the retain set from one {one} to the next": windowed_forgetting(kept, 2),
        f"largest fall on the retain set over the whole {whole}": (
            windowed_forgetting(kept, max(2, len(kept)))
        ),
    }


def right(model: nn.Module, examples: Encoded, run: Run) -> float | None:
    """Share of answers, or of their tokens, that the model gets right; None where nothing says.

    Several processes share the work. The model's modes are put back, no gradient is taken and no
    random number drawn.
    """

    def counted(indices: list[int]) -> tuple[int, int]:
        batch = examples.batch(indices, run.device)
        hits = int(run.task.predictions(model, batch).hits().sum())
        return hits, int((batch["labels"] != IGNORED).sum())

    with evaluating(model):
        counts = list(distributed.spread(counted, examples.by_length(64)))
    units = sum(there for _, there in counts)
    return sum(hits for hits, _ in counts) / units if units else None


def unit_of(task: Any) -> str:
    """What :func:`right` counts, in words."""
    return "accuracy" if task.name == "classification" else "share of answer tokens predicted"


def as_watched(sets: Mapping[str, Encoded], task: Any) -> dict[str, Encoded]:
    """The sets with their labels: what is watched is not for the method."""
    if not isinstance(task, Classification):
        return dict(sets)
    reading = task.reading(Need.OPTIONAL)
    return {name: part.as_read(reading) for name, part in sets.items()}


class Watch:
    """Progress that looks at some records every few optimiser steps, and passes everything on.

    The weights are the same with it and without, bit for bit. What it sees stands in metrics.jsonl,
    so that a run that was interrupted knows all of it.

    Args:
        case: its ``config.watch`` says how many steps lie between two looks; at most 200 seeded
            records of each set are looked at.
        model: the one that forgets, in place; looked at once now.
        run: whose progress this takes the place of, until :meth:`end`.
    """

    def __init__(self, case: Case, model: nn.Module, run: Run) -> None:
        self.every: int = case.config.watch  # type: ignore[attr-defined]
        self.model, self.run, self.progress = model, run, run.progress
        chosen: dict[str, Encoded] = {
            name: part.sample(LOOKED_AT, case.config.seed)
            for name, part in case.sets.named().items()
            if name in SETS and len(part)
        }
        self.sets = as_watched(chosen, case.checkpoint.task)
        self._look("before", "", 0)
        run.progress = self

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """A step was taken: look, if it is one to look at."""
        word, _, name = phase.partition(" ")
        if word == "unlearn" and done % self.every == 0:
            self._look("step", name, done)
        self.progress.advance(phase, done, total, numbers)

    def say(self, sentence: str) -> None:
        """Pass it on."""
        self.progress.say(sentence)

    def end(self, model: nn.Module, run: Run) -> None:
        """The model as it was written; from here on nothing is looked at."""
        run.progress = self.progress
        in_place, self.model = model is self.model, model
        self._look("after", "", 0, in_place=in_place)

    def _look(self, when: str, phase: str, step: int, **more: bool) -> None:
        seen = {name: right(self.model, part, self.run) for name, part in self.sets.items()}
        self.run.log("look", when=when, phase=phase, step=step, **seen, **more)

    def course(self, metrics: Path) -> Course:
        """What was seen, in all attempts at the run, and the worst of it."""
        looks, steps, in_place = looks_of(metrics.read_text().splitlines())
        if not steps:
            note = "The method takes no gradient steps: only both ends were looked at."
        elif not in_place:
            note = "The method makes another model than the one it is given: only both ends count."
        elif len(looks) == 2:
            note = f"The method took {steps:,} steps, too few for a look on the way."
        else:
            note = _return(looks)
        unit = unit_of(next(iter(self.sets.values())).task)
        return Course(every=self.every, unit=unit, looks=looks, worst=worst(looks), note=note)


def events_of(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The events that the lines of metrics.jsonl tell of.

    Work that is killed while it writes leaves half a line, and what it does next, it appends to
    that: the half is dropped, and the event behind it is kept.

    >>> events_of(['{"event": "st{"event": "look"}', '{"event'])
    [{'event': 'look'}]
    """
    found = []
    for line in lines:
        for start in (0, line.rfind('{"event"')):
            try:
                event = json.loads(line[max(0, start) :])
            except json.JSONDecodeError:
                continue
            if isinstance(event, dict) and "event" in event:
                found.append(event)
                break
    return found


def looks_of(lines: Sequence[str]) -> tuple[tuple[Look, ...], int, bool]:
    """The looks that the lines of metrics.jsonl tell of, from before the first step to the end.

    Steps of several phases are counted one after another. What an interrupted run did again stands
    there twice, with the same numbers.

    Returns:
        The looks; how many optimiser steps were taken in all; and whether the model that was looked
        at on the way is the one that came out, without which only both ends are among the looks.
    """
    events = events_of(lines)
    sizes: dict[str, int] = {}
    for event in events:
        if event["event"] == "step":
            sizes[event["phase"]] = max(event["step"], sizes.get(event["phase"], 0))
    total, starts = sum(sizes.values()), dict(zip(sizes, _sums(sizes.values()), strict=True))
    seen = [event for event in events if event["event"] == "look"]
    before, after = ([e for e in seen if e["when"] == when][-1] for when in ("before", "after"))
    between = {starts[e["phase"]] + e["step"]: e for e in seen if e["when"] == "step"}
    if not after["in_place"]:
        between = {}
    at = [(step, event) for step, event in sorted(between.items()) if step < total]
    return (
        tuple(
            Look(step=step, **{name: event.get(name) for name in SETS})
            for step, event in [(0, before), *at, (total, after)]
        ),
        total,
        after["in_place"],
    )


def _sums(sizes: Iterable[int]) -> list[int]:
    """What came before each, summed."""
    return [0, *accumulate(sizes)][:-1]


def worst(looks: Sequence[Look]) -> dict[str, float]:
    """The worst moments of one run, by what they mean; empty with fewer than two looks."""
    if len(looks) < 2:
        return {}
    gone = [look.forget for look in looks if look.forget is not None]
    kept = [look.retain for look in looks if look.retain is not None]
    found: dict[str, float] = {}
    if len(gone) == len(looks):
        forgotten = np.array(gone)
        first = int(np.argmax(forgotten <= forgotten[-1]))
        found["highest accuracy on what was forgotten, once it was as low as at the end"] = (
            forgotten[first:].max()
        )
        found["largest return of what was forgotten, from one look to any later one"] = (
            windowed_forgetting(1 - forgotten, len(looks))
        )
    if len(kept) == len(looks):
        found |= falls(kept, "look", "run")
        if len(gone) == len(looks):
            tasks = [kept, 1 - forgotten]  # the one known before the first step, the other since
            found["what holds at the worst moment (WC-ACC of what stays and 1 - what is gone)"] = (
                worst_case_accuracy(tasks, [(0, 1), (1, len(looks))])
            )
    return {name: float(value) for name, value in found.items()}


def _return(looks: Sequence[Look]) -> str:
    """When what was forgotten came back most, in a sentence."""
    known = [(look.step, look.forget) for look in looks if look.forget is not None]
    back, start, end = max(
        ((later[1] - earlier[1], earlier, later)
         for i, earlier in enumerate(known) for later in known[i + 1 :]),
        key=lambda found: found[0], default=(0.0, None, None),
    )  # fmt: skip
    if start is None or end is None or back <= 0:
        return "What was forgotten never rose from one look to a later one."
    return (
        f"What was forgotten came back most from step {start[0]:,} ({start[1]:.3f}) to step "
        f"{end[0]:,} ({end[1]:.3f})."
    )


def _checked(series: Any, intervals: Sequence[tuple[int, int]]) -> tuple[Array, list[int]]:
    values = np.asarray(series, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2 or len(intervals) != len(values):
        raise BadInput(
            "accuracies must have the shape (tasks, evaluations), with at least two tasks and one "
            "interval for each"
        )
    if any(not 0 <= start < end <= values.shape[1] for start, end in intervals):
        raise BadInput("an interval must lie within the evaluations and hold at least one")
    return values, [end for _, end in intervals]
