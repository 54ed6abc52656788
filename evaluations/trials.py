"""What a trial of a search is worth: a run and its quick audit, in two numbers.

Forgetting and utility are those of :mod:`unlearn.evaluations.objectives`, here over every finding
that the criteria require. (A report does not require what the original passes, too, unless a run
fails it; a search needs means of the same numbers for all trials.)

For ``memcontrol``, which forgets nothing but should learn without memorising, the two are those of
its paper (arXiv 2405.19458) in this audit's terms: *memorization*, how far training records stand
out from unseen ones (extraction strength or accuracy, retain less holdout; of pipelines 2 AUC - 1
of the denoising losses), and *quality* on the holdout, as a share of the original's (accuracy, mean
probability of a token, or the inverse denoising loss).

The original and the retrained model are measured once for all trials. A model that breaks, or that
gets less than half as much of ``LOOKED`` retained records right as the original (answers of a
classifier, tokens of a language model's answers), is not audited.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from unlearn import registry
from unlearn.case import Case
from unlearn.errors import UnlearnError
from unlearn.evaluations import criteria as rules
from unlearn.evaluations import exposure, findings, guards, robustness
from unlearn.evaluations.criteria import Check, Criteria, Decision
from unlearn.evaluations.examination import Examination, examiner, finding
from unlearn.evaluations.objectives import Objectives, objectives
from unlearn.evaluations.schema import Finding, Value
from unlearn.evaluations.stability import right
from unlearn.evaluations.statistics import auc
from unlearn.plan import Plan, check_names
from unlearn.run import Role, Run
from unlearn.workplace import Outcome

LEARNS = "memcontrol"  # the method that is searched for learning without memorising
HOPELESS = 0.5  # of the original's right answers, below which a trial is given up
LOOKED = 100  # retained records that are looked at for that


class Hopeless(UnlearnError):
    """A trial whose model has lost too much to be examined."""


def fixed(base: Plan) -> dict[str, Any]:
    """The hyperparameters that every trial of a request shares, as the method reads them."""
    return {name: base.hyperparameters[name] for name in base.given}


def planned(base: Plan, settings: Mapping[str, Any], out: Path | None = None) -> Plan:
    """The request of a search with these settings; its data is not read again.

    Raises:
        UnlearnError: the method, its needs or the scope say no.
    """
    method = registry.build(base.method_name, settings)
    check_names(method, base.checkpoint)
    found = replace(
        base,
        config=base.config.model_copy(update={"set": dict(settings), "scope": None, "out": out}),
        method=method,
        hyperparameters=registry.values(method),
        given=settings,
    )
    if callable(check := getattr(method, "check", None)):
        check(found.request())
    return found


class Trying:
    """The audit of all trials of a case; what it concludes are :class:`Objectives`.

    Args:
        case: target, sets and models.
        criteria: what is required; None: what ships.
    """

    def __init__(self, case: Case, criteria: Any = None) -> None:
        self.criteria = rules.read(criteria)
        self.audit: Any = examiner(case, criteria)
        self.known: set[Role] = set()
        self.before: float | None = None  # share of the original's right answers, where one looked
        self.audit.prepare(case)
        compared = len(case.sets.forget) > 0
        self.blind = guards.blind_baseline(case, self.criteria)[1] if compared else None

    def prepare(self, case: Case) -> None:
        """Done already: all trials are of one case."""

    def measure(self, role: Role, model: nn.Module, case: Case, run: Run, directory: Path) -> None:
        """Measure what is not known yet.

        Raises:
            Hopeless: the unlearned model lost more than half of the original's right answers.
        """
        if role in self.known:
            return
        if role == "original":
            self.before = looked(model, case, run)
        elif role == "unlearned" and self.before:
            now = looked(model, case, run) or 0.0
            if now < HOPELESS * self.before:
                raise Hopeless(
                    f"it is right on {now:.1%} of retained answers, where the original is on "
                    f"{self.before:.1%}: it was not audited"
                )
        self.audit.measure(role, model, case, run, directory)
        if role != "unlearned":
            self.known.add(role)

    def conclude(self, case: Case, outcome: Outcome, run: Run, directory: Path) -> Objectives:
        """What the run is worth, by its measurements and by membership as the loss tells it.

        Raises:
            Hopeless: a number is not finite.
            MissingNeed: nothing says how a model that forgot would look, or what must stay.
        """
        audit, criteria = self.audit, self.criteria
        if isinstance(audit, Examination):
            checks = findings.checks(audit.measured, case, criteria, self.blind)
            checks += robustness.checks(audit.measured, case, criteria)
            scores = exposure.score(audit.measured, case, None)[0]
        else:
            checks = audit.seen(case, run).checks(criteria)
            scores = audit.attacked(case)
        scores = [score for score in scores if score.attack.name == "loss"]
        checks = [*checks, *exposure.checks(scores, case, criteria, self.blind)]
        found = [undecided(check, criteria) for check in checks]
        for each in found:
            if each.verdict == "fail" and each.unlearned is None:
                raise Hopeless(f"{each.title} is not finite: the model is damaged")
        if case.method_name == LEARNS:
            return memorization(found, getattr(audit, "signals", None))
        return objectives(found)


def undecided(check: Check, criteria: Criteria) -> Finding:
    """A check as a report shows it, but without a verdict, and required if the criteria say so."""
    rule = criteria.rule(check.name, check.subset)
    verdict, reason = check.state or ("info", "")
    return finding(check, Decision(verdict, reason, rule is not None and rule.required))


def memorization(found: Sequence[Finding], signals: Any = None) -> Objectives:
    """How far training records stand out from unseen ones, and the quality on the latter.

    Args:
        found: findings of one audit.
        signals: of a pipeline, by model and set: they hold the denoising losses.

    Raises:
        Hopeless: a denoising loss is not finite, or the original is of no use on the holdout.
    """
    values = {(f.name, f.subset): (_of(f.original), _of(f.unlearned)) for f in found}
    seen = next((n for n in ("extraction_strength", "accuracy") if (n, "retain") in values), None)
    if seen is None:
        known, unseen = (signals["unlearned"][name].loss() for name in ("retain", "holdout"))
        if not (np.isfinite(known).all() and np.isfinite(unseen).all()):
            raise Hopeless("a denoising loss is not finite: the model is damaged")
        gap = 2 * auc(-known, -unseen) - 1
        quality = float(signals["original"]["holdout"].loss().mean() / unseen.mean())
    else:
        before, now = values[seen, "holdout"]
        gap = values[seen, "retain"][1] - now
        if seen == "accuracy":
            quality = now / (before or math.nan)
        else:
            loss_before, loss_now = values["loss", "holdout"]
            quality = math.exp(loss_before - loss_now)
    if not math.isfinite(gap + quality):
        raise Hopeless("the original is of no use on the holdout: there is no quality to compare")
    parts = {"memorization": max(0.0, gap), "quality": quality}
    return Objectives(parts["memorization"], parts["quality"], parts)


def looked(model: nn.Module, case: Case, run: Run) -> float | None:
    """Share of answers, or their tokens, that are right on a few records that must stay.

    None of models that draw.
    """
    kept = case.sets.retain or case.sets.holdout
    if kept is None or run.task.name == "diffusion":
        return None
    return right(model, kept.sample(LOOKED, run.seed), run)


def _of(value: Value | None) -> float:
    return math.nan if value is None else value.value
