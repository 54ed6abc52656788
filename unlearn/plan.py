"""From a configuration to a plan: the case, the method and its needs, before a weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from unlearn import case as cases
from unlearn import checkpoint as checkpoints
from unlearn import registry
from unlearn.case import Case
from unlearn.checkpoint import Checkpoint
from unlearn.config import RunConfig
from unlearn.errors import BadInput, Faults, MissingNeed, Unsupported
from unlearn.interface import Method, Need, Request
from unlearn.scope import SALIENCY, WORDS, matching
from unlearn.tasks.classification import Classification


@dataclass(frozen=True, kw_only=True)
class Plan(Case):
    """A request that passed every check that does not need the weights."""

    config: RunConfig
    method: Method

    def request(self) -> Request:
        """What the method gets to see: sets it declared NO for are withheld."""
        needs, task = self.method.needs, self.checkpoint.task
        sets = self.sets.forget, self.sets.retain
        if isinstance(task, Classification) and needs.labels is not task.labels:
            reading = task.reading(needs.labels)
            sets = sets[0].as_read(reading), sets[1] and sets[1].as_read(reading)
        return Request(
            self.target,
            None if needs.forget is Need.NO or not len(self.sets.forget) else sets[0],
            None if needs.retain is Need.NO else sets[1],
        )


def plan(config: RunConfig, checkpoint: Checkpoint | None = None) -> Plan:
    """Resolve and check everything; reads data and headers, loads no weights.

    Args:
        config: what is asked.
        checkpoint: the one that ``config`` names, when it was looked at already.

    Raises:
        BadInput: whatever is wrong with flags, files or records.
        MissingNeed: the method needs something that was not given.
    """
    hyperparameters = dict(config.set)
    if config.scope is not None:
        hyperparameters["scope"] = config.scope
    method = registry.build(config.method, hyperparameters)
    if config.out is not None:
        cases.check_out(Path(config.out))
    checkpoint = checkpoint or checkpoints.inspect(config.checkpoint, cases.options(config))
    if getattr(checkpoint.task, "one_step", False):
        raise Unsupported(
            f"{checkpoint.source} draws in one step and is no denoiser any more, as every method "
            "needs it: go on from the checkpoint before"
        )
    members = (name for name in checkpoint.stored.names if name.startswith("members.0."))
    if config.method != "sisa" and any(members):
        raise Unsupported(
            f"{checkpoint.source} is an ensemble: only sisa forgets from it, by training again the "
            "members that are hit"
        )
    _check_needs(config, method, checkpoint)
    needs = method.needs
    if config.audit == "none" and isinstance(checkpoint.task, Classification):
        checkpoint = replace(checkpoint, task=checkpoint.task.reading(method.needs.labels))
    case = cases.build(config, checkpoint, once=needs.state is not Need.NO)
    check_names(method, checkpoint)
    scope = getattr(method, "scope", "all")
    if scope.startswith(SALIENCY) and Need.NO in (needs.forget, needs.labels):
        raise BadInput(
            f"{config.method} never reads the forget set and its labels, which saliency comes from"
        )
    planned = Plan(
        **{f.name: getattr(case, f.name) for f in fields(Case)}
        | {
            "method": method,
            "method_name": config.method,
            "hyperparameters": registry.values(method),
            "given": hyperparameters,
        }
    )
    if callable(check := getattr(method, "check", None)):
        check(planned.request())
    return planned


def check_names(method: Method, checkpoint: Checkpoint) -> None:
    """Refuse a scope, or parts that the method is to change, of which the model has none.

    Raises:
        UnlearnError: which one.
    """
    scope = getattr(method, "scope", "all")
    if scope not in WORDS:
        matching(scope, checkpoint.parameter_names())
    if callable(check := getattr(method, "check_names", None)):
        check(checkpoint.parameter_names())


def _check_needs(config: RunConfig, method: Method, checkpoint: Checkpoint) -> None:
    split = config.data is not None and bool(
        config.forget_ids or config.forget_classes or config.forget is not None
    )
    named = config.forget_classes or config.forget_concepts
    data_free = bool(named) and checkpoint.task.name == "diffusion"
    given = {
        "forget": config.forget is not None or split or not data_free,
        "retain": config.retain is not None or config.data is not None,
        "state": checkpoint.has_state(),
    }
    faults = Faults()
    if config.forget is None and not split and not data_free:
        faults.add(
            "nothing to forget was named: pass --forget, or --data with --forget-ids or "
            "--forget-classes"
        )
    target = "classes" if config.forget_classes else "concepts" if named else "records"
    for fault in method.needs.faults(config.method, given, checkpoint.task.name, target):
        faults.add(fault)
    faults.check(MissingNeed)
