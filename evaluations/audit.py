"""The audit that ends every run: measure before and after, hold against rules, write it down.

:class:`Audit` measures one model at a time, so two are never in memory together; what it measured
is on disk, so an interrupted audit goes on and every number can be computed again.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from torch import nn

from unlearn.attacks.signals import Signals, collect
from unlearn.evaluations import generation
from unlearn.evaluations.findings import Array, Measured, findings, overall
from unlearn.evaluations.memorization import rouge_l
from unlearn.evaluations.report import (
    Cost,
    Distribution,
    Example,
    Hyperparameter,
    RecordSet,
    Report,
    TrajectoryPoint,
    render_html,
    render_markdown,
)
from unlearn.plan import Plan, SetName
from unlearn.run import Outcome, Role, Run, written_whole
from unlearn.tasks.base import Encoded

SAMPLE = 1000  # examples measured of sets other than the forget set
ASKED = 200  # questions a language model is asked, per set
SHOWN = 5  # examples in the report, when asked for
POINTS = 400  # of the training trajectory


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
                with written_whole(path) as new:
                    new.write_text(json.dumps(answers))
        if stem.endswith("-forget"):
            self.answers[role] = answers
        truth = generation.true_answers(asked)
        return np.array([rouge_l(t, a).recall for t, a in zip(truth, answers, strict=True)])

    def conclude(self, plan: Plan, outcome: Outcome, directory: Path) -> Report:
        """Decide, and write report.json, report.html and the model card."""
        found = tuple(findings(self.measured, plan.target))
        verdict, reason = overall(found)
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
            findings=found,
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
