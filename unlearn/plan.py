"""From a configuration to a plan: everything is read and checked, no weight is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from unlearn import checkpoint as checkpoints
from unlearn import data, registry
from unlearn.checkpoint import Checkpoint, Options
from unlearn.config import RunConfig
from unlearn.errors import BadInput, Faults, MissingNeed
from unlearn.interface import Classes, Method, Need, Records, Request, Target
from unlearn.scope import WORDS, matching
from unlearn.tasks.base import Encoded, Task
from unlearn.tasks.classification import Classification

SetName = Literal["forget", "retain", "holdout", "holdout_forget"]


@dataclass(frozen=True)
class Sets:
    """The validated data of a request; ``holdout_forget`` is the holdout's forgotten classes."""

    forget: Encoded
    retain: Encoded | None = None
    holdout: Encoded | None = None
    holdout_forget: Encoded | None = None

    def named(self) -> dict[SetName, Encoded]:
        """Every set that is there, by name."""
        found = {name: getattr(self, name) for name in get_args(SetName)}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Plan:
    """A request that passed every check that does not need the weights."""

    config: RunConfig
    method: Method
    checkpoint: Checkpoint
    retrained: Checkpoint | None
    sets: Sets
    target: Target
    device: torch.device
    hashes: Mapping[str, list[bytes]]
    hyperparameters: Mapping[str, Any]
    given: Mapping[str, Any]

    def request(self) -> Request:
        """What the method gets to see: sets it declared NO for are withheld."""
        needs = self.method.needs
        return Request(
            self.target,
            None if needs.forget is Need.NO else self.sets.forget,
            None if needs.retain is Need.NO else self.sets.retain,
        )

    def identity(self) -> str:
        """One hash of everything that decides the resulting weights and report."""
        settings = self.config.model_dump(
            mode="json", exclude={"checkpoint", "forget", "retain", "holdout", "data", "retrained",
                                  "out", "save_every"},
        )  # fmt: skip
        parts = [
            json.dumps(settings, sort_keys=True, default=str),
            json.dumps(self.hyperparameters, sort_keys=True, default=str),
            self.checkpoint.fingerprint,
            self.retrained.fingerprint if self.retrained else "",
            self.device.type,
            # in their order: batches and what is kept of them go by position
            *(f"{name}:{b''.join(hashes).hex()}" for name, hashes in self.hashes.items()),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def plan(config: RunConfig) -> Plan:
    """Resolve and check everything; reads data and headers, loads no weights.

    Raises:
        BadInput: whatever is wrong with flags, files or records.
        MissingNeed: the method needs something that was not given.
    """
    hyperparameters = dict(config.set)
    if config.scope is not None:
        hyperparameters["scope"] = config.scope
    method = registry.build(config.method, hyperparameters)
    if config.out is not None:
        _check_out(Path(config.out))
    options = Options(
        config.model, config.task, config.trust_remote_code, config.max_length, config.chat_template
    )
    checkpoint = checkpoints.inspect(config.checkpoint, options)
    _check_needs(config, method, checkpoint)
    scope = getattr(method, "scope", "all")
    if scope not in WORDS:
        matching(scope, checkpoint.parameter_names())
    raw, target = _raw_sets(config, checkpoint.task)
    encoded = _encode(raw, checkpoint.task)
    hashes = {name: data.record_hashes(e, checkpoint.task.content) for name, e in raw.items()}
    _check_overlap(raw, hashes)
    retrained = None
    if config.retrained is not None:
        retrained = checkpoints.inspect(config.retrained, options)
        if type(retrained.task) is not type(checkpoint.task):
            raise BadInput(f"{config.retrained} is not of the same kind as {config.checkpoint}")
        if isinstance(retrained.task, Classification):
            _check_same_classes(checkpoint.task, retrained.task)
        _encode(raw, retrained.task)
    return Plan(
        config, method, checkpoint, retrained, Sets(**_split_holdout(encoded, target)), target,
        _device(config.device), hashes, _fields(method), hyperparameters,
    )  # fmt: skip


def _fields(method: Any) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in fields(method) if f.init}


def _check_same_classes(task: Task, other: Classification) -> None:
    ours = task.classes, getattr(task, "names", ())
    if ours[0] != other.classes or (ours[1] and other.names and tuple(ours[1]) != other.names):
        raise BadInput(
            "the retrained model has other classes, or in another order: pass one with the same"
        )


def _check_out(out: Path) -> None:
    if out.exists():
        raise BadInput(f"{out} exists already: runs are never overwritten; choose another --out")
    if not out.absolute().parent.is_dir():
        raise BadInput(f"the folder {out.absolute().parent} does not exist: create it first")


def _check_needs(config: RunConfig, method: Method, checkpoint: Checkpoint) -> None:
    split = config.data is not None and bool(
        config.forget_ids or config.forget_classes or config.forget is not None
    )
    given = {
        "forget": True,
        "retain": config.retain is not None or split,
        "state": checkpoint.has_state(),
    }
    faults = Faults()
    if config.forget is None and not split:
        faults.add(
            "nothing to forget was named: pass --forget, or --data with --forget-ids or "
            "--forget-classes"
        )
    for fault in method.needs.faults(config.method, given, checkpoint.task.name):
        faults.add(fault)
    faults.check(MissingNeed)


def _raw_sets(config: RunConfig, task: Task) -> tuple[dict[str, data.Examples], Target]:
    ways = [config.forget is not None, bool(config.forget_ids), bool(config.forget_classes)]
    if sum(ways) > 1:
        raise BadInput("name the forget set one way: --forget, --forget-ids or --forget-classes")
    if (config.forget_ids or config.forget_classes) and config.data is None:
        raise BadInput("--forget-ids and --forget-classes select from --data: pass it")
    if config.data is not None and config.retain is not None:
        raise BadInput("--retain and --data exclude each other: the rest of --data is retained")
    sets: dict[str, data.Examples] = {}
    target: Target
    classes: Classes | None = None
    if config.data is not None:
        everything = data.load(config.data, "data", config.columns)
        if config.forget_classes:
            classes = _classes(config.forget_classes, task, everything)
            _encode({"data": everything}, task)  # every label is there and known
            labels = [_label(task, v) for v in everything.column("label")]
            sets["forget"], sets["retain"] = data.split_by_labels(
                everything, labels, set(classes.indices)
            )
        elif config.forget_ids:
            ids = data.parse_ids(config.forget_ids)
            sets["forget"], sets["retain"] = data.split_by_ids(everything, ids)
        else:
            forget = data.load(config.forget, "forget", config.columns)
            _encode({"data": everything, "forget": forget}, task)  # every content can be read
            sets["forget"], sets["retain"] = data.split_by_content(everything, forget, task.content)
    else:
        sets["forget"] = data.load(config.forget, "forget", config.columns)
        if config.retain is not None:
            sets["retain"] = data.load(config.retain, "retain", config.columns)
    if config.holdout is not None:
        sets["holdout"] = data.load(config.holdout, "holdout", config.columns)
    target = classes or Records(len(sets["forget"]))
    return sets, target


def _classes(text: str, task: Task, examples: data.Examples) -> Classes:
    if not isinstance(task, Classification):
        raise BadInput("--forget-classes is for classifiers: use --forget-ids or --forget")
    if not task.names and examples.class_names:
        task.names = examples.class_names
    indices = tuple(task.label_index(part.strip()) for part in text.split(",") if part.strip())
    names = tuple(task.names[i] if task.names else str(i) for i in indices)
    return Classes(indices, names)


def _label(task: Task, value: Any) -> int:
    if not isinstance(task, Classification):
        raise BadInput("only classifiers have labels")
    return task.label_index(value)


def _encode(raw: Mapping[str, data.Examples], task: Task) -> dict[str, Encoded]:
    faults, encoded = Faults(), {}
    for name, examples in raw.items():
        try:
            encoded[name] = Encoded(examples, task)
        except BadInput as error:
            faults.add(str(error))
    faults.check()
    return encoded


def _check_overlap(raw: Mapping[str, data.Examples], hashes: Mapping[str, list[bytes]]) -> None:
    faults = Faults()
    for other in ("retain", "holdout"):
        if other in raw:
            fault = data.overlap_fault(raw["forget"], hashes["forget"], raw[other], hashes[other])
            if fault:
                faults.add(fault)
    faults.check()


def _split_holdout(encoded: dict[str, Encoded], target: Target) -> dict[str, Encoded]:
    """Forgotten classes of the holdout are a set of their own: they should be lost, too."""
    holdout = encoded.get("holdout")
    if holdout is None or not isinstance(target, Classes):
        return encoded
    labels = [_label(holdout.task, value) for value in holdout.examples.column("label")]
    gone = [i for i, label in enumerate(labels) if label in target.indices]
    rest = [i for i, label in enumerate(labels) if label not in target.indices]
    split = {"holdout": rest, "holdout_forget": gone}
    parts = {name: holdout.select(part, name) for name, part in split.items() if part}
    return {**{k: v for k, v in encoded.items() if k != "holdout"}, **parts}


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"device {name!r} is unknown: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"device {name!r} is not supported: use cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"device {name} was asked for, and there is no CUDA here: use cpu")
    return device
