"""What is left inside: probes of hidden layers, and how fast it comes back.

Every number here needs the same number from a retrained model beside it: probes and relearning
teach, and the question is what they find *more* than in a model that never knew. Of several layers
the one counts in which the original and the retrained model differ most; the unlearned model has no
say in the choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from unlearn.attacks.relearning import recovered, steps_to
from unlearn.case import Case
from unlearn.errors import BadInput, Unsupported, sentence
from unlearn.evaluations import probes
from unlearn.evaluations.criteria import Check, Criteria
from unlearn.evaluations.findings import beside, shown
from unlearn.evaluations.measure import Decoder, Measurements
from unlearn.evaluations.schema import CHECKPOINTS, Checkpoint, Layers, Value
from unlearn.interface import Classes
from unlearn.run import Run

Array = npt.NDArray[np.float64]
Curves = Mapping[Checkpoint, Array]  # by layer and record, shape (layers, records)

RELEARNED = "Golatkar et al. 2020, arXiv 1911.04933; Deeb & Roger 2024, arXiv 2410.08827"
ALAIN = "Alain & Bengio 2016, arXiv 1610.01644"
PROBES = {
    "one_shot_probe": ("One-shot probe of hidden layers", ALAIN),
    "linear_probe": ("Linear probe of hidden layers", ALAIN),
    "knn_probe": ("Nearest-neighbours probe of hidden layers", ALAIN),
    "logit_lens": ("Logit lens: the true answer read from hidden layers",
                   "nostalgebraist 2020; Lynch et al. 2024, arXiv 2402.16835"),
}  # fmt: skip


def decoder(model: nn.Module, case: Case, run: Run) -> Decoder | None:
    """The original language model's way from hidden states to words, for a closer audit."""
    if case.config.audit == "quick" or run.task.name != "causal_lm":  # type: ignore[attr-defined]
        return None
    try:
        return probes.decoder(model, case.sets.forget, run)
    except Unsupported as error:
        run.note(f"The logit lens was not run: {error}.")
        return None


class Inside:
    """What probes and relearning found in every model; probes are fitted once."""

    def __init__(self, measured: Measurements, case: Case) -> None:
        self.read: dict[str, dict[Checkpoint, Array]] = {}
        self.control: Array | None = None
        self.layers: tuple[str, ...] = ()
        self.relearning: dict[Checkpoint, Mapping[str, Array]] = {}
        self.unable = ""
        self.expected: list[str] = []
        if case.config.audit != "quick":  # type: ignore[attr-defined]
            texts = case.checkpoint.task.name == "causal_lm"
            whole = isinstance(case.target, Classes)
            self.expected = ["logit_lens" if texts else "one_shot_probe"] if texts or whole else []
            self.expected.append("relearning")
        for role in CHECKPOINTS:
            if role not in measured:
                continue
            found = measured[role].curves
            if "relearning" in found:
                self.relearning[role] = found["relearning"]
            if "lens" in found:
                self.layers = self.layers or tuple(found["lens"])
                stacked = np.stack(list(found["lens"].values()))
                self.read.setdefault("logit_lens", {})[role] = np.exp(
                    np.nan_to_num(stacked, nan=-1e3)
                )
            elif measured[role].signals["forget"].features:
                self._probe(role, measured, case)
        self._comparable()

    def _probe(self, role: Checkpoint, measured: Measurements, case: Case) -> None:
        tables = {n: measured[role].signals.get(n) for n in ("forget", "retain")}
        sets = {name: table for name, table in tables.items() if table is not None}
        if len(sets) < 2:
            self.unable = "Probes learn the other classes from the retain set: pass --retain."
            return
        try:
            found = probes.class_probe(
                {name: table.features for name, table in sets.items()},
                {name: table.label for name, table in sets.items()},
                case.target, case.config.seed,
            )  # fmt: skip
        except BadInput as error:
            self.unable = sentence(error)
            return
        self.layers = self.layers or found.layers
        for name, values in (
            ("one_shot_probe", found.one_shot),
            ("linear_probe", found.linear),
            ("knn_probe", found.knn),
        ):
            if values is not None:
                self.read.setdefault(name, {})[role] = values
        if role == "unlearned":
            self.control = found.control.mean(1)

    def _comparable(self) -> None:
        """Drop what was read from models with other layers than the original's."""
        for curves in self.read.values():
            shape = next(iter(curves.values())).shape  # the original comes first
            for role in [r for r, c in curves.items() if c.shape != shape]:
                del curves[role]

    def checks(self, criteria: Criteria) -> list[Check]:
        """Probes and relearning, each beside the retrained model."""
        found = [self._probed(name, values, criteria) for name, values in self.read.items()]
        found += _relearning(self.relearning, criteria)
        for name in self.expected:
            if not any(check.name == name for check in found):
                title, source = PROBES.get(name, ("Relearning", RELEARNED))
                group = "probe" if name in PROBES else "durability"
                why = self.unable or "It could not be made on this model and these records."
                fields = {"title": title, "n": 0, "group": group, "source": source,
                          "better": "closer_to_retrained"}  # fmt: skip
                found.append(Check(name, "forget", state=("not_run", why), fields=fields))
        return found

    def _probed(self, name: str, curves: Curves, criteria: Criteria) -> Check:
        title, source = PROBES[name]
        layer = _telling(curves)
        values: dict[Checkpoint, Array | None] = {role: c[layer] for role, c in curves.items()}
        fields = shown(
            f"{title} ({self.layers[layer]})", values, (0.0, 1.0), unit=_unit(name),
            better="closer_to_retrained", group="probe", source=source,
        )  # fmt: skip
        return beside(name, values, fields, criteria)

    def figures(self) -> tuple[Layers, ...]:
        """What probes read, layer by layer."""
        return tuple(
            Layers(
                probe=name,
                title=PROBES[name][0],
                unit=_unit(name),
                layers=self.layers,
                **{role: tuple(c.mean(1)) for role, c in curves.items()},
                control=tuple(self.control)
                if name == "linear_probe" and self.control is not None
                else (),
            )
            for name, curves in self.read.items()
        )


def _unit(name: str) -> str:
    return "probability per token" if name == "logit_lens" else "share of records"


def _telling(curves: Curves) -> int:
    """The layer in which original and retrained model differ most; the last without the latter."""
    if "retrained" not in curves:
        return len(curves["original"]) - 1
    return int(np.argmax((curves["original"] - curves["retrained"]).mean(1)))


def _relearning(
    curves: Mapping[Checkpoint, Mapping[str, Array]], criteria: Criteria
) -> list[Check]:
    if "unlearned" not in curves:
        return []
    areas: dict[Checkpoint, Array | None] = {
        role: recovered(c["hits"], c["steps"]) for role, c in curves.items()
    }
    fields = shown(
        "Relearning: share of the other forget records that comes back", areas, (0.0, 1.0),
        unit="area under the curve", better="closer_to_retrained", group="durability",
        source=RELEARNED,
    )  # fmt: skip
    found = [beside("relearning", areas, fields, criteria)]
    if "original" not in curves:  # relearning destroyed it: a note says so
        return found
    level = 0.9 * float(curves["original"]["hits"][0].mean())
    times = {r: steps_to(c["hits"].mean(1), c["steps"], level) for r, c in curves.items()}
    values: dict[str, Any] = {r: Value(value=float(t)) for r, t in times.items() if t is not None}
    never = [role for role, t in times.items() if t is None]
    last = int(curves["unlearned"]["steps"][-1])
    fields = {
        "title": "Relearn time: steps until nine tenths of the original's hits are back",
        "unit": "optimiser steps", "n": fields["n"], "better": "closer_to_retrained",
        "group": "durability", "source": RELEARNED, **values,
    }  # fmt: skip
    why = f"Not within {last} steps: {', '.join(never)}." if never else ""
    return [*found, Check("relearn_time", "forget", state=("info", why), fields=fields)]
