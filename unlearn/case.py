"""From a configuration to a case: which checkpoints and data it is about, read and checked.

No weight is loaded here. A case is what a run and an audit have in common.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from unlearn import checkpoint as checkpoints
from unlearn import data, distributed, registry
from unlearn.checkpoint import Checkpoint, Options
from unlearn.config import AuditConfig, CaseConfig
from unlearn.errors import BadInput, Faults
from unlearn.interface import Classes, Concepts, Method, Records, Target
from unlearn.tasks.base import Encoded, Task
from unlearn.tasks.classification import Classification
from unlearn.tasks.diffusion import Diffusion, words
from unlearn.weights import fingerprint_files

SetName = Literal["forget", "retain", "holdout", "holdout_forget", "neighbours"]


@dataclass(frozen=True)
class Sets:
    """The validated data of a request.

    ``holdout_forget`` is the holdout's forgotten classes; ``neighbours`` are records of topics near
    the forgotten ones.
    """

    forget: Encoded
    retain: Encoded | None = None
    holdout: Encoded | None = None
    holdout_forget: Encoded | None = None
    neighbours: Encoded | None = None

    def named(self) -> dict[SetName, Encoded]:
        """Every set that is there, by name."""
        found = {name: getattr(self, name) for name in get_args(SetName)}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Case:
    """Checkpoints and data that passed every check that does not need the weights.

    Attributes:
        config: as it was asked.
        checkpoint: the model before it forgot.
        unlearned: the model after, when it exists already.
        retrained: a model trained without the forget set, if there is one.
        sets: the data.
        target: what must go.
        device: where to compute.
        hashes: of every record, by set.
        method: how the unlearned model is or was made; None when nobody said.
        method_name: its name; "" when nobody said.
        hyperparameters: every setting of the method.
        given: the settings that were not left at their defaults.
    """

    config: CaseConfig
    checkpoint: Checkpoint
    unlearned: Checkpoint | None
    retrained: Checkpoint | None
    sets: Sets
    target: Target
    device: torch.device
    hashes: Mapping[str, list[bytes]]
    method: Method | None = None
    method_name: str = ""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)

    def identity(self) -> str:
        """One hash of everything that decides the resulting weights and report."""
        settings = self.config.model_dump(mode="json", exclude=set(BY_CONTENT), fallback=str)
        found = (self.checkpoint, self.unlearned, self.retrained)
        parts = [
            json.dumps(settings, sort_keys=True, default=str),
            json.dumps([self.method_name, self.hyperparameters], sort_keys=True, default=str),
            *(checkpoint.fingerprint if checkpoint else "" for checkpoint in found),
            *([self.classifier.fingerprint] if self.config.classifier is not None else []),
            *([content(self.clip)] if self.config.clip is not None else []),
            *(
                content(getattr(self.config, name))
                for name in ("translations", "translator", "jailbreaks")
            ),
            self.device.type,
            # in their order: batches and what is kept of them go by position
            *(f"{name}:{b''.join(hashes).hex()}" for name, hashes in self.hashes.items()),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    def classifier(self) -> Checkpoint:
        """What judges generated pictures, where a classifier was given."""
        trusted = Options(trust_remote_code=self.config.trust_remote_code)
        return checkpoints.inspect(self.config.classifier, trusted)

    @cached_property
    def clip(self) -> Path:
        """The directory of the CLIP model, where one was given; a hub name is downloaded.

        Raises:
            BadInput: no such directory, nor on the hub.
        """
        name = str(self.config.clip)
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        if not path.exists() and checkpoints.on_hub(name):
            return checkpoints.download(name)
        raise BadInput(f"the CLIP model {name} is no directory: check the path")

    def tasks(self) -> dict[str, Task]:
        """How each checkpoint reads records, by role."""
        found = {
            "original": self.checkpoint,
            "unlearned": self.unlearned or self.checkpoint,
            "retrained": self.retrained,
        }
        return {role: checkpoint.task for role, checkpoint in found.items() if checkpoint}


# settings that identity() takes by content, or that decide nothing
BY_CONTENT = (
    "checkpoint", "original", "unlearned", "forget", "retain", "holdout", "data", "retrained",
    "classifier", "clip", "neighbours", "translations", "translator", "jailbreaks",
    "out", "save_every", "shadow_cache",
)  # fmt: skip


def content(given: Any) -> str:
    """What stands in a file or directory, or was given as it is; a function is like no other."""
    if isinstance(given, Mapping):
        given = {name: content(part) for name, part in given.items()}
    elif isinstance(given, str | Path) and (path := Path(given)).exists():
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
        given = [(str(file.relative_to(path)), fingerprint_files([file])) for file in files]
    return json.dumps(given, sort_keys=True, default=str)


def options(config: CaseConfig) -> Options:
    """How the checkpoints of a case are read."""
    return Options(
        config.model, config.task, config.trust_remote_code, config.max_length,
        config.chat_template, config.sampling.get("null_class"),
    )  # fmt: skip


def build(config: CaseConfig, checkpoint: Checkpoint, *, once: bool = False, **made: Any) -> Case:
    """Read and check the data, and the other checkpoints against the first.

    Args:
        config: what is asked.
        checkpoint: the first one.
        once: what earlier requests forgot is not forgotten again, though it is named again.
        **made: further fields of the case.

    Raises:
        BadInput: whatever is wrong with files or records, or checkpoints that do not belong
            together.
    """
    _check_closer(config, checkpoint.task)
    raw, target, warnings = _raw_sets(config, checkpoint.task)
    if isinstance(checkpoint.task, Diffusion):
        checkpoint.task.anchor = _anchor(config, checkpoint.task, target)
    before = getattr(config, "unlearned", None)
    known = checkpoints.inspect(before, options(config)) if before is not None else checkpoint
    left_out = once or (isinstance(target, Classes) and before is None)
    encoded = _encode(raw, checkpoint.task)  # every content can be read
    names = ("retain", "forget") if left_out else ("retain",)
    encoded, notes = _without_forgotten(encoded, known, names)
    raw = {name: part.examples for name, part in encoded.items()}
    checkpoint = replace(checkpoint, notes=(*checkpoint.notes, *warnings, *notes))
    hashes = {name: data.record_hashes(e, checkpoint.task.content) for name, e in raw.items()}
    _check_overlap(raw, hashes)
    if near := set(hashes.get("neighbours", ())) & set(hashes.get("retain", ())):
        note = f"{len(near):,} neighbours are retain records, too, and more easily kept."
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
    others: dict[str, Checkpoint | None] = {"unlearned": None, "retrained": None}
    for name in others:
        source = getattr(config, name, None)
        if source is not None:
            other = known if name == "unlearned" else checkpoints.inspect(source, options(config))
            _check_same_kind(checkpoint.task, other.task, source)
            _encode(raw, _as_labelled(other.task, checkpoint.task))
            others[name] = other
    return Case(
        config, checkpoint, others["unlearned"], others["retrained"],
        Sets(**_split_holdout(encoded, target)), target, device_of(config.device), hashes, **made,
    )  # fmt: skip


def of_audit(config: AuditConfig) -> tuple[Case, Checkpoint]:
    """The case of an audit, and the unlearned checkpoint.

    How that was made is read from its run directory, unless the configuration says so.

    Raises:
        BadInput: whatever is wrong with flags, files or records.
    """
    if config.out is not None:
        check_out(Path(config.out))
    if config.set and config.method is None:
        raise BadInput("--set gives the hyperparameters of --method: pass it, too")
    case = build(config, checkpoints.inspect(config.original, options(config)))
    unlearned = case.unlearned
    if unlearned is None:
        raise BadInput("there is nothing to audit: pass --unlearned")
    name, settings = config.method, dict(config.set)
    if name is None and unlearned.made_by is not None:
        name, settings = unlearned.made_by[0], dict(unlearned.made_by[1])
    if name is None:
        return case, unlearned
    given = settings if config.method is not None else {}  # a run's are all in its own record
    case = replace(case, method_name=name, hyperparameters=settings, given=given)
    try:
        method = registry.build(name, settings)
    except BadInput:
        if config.method is not None:
            raise
        return case, unlearned  # a method that is not installed here is known by name alone
    return replace(case, method=method, hyperparameters=registry.values(method)), unlearned


def check_out(out: Path) -> None:
    """Refuse a place that is taken or cannot be made; the main process's business alone.

    Raises:
        BadInput: it exists, or its parent does not.
    """
    if not distributed.is_main():
        return
    if out.exists():
        raise BadInput(f"{out} exists already: runs are never overwritten; choose another --out")
    if not out.absolute().parent.is_dir():
        raise BadInput(f"the folder {out.absolute().parent} does not exist: create it first")


def _check_closer(config: CaseConfig, task: Task) -> None:
    """Refuse what nobody would look at."""
    named = [n for n in ("translations", "translator", "jailbreaks", "acr") if getattr(config, n)]
    if named and (task.name != "causal_lm" or getattr(config, "audit", None) != "deep"):
        raise BadInput(f"--{named[0]} is for deep audits (--audit deep) of language models")
    if config.neighbours is not None and isinstance(task, Diffusion):
        raise BadInput("--neighbours are records: of what a pipeline draws, name --keep-concepts")
    if config.clip is not None:
        if not isinstance(task, Diffusion):
            raise BadInput("--clip looks at pictures, and this model draws none: leave it out")
        if task.tokenizer is None:
            raise BadInput(
                "--clip compares pictures with their prompts, and this pipeline takes no prompts: "
                "leave it out"
            )
        if getattr(config, "audit", None) == "none":
            raise BadInput("--clip is for the audit, and there is none: leave it out")


def _as_labelled(task: Task, like: Task) -> Task:
    """A classification task that needs labels no more than another one does."""
    if isinstance(task, Classification) and isinstance(like, Classification):
        return task.reading(like.labels)
    return task


def _check_same_kind(task: Task, other: Task, source: Any) -> None:
    if type(other) is not type(task):
        raise BadInput(f"{source} is not of the same kind as the original checkpoint")
    if isinstance(task, Classification) and isinstance(other, Classification):
        same_names = not (task.names and other.names) or tuple(task.names) == tuple(other.names)
        if task.classes != other.classes or not same_names:
            raise BadInput(
                f"{source} has other classes than the original, or in another order: pass one "
                "with the same"
            )


def _raw_sets(config: CaseConfig, task: Task) -> tuple[dict[str, data.Examples], Target, list[str]]:
    """The sets, what must go, and warnings about it."""
    generates = isinstance(task, Diffusion)
    named = bool(config.forget_classes or config.forget_concepts)
    if config.forget is None and config.data is None and not (generates and named):
        raise BadInput("nothing to forget was named: pass --forget, or --data with --forget-ids")
    ways = [config.forget is not None, bool(config.forget_ids), bool(config.forget_classes)]
    if sum(ways) > 1 or (config.forget_classes and config.forget_concepts):
        raise BadInput("name the forget set one way: --forget, --forget-ids or --forget-classes")
    if (config.forget_ids or (config.forget_classes and not generates)) and config.data is None:
        raise BadInput("--forget-ids and --forget-classes select from --data: pass it")
    if config.data is not None and config.retain is not None:
        raise BadInput("--retain and --data exclude each other: the rest of --data is retained")
    sets: dict[str, data.Examples] = {}
    notes: list[str] = []
    classes: Classes | None = None
    if config.data is not None:
        everything = data.load(config.data, "data", config.columns)
        if config.forget_classes:
            classes = _classes(config, task, everything)
            _encode({"data": everything}, task)  # every label is there and known
            labels = [task.label_index(v) for v in everything.column("label")]
            sets["forget"], sets["retain"] = data.split_by_labels(
                everything, labels, set(classes.indices)
            )
        elif config.forget_ids:
            ids = data.parse_ids(config.forget_ids)
            sets["forget"], sets["retain"] = data.split_by_ids(everything, ids)
        elif config.forget is None:
            sets |= _by_caption(config, task, everything)
        else:
            forget = data.load(config.forget, "forget", config.columns)
            _encode({"data": everything, "forget": forget}, task)  # every content can be read
            sets["forget"], sets["retain"] = data.split_by_content(everything, forget, task.content)
    else:
        if config.forget_classes:
            classes = _classes(config, task, None)
        if config.forget is not None:
            sets["forget"] = data.load(config.forget, "forget", config.columns)
        if config.retain is not None:
            sets["retain"] = data.load(config.retain, "retain", config.columns)
    for name in ("holdout", "neighbours"):
        if (source := getattr(config, name)) is not None:
            sets[name] = data.load(source, name, config.columns)
    sets.setdefault("forget", data.Examples([], [], "forget", "nothing"))
    target: Target = classes or Records(len(sets["forget"]))
    if config.forget_concepts:
        target, notes = _concepts(config, task)
    return sets, target, notes


def _without_forgotten(
    sets: dict[str, Encoded], checkpoint: Checkpoint, names: Sequence[str]
) -> tuple[dict[str, Encoded], list[str]]:
    """The sets without what earlier requests forgot, and what was left out.

    It is not retained again, and a class is forgotten without those of its records that are gone
    already. Records that were named are taken at their word, but by methods that keep count.
    """
    kept, notes, key = dict(sets), list[str](), checkpoint.record_key
    if not checkpoint.forgotten:
        return kept, notes
    if key is None:
        raise BadInput(
            f"{checkpoint.source} cannot say what it forgot without its record.key: put that back "
            "beside run.json, so that it is not retained again"
        )
    shown = checkpoint.task.shown
    named = set(data.record_hashes(sets["forget"].examples, shown, key))  # audited: this run's own
    for name in [name for name in names if name in sets]:
        hashes = data.record_hashes(sets[name].examples, shown, key)
        gone = checkpoint.forgotten - (named if name == "retain" else set())
        left = [i for i, h in enumerate(hashes) if h not in gone]
        if not left:
            raise BadInput(f"earlier requests forgot every record of the {name} set already")
        if out := len(hashes) - len(left):
            kept[name] = sets[name].select(left)
            notes.append(
                f"{out:,} records that earlier requests forgot were left out of the {name} set."
            )
    return kept, notes


def _by_caption(
    config: CaseConfig, task: Task, examples: data.Examples
) -> dict[str, data.Examples]:
    """Records whose caption says every word of a prompt that must go, and the others."""
    _encode({"data": examples}, task)  # every caption is there
    wanted = [words(prompt) for prompt in _listed(config.forget_concepts)]
    said = [words(str(text)) for text in examples.column("text")]
    named = [i for i, text in enumerate(said) if any(w and w <= text for w in wanted)]
    gone = set(named)
    rest = [i for i in range(len(said)) if i not in gone]
    parts = {"forget": named, "retain": rest}
    return {name: examples.select(part, name) for name, part in parts.items() if part}


def _anchor(config: CaseConfig, task: Diffusion, target: Target) -> str | int | None:
    """What is shown instead, as the task takes it.

    Raises:
        BadInput: no such class, or a prompt that the tokenizer reads as nothing.
    """
    if isinstance(target, Classes):
        return target.anchor
    if config.anchor is None:
        return None
    if task.tokenizer is None:
        return task.label_index(config.anchor)
    if fault := task.expressible(config.anchor):
        raise BadInput(fault)
    return config.anchor


def _classes(config: CaseConfig, task: Task, examples: data.Examples | None) -> Classes:
    named = getattr(task, "names", ())
    if examples and not named and examples.class_names:
        named = task.names = examples.class_names  # type: ignore[attr-defined]
    indices = tuple(task.label_index(part) for part in _listed(config.forget_classes))
    names = tuple(named[i] if named else str(i) for i in indices)
    anchor = None if config.anchor is None else task.label_index(config.anchor)
    if anchor in indices:
        raise BadInput(f"the anchor {config.anchor} is one of the classes to forget: name another")
    return Classes(indices, names, anchor)


def _concepts(config: CaseConfig, task: Task) -> tuple[Concepts, list[str]]:
    """The concepts that prompts name, and warnings about words the tokenizer does not know.

    Raises:
        BadInput: no text-to-image model, or a prompt that its tokenizer reads as nothing.
    """
    if not isinstance(task, Diffusion) or task.tokenizer is None:
        raise BadInput("--forget-concepts is for text-to-image models: use --forget or --data")
    wanted, keep = _listed(config.forget_concepts), _listed(config.keep_concepts)
    faults, notes = Faults(), []
    for prompt in (*wanted, *keep, *([config.anchor] if config.anchor else [])):
        if fault := task.expressible(prompt):
            faults.add(fault)
        elif lost := task.lost_words(prompt):
            notes.append(
                f"Warning: the tokenizer does not know {', '.join(map(repr, lost))} of {prompt!r} "
                "and reads it as padding."
            )
    if config.anchor in wanted:
        faults.add(f"the anchor {config.anchor!r} is one of the concepts to forget: name another")
    faults.check()
    return Concepts(tuple(wanted), config.anchor or "", tuple(keep)), notes


def _listed(text: str | None) -> list[str]:
    """Items between commas, or the lines of ``@file``."""
    if text and text.startswith("@"):
        return data.parse_ids(text)
    return [part.strip() for part in (text or "").split(",") if part.strip()]


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
    pairs = (("forget", "retain"), ("forget", "holdout"), ("forget", "neighbours"))
    for one, other in (*pairs, ("retain", "holdout")):
        if one in raw and other in raw:
            fault = data.overlap_fault(raw[one], hashes[one], raw[other], hashes[other])
            if fault:
                faults.add(fault)
    faults.check()


def _split_holdout(encoded: dict[str, Encoded], target: Target) -> dict[str, Encoded]:
    """Forgotten classes of the holdout are a set of their own: they should be lost, too."""
    holdout = encoded.get("holdout")
    if holdout is None or not isinstance(target, Classes):
        return encoded
    labels = [holdout.task.label_index(value) for value in holdout.examples.column("label")]
    gone = [i for i, label in enumerate(labels) if label in target.indices]
    rest = [i for i, label in enumerate(labels) if label not in target.indices]
    split = {"holdout": rest, "holdout_forget": gone}
    parts = {name: holdout.select(part, name) for name, part in split.items() if part}
    return {**{k: v for k, v in encoded.items() if k != "holdout"}, **parts}


def device_of(name: str | None) -> torch.device:
    """Where to compute; by default on the first GPU, if there is one.

    Raises:
        BadInput: unknown, or not here.
    """
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
