"""What both checkpoints give away, from what was measured on each."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.evaluations.measurements import text_case
from unlearn.evaluations import differences
from unlearn.evaluations.measure import Measured


def measured(width: int, seed: int, **more: Any) -> Measured:
    draw = np.random.default_rng(seed)
    shown = Measured({})
    for name in ("forget", "holdout"):
        shown.curves[f"states/{name}"] = {"block 0": draw.normal(size=(8, width))}
    shown.curves.update(more)
    return shown


def test_a_reference_of_another_width_is_left_out() -> None:
    case, weights = text_case(audit="deep", shadows=0), {"relative": np.array([0.5])}
    found = {
        "original": measured(4, 0),
        "unlearned": measured(4, 1, weights=weights),
        "retrained": measured(6, 2),
    }
    states, moved = differences.checks(found, case)
    assert states.name == "hidden_states_moved"
    assert {"unlearned"} == {"unlearned", "retrained"} & states.fields.keys()
    assert moved.fields["unlearned"].value == 0.5
    # records are those of the forget set, in both
    assert states.fields["n"] == 8
    assert moved.fields["n"] == len(case.sets.forget)
    found["unlearned"] = measured(6, 1)
    assert differences.checks(found, case) == []
