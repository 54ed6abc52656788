"""One request from start to finish.

What a method and an audit are handed (:class:`Run`), and the order of things: measure the model,
make it forget, save it, measure again, decide.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unlearn import checkpoint as checkpoints
from unlearn import data, distributed, manifest, weights
from unlearn.case import Case
from unlearn.checkpoint import Checkpoint
from unlearn.ensemble import ENSEMBLE
from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Need, Subject
from unlearn.pipeline import INDEX
from unlearn.plan import Plan
from unlearn.scope import BETWEEN, is_lora
from unlearn.tasks.base import Encoded, Task
from unlearn.workplace import (
    SAVED,
    Outcome,
    Stopwatch,
    begin,
    peak_memory,
    publish,
    workplace,
    written_whole,
)


class Progress(Protocol):
    """Where a run tells how far it is."""

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """``done`` of ``total`` steps of ``phase`` are finished."""

    def say(self, sentence: str) -> None:
        """Something the user should know."""


class Silent:
    """Progress for libraries: nothing is printed."""

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """Ignore."""

    def say(self, sentence: str) -> None:
        """Ignore."""


@dataclass
class Run:
    """What a method is given besides subject and request.

    Attributes:
        task: scores examples of this model family.
        seed: everything random follows from it.
        device: where to compute.
        work: directory of the unfinished run; None: nothing is kept on disk.
        progress: told about every step.
        save_every: seconds between saves of unfinished training.
        resumable: whether unfinished training is worth saving at all.
        checkpoint: what the subject was loaded from.
        notes: sentences the method wants in the report.
        adapter: where trained adapters are kept, with scope lora; None: they are only merged.
        sharded: each of several processes keeps only its part of the model while it trains.
    """

    task: Task
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    work: Path | None = None
    progress: Progress = field(default_factory=Silent)
    save_every: float = 60.0
    resumable: bool = True
    checkpoint: Checkpoint | None = None
    notes: list[str] = field(default_factory=list)
    adapter: Path | None = None
    sharded: bool = False

    def seed_of(self, name: str) -> int:
        """A seed for one purpose; different names are independent."""
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        return int.from_bytes(digest[:6], "big")

    def generator(self, name: str) -> torch.Generator:
        """A CPU random generator for one purpose."""
        return torch.Generator().manual_seed(self.seed_of(name))

    def note(self, sentence: str) -> None:
        """A reason worth printing and keeping with the run."""
        self.notes.append(sentence)
        self.progress.say(sentence)

    def log(self, event: str, **numbers: Any) -> None:
        """Append one event to metrics.jsonl."""
        if self.work is not None:
            line = json.dumps({"event": event, "time": time.time(), **numbers})
            with (self.work / "metrics.jsonl").open("a") as file:
                file.write(line + "\n")

    def once(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """``compute()``, or what an interrupted run already computed under this name."""
        if self.work is None:
            return compute()
        path = self.work / "once" / f"{name}.safetensors"
        if not distributed.on_main(path.exists):
            values = {key: value.contiguous() for key, value in compute().items()}
            if distributed.is_main():
                with written_whole(path) as new:
                    save_file(values, new)
            if distributed.world() == 1:
                return values
        found = distributed.tensors_of_main(path)
        return {key: value.to(self.device) for key, value in found.items()}

    def batches(self, examples: Encoded, phase: str, size: int = 64) -> Iterator[list[int]]:
        """Index batches of similar length, with progress."""
        done = 0
        for indices in examples.by_length(size):
            yield indices
            done += len(indices)
            self.progress.advance(phase, done, len(examples), {})

    def initial_model(self, init: str | None) -> nn.Module:
        """The weights retraining starts from: a checkpoint's, or new random ones."""
        if init is not None:
            options = self.checkpoint.options if self.checkpoint else checkpoints.Options()
            return checkpoints.inspect(init, options).load().model.to(self.device)
        if self.checkpoint is None or self.checkpoint.fresh is None:
            raise BadInput(
                "new random weights need a checkpoint with a configuration (or --model): pass init"
            )
        return self.checkpoint.fresh().to(self.device)


Role = Literal["original", "unlearned", "retrained"]


class Audit(Protocol):
    """What examines the model before and after; lives in ``unlearn.evaluations``."""

    def prepare(self, case: Case) -> None:
        """Refuse, before anything expensive starts, what would fail later."""

    def measure(self, role: Role, model: nn.Module, case: Case, run: Run, directory: Path) -> None:
        """Measure the original, unlearned or retrained model and keep signals in ``directory``."""

    def conclude(self, case: Case, outcome: Outcome, run: Run, directory: Path) -> Any:
        """Decide, and write the report in all its forms; return it."""


@dataclass(frozen=True)
class Result:
    """What a run returns.

    Attributes:
        subject: the unlearned model, in the precision it came in.
        directory: the run directory, or None when ``out`` was not given.
        report: the audit's report, or None without an audit.
        outcome: fingerprints, cost, environment.
    """

    subject: Subject
    directory: Path | None
    report: Any
    outcome: Outcome


def execute(plan: Plan, audit: Audit | None = None, progress: Progress | None = None) -> Result:
    """Carry out a plan; with several processes, the main one alone writes and reports progress.

    Args:
        plan: from :func:`unlearn.plan.plan`.
        audit: examines the model before and after; None: nothing is measured.
        progress: told about every step.

    Raises:
        Collapsed: training destroyed the model; nothing is left behind.
        BadInput: the output directory appeared meanwhile, or holds another unfinished run.
        Unsupported: ``watch`` for a model that draws, or with FSDP.
        UnlearnError: the audit failed on the finished model, which is kept with ``out``.
    """
    _check_watch(plan)
    with distributed.together():
        progress = progress if progress and distributed.is_main() else Silent()
        if audit is not None:
            audit.prepare(plan)
        with workplace(plan) as (place, resumed):
            if resumed:
                progress.say(f"Going on with the unfinished run in {place}.")
            result = _carry_out(plan, audit, progress, place)
            return replace(result, directory=publish(plan, place))


def _check_watch(plan: Plan) -> None:
    if not plan.config.watch:
        return
    if plan.checkpoint.task.name == "diffusion":
        raise Unsupported(
            "--watch counts the answers a model gets right, and this one draws: leave it out"
        )
    if distributed.shards():
        raise Unsupported(
            "--watch needs whole weights while the model trains, which FSDP keeps apart: leave it "
            "out, or launch without FSDP"
        )


def _carry_out(plan: Plan, audit: Audit | None, progress: Progress, place: Path) -> Result:
    work, result = place / "work", place / "result"
    work.mkdir(exist_ok=True)
    result.mkdir(exist_ok=True)
    run = Run(
        plan.checkpoint.task, plan.config.seed, plan.device, work, progress,
        plan.config.save_every, plan.config.out is not None, plan.checkpoint,
        adapter=work / "adapter" if _keeps_adapter(plan) else None,
        sharded=distributed.shards(),
    )  # fmt: skip
    outcome = distributed.on_main(lambda: begin(plan, result))
    outcome.environment["processes"] = str(distributed.world())
    stopwatch = Stopwatch(outcome.seconds, work)

    def examine(role: Role, model: nn.Module) -> None:
        if audit is not None:
            with stopwatch.phase(f"measure {role}"):
                audit.measure(role, model, plan, run, result)

    with stopwatch.phase("load"):
        subject = plan.checkpoint.load()
        subject.model.to(plan.device)
    start = weights.fingerprint_tensors(subject.model.state_dict()) if run.adapter else ""
    run.notes += plan.checkpoint.notes
    if plan.method.needs.state is Need.NO:  # it would not know what this request forgets
        subject = subject.with_state({}, {})
    examine("original", subject.model)
    with stopwatch.phase("unlearn"):
        subject = plan.method.unlearn(subject, plan.request(), run)
    with stopwatch.phase("save"):
        stored = plan.checkpoint.stored.dtype
        outcome.fingerprint_out = distributed.on_main(
            lambda: _save(subject, start, plan, run, place)
        )
        weights.cast(subject.model, stored)  # of every process
    subject.model.to(plan.device, weights.master(stored))
    examine("unlearned", subject.model)
    weights.cast(subject.model, stored)
    if plan.retrained is not None and audit is not None:
        examine("retrained", plan.retrained.load().model.to(plan.device))
    outcome.notes = run.notes
    outcome.peak_memory = peak_memory(plan.device)

    def conclude() -> Any:
        report = audit.conclude(plan, outcome, run, result) if audit is not None else None
        _write_records(plan, outcome, work, result)
        return report

    return Result(subject, None, distributed.on_main(conclude), outcome)


def _keeps_adapter(plan: Plan) -> bool:
    lora = is_lora(getattr(plan.method, "scope", None))
    return lora and not plan.config.merge and plan.checkpoint.source != checkpoints.MEMORY


def _save(subject: Subject, start: str, plan: Plan, run: Run, place: Path) -> str:
    """The model or its adapter, and what the method keeps; returns the fingerprint.

    ``start`` is the fingerprint of the weights that were loaded.
    """
    directory, stored = place / "result" / "model", plan.checkpoint.stored.dtype
    if run.adapter and _leads(run.adapter, start, subject.model):
        weights.check_finite(weights.cast(subject.model, stored), stored)
        fingerprint = checkpoints.save_adapter(run.adapter, plan.checkpoint, directory)
        run.note(
            "The run keeps an adapter: the model forgets only while it is on its base, "
            f"{plan.checkpoint.source}. --merge writes a checkpoint that stands alone."
        )
    else:
        fingerprint = weights.save(subject, stored, directory)
    if subject.state:
        weights.write_state(place / "result" / weights.STATE, subject.state, subject.note)
    (place / SAVED).touch()
    return fingerprint


def _leads(adapter: Path, start: str, model: nn.Module) -> bool:
    """Whether the adapter alone leads from the weights that were loaded to the model's, and away.

    Not so where a method moved weights before or after it trained adapters.
    """
    if not (adapter / BETWEEN).exists():
        return False
    end = weights.fingerprint_tensors(model.state_dict())
    return start != end and (adapter / BETWEEN).read_text() == f"{start} {end}"


def _kind(model: Path) -> str:
    """What was written: an ensemble, adapter, pipeline, transformers model or plain module."""
    if (model / ENSEMBLE).exists():
        return "ensemble"
    if (model / checkpoints.ADAPTER).exists():
        return "adapter"
    if (model / INDEX).exists():
        return "pipeline"
    return "transformers" if (model / "config.json").exists() else "module"


def _write_records(plan: Plan, outcome: Outcome, work: Path, result: Path) -> None:
    """The run's facts, its lineage, what was forgotten so far, and checksums: it is complete."""
    entry = {
        "created": outcome.created,
        "method": plan.config.method,
        "target": str(plan.target),
        "forget": outcome.sets["forget"],
        "fingerprint_in": outcome.fingerprint_in,
        "fingerprint_out": outcome.fingerprint_out,
    }
    config = plan.config
    record = {
        "schema_version": "1",
        "status": "complete",
        **entry,
        "sets": outcome.sets,
        "hyperparameters": plan.hyperparameters,
        "given": plan.given,
        "seed": config.seed,
        "options": {
            "task": config.task,
            "model": config.model,
            "max_length": config.max_length,
            "chat_template": config.chat_template,
        },
        "model_kind": _kind(result / "model"),
        "retrained": plan.retrained.fingerprint if plan.retrained else None,
        "environment": outcome.environment,
        "seconds": outcome.seconds,
        "peak_memory_bytes": outcome.peak_memory,
        "notes": outcome.notes,
    }
    (result / "run.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
    lineage = [*plan.checkpoint.lineage, entry]
    (result / "lineage.json").write_text(json.dumps(lineage, indent=2, default=str) + "\n")
    forget = plan.sets.forget
    hashes = data.record_hashes(forget.examples, forget.task.shown, outcome.record_key)
    forgotten = sorted(h.hex() for h in {*hashes, *plan.checkpoint.forgotten})
    (result / checkpoints.FORGOTTEN).write_text("\n".join(forgotten) + "\n")
    metrics = work / "metrics.jsonl"
    (result / "metrics.jsonl").write_text(metrics.read_text() if metrics.exists() else "")
    manifest.write(result)
