"""The audit: measure each model once, hold the numbers against rules, write down what follows.

:class:`Examination` measures one model at a time, so two are never in memory together; what it
measured is on disk, so an interrupted audit goes on and every number can be computed again. Only a
deep audit holds the original's weights once more beside a model, to see where they differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unlearn import distributed, generation, manifest
from unlearn.case import BY_CONTENT, Case, of_audit
from unlearn.checkpoint import Checkpoint
from unlearn.config import AuditConfig
from unlearn.evaluations import (
    attestation,
    differences,
    exposure,
    findings,
    guards,
    inside,
    junit,
    robustness,
    shadowing,
    stability,
)
from unlearn.evaluations import criteria as rules
from unlearn.evaluations.criteria import Check, Criteria, Decision, decide
from unlearn.evaluations.measure import ASKED, COSTLY, SAMPLED, Measured, Taking, measure
from unlearn.evaluations.report import render_html, render_markdown
from unlearn.evaluations.schema import (
    EVIDENCE,
    Cost,
    Course,
    Distribution,
    Example,
    Finding,
    Hyperparameter,
    RecordSet,
    Report,
    Series,
    TrajectoryPoint,
)
from unlearn.interface import Subject
from unlearn.methods.retrain import Retrain
from unlearn.run import Audit, Progress, Role, Run, Silent
from unlearn.workplace import Outcome, Stopwatch, begin, peak_memory, publish, workplace

# settings that may name people, or places on this machine
PRIVATE = (
    "forget_ids", "forget_classes", "criteria", "columns", "translations", "translator",
    "jailbreaks",
)  # fmt: skip
SHOWN = 5  # examples in the report, when asked for
POINTS = 400  # of the training trajectory


class Examination:
    """Measures and concludes; ``criteria`` are read before anything expensive starts."""

    def __init__(self, criteria: Any = None) -> None:
        self.criteria = rules.read(criteria)
        self.measured: dict[Role, Measured] = {}
        self.weights: dict[Role, dict[str, str]] = {}
        self.decoder: Any = None
        self.recipe: Retrain | None = None
        self.material = robustness.Material([], [], {}, {}, ())
        self.series: Series | None = None
        self.watch_within: stability.Watch | None = None

    def prepare(self, case: Case) -> None:
        """Refuse what would fail later.

        Raises:
            BadInput: a deep audit does not know how to train its shadow models, or what it should
                ask a language model cannot be read.
            MissingNeed: they have not what the method under audit needs.
        """
        self.recipe = shadowing.recipe(case)
        self.material = robustness.material(case)

    def measure(self, role: Role, model: nn.Module, case: Case, run: Run, directory: Path) -> None:
        """Measure one model on every set; what an interrupted audit measured is read back."""
        if role == "original":
            self.decoder = inside.decoder(model, case, run)
            if getattr(case.config, "watch", 0):
                self.watch_within = stability.Watch(case, model, run)
        if role == "unlearned" and self.watch_within is not None:
            self.watch_within.end(model, run)
        self.weights[role] = guards.hidden_weights(model, case.tasks()[role])
        found = measure(role, model, case, run, directory, self.decoder)
        taking = Taking(role, model, run, directory)
        robustness.look(found, taking, case, self.material)
        differences.look(found, taking, case)
        self.measured[role] = found

    def conclude(self, case: Case, outcome: Outcome, run: Run, directory: Path) -> Report:
        """Decide, and write the report in all its forms."""
        shadowed = shadowing.shadowed(case, self.recipe, run) if self.recipe else None
        outcome.notes = run.notes
        scores, checks = exposure.score(self.measured, case, shadowed)
        within = inside.Inside(self.measured, case)
        blind, warning = guards.blind_baseline(case, self.criteria)
        checks = [
            *findings.checks(self.measured, case, self.criteria, warning),
            *exposure.checks(scores, case, self.criteria, warning),
            *checks,
            *within.checks(self.criteria),
            *robustness.checks(self.measured, case, self.criteria),
            *findings.distances(self.measured, case, self.criteria),
            *differences.checks(self.measured, case),
            *(self._of_shadows(shadowed, case) if shadowed else []),
            *blind,
            *guards.changed(self.weights, case, outcome.fingerprint_out),
        ]
        best = exposure.sharpest(scores)
        drawn = {"loss", "u_lira", "lira_online", best.attack.name if best else ""}
        return concluded(
            case, outcome, directory, self.criteria, checks,
            request=request(case),
            limits=_limits(case, self.criteria),
            distributions=self._distributions(case),
            curves=exposure.curves(scores, tuple(drawn)),
            layers=within.figures(),
            series=self.series,
            course=self._course(directory),
            exposed=exposure.exposed(scores),
            examples=self._examples(case) if case.config.include_examples else None,
        )  # fmt: skip

    def _course(self, directory: Path) -> Course | None:
        if self.watch_within is None:
            return None
        return self.watch_within.course(directory.parent / "work" / "metrics.jsonl")

    def _of_shadows(self, shadowed: shadowing.Shadowed, case: Case) -> list[Check]:
        return [
            *shadowing.checks(shadowed),
            *shadowing.likeness(shadowed, self.measured, case, self.criteria),
        ]

    def _distributions(self, case: Case) -> tuple[Distribution, ...]:
        return tuple(
            Distribution(
                subset=subset,
                **{
                    role: tuple(m.signals[subset].loss().round(5))
                    for role, m in self.measured.items()
                },
            )
            for subset in case.sets.named()
        )

    def _examples(self, case: Case) -> tuple[Example, ...] | None:
        if case.checkpoint.task.name != "causal_lm":
            return None
        asked = case.sets.forget.sample(ASKED, case.config.seed)
        truth = generation.true_answers(asked)
        texts = case.checkpoint.task.texts  # type: ignore[attr-defined]
        return tuple(
            Example(
                subset="forget",
                prompt=texts(asked.examples[i])[0],
                reference=truth[i],
                **{role: m.answers[i] for role, m in self.measured.items()},
            )
            for i in range(min(SHOWN, len(asked)))
        )


def examiner(case: Case, criteria: Any = None) -> Audit:
    """The audit of a case's model family."""
    if case.checkpoint.task.name == "diffusion":
        from unlearn.evaluations.drawing import DiffusionExamination  # which needs this file first

        return DiffusionExamination(criteria)
    return Examination(criteria)


def audit(config: AuditConfig, progress: Progress | None = None) -> tuple[Report, Path | None]:
    """Audit a checkpoint that was made to forget.

    Returns:
        The report, and the directory it was written to (None without ``out``).

    Raises:
        BadInput: whatever is wrong with checkpoints, data or criteria; nothing is left behind.
    """
    rules.read(config.criteria)  # before anything else is looked at
    case, unlearned = of_audit(config)
    examination = examiner(case, config.criteria)
    examination.prepare(case)
    with distributed.together(), workplace(case) as (place, resumed):
        progress = progress if progress and distributed.is_main() else Silent()
        if resumed:
            progress.say(f"Going on with the unfinished audit in {place}.")
        work, result = place / "work", place / "result"
        work.mkdir(exist_ok=True)
        result.mkdir(exist_ok=True)
        run = Run(case.checkpoint.task, config.seed, case.device, work, progress,
                  checkpoint=case.checkpoint)  # fmt: skip
        outcome = distributed.on_main(lambda: begin(case, result))
        outcome.environment["processes"] = str(distributed.world())
        outcome.fingerprint_out = unlearned.fingerprint
        stopwatch = Stopwatch(outcome.seconds, work)
        found: dict[Role, Checkpoint | None] = {
            "original": case.checkpoint,
            "unlearned": unlearned,
            "retrained": case.retrained,
        }
        for role, checkpoint in found.items():
            if checkpoint is not None:
                with stopwatch.phase(f"measure {role}"), given_back(getattr(config, role)):
                    model = checkpoint.load().model.to(case.device)
                    examination.measure(role, model, case, run, result)
                    del model
        outcome.peak_memory = peak_memory(case.device)
        report = distributed.on_main(lambda: examination.conclude(case, outcome, run, result))
        record = {
            "schema_version": "1",
            "created": outcome.created,
            "fingerprints": {
                role: checkpoint.fingerprint for role, checkpoint in found.items() if checkpoint
            },
            "settings": config.model_dump(
                mode="json", exclude={*BY_CONTENT, *PRIVATE}, fallback=str
            ),
            "sets": outcome.sets,
            "environment": outcome.environment,
            "seconds": outcome.seconds,
        }
        if distributed.is_main():
            (result / "audit.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
            manifest.write(result)
        return report, publish(case, place)


@contextmanager
def given_back(source: Any) -> Iterator[None]:
    """A checkpoint in memory has its precision, device and mode again when the block ends."""
    model = source.model if isinstance(source, Subject) else source
    if not isinstance(model, nn.Module):
        yield
        return
    modes = {module: module.training for module in model.modules()}
    before = {name: (t.dtype, t.device) for name, t in _tensors(model)}
    try:
        yield
    finally:
        for name, tensor in _tensors(model):
            if name in before:
                dtype, device = before[name]
                tensor.data = tensor.data.to(device, dtype)
        for module, training in modes.items():
            module.training = training


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def concluded(
    case: Case, outcome: Outcome, directory: Path, criteria: Criteria, checks: Sequence[Check],
    **shown: Any,
) -> Report:  # fmt: skip
    """Decide, and write the report in all its forms.

    Args:
        case: what was examined.
        outcome: of the run, its notes complete.
        directory: to write to.
        criteria: the rules.
        checks: all measurements.
        **shown: the fields of the report that depend on the model family.
    """
    decisions = decide(checks, criteria)
    verdict, reason = overall(checks, decisions)
    report = Report(
        title=f"Erasure of {case.target} from {label(case.checkpoint.source)}",
        created=outcome.created,
        verdict=verdict,
        verdict_reason=reason,
        depth=case.config.audit,  # type: ignore[attr-defined]
        method=case.method_name,
        hyperparameters=tuple(
            Hyperparameter(name=name, value=str(value), given=name in case.given)
            for name, value in case.hyperparameters.items()
        ),
        sets=tuple(
            RecordSet(name=name, n=facts["n"], fingerprint=facts["fingerprint"])
            for name, facts in outcome.sets.items()
        ),
        findings=tuple(map(finding, checks, decisions)),
        notes=tuple(outcome.notes),
        cost=Cost(
            seconds=outcome.seconds,
            peak_memory_bytes=outcome.peak_memory,
            device=outcome.environment.get("gpu", outcome.environment["device"]),
        ),
        environment=outcome.environment,
        trajectory=_trajectory(directory.parent / "work" / "metrics.jsonl"),
        criteria=criteria.text,
        criteria_digest=criteria.digest(),
        checkpoint_in=outcome.fingerprint_in,
        checkpoint_out=outcome.fingerprint_out,
        **shown,
    )
    _write(report, directory)
    return report


def overall(checks: Sequence[Check], decisions: Sequence[Decision]) -> tuple[Any, str]:
    """The verdict over all checks, and what decided it."""
    pairs = list(zip(checks, decisions, strict=True))
    if failed := [c for c, d in pairs if d.verdict == "fail"]:
        return "not forgotten", _sentence("Failed", failed)
    required = [(c, d) for c, d in pairs if d.required]
    if open_ := [c for c, d in required if d.verdict != "pass"]:
        return "inconclusive", _sentence("Undecided", open_)
    told = [c for c, d in required if d.powered is not False and c.fields.get("group") in EVIDENCE]
    if not told:
        return "inconclusive", (
            "No required check tells the original model from one that forgot, so none could say "
            "whether anything was forgotten."
        )
    return "forgotten", f"All {len(required)} required checks of this audit passed."


def _sentence(word: str, checks: Sequence[Check]) -> str:
    named = [
        f"{c.fields['title'].split(':')[0]} on the {c.subset.replace('_', ' ')} set" for c in checks
    ]
    return f"{word}: {'; '.join(dict.fromkeys(named))}."


def finding(check: Check, decision: Decision) -> Finding:
    """A check as the report shows it."""
    return Finding(
        name=check.name,
        subset=check.subset,
        verdict=decision.verdict,
        reason=decision.reason,
        required=decision.required,
        p_value=decision.p_value,
        **check.fields,
    )


def _write(report: Report, directory: Path) -> None:
    """report.json, report.html, the pipeline formats, and the model card where there is a model."""
    (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
    (directory / "report.html").write_text(render_html(report))
    (directory / "junit.xml").write_text(junit.render(report))
    if (directory / "model").is_dir():
        (directory / "model" / "README.md").write_text(render_markdown(report))
    # last, because it is about the files of the model
    (directory / "statement.json").write_text(attestation.render(report, directory), "utf-8")


def label(source: str) -> str:
    """A path without the folders that are nobody else's business."""
    return "/".join(Path(source).parts[-2:])


def request(case: Case) -> dict[str, str]:
    """Facts on what was asked."""
    earlier = len(case.checkpoint.lineage)
    return {
        "to be forgotten": str(case.target),
        "checkpoint": label(case.checkpoint.source),
        "earlier requests on it": str(earlier),
        "retrained reference": "given" if case.retrained else "none",
        "seed": str(case.config.seed),
    }


def _limits(case: Case, criteria: Criteria) -> tuple[str, ...]:
    depth = case.config.audit  # type: ignore[attr-defined]
    closely = "attacks that train models of their own (U-LiRA, LiRA, RMIA) were not run"
    found = {
        "quick": ["This quick audit looks at outputs only; probes of hidden states, relearning "
                  f"and {closely}, and a pass does not rule them out."],
        "standard": [f"The {closely}: leaks of single records "
                     "that only those find are not ruled out."],
        "deep": [] if case.config.shadows else [f"The {closely}: --shadows 0."],
    }[depth]  # fmt: skip
    found.append("Copies of the original checkpoint and of the data elsewhere were not examined.")
    size = SAMPLED[depth]
    sampled = [n for n, s in case.sets.named().items() if n != "forget" and len(s) > size]
    if sampled:
        found.append(f"Of the {' and '.join(sampled)} set, {size:,} random records were measured.")
    if case.checkpoint.task.name == "causal_lm":
        found.append(f"At most {ASKED} random prompts per set were answered for ROUGE-L.")
    if depth != "quick":
        found.append(
            f"Gradient norms and neighbours were taken of at most {COSTLY} random records per set."
        )
    if depth == "deep" and (names := shadowing.capped(case)):
        found.append(
            f"Attacks with shadow models saw {shadowing.TARGETS} random records of the "
            f"{' and '.join(names).replace('_', ' ')} set, and say nothing about the others."
        )
    usual = robustness.LOOKED_FOR.get(case.checkpoint.task.name, 0)
    own = {s.name: s.records for s in robustness.searches(case) if s.records}
    if depth != "quick" and len(case.sets.forget) > usual:
        apart = ", ".join(f"{name}: {size}" for name, size in own.items())
        found.append(
            f"Rounding, other ways of asking and the like were tried on at most {usual:,} random "
            f"records of the forget set{f' ({apart})' if apart else ''}."
        )
    if case.sets.holdout is None:
        found.append("No holdout was given: membership was not tested against unseen records.")
    if case.retrained is None:
        found.append("No retrained model was given: what forgetting should look like is a guess.")
    else:
        found.append(
            "One retrained model stands for all: how much two of them differ was not measured."
        )
    found.append("Records are taken as independent; several of one person count as several.")
    if loosened := criteria.looser_than_shipped():
        found.append(f"The criteria are looser than the shipped ones in {', '.join(loosened)}.")
    return tuple(found)


def _trajectory(metrics: Path) -> tuple[TrajectoryPoint, ...]:
    if not metrics.exists():
        return ()
    events = stability.events_of(metrics.read_text().splitlines())
    steps = {event["step"]: event for event in events if event["event"] == "step"}
    every = max(1, len(steps) // POINTS)
    return tuple(
        TrajectoryPoint(
            step=step, terms={k: v for k, v in event.items() if k.endswith(("_loss", "_nll"))}
        )
        for step, event in sorted(steps.items())
        if step % every == 0 or step == len(steps)
    )
