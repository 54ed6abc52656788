"""The audit that ends every run: measure before and after, hold against rules, write it down.

:class:`Audit` measures one model at a time, so two are never in memory together; what it measured
is on disk, so an interrupted audit goes on and every number can be computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from unlearn.attacks.membership.loss import loss_score
from unlearn.attacks.signals import Signals, collect
from unlearn.evaluations import criteria, generation
from unlearn.evaluations.criteria import Decision
from unlearn.evaluations.memorization import exact_memorization, extraction_strength, rouge_l
from unlearn.evaluations.report import (
    Cost,
    Distribution,
    Example,
    Finding,
    Hyperparameter,
    Interval,
    RecordSet,
    Report,
    TrajectoryPoint,
    Value,
    render_html,
    render_markdown,
)
from unlearn.evaluations.statistics import auc, auc_interval, mean_interval
from unlearn.interface import Classes
from unlearn.plan import Plan, SetName
from unlearn.run import Outcome, Role, Run
from unlearn.tasks.base import Encoded

Array = npt.NDArray[np.float64]
Better = Literal["lower", "higher", "closer_to_retrained"]
ROLES: tuple[Role, ...] = ("original", "unlearned", "retrained")
SAMPLE = 1000  # examples measured of sets other than the forget set
ASKED = 200  # questions a language model is asked, per set
SHOWN = 5  # examples in the report, when asked for
POINTS = 400  # of the training trajectory


@dataclass(frozen=True)
class Metric:
    """A per-example number; ``values`` is None where it does not apply."""

    name: str
    title: str
    unit: str
    forget_better: Better
    values: Callable[[Measured], Array | None]
    bounded: bool = True


@dataclass(frozen=True)
class Measured:
    """What one model showed on one set; ``answers`` are a language model's, for the first ones."""

    signals: Signals
    rouge: Array | None
    is_text: bool


def _extraction(measured: Measured) -> Array | None:
    if not measured.is_text:
        return None
    hits = measured.signals.hits
    return np.array([extraction_strength(np.array(h, int), np.ones(len(h), int)) for h in hits])


def _exact(measured: Measured) -> Array | None:
    if not measured.is_text:
        return None
    hits = measured.signals.hits
    return np.array([exact_memorization(np.array(h, int), np.ones(len(h), int)) for h in hits])


def _accuracy(measured: Measured) -> Array | None:
    if measured.is_text:
        return None
    return np.array([float(h[0]) for h in measured.signals.hits])


METRICS = (
    Metric("extraction_strength", "Extraction strength", "share of the answer", "lower",
           _extraction),
    Metric("exact_memorization", "Exact memorization", "share of tokens", "closer_to_retrained",
           _exact),
    Metric("rouge_l_recall", "ROUGE-L recall of the greedy answer", "share of words",
           "closer_to_retrained", lambda m: m.rouge),
    Metric("accuracy", "Accuracy", "share of records", "lower", _accuracy),
    Metric("loss", "Loss", "nats per unit", "closer_to_retrained", lambda m: m.signals.loss(),
           bounded=False),
)  # fmt: skip


class Audit:
    """The quick audit: likelihood, extraction, answers, accuracy, loss-based membership."""

    def __init__(self) -> None:
        self.measured: dict[Role, dict[SetName, Measured]] = {}
        self.answers: dict[Role, list[str]] = {}

    def measure(self, role: Role, model: nn.Module, plan: Plan, run: Run, directory: Path) -> None:
        """Measure one model on every set; what an interrupted run measured is read back."""
        task = (plan.retrained if role == "retrained" and plan.retrained else plan.checkpoint).task
        key = bytes.fromhex((directory / "record.key").read_text().strip())
        self.measured[role] = {}
        for name, examples in plan.sets.named().items():
            part = examples if name == "forget" else examples.sample(SAMPLE, plan.config.seed)
            part = part if part.task is task else Encoded(part.examples, task)
            stem, phase = f"{role}-{name}", f"measure {role} on {name}"
            path = directory / "signals" / f"{stem}.parquet"
            if not path.exists():
                collect(model, part, run, key, phase).write(path)
            is_text = task.name == "causal_lm"
            rouge = self._rouge(role, model, part, run, stem) if is_text else None
            self.measured[role][name] = Measured(Signals.read(path), rouge, is_text)

    def _rouge(self, role: Role, model: nn.Module, examples: Encoded, run: Run, stem: str) -> Array:
        """ROUGE-L recall of the greedy answers to (a sample of) the prompts."""
        asked = examples.sample(ASKED, run.seed)
        path = run.work / "answers" / f"{stem}.json" if run.work else None
        if path is not None and path.exists():
            answers = json.loads(path.read_text())
        else:
            answers = generation.greedy_answers(model, asked, run, f"ask {stem}")
            if path is not None:
                path.parent.mkdir(exist_ok=True)
                path.with_suffix(".new").write_text(json.dumps(answers))
                path.with_suffix(".new").rename(path)
        if stem.endswith("-forget"):
            self.answers[role] = answers
        truth = generation.true_answers(asked)
        return np.array([rouge_l(t, a).recall for t, a in zip(truth, answers, strict=True)])

    def conclude(self, plan: Plan, outcome: Outcome, directory: Path) -> Report:
        """Decide, and write report.json, report.html and the model card."""
        findings = (*self._findings(plan), *self._membership(plan))
        verdict, reason = overall(findings)
        report = Report(
            title=f"Erasure of {plan.target} from {_label(plan.checkpoint.source)}",
            created=outcome.created,
            verdict=verdict,
            verdict_reason=reason,
            request=_request(plan),
            method=plan.config.method,
            hyperparameters=tuple(
                Hyperparameter(name=name, value=str(value), given=name in plan.given)
                for name, value in plan.hyperparameters.items()
            ),
            sets=tuple(
                RecordSet(name=name, n=facts["n"], fingerprint=facts["fingerprint"])
                for name, facts in outcome.sets.items()
            ),
            findings=findings,
            notes=tuple(outcome.notes),
            limits=_limits(plan),
            cost=Cost(
                seconds=outcome.seconds,
                peak_memory_bytes=outcome.peak_memory,
                device=outcome.environment.get("gpu", outcome.environment["device"]),
            ),
            environment=outcome.environment,
            distributions=self._distributions(),
            trajectory=_trajectory(directory.parent / "work" / "metrics.jsonl"),
            examples=self._examples(plan) if plan.config.include_examples else None,
            checkpoint_in=outcome.fingerprint_in,
            checkpoint_out=outcome.fingerprint_out,
        )
        (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
        (directory / "report.html").write_text(render_html(report))
        (directory / "model" / "README.md").write_text(render_markdown(report))
        return report

    def _values(self, role: Role, subset: SetName, metric: Metric) -> Array | None:
        measured = self.measured.get(role, {}).get(subset)
        return metric.values(measured) if measured else None

    def _findings(self, plan: Plan) -> list[Finding]:
        found = []
        for subset in plan.sets.named():
            for metric in METRICS:
                values = {role: self._values(role, subset, metric) for role in ROLES}
                if (after := values["unlearned"]) is None:
                    continue
                decision = self._decide(metric, subset, values, plan)
                found.append(
                    Finding(
                        name=metric.name,
                        title=metric.title,
                        subset=subset,
                        unit=metric.unit,
                        better=_better(metric, subset),
                        n=len(after),
                        original=_value(values["original"], metric.bounded),
                        unlearned=_value(after, metric.bounded),
                        retrained=_value(values["retrained"], metric.bounded),
                        **_decided(decision),
                    )
                )
        return found

    def _decide(
        self, metric: Metric, subset: SetName, values: dict[Role, Array | None], plan: Plan
    ) -> Decision | None:
        """The rule for one metric on one set; None: it is reported for information."""
        before, after, retrained = (values[role] for role in ROLES)
        if before is None or after is None:
            return None
        if subset in ("forget", "holdout_forget"):
            if metric.name not in ("extraction_strength", "accuracy"):
                return None
            if retrained is not None:
                return criteria.at_most_above(after, retrained, "the retrained model", paired=True)
            if isinstance(plan.target, Classes):
                return criteria.at_most(after, criteria.FORGET_MARGIN)
            never_seen = self._values("original", "holdout", metric)
            if never_seen is None:
                return criteria.NO_REFERENCE
            return criteria.at_most_above(after, never_seen, "the holdout", paired=False)
        if metric.name in ("extraction_strength", "rouge_l_recall") and subset == "retain":
            return criteria.at_least_share(after, before)
        if metric.name == "accuracy":
            return criteria.at_most_below(after, before)
        return None

    def _membership(self, plan: Plan) -> list[Finding]:
        """Loss-based membership, against the retrained model and against the holdout."""
        scores = {
            role: {name: loss_score(m.signals.nll, m.signals.units) for name, m in sets.items()}
            for role, sets in self.measured.items()
        }
        found = []
        if "retrained" in scores:
            reference = scores["retrained"]["forget"]
            bounds = auc_interval(scores["unlearned"]["forget"], reference, criteria.LEVEL)
            found.append(
                Finding(
                    name="membership_auc_against_retrained",
                    title="Loss-based membership AUC, forget records on this model against the "
                    "same records on the retrained model",
                    subset="forget",
                    better="closer_to_retrained",
                    n=len(reference),
                    original=_auc_value(scores["original"]["forget"], reference),
                    unlearned=_auc_value(scores["unlearned"]["forget"], reference),
                    retrained=Value(value=0.5),
                    **_decided(criteria.auc_near(bounds, 0.5, "one half")),
                )
            )
        same: SetName = "holdout_forget" if isinstance(plan.target, Classes) else "holdout"
        if same in scores["unlearned"]:
            aucs = {role: _auc_value(sets["forget"], sets[same]) for role, sets in scores.items()}
            after = scores["unlearned"]
            bounds = auc_interval(after["forget"], after[same], criteria.LEVEL)
            centre, name = 0.5, "one half"
            if "retrained" in aucs:
                centre, name = aucs["retrained"].value, "the retrained model's"
            found.append(
                Finding(
                    name="membership_auc",
                    title="Loss-based membership AUC, forget records against the holdout",
                    subset="forget",
                    better="closer_to_retrained",
                    n=len(after["forget"]) + len(after[same]),
                    original=aucs["original"],
                    unlearned=aucs["unlearned"],
                    retrained=aucs.get("retrained"),
                    **_decided(criteria.auc_near(bounds, centre, name)),
                )
            )
        return found

    def _distributions(self) -> tuple[Distribution, ...]:
        subsets = self.measured["unlearned"]
        return tuple(
            Distribution(
                subset=subset,
                **{
                    role: tuple(sets[subset].signals.loss().round(5))
                    for role, sets in self.measured.items()
                },
            )
            for subset in subsets
        )

    def _examples(self, plan: Plan) -> tuple[Example, ...] | None:
        if not self.answers:
            return None
        asked = plan.sets.forget.sample(ASKED, plan.config.seed)
        truth = generation.true_answers(asked)
        texts = plan.checkpoint.task.texts  # type: ignore[attr-defined]
        return tuple(
            Example(
                subset="forget",
                prompt=texts(asked.examples[i])[0],
                reference=truth[i],
                **{role: answers[i] for role, answers in self.answers.items()},
            )
            for i in range(min(SHOWN, len(asked)))
        )


def overall(findings: tuple[Finding, ...]) -> tuple[Any, str]:
    """The verdict over all findings, and what decided it."""
    by = {
        verdict: [f for f in findings if f.verdict == verdict]
        for verdict in ("pass", "fail", "inconclusive")
    }
    if by["fail"]:
        return "not forgotten", _sentence("Failed", by["fail"])
    if by["inconclusive"]:
        return "inconclusive", _sentence("Undecided", by["inconclusive"])
    if not by["pass"]:
        return "inconclusive", "No check had a reference to be held against."
    return "forgotten", f"All {len(by['pass'])} checks of this audit passed."


def _sentence(word: str, findings: list[Finding]) -> str:
    named = [f"{f.title.split(',')[0]} on the {f.subset.replace('_', ' ')} set" for f in findings]
    return f"{word}: {'; '.join(dict.fromkeys(named))}."


def _better(metric: Metric, subset: SetName) -> Better:
    if subset in ("forget", "holdout_forget"):
        return metric.forget_better
    return "lower" if metric.name == "loss" else "higher"


def _value(values: Array | None, bounded: bool) -> Value | None:
    if values is None:
        return None
    low, high = mean_interval(values, bounds=(0.0, 1.0) if bounded else None)
    return Value(value=float(values.mean()), interval=Interval(low=low, high=high))


def _auc_value(members: Array, nonmembers: Array) -> Value:
    low, high = auc_interval(members, nonmembers)
    return Value(value=auc(members, nonmembers), interval=Interval(low=low, high=high))


def _decided(decision: Decision | None) -> dict[str, Any]:
    if decision is None:
        return {"verdict": "info"}
    return {
        "criterion": decision.criterion,
        "verdict": decision.verdict,
        "reason": decision.reason,
    }


def _label(source: str) -> str:
    return "/".join(Path(source).parts[-2:])


def _request(plan: Plan) -> dict[str, str]:
    earlier = len(plan.checkpoint.lineage)
    return {
        "to be forgotten": str(plan.target),
        "checkpoint": _label(plan.checkpoint.source),
        "earlier requests on it": str(earlier),
        "retrained reference": "given" if plan.retrained else "none",
        "seed": str(plan.config.seed),
    }


def _limits(plan: Plan) -> tuple[str, ...]:
    found = [
        "This quick audit looks at averages; attacks on single records, probes of hidden states "
        "and relearning were not run, and a pass does not rule them out.",
        "Copies of the original checkpoint and of the data elsewhere were not examined.",
    ]
    sampled = [n for n, s in plan.sets.named().items() if n != "forget" and len(s) > SAMPLE]
    if sampled:
        found.append(
            f"Of the {' and '.join(sampled)} set, {SAMPLE:,} random records were measured."
        )
    if plan.checkpoint.task.name == "causal_lm":
        found.append(f"At most {ASKED} random prompts per set were answered for ROUGE-L.")
    if plan.sets.holdout is None:
        found.append("No holdout was given: membership was not tested against unseen records.")
    if plan.retrained is None:
        found.append("No retrained model was given: what forgetting should look like is a guess.")
    return tuple(found)


def _trajectory(metrics: Path) -> tuple[TrajectoryPoint, ...]:
    if not metrics.exists():
        return ()
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = {event["step"]: event for event in events if event["event"] == "step"}
    every = max(1, len(steps) // POINTS)
    return tuple(
        TrajectoryPoint(
            step=step, terms={k: v for k, v in event.items() if k.endswith(("_loss", "_nll"))}
        )
        for step, event in sorted(steps.items())
        if step % every == 0 or step == len(steps)
    )
