"""What somebody with both checkpoints learns: whose hidden states moved, and where weights changed.

The model before the request is a copy that the audit cannot see (it may be kept, sold or cached).
Beside it, even an exact retrain says something about what was removed; so everything here is for
information, and stands beside the same for the retrained model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from unlearn.attacks import activation_difference, weight_difference
from unlearn.attacks.weight_difference import Change
from unlearn.case import Case
from unlearn.errors import BadInput
from unlearn.evaluations.criteria import Check
from unlearn.evaluations.exposure import value
from unlearn.evaluations.measure import Measured, Measurements, Taking, nonmembers
from unlearn.evaluations.schema import Checkpoint, Value
from unlearn.interface import WITH_LOGITS, Classes
from unlearn.tasks.base import Encoded

Array = npt.NDArray[np.float64]

COMPARED = 200  # records per set
CHEN, GAO = "Chen et al. 2021, arXiv 2005.02205", "Gao et al. 2022, arXiv 2202.03460"


def others(case: Case) -> str:
    """Records beside which those of the forget set are told: unseen ones, else retained ones."""
    return nonmembers(case) or ("retain" if case.sets.retain is not None else "")


def look(found: Measured, taking: Taking, case: Case) -> None:
    """Hidden states of some records, and what the weights have become; in deep audits."""
    task = case.tasks()[taking.role]
    deep = case.config.audit == "deep"  # type: ignore[attr-defined]
    if not deep or task.name not in WITH_LOGITS or not others(case):
        return
    try:
        for name in ("forget", others(case)):
            part = case.sets.named()[name].sample(COMPARED, case.config.seed)  # type: ignore[index]
            found.curves[f"states/{name}"] = _states_of(taking, part.as_read(task), name)
        if taking.role != "original":
            found.curves["weights"] = taking.arrays("weights", lambda: _changed(taking.model, case))
    except BadInput as error:
        why = f"The {taking.role} model could not be compared with the original"
        taking.run.note(f"{why}: {error}.")


def _states_of(taking: Taking, part: Encoded, name: str) -> dict[str, Array]:
    """Hidden states, by layer; they say much about a record and stay with unfinished work."""

    def read() -> dict[str, torch.Tensor]:
        states = activation_difference.states(taking.model, part, taking.run)
        return {layer: torch.from_numpy(values) for layer, values in states.items()}

    kept = taking.run.once(f"states-{taking.role}-{name}", read)
    return {layer: states.double().cpu().numpy() for layer, states in kept.items()}


def _changed(model: nn.Module, case: Case) -> dict[str, Any]:
    """What the step from the original to this model says.

    Raises:
        BadInput: the original is no longer there, or has other tensors.
    """
    before = case.checkpoint.build()
    if before is model:
        raise BadInput("the original lived in memory and has become the unlearned model")
    found = weight_difference.differences(before, model)
    blocks, whole = weight_difference.in_blocks(found), sum(found.values(), Change())
    numbers = {
        "relative": [whole.relative],
        "entries": [whole.share_changed],
        "largest": [max((b.share_of(whole) for b in blocks.values()), default=0.0)],
    }
    task, sets = case.checkpoint.task, case.sets
    name = weight_difference.output_name(before, task)
    gone: list[int] = []
    rest: list[int] | None = None
    if isinstance(case.target, Classes):
        gone = list(case.target.indices)
    elif task.name == "causal_lm" and sets.retain is not None:
        gone, rest = weight_difference.answer_tokens(sets.forget, sets.retain)
    if gone and (rest is None or rest):
        old, new = (dict(m.named_parameters())[name] for m in (before, model))
        moved = weight_difference.rows_moved(old, new)
        numbers["rows"] = [weight_difference.rows_named(moved, gone, rest)]
    return numbers


def checks(measured: Measurements, case: Case) -> list[Check]:
    """What both checkpoints give away; for information."""
    return [*_states(measured, case), *_weights(measured, len(case.sets.forget))]


def _states(measured: Measurements, case: Case) -> list[Check]:
    """How well records of the forget set are told by how far their hidden states moved."""
    beside = others(case)
    curves = {role: m.curves for role, m in measured.items()}
    if not all(f"states/{beside}" in c for c in curves.values()) or "original" not in curves:
        return []
    before, names = curves["original"], [f"states/{name}" for name in ("forget", beside)]
    values: dict[str, Any] = {}
    for role in ("unlearned", "retrained"):
        if role in curves and _shapes(curves[role][names[0]]) == _shapes(before[names[0]]):
            pair = [activation_difference.moved(before[x], curves[role][x]) for x in names]
            values[role] = value(*pair)
    if "unlearned" not in values:
        return []
    title = "With both checkpoints: forget records told by how far their hidden states moved"
    fields = {
        "title": f"{title}, beside the {beside.replace('_', ' ')} set", "unit": "AUC",
        "n": len(next(iter(before[names[0]].values()))), "better": "closer_to_retrained",
        "group": "distance", "source": CHEN, **values,
    }  # fmt: skip
    return [Check("hidden_states_moved", "forget", fields=fields)]


def _shapes(states: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    """Of every layer; a reference of another architecture has others, and moved from nowhere."""
    return {layer: values.shape for layer, values in states.items()}


WEIGHTS = {
    "relative": ("weights_moved", "Change of the weights, relative to their length", "", ""),
    "entries": ("weights_changed", "Weights that changed", "share of weights", ""),
    "largest": ("weights_in_one_block", "Largest part of the change that sits in one block",
                "share of the squared change", ""),
    "rows": ("rows_moved", "With both checkpoints: what was forgotten told by the rows of the "
             "output layer that moved", "AUC", GAO),
}  # fmt: skip


def _weights(measured: Measurements, n: int) -> list[Check]:
    steps: Mapping[Checkpoint, Mapping[str, Array]] = {
        role: m.curves["weights"] for role, m in measured.items() if "weights" in m.curves
    }
    found = []
    for key, (name, title, unit, source) in WEIGHTS.items():
        values: dict[str, Any] = {
            role: Value(value=float(step[key][0])) for role, step in steps.items() if key in step
        }
        if "unlearned" in values:
            fields = {"title": title, "unit": unit, "n": n, "better": "closer_to_retrained",
                      "group": "distance", "source": source, **values}  # fmt: skip
            found.append(Check(name, "forget", fields=fields))
    return found
