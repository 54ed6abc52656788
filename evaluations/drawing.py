"""The audit of models that draw: is the forgotten still drawn, and at what price is it not?

Two numbers belong together: how seldom pictures under a forgotten condition show it, and whether
they are pictures at all. A network that draws noise has not forgotten, it is broken.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from unlearn.attacks.interface import Attack
from unlearn.attacks.signals import Signals
from unlearn.case import Case
from unlearn.errors import BadInput
from unlearn.evaluations import clip, exposure, guards, pictures
from unlearn.evaluations import criteria as rules
from unlearn.evaluations.examination import concluded, label, request
from unlearn.evaluations.judging import judge
from unlearn.evaluations.measure import nonmembers, parts
from unlearn.evaluations.pictures import Drawn
from unlearn.evaluations.schema import Checkpoint, Report
from unlearn.evaluations.seen import Seen
from unlearn.interface import Concepts, Records
from unlearn.pipeline import Pipeline
from unlearn.run import Role, Run
from unlearn.tasks.base import Encoded
from unlearn.workplace import Outcome as Done

Array = npt.NDArray[np.float64]


class DiffusionExamination:
    """Draws with every model, lets a judge look, and concludes."""

    def __init__(self, criteria: Any = None) -> None:
        self.criteria = rules.read(criteria)
        self.drawn: dict[Checkpoint, Drawn] = {}
        self.signals: dict[Checkpoint, dict[str, Signals]] = {}
        self.scores: dict[Checkpoint, dict[str, dict[str, Array]]] = {}
        self.weights: dict[Role, dict[str, str]] = {}
        self.known: dict[Any, pictures.Known] = {}

    def prepare(self, case: Case) -> None:
        """Find a judge, and what to draw.

        Raises:
            BadInput: a deep audit, impossible settings, a CLIP model that is none, or a classifier
                that cannot judge.
        """
        self.depth = case.config.audit  # type: ignore[attr-defined]
        if self.depth == "deep":
            raise BadInput(
                "a deep audit trains many models like the original, which is not supported for "
                "diffusion pipelines: pass --audit standard"
            )
        self.sampling = pictures.sampling(case)
        named = case.config.clip
        self.clip = None if named is None else clip.read(case.clip, label(str(named)))
        self.judge, self.unjudged = judge(case)
        self.conditions = pictures.conditions(case, self.sampling, self.judge)

    def measure(self, role: Role, model: nn.Module, case: Case, run: Run, directory: Path) -> None:
        """Draw, look and denoise with one model; what was drawn before is read back."""
        assert isinstance(model, Pipeline)  # noqa: S101
        searched = None if isinstance(case.target, Records) else self.known
        self.weights[role] = _weights(model, case.checkpoint.task)
        self.drawn[role] = pictures.drawn(
            role, model, self.conditions, self.sampling, self.judge, run, self.depth, searched,
            self.clip,
        )  # fmt: skip
        if model.steps and model.steps != self.sampling.steps:
            run.note(
                f"The {role} pipeline is made to be sampled in {model.steps} "
                f"step{'' if model.steps == 1 else 's'}, and was."
            )
        sets: dict[str, Encoded] = parts(case, case.tasks()[role])
        sets = {name: part for name, part in sets.items() if len(part)}
        self.signals[role] = {
            name: pictures.losses(role, model, part, run, directory, name)
            for name, part in sets.items()
        }
        self.scores[role] = {
            name: pictures.scores(role, model, sets[name], run, directory, name, self.depth)
            for name in ("forget", nonmembers(case) or "")
            if name in sets
        }

    def conclude(self, case: Case, outcome: Done, run: Run, directory: Path) -> Report:
        """Decide, and write the report in all its forms."""
        outcome.notes = run.notes
        seen = self.seen(case, run)
        blind, warning = (
            guards.blind_baseline(case, self.criteria) if len(case.sets.forget) else ([], None)
        )
        attacked = self.attacked(case)
        checks = [
            *seen.checks(self.criteria),
            *exposure.checks(attacked, case, self.criteria, warning),
            *blind,
            *guards.changed(self.weights, case, outcome.fingerprint_out),
        ]
        shown = not isinstance(case.target, Records) or case.config.include_examples
        return concluded(
            case, outcome, directory, self.criteria, checks,
            request=request(case) | self._facts(),
            limits=self._limits(case),
            curves=exposure.curves(attacked, tuple(s.attack.name for s in attacked)),
            exposed=exposure.exposed(attacked),
            grids=seen.grids() if shown else (),
        )  # fmt: skip

    def seen(self, case: Case, run: Run) -> Seen:
        """What all models drew."""
        return Seen(
            self.conditions, self.drawn, self.judge, self.unjudged, case, run.device,
            self.clip.name if self.clip else "",
        )  # fmt: skip

    def attacked(self, case: Case) -> list[exposure.Scores]:
        """Membership attacks on the forget records, if there is anything to tell them from."""
        against = nonmembers(case)
        of_records = isinstance(case.target, Records)
        if self.drawn["unlearned"].steps != self.drawn["original"].steps:
            return []  # it draws in one step and denoises nothing: losses mean nothing
        if not len(case.sets.forget) or (against is None and not of_records):
            return []
        loss = Attack("loss", "Denoising loss", "Carlini et al. 2023, arXiv 2301.13188, section 5",
                      lambda *_: np.zeros(0))  # fmt: skip
        found = []
        for attack in (loss, *(score.attack for score in pictures.SCORES)):
            if attack is not loss and attack.name not in self.scores["unlearned"]["forget"]:
                continue  # of a closer audit

            def said(role: Checkpoint, name: str, attack: Attack = attack) -> Array:
                if attack is loss:
                    raw = -self.signals[role][name].loss()
                else:
                    raw = self.scores[role][name][attack.name]
                return np.nan_to_num(raw, nan=exposure.LOWEST, neginf=exposure.LOWEST)

            members = {role: said(role, "forget") for role in self.signals}
            others = {role: said(role, against) for role in self.signals} if against else {}
            record = self.signals["unlearned"]["forget"].record
            found.append(exposure.Scores(attack, members, others, record))
        return found

    def _facts(self) -> dict[str, str]:
        often = {c.subset: c.count for c in self.conditions}
        counts = " and ".join(
            f"{n} per {'forgotten' if s == 'forget' else 'retained'} condition"
            for s, n in often.items()
        )
        how = f"{self.sampling.steps} steps, guidance {self.sampling.guidance:g}"
        told = {"pictures": f"{counts}, {how}"}
        if self.clip:
            told["CLIP model"] = f"{self.clip.name}, weights {self.clip.fingerprint[:16]}"
        if self.judge is None:
            return told | {"judge": "none"}
        right, text = self.judge.right, self.judge.title
        if right:
            text += f", right on {np.mean(right):.1%} of {len(right)} real pictures it never saw"
        return told | {"judge": text}

    def _limits(self, case: Case) -> tuple[str, ...]:
        found = [
            "What pictures show is what one classifier sees in them, not what people would see."
            if self.judge
            else self.unjudged,
        ]
        if self.drawn["unlearned"].steps != self.drawn["original"].steps:
            found.append(
                "The pipeline draws in one step and is no denoiser: attacks on denoising, and "
                "searches by it for other conditions, were not run."
            )
        if not self.drawn["unlearned"].numbers:
            found.append(
                "Nobody searched for other prompts or conditions that bring the forgotten back, "
                "and a pass does not rule them out."
            )
        if self.judge and not self.judge.right:
            found.append(
                "How often the classifier is right was not measured: no labelled records were "
                "given."
            )
        found.append("Distances in a classifier's features are no FID, nor comparable with one.")
        found.append(
            "Copies of the original checkpoint and of the data elsewhere were not examined."
        )
        if nonmembers(case) is None:
            found.append("No holdout was given: membership was not tested against unseen records.")
        if case.retrained is None:
            found.append("No retrained model was given: what forgetting looks like is a guess.")
        else:
            found.append(
                "One retrained model stands for all: how much two of them differ was not measured."
            )
        if isinstance(case.target, Concepts):
            found.append("Only the prompts named here, and captions of the records, were drawn.")
        if loosened := self.criteria.looser_than_shipped():
            found.append(f"The criteria are looser than the shipped ones in {', '.join(loosened)}.")
        return tuple(found)


def _weights(model: Pipeline, task: Any) -> dict[str, str]:
    """SHA-256 of every parameter of every component, but of the denoiser's output layer."""
    last = {id(p) for p in task.output_layer(model).parameters()}
    components = model.pipeline.components.items()
    return {
        f"{name}.{own}": hashlib.sha256(p.detach().float().cpu().numpy().tobytes()).hexdigest()
        for name, part in components
        if isinstance(part, nn.Module)
        for own, p in part.named_parameters()
        if id(p) not in last
    }
