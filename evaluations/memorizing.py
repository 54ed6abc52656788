"""`unlearn audit --only memorization`: how much of a set of texts a language model has memorised.

Four measurements, each with a file of its own: what can be extracted (``extractable``), what is
recognised, recalled and retained (``recollection``), what the model says that stands in files
(``verbatim``), and what a text changes by having been trained on (``counterfactual``). This file
checks the input, brings them in order, and writes them down. It measures and gives no verdict.

Interrupted work goes on: tables of signals are read back, and so is every finished measurement.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, TypeAdapter
from torch import nn

from unlearn import checkpoint as checkpoints
from unlearn import data, distributed, manifest
from unlearn.attacks.signals import Signals, collect
from unlearn.case import Case, Sets, check_out, options
from unlearn.case import _device as device_of
from unlearn.config import CaseConfig, MemorizationConfig, configure
from unlearn.errors import BadInput, Collapsed, Faults
from unlearn.evaluations import plots
from unlearn.evaluations.counterfactual import Counterfactual, halves, memories, recipe
from unlearn.evaluations.examination import _given_back, _label
from unlearn.evaluations.extractable import (
    PREFIXES,
    Estimate,
    Extractable,
    Row,
    begun,
    continued,
    distinct,
    drawn,
    measured,
    spans,
    speaking,
    usable,
)
from unlearn.evaluations.recollection import (
    ASKED,
    Recollected,
    recollect,
    retained,
    trial,
)
from unlearn.evaluations.report import duration, number
from unlearn.evaluations.verbatim import Document, Verbatim, documents, files, said, searched
from unlearn.generation import LONGEST, Opening, sampled_answers
from unlearn.interface import Records
from unlearn.methods.retrain import Retrain
from unlearn.run import Progress, Run, Silent
from unlearn.tasks.base import Encoded
from unlearn.training import Training
from unlearn.workplace import Stopwatch, begin, peak_memory, publish, workplace, written_whole

Counts = npt.NDArray[np.int64]
T = TypeVar("T")

# settings of a case that have a meaning here
USED = {
    "data", "holdout", "columns", "out", "task", "max_length", "chat_template",
    "trust_remote_code", "training", "shadows", "shadow_cache", "include_examples", "seed",
    "device",
}  # fmt: skip
# a case knows its sets by their part in an erasure
ROLES = {"forget": "data", "holdout": "holdout", "retain": "further"}
SHOWN = 5  # examples of extracted texts
FEW = 10  # texts below which a share says little
OTHERS = {
    "classification": "a classifier; what shadow models say about single records of it is in "
    "`unlearn audit --audit deep` (memorization scores)",
    "diffusion": "a diffusion pipeline; whether pictures of records come back is in `unlearn "
    "audit` of it (copies of forgotten records, denoising losses)",
}


class Example(BaseModel):
    """A text that was extracted."""

    beginning: str
    continuation: str


class Memorization(BaseModel):
    """What was found, as it stands in report.json.

    Attributes:
        records: of the data.
        texts: distinct ones among them.
        extractable: of the data.
        unseen: the same of the holdout, which the model cannot have memorised.
        recollection: what is recognised and recalled.
        retention: the same, while the model is trained on other texts.
        not_run: measurements that were not made, with the reason.
        limits: what these numbers do not show.
        examples: texts, only where they were asked for.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: str = "1"
    kind: str = "memorization"
    title: str
    created: str
    fingerprint: str
    records: int
    texts: int
    sets: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    extractable: Extractable
    unseen: Extractable | None
    recollection: Recollected
    retention: tuple[Recollected, ...]
    verbatim: Verbatim | None
    counterfactual: Counterfactual | None
    not_run: dict[str, str]
    limits: tuple[str, ...]
    examples: tuple[Example, ...]
    environment: dict[str, str]
    seconds: dict[str, float]
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """What will be measured; everything that needs no weights is checked.

    Attributes:
        case: checkpoint, data and device.
        texts: distinct ones of the data, as many as are measured.
        copies: of each, shape (n,).
        rest: distinct texts that are not measured.
        unseen: distinct texts of the holdout.
        foils: those of them that are still unseen after retention.
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
    foils: Encoded | None
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


def audit_memorization(
    checkpoint: Any, records: Any, *, progress: Progress | None = None, **settings: Any
) -> Memorization:
    """Measure how much of some texts a model has memorised: `unlearn audit --only memorization`.

    Args:
        checkpoint: the language model, in any form :func:`unlearn.forget` takes.
        records: texts it was trained on: a path or objects in memory.
        progress: told about every step.
        **settings: the fields of :class:`unlearn.config.MemorizationConfig`: holdout, prefixes,
            suffix, further, corpus, match, training, out, seed and more.

    Raises:
        unlearn.errors.UnlearnError: with a sentence on what is wrong and what to do.
    """
    config = configure(MemorizationConfig, checkpoint=checkpoint, data=records, **settings)
    return memorization(config, progress)[0]


# ------------------------------------------------------------------------ before any weight is read


def plan(config: MemorizationConfig) -> Plan:
    """Check everything that can be checked without the weights.

    Raises:
        BadInput: settings that mean nothing here, a model that is no language model, texts too
            short for what is asked, sets that overlap, files that do not exist.
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
    faults = Faults()
    for one, two in (("data", "holdout"), ("data", "further"), ("holdout", "further")):
        if one in raw and two in raw:
            fault = data.overlap_fault(raw[one], hashes[one], raw[two], hashes[two])
            if fault:
                faults.add(fault)
    faults.check()
    whole = sets["data"]
    roles = {role: sets.get(name) for role, name in ROLES.items()}
    case = Case(
        config, checkpoint, None, None,
        Sets(whole, retain=roles["retain"], holdout=roles["holdout"]),
        Records(len(whole)), device_of(config.device),
        {role: hashes[name] for role, name in ROLES.items() if name in hashes},
    )  # fmt: skip
    first, copies = distinct(whole)
    chosen = _drawn(len(first), config.sample, config.seed)
    texts = whole.select([first[i] for i in chosen])
    left = sorted(set(range(len(first))) - set(chosen))
    unseen = sets["holdout"].select(distinct(sets["holdout"])[0]) if "holdout" in sets else None
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
            "it trains new models on halves of the texts: say how with --training name=value "
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
    odd = sorted((config.model_fields_set & set(CaseConfig.model_fields)) - USED)
    if odd:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in odd)
        raise BadInput(f"{flags} means nothing to --only memorization: leave it out")
    if config.data is None:
        raise BadInput(
            "say which records the model was trained on: `--only memorization MODEL DATA`"
        )


def _listed(paths: str | Path) -> list[str | Path]:
    if isinstance(paths, Path):
        return [paths]
    return [part.strip() for part in paths.split(",") if part.strip()]


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
) -> tuple[Encoded | None, Encoded | None, str]:
    """What is trained on for retention, the foils that it leaves unseen, and why there is none."""
    if not config.retention_steps:
        return None, unseen, "--retention-steps is 0."
    if further is not None:
        return further, unseen, ""
    if unseen is None:
        return None, None, "there is nothing else to train on: pass --further or --holdout."
    if len(unseen) < 4:
        return None, unseen, "half of so small a holdout is too little: pass --further."
    half = _drawn(len(unseen), len(unseen) // 2, config.seed)
    foils = sorted(set(range(len(unseen))) - set(half))
    return unseen.select(half), unseen.select(foils), ""


# ---------------------------------------------------------------------------------------- measuring


def memorization(
    config: MemorizationConfig, progress: Progress | None = None
) -> tuple[Memorization, Path | None]:
    """Measure, and write the report.

    Returns:
        The report, and the directory it was written to (None without ``out``).

    Raises:
        BadInput: whatever is wrong with checkpoint, data or settings; nothing is left behind.
    """
    planned = plan(config)
    case = planned.case
    with workplace(case) as (place, resumed):
        progress = progress or Silent()
        if resumed:
            progress.say(f"Going on with the unfinished audit in {place}.")
        work, result = place / "work", place / "result"
        work.mkdir(exist_ok=True)
        result.mkdir(exist_ok=True)
        outcome = begin(case, result)
        stopwatch = Stopwatch(outcome.seconds)
        run = Run(case.checkpoint.task, config.seed, case.device, None, progress,
                  checkpoint=case.checkpoint)  # fmt: skip
        with _given_back(config.checkpoint):
            model = case.checkpoint.load().model.to(case.device)
            found = _Measuring(planned, model, run, outcome.record_key, work, result, stopwatch)
            texts, extractable, unseen = found.extraction()
            recollection, retention = found.recollection(texts, extractable.prefix)
            verbatim = found.verbatim()
            examples = found.examples(texts, extractable) if config.include_examples else ()
            del model, found.model
        scores, counterfactual = _counterfactual(planned, run, work, stopwatch)
        _write_records(planned, texts, extractable, scores, result / "records.parquet")
        report = Memorization(
            title=f"Memorization of {_name(planned)} in {_label(case.checkpoint.source)}",
            created=outcome.created,
            fingerprint=outcome.fingerprint_in,
            records=len(case.sets.forget),
            texts=len(planned.texts),
            sets={ROLES[name]: facts for name, facts in outcome.sets.items()},
            settings=_settings(config),
            extractable=extractable,
            unseen=unseen,
            recollection=recollection,
            retention=retention,
            verbatim=verbatim,
            counterfactual=counterfactual,
            not_run=planned.not_run,
            limits=_limits(planned),
            examples=examples,
            environment=outcome.environment,
            seconds=outcome.seconds,
            peak_memory_bytes=peak_memory(case.device),
        )
        (result / "report.json").write_text(report.model_dump_json(indent=2) + "\n")
        (result / "report.html").write_text(render(report), "utf-8")
        manifest.write(result)
        return report, publish(case, place)


class _Measuring:
    """Asks one model; finished measurements are read back from ``work`` and ``result``."""

    def __init__(
        self, plan: Plan, model: nn.Module, run: Run, key: bytes, work: Path, result: Path,
        stopwatch: Stopwatch,
    ) -> None:  # fmt: skip
        self.plan, self.model, self.run, self.key = plan, model, run, key
        self.work, self.result, self.stopwatch = work, result, stopwatch
        self.begun = begun(plan.texts)
        self.unseen: Signals | None = None

    def once(self, name: str, kind: type[T], compute: Callable[[], T]) -> T:
        """``compute()``, or what interrupted work found."""
        path, adapter = self.work / f"{name}.json", TypeAdapter(kind)
        if path.exists():
            return adapter.validate_json(path.read_bytes())
        with self.stopwatch.phase(name):
            value = compute()
        with written_whole(path) as new:
            new.write_bytes(adapter.dump_json(value))
        return value

    def signals(self, name: str, examples: Encoded) -> Signals:
        """What the model says of every token of a set."""
        path = self.result / "signals" / f"{name}.parquet"
        if not path.exists():
            with self.stopwatch.phase(f"signals of {name}"):
                found = collect(self.model, examples, self.run, self.key, f"measure {name}")
            found.write(path)
        return Signals.read(path)

    def extraction(self) -> tuple[Signals, Extractable, Extractable | None]:
        """What can be extracted of the data, and as much of texts that were never seen."""
        plan, suffix = self.plan, self.plan.config.suffix
        texts = self.signals("data", plan.texts)
        found = measured(texts, plan.copies, self.begun, plan.prefixes, suffix)
        if plan.unseen is None:
            return texts, found, None
        self.unseen = self.signals("holdout", plan.unseen)
        before = begun(plan.unseen)
        ones = np.ones(len(plan.unseen), dtype=np.int64)
        return texts, found, measured(self.unseen, ones, before, plan.prefixes, suffix)

    def recollection(
        self, texts: Signals, prefix: int
    ) -> tuple[Recollected, tuple[Recollected, ...]]:
        """What is recognised and recalled, now and while other texts are learned."""
        plan, config = self.plan, self.plan.config
        how: dict[str, Any] = {"prefix": prefix, "suffix": config.suffix, "seed": config.seed}
        test = trial(plan.texts, self.begun, plan.unseen, **how)
        now = self.once(
            "recollection", Recollected,
            lambda: recollect(self.model, test, self.run, seen=texts, unseen=self.unseen),
        )  # fmt: skip
        other = plan.other
        if other is None:
            return now, ()
        later = trial(plan.texts, self.begun, plan.foils, **how).sample(ASKED)
        settings = Training(lr=config.retention_lr, weight_decay=0.0, max_loss=1e3)
        try:
            curve = self.once(
                "retention", tuple[Recollected, ...],
                lambda: retained(
                    self.model, later, other, self.run, settings, config.retention_steps
                ),
            )  # fmt: skip
        except Collapsed as error:
            plan.not_run["retention"] = f"training on other texts failed: {error}."
            return now, ()
        return now, curve

    def verbatim(self) -> Verbatim | None:
        """How much of what the model says stands in the files, or in the data."""
        plan, config, run = self.plan, self.plan.config, self.run
        if not config.generations:
            return None
        task = speaking(plan.texts)
        draw = random.Random(run.seed_of("openings"))  # noqa: S311
        openings = [Opening(draw.randrange(len(plan.texts))) for _ in range(config.generations)]

        def tokens(word: str) -> int:
            return len(task.tokenizer(f" {word}", add_special_tokens=False)["input_ids"])

        def compute() -> Verbatim:
            texts = sampled_answers(
                self.model, plan.texts, openings, run, "generate",
                longest=max(LONGEST, 2 * config.match),
            )  # fmt: skip
            if not any(text.split() for text in texts):
                raise BadInput(
                    "the model generated only blank texts: pass --generations 0 to go without"
                )
            return searched(
                texts, _searched_in(plan, run), tokens,
                config.match, config.include_examples,
            )  # fmt: skip

        return self.once("verbatim", Verbatim, compute)

    def examples(self, texts: Signals, found: Extractable) -> tuple[Example, ...]:
        """A few of the texts that were extracted."""
        where = spans(
            [len(h) for h in texts.hits()], self.begun.tolist(), found.prefix, found.suffix
        )
        out = continued(texts.hits(), where)
        decode = speaking(self.plan.texts).tokenizer.decode
        shown = []
        for i in np.flatnonzero(out == 1)[:SHOWN].tolist():
            encoding, span = self.plan.texts[i], where[i]
            before = [*encoding["prompt"].tolist(), *encoding["answer"][: span.start].tolist()]
            shown.append(
                Example(
                    beginning=decode(before, skip_special_tokens=True),
                    continuation=decode(encoding["answer"][span].tolist()),
                )
            )
        return tuple(shown)


def _searched_in(plan: Plan, run: Run) -> Iterator[Document]:
    """The documents of the files, or of the data."""
    if not plan.files:
        rows = plan.case.sets.forget.examples
        for i in range(len(rows)):
            yield from said(dict(rows[i]))
    for number_, path in enumerate(plan.files, start=1):
        yield from documents(path)
        run.progress.advance("search files", number_, len(plan.files), {})


def _counterfactual(
    plan: Plan, run: Run, work: Path, stopwatch: Stopwatch
) -> tuple[npt.NDArray[np.float64] | None, Counterfactual | None]:
    """What new models say that had a text, against those that had it not."""
    if plan.recipe is None:
        return None, None
    config = plan.config
    cache = Path(config.shadow_cache) if config.shadow_cache else work / "shadows"
    with stopwatch.phase("counterfactual"):
        found = halves(plan.texts, plan.rest, plan.recipe, run, config.shadows, cache)
    return memories(found.trained["texts"].correct, found.member)


def _write_records(plan: Plan, texts: Signals, found: Extractable, scores: Any, path: Path) -> None:
    """One row per text, named by its keyed hash."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    units = [len(h) for h in texts.hits()]
    columns: dict[str, Any] = {
        "record": texts.record, "copies": plan.copies, "tokens": units, "loss": texts.loss(),
    }  # fmt: skip
    for k in plan.prefixes:
        where = spans(units, begun(plan.texts).tolist(), k, found.suffix)
        out = continued(texts.hits(), where)
        columns[f"extracted_{k}"] = pa.array(out == 1, mask=np.isnan(out))
        p_z = drawn(texts, where)
        columns[f"probability_{k}"] = pa.array(p_z, mask=np.isnan(p_z))
    if scores is not None:
        columns["counterfactual"] = scores
    with written_whole(path) as new:
        pq.write_table(pa.table(columns), new)


def _name(plan: Plan) -> str:
    source = plan.texts.examples.source
    return "records in memory" if source == "memory" else Path(source).name


def _settings(config: MemorizationConfig) -> dict[str, Any]:
    """What was asked, without what is named by fingerprint or is private."""
    names = ("prefixes", "suffix", "sample", "retention_steps", "retention_lr", "corpus", "match",
             "generations", "shadows", "training", "max_length", "seed")  # fmt: skip
    found = config.model_dump(mode="json", include=set(names), fallback=str)
    return {name: found[name] for name in names if found[name] not in (None, {})}


def _limits(plan: Plan) -> tuple[str, ...]:
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
        found.append(
            "Only files that were given were searched: what stands elsewhere was not found. "
            "Matches are of whole words, in the same letters."
        )
    found.append("Texts are taken as independent of each other.")
    return tuple(found)


# -------------------------------------------------------------------------------------- on one page


def render(report: Memorization) -> str:
    """The report as one self-contained page: no script, no network, every text escaped."""
    from importlib import resources

    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = resources.files("unlearn.evaluations.templates")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number, duration=duration, copies=copies_of)
    text = (folder / "memorization.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        report=report,
        css=Markup((folder / "report.css").read_text(encoding="utf-8")),  # noqa: S704 our own file
        headline=next(r for r in report.extractable.by_prefix
                      if r.prefix == report.extractable.prefix),
        figures=_figures(report),
        few=FEW,
    )  # fmt: skip


def copies_of(row: Row) -> str:
    """How often the texts of a row occur.

    >>> copies_of(Row(8, 3, 4, None))
    '3\N{EN DASH}4'
    """
    if row.most is None:
        return "any"
    return str(row.least) if row.least == row.most else f"{row.least}\N{EN DASH}{row.most}"


def _figures(report: Memorization) -> dict[str, Any]:
    """The drawings, by the section they belong to; none where there are no two points."""
    found, headline = report.extractable, report.extractable.prefix
    groups = [row for row in found.by_copies if row.prefix == headline]
    series: dict[str, list[Estimate | None]] = {"data": [row.share for row in found.by_prefix]}
    if report.unseen is not None:
        series["holdout, never seen"] = [row.share for row in report.unseen.by_prefix]
    steps = [point.step for point in report.retention]
    remembered: dict[str, list[Estimate | None]] = {
        "recognised among unseen texts": [point.foils for point in report.retention],
        "recognised beside minimal edits": [point.edits for point in report.retention],
        "recalled exactly": [point.exact for point in report.retention],
        "ROUGE-L of what is recalled": [point.rouge for point in report.retention],
    }
    return {
        "prefix": _curves([r.prefix for r in found.by_prefix], series, "tokens of the beginning",
                          "Extractable share by length of the prefix"),
        "copies": _curves([copies_of(r) for r in groups], {"data": [r.share for r in groups]},
                          "copies in the data", "Extractable share by number of copies"),
        "retention": _curves(steps, remembered, "training steps on other texts",
                             "What is recognised and recalled after training on other texts"),
    }  # fmt: skip


def _curves(
    places: Sequence[Any], series: dict[str, list[Estimate | None]], across: str, label: str
) -> dict[str, Any] | None:
    """Shares with their intervals over places that stand equally far apart."""
    from markupsafe import Markup

    known = {name: values for name, values in series.items() if any(values)}
    if len(places) < 2 or not known:
        return None
    inks = ("unlearned", "original", "retrained", "control")
    with plots._style():
        figure, axes = plots._axes(2.5)
        for order, (values, ink) in enumerate(zip(known.values(), inks, strict=False)):
            drawn_ = [(i + 0.05 * order, e) for i, e in enumerate(values) if e is not None]
            x, y = [at for at, _ in drawn_], [e.value for _, e in drawn_]
            axes.vlines(x, [e.low for _, e in drawn_], [e.high for _, e in drawn_],
                        color=plots.INK[ink], linewidth=1.0, alpha=0.55)  # fmt: skip
            axes.plot(x, y, color=plots.INK[ink], marker="o", markersize=3.2, markeredgewidth=0,
                      clip_on=False, **plots.STYLES[ink])  # fmt: skip
        axes.set_ylim(0, 1)
        axes.set_xticks(range(len(places)), [str(place) for place in places])
        axes.set_xlabel(across)
        axes.set_ylabel("share")
        svg = plots._svg(figure, label)
    legend = list(zip(known, inks, strict=False))
    return {"title": label, "svg": Markup(svg), "legend": legend}  # noqa: S704 drawn by ourselves
