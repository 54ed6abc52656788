"""What a memorization audit will measure: everything is checked before a weight is read."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unlearn import checkpoint as checkpoints
from unlearn import data, distributed
from unlearn.case import Case, Sets, check_out, device_of, options
from unlearn.config import CaseConfig, MemorizationConfig, as_flags
from unlearn.errors import BadInput, Faults
from unlearn.evaluations.counterfactual import recipe
from unlearn.evaluations.examination import label
from unlearn.evaluations.extractable import PREFIXES, begun, distinct, keys, speaking, usable
from unlearn.evaluations.recollection import ASKED, words_of
from unlearn.evaluations.verbatim import READ, files
from unlearn.interface import Records
from unlearn.methods.retrain import Retrain
from unlearn.tasks.base import Encoded

Counts = npt.NDArray[np.int64]

# settings of a case that have a meaning here
USED = {
    "data", "holdout", "columns", "out", "task", "max_length", "chat_template",
    "trust_remote_code", "training", "shadows", "shadow_cache", "include_examples", "seed",
    "device",
}  # fmt: skip
# a case knows its sets by their part in an erasure
ROLES = {"forget": "data", "holdout": "holdout", "retain": "further"}
OTHERS = {
    "classification": "a classifier; what shadow models say about single records of it is in "
    "`unlearn audit --audit deep` (memorization scores)",
    "diffusion": "a diffusion pipeline; whether pictures of records come back is in `unlearn "
    "audit` of it (copies of forgotten records, denoising losses)",
}


@dataclass(frozen=True)
class Plan:
    """What will be measured; everything that needs no weights is checked.

    Attributes:
        case: checkpoint, data and device.
        texts: distinct ones of the data, as many as are measured.
        copies: of each, shape (n,).
        rest: distinct texts that are not measured.
        unseen: distinct texts of the holdout.
        foils: positions of those of them that are still unseen after retention.
        other: what the model is trained on for it.
        prefixes: in tokens.
        files: where generated text is looked up; empty: in the data.
        recipe: how models for counterfactual memorization are trained.
        not_run: measurements that are left out, with the reason.
    """

    case: Case
    texts: Encoded
    copies: Counts
    rest: Encoded | None
    unseen: Encoded | None
    foils: tuple[int, ...]
    other: Encoded | None
    prefixes: tuple[int, ...]
    files: tuple[Path, ...]
    recipe: Retrain | None
    not_run: dict[str, str]

    @property
    def config(self) -> MemorizationConfig:
        """As it was asked."""
        config = self.case.config
        if not isinstance(config, MemorizationConfig):
            raise TypeError("this case is not about memorization")
        return config


def plan(config: MemorizationConfig) -> Plan:
    """Check everything that can be checked without the weights.

    Raises:
        BadInput: settings that mean nothing here, a model that is no language model, texts too
            short for what is asked, sets that overlap but for white space, files that cannot be
            read, checkpoints to start from that cannot take the model's place.
    """
    _check_settings(config)
    if config.out is not None:
        check_out(Path(config.out))
    found = files(_listed(config.corpus)) if config.corpus is not None else []
    checkpoint = checkpoints.inspect(config.checkpoint, options(config))
    if kind := OTHERS.get(checkpoint.task.name):
        raise BadInput(
            f"memorization of text is measured on language models, and {checkpoint.source} is "
            f"{kind}"
        )
    sources = {"data": config.data, "holdout": config.holdout, "further": config.further}
    raw = {n: data.load(s, n, config.columns) for n, s in sources.items() if s is not None}
    sets = {name: Encoded(examples, checkpoint.task) for name, examples in raw.items()}
    hashes = {n: data.record_hashes(e, checkpoint.task.content) for n, e in raw.items()}
    said = {name: keys(examples) for name, examples in sets.items()}
    faults = Faults()
    for one, two in (("data", "holdout"), ("data", "further"), ("holdout", "further")):
        if one in raw and two in raw:
            fault = data.overlap_fault(raw[one], said[one], raw[two], said[two])
            if fault:
                faults.add(fault)
    faults.check()
    whole = sets["data"]
    roles = {role: sets.get(name) for role, name in ROLES.items()}
    case = Case(
        config, checkpoint, None, None,
        Sets(whole, retain=roles["retain"], holdout=roles["holdout"]),
        Records(len(whole)), device_of(config.device),
        # files that are searched make the work another one when they change, as records do
        {role: hashes[name] for role, name in ROLES.items() if name in hashes}
        | {"corpus": [_stamp(path) for path in found]},
    )  # fmt: skip
    first, copies = distinct(whole)
    chosen = _drawn(len(first), config.sample, config.seed)
    texts = whole.select([first[i] for i in chosen])
    left = sorted(set(range(len(first))) - set(chosen))
    unseen = sets["holdout"].select(distinct(sets["holdout"])[0]) if "holdout" in sets else None
    words_of(*filter(None, (texts, unseen)))  # there are some to make edits with
    method = recipe(config.training, checkpoint) if config.training and config.shadows else None
    if method is not None and len(texts) < 2:
        raise BadInput("counterfactual memorization trains on halves of the texts: give at least 2")
    other, foils, why = _other(config, sets.get("further"), unseen)
    not_run = {"retention": why} if other is None else {}
    if unseen is None:
        not_run["recognition against unseen texts"] = "there are none: pass --holdout."
    if not config.generations:
        not_run["verbatim generation"] = "--generations is 0."
    if method is None:
        not_run["counterfactual memorization"] = (
            "--shadows is 0."
            if config.training
            else "it trains new models on halves of the texts: say how with --training name=value "
            "(`unlearn methods retrain` lists the settings)."
        )
    units = [_units(texts, i) for i in range(len(texts))]
    asked = _prefixes(config, texts)
    return Plan(
        case, texts, copies[chosen], whole.select([first[i] for i in left]) if left else None,
        unseen, foils, other, usable(units, begun(texts).tolist(), asked, config.suffix),
        tuple(found), method, not_run,
    )  # fmt: skip


def _check_settings(config: MemorizationConfig) -> None:
    if distributed.world() > 1:
        raise BadInput("memorization is measured in one process: start it without a launcher")
    if odd := (config.model_fields_set & set(CaseConfig.model_fields)) - USED:
        raise BadInput(f"{as_flags(odd)} means nothing to --only memorization: leave it out")
    if config.data is None:
        raise BadInput(
            "say which records the model was trained on: `--only memorization MODEL DATA`"
        )


def _listed(paths: str | Path) -> list[str | Path]:
    if isinstance(paths, Path):
        return [paths]
    found: list[str | Path] = [part.strip() for part in paths.split(",") if part.strip()]
    if not found:
        raise BadInput("--corpus names no file: name files or folders, or leave it out")
    return found


def _prefixes(config: MemorizationConfig, texts: Encoded) -> tuple[int, ...]:
    """The lengths that were asked for; else doubling ones, and none where there are prompts."""
    if config.prefixes is None:
        prompted = any(speaking(texts).texts(row)[0] for row in texts.examples.rows)
        return (0, *PREFIXES) if prompted else PREFIXES
    parts = [part.strip() for part in config.prefixes.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise BadInput(
            f"--prefixes {config.prefixes!r} must be numbers of tokens, such as '8,16,50'"
        )
    return tuple(sorted({int(part) for part in parts}))


def _units(texts: Encoded, index: int) -> int:
    """Scored tokens of a text, a closing end of sequence left out as in ``Signals.hits``."""
    answer = texts[index]["answer"]
    return len(answer) - int(len(answer) > 1 and int(answer[-1]) == speaking(texts).eos)


def _drawn(n: int, size: int, seed: int) -> list[int]:
    """At most ``size`` of ``n`` positions, ascending."""
    return sorted(random.Random(seed).sample(range(n), min(n, size)))  # noqa: S311


def _other(
    config: MemorizationConfig, further: Encoded | None, unseen: Encoded | None
) -> tuple[Encoded | None, tuple[int, ...], str]:
    """What is trained on for retention, the foils that it leaves unseen, and why there is none."""
    everything = tuple(range(len(unseen))) if unseen is not None else ()
    if not config.retention_steps:
        return None, everything, "--retention-steps is 0."
    if further is not None:
        return further, everything, ""
    if unseen is None:
        return None, (), "there is nothing else to train on: pass --further or --holdout."
    if len(unseen) < 4:
        return None, everything, "half of so small a holdout is too little: pass --further."
    half = _drawn(len(unseen), len(unseen) // 2, config.seed)
    return unseen.select(half), tuple(sorted(set(everything) - set(half))), ""


def _stamp(path: Path) -> bytes:
    """What changes when a file does: its place, size and time."""
    facts = path.stat()
    return f"{path.resolve()}\x00{facts.st_size}\x00{facts.st_mtime_ns}\x00".encode()


def name_of(plan: Plan) -> str:
    """The data, for people."""
    source = plan.texts.examples.source
    return "records in memory" if source == "memory" else Path(source).name


def settings(config: MemorizationConfig) -> dict[str, Any]:
    """What was asked, without what is named by fingerprint or is private; paths shortened."""
    names = ("prefixes", "suffix", "sample", "retention_steps", "retention_lr", "corpus", "match",
             "generations", "shadows", "training", "max_length", "seed")  # fmt: skip
    found = config.model_dump(mode="json", include=set(names), fallback=str)
    if config.corpus is not None:
        found["corpus"] = ", ".join(label(str(path)) for path in _listed(config.corpus))
    if config.training.get("init") is not None:
        found["training"] = {**config.training, "init": label(str(config.training["init"]))}
    return {name: found[name] for name in names if found[name] not in (None, {})}


def limits(plan: Plan) -> tuple[str, ...]:
    """What the numbers will not show."""
    config, task = plan.config, speaking(plan.texts)
    found = [
        "Copies are records that are equal but for white space. Near-duplicates were not looked "
        "for and count as texts of their own.",
        "Greedy decoding was begun with the first tokens of a text only; other prompts may bring "
        "out more.",
        f"Shares by prefix are about the texts long enough for it, with {config.suffix} tokens to "
        "follow, so different prefixes are not about the same texts.",
    ]
    if plan.unseen is None:
        found.append(
            "No holdout was given: how much of what comes out a model would say without having "
            "seen it is not known."
        )
    if plan.rest is not None:
        found.append(f"Of the distinct texts, {len(plan.texts):,} random ones were measured.")
    cut = sum(int(plan.texts[i]["length"]) >= task.max_length for i in range(len(plan.texts)))
    if cut:
        found.append(
            f"{cut:,} texts reach the longest input of {task.max_length:,} tokens and may have "
            "lost their end."
        )
    if plan.other is not None and len(plan.texts) > ASKED:
        found.append(f"Retention was measured on {ASKED} random texts.")
    if plan.recipe is not None:
        found.append(
            "Counterfactual memorization is about new models trained on halves of the distinct "
            "texts, each once, and not about the audited weights."
        )
    if config.generations:
        where = "Only the records were searched"
        if plan.files:
            ends = ", ".join(READ)
            where = f"Only files that were given were searched, of folders those that end in {ends}"
        found.append(
            f"{where}: what stands elsewhere was not found. Matches are of whole words, in the "
            "same letters."
        )
    found.append("Texts are taken as independent of each other.")
    return tuple(found)
