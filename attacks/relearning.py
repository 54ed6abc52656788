"""Relearning: show a model some of what it forgot and see whether the rest comes back with it.

A few of the forget records are fine-tuned on for a few steps, beside records of the retain set, so
that a classifier cannot win by giving the forgotten answer to everything. The *other* forget
records are measured on the way. What was only hidden returns at once and as a whole; a model that
never knew it has to learn every record anew.

The attack teaches, so a curve means nothing on its own: it is read against the same attack on a
model retrained without the forget set. The time it takes is the relearn or anamnesis time
(Golatkar et al. 2020, arXiv 1911.04933; Chundawat et al. 2023, arXiv 2201.05629), steps of the
retrained model over steps of the unlearned one are the savings; testing on records that were not
shown follows Deeb and Roger (2024, arXiv 2410.08827).

An attacker without any forget record trains on something else (Hu et al. 2024, arXiv 2406.13356):
:func:`unrelated` shows the model records of the retain set alone, so nothing is taught that was to
be forgotten, and what comes back was there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from unlearn.attacks.interface import Ground, Search
from unlearn.attacks.signals import collect, hit_rates
from unlearn.attacks.weights import strongest
from unlearn.errors import BadInput
from unlearn.interface import Subject
from unlearn.run import Run, Silent
from unlearn.tasks.base import Encoded
from unlearn.training import Term, Training, descend, likelihood

Array = npt.NDArray[np.float64]

STEPS = (0, 1, 2, 4, 8, 16, 32)
# both ways are tried on every model, and the better one counts
ADAMW = tuple(Training(lr=lr, weight_decay=0.0, max_loss=1e3) for lr in (1e-4, 1e-3))
SGD = tuple(replace(ways, lr=30 * ways.lr, optimizer="sgd") for ways in ADAMW)
SHOWN, HELD = 64, 256


@dataclass(frozen=True)
class Relearned:
    """What came back, and when.

    Attributes:
        steps: optimiser steps taken at each measurement, shape (k,).
        hits: share of argmax hits of each held-out record (a closing end-of-sequence token does
            not count), shape (k, n).
        loss: mean NLL per unit of each held-out record, in nats, shape (k, n).
        lr: the learning rate of this curve.
    """

    steps: npt.NDArray[np.int64]
    hits: Array
    loss: Array
    lr: float


def split(n: int, seed: int, shown: int = SHOWN) -> tuple[list[int], list[int]]:
    """Which forget records are shown and which are held out; a function of the arguments alone.

    Every model must be attacked with the same split.

    Args:
        n: number of forget records.
        seed: of the draw.
        shown: at most this many are shown. A forgotten class needs few: with many, also a model
            that never knew the class learns it in full.

    Returns:
        Positions of at most ``shown`` records from one random half and at most ``HELD`` from the
        other, each in ascending order.

    Raises:
        BadInput: fewer than two records, or no records to show.
    """
    if n < 2:
        raise BadInput(f"relearning shows some forget records and tests on others; there is {n}")
    if shown < 1:
        raise BadInput(f"relearning shows some forget records, so shown must not be {shown}")
    order = np.random.default_rng(seed).permutation(n)
    cut = n // 2
    return sorted(order[:cut][:shown].tolist()), sorted(order[cut:][:HELD].tolist())


def relearn(
    model: nn.Module,
    shown: Encoded,
    held: Encoded,
    retain: Encoded | None,
    run: Run,
    settings: Training | None = None,
    steps: Sequence[int] = STEPS,
) -> Relearned:
    """Fine-tune on ``shown`` and measure ``held`` on the way; the weights are put back afterwards.

    The attacker tries several ways and the curve with the largest mean area counts, in every
    model alike: two learning rates, and, where a whole class was forgotten, each of them also with
    the output layer's rows of that class renewed (set to the mean of the others) after the first
    measurement.

    Cost: in each of the two or four tries ``steps[-1]`` training steps and a forward pass over
    ``held`` at each of ``steps``; one copy of the weights on the CPU.

    Args:
        model: on ``run.device``; bit for bit the same when this returns or raises.
        shown: the forget records the attacker has.
        held: the forget records whose return is measured.
        retain: trained on beside ``shown``, with equal weight; None for no such term.
        run: task, seed, device and progress; nothing is written to its directory.
        settings: the one way to train, its ``epochs`` replaced by ``steps``; None: each of
            ``SGD`` for classifiers, of ``ADAMW`` for others.
        steps: when to measure, ascending; 0 is before any training.

    Raises:
        BadInput: ``steps`` do not ascend from 0 or later to at least 1.
        Collapsed: the model was destroyed at every learning rate.
    """
    if list(steps) != sorted(set(steps)) or not steps or steps[0] < 0 or steps[-1] < 1:
        raise BadInput(f"steps must ascend from 0 or later to at least 1, got {list(steps)}")
    usual = SGD if run.task.name == "classification" else ADAMW
    gone = _gone(model, shown, retain)
    ways = [
        partial(_curve, model, shown, held, retain, run, way, steps, renewed)
        for way in ([settings] if settings else usual)
        for renewed in ([[], gone] if gone else [[]])
    ]
    return strongest(
        model, ways, lambda curve: recovered(curve.hits, curve.steps).mean(), "relearning"
    )


def unrelated(model: nn.Module, ground: Ground, run: Run) -> Array:
    """How much of the forget set comes back with training on the retain set alone.

    Cost: that of :func:`relearn` with at most ``HELD`` forget records, all of them held out.

    Returns:
        Area under the recovery curve of each record, shape (n,), in [0, 1].

    Raises:
        BadInput: no retain records.
        Collapsed: the model was destroyed at every learning rate.
    """
    if ground.retain is None:
        raise BadInput("relearning on other records needs records that were to stay: pass --retain")
    found = relearn(model, ground.retain, ground.forget.sample(HELD, run.seed), None, run)
    return recovered(found.hits, found.steps)


def recovered(hits: Any, steps: Any) -> Array:
    """Area under the recovery curve of each record, as a share of the largest possible.

    Trapezoids over the number of steps, divided by the range of steps.

    Args:
        hits: values in [0, 1], shape (k, n).
        steps: where they were measured, ascending, shape (k,).

    Returns:
        Values in [0, 1], shape (n,): 1 for a record that was right all along.

    Raises:
        BadInput: shapes that do not fit, or fewer than two measurements.

    >>> recovered([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]], [0, 1, 4])
    array([0.875, 1.   ])
    """
    curve, at = np.asarray(hits, dtype=np.float64), np.asarray(steps, dtype=np.float64)
    if curve.ndim != 2 or at.shape != curve.shape[:1] or len(at) < 2:
        raise BadInput(
            "a recovery curve needs hits of shape (k, n) and steps of shape (k,), k at least 2; "
            f"got {curve.shape} and {at.shape}"
        )
    return np.asarray(np.trapezoid(curve, at, axis=0) / (at[-1] - at[0]))


def steps_to(curve: Any, steps: Any, level: float) -> int | None:
    """Relearn time: the first measured step at which a curve reaches ``level``; None if never.

    Args:
        curve: mean over records at each step, shape (k,).
        steps: where it was measured, ascending, shape (k,).
        level: to reach.

    >>> steps_to([0.0, 0.4, 0.9], [0, 1, 4], 0.5)
    4
    """
    reached = np.flatnonzero(np.asarray(curve, dtype=np.float64) >= level)
    return int(steps[reached[0]]) if len(reached) else None


def _curve(
    model: nn.Module,
    shown: Encoded,
    held: Encoded,
    retain: Encoded | None,
    run: Run,
    settings: Training,
    steps: Sequence[int],
    renewed: Sequence[int],
) -> Relearned:
    watch = _Watch(model, held, run, steps)
    watch.measure(0)
    if renewed:
        _renew(run.task.output_layer(model), renewed)
    # the middle of the last step: no rounding can add or lose one
    epochs = (steps[-1] - 0.5) / replace(settings, epochs=1).steps(len(shown))
    terms = [Term("shown", shown, likelihood, "unit")]
    if retain is not None:
        terms.append(Term("retain", retain, likelihood, "unit"))
    quiet = Run(run.task, run.seed_of("relearn"), run.device, progress=watch)
    descend(Subject(model), terms, replace(settings, epochs=epochs), quiet)
    return Relearned(
        np.array(steps, dtype=np.int64), np.stack(watch.hits), np.stack(watch.loss), settings.lr
    )


def _gone(model: nn.Module, shown: Encoded, retain: Encoded | None) -> list[int]:
    """Classes that only ``shown`` has; none where the output layer has no row for each class."""
    if retain is None or "label" not in shown[0]:
        return []
    if getattr(shown.task.output_layer(model), "out_features", None) != shown.task.classes:
        return []
    shown_labels, kept = ({int(s[i]["label"]) for i in range(len(s))} for s in (shown, retain))
    return sorted(shown_labels - kept)


def _renew(layer: nn.Module, rows: Sequence[int]) -> None:
    """Set rows of an output layer to the mean of the others.

    A class can be silenced by its output alone, which gradient steps undo more slowly than they
    teach a new class; an attacker undoes it at once.
    """
    with torch.no_grad():
        for values in layer.parameters():
            others = torch.ones(len(values), dtype=torch.bool, device=values.device)
            others[list(rows)] = False
            values[list(rows)] = values[others].mean(0)


class _Watch(Silent):
    """Is told about every training step, and looks at the held-out records at some of them."""

    def __init__(self, model: nn.Module, held: Encoded, run: Run, steps: Sequence[int]) -> None:
        self.model, self.held, self.run, self.steps = model, held, run, set(steps)
        self.hits: list[Array] = []
        self.loss: list[Array] = []

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """A step was taken."""
        self.measure(done)
        self.run.progress.advance("relearn", done, total, numbers)

    def measure(self, step: int) -> None:
        """One forward pass over the held-out records, if this step is one to measure at."""
        if step not in self.steps:
            return
        quiet = Run(self.run.task, device=self.run.device)
        found = collect(self.model, self.held, quiet, b"relearn", "relearn")
        self.hits.append(hit_rates(found))
        self.loss.append(found.loss())


SEARCHES = (
    Search(
        name="relearning_unrelated",
        title="Relearning on other records: share of the forget records that comes back",
        unit="area under the curve",
        source="Hu et al. 2024, arXiv 2406.13356",
        score=unrelated,
        tasks=("causal_lm", "classification"),
        needs=("retain",),
    ),
)
