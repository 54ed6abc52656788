"""`unlearn audit --only memorization`: how much of a set of texts a language model has memorised.

Four measurements, each with a file of its own: what can be extracted (``extractable``), what is
recognised, recalled and retained (``recollection``), what the model says that stands in files
(``verbatim``), and what a text changes by having been trained on (``counterfactual``). The input is
checked in ``memorization_plan``; this file brings the measurements in order and writes them down.
It gives no verdict.

Interrupted work goes on: tables of signals are read back, and so is every finished measurement. One
that cannot be made, for a reason that only shows late, leaves the others as they are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter
from torch import nn

from unlearn import manifest
from unlearn.attacks.signals import Signals, collect
from unlearn.config import MemorizationConfig, configure
from unlearn.errors import BadInput, Collapsed, UnlearnError
from unlearn.evaluations.counterfactual import Counterfactual, halves, memories
from unlearn.evaluations.examination import given_back, label
from unlearn.evaluations.extractable import (
    Extractable,
    begun,
    continued,
    drawn,
    measured,
    spans,
    speaking,
)
from unlearn.evaluations.memorization_page import render
from unlearn.evaluations.memorization_plan import ROLES, Plan, limits, name_of, plan, settings
from unlearn.evaluations.memorization_schema import Example, Memorization
from unlearn.evaluations.recollection import ASKED, Recollected, Trial, recollect, retained, trial
from unlearn.evaluations.verbatim import Document, Verbatim, documents, said, searched
from unlearn.generation import LONGEST, Opening, sampled_answers
from unlearn.run import Progress, Run, Silent
from unlearn.tasks.base import Encoded
from unlearn.training import Training
from unlearn.workplace import Stopwatch, begin, peak_memory, publish, workplace, written_whole

T = TypeVar("T")

SHOWN = 5  # examples of extracted texts


def audit_memorization(
    checkpoint: Any, records: Any, *, progress: Progress | None = None, **asked: Any
) -> Memorization:
    """Measure how much of some texts a model has memorised: `unlearn audit --only memorization`.

    Args:
        checkpoint: the language model, in any form :func:`unlearn.forget` takes.
        records: texts it was trained on: a path or objects in memory.
        progress: told about every step.
        **asked: the fields of :class:`unlearn.config.MemorizationConfig`: holdout, prefixes,
            suffix, further, corpus, match, training, out, seed and more.

    Raises:
        unlearn.errors.UnlearnError: with a sentence on what is wrong and what to do.
    """
    config = configure(MemorizationConfig, checkpoint=checkpoint, data=records, **asked)
    return memorization(config, progress)[0]


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
        stopwatch = Stopwatch(outcome.seconds, work)
        run = Run(case.checkpoint.task, config.seed, case.device, None, progress,
                  checkpoint=case.checkpoint)  # fmt: skip
        with given_back(config.checkpoint):
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
            title=f"Memorization of {name_of(planned)} in {label(case.checkpoint.source)}",
            created=outcome.created,
            fingerprint=outcome.fingerprint_in,
            records=len(case.sets.forget),
            texts=len(planned.texts),
            sets={ROLES[name]: facts for name, facts in outcome.sets.items()},
            settings=settings(config),
            extractable=extractable,
            unseen=unseen,
            recollection=recollection,
            retention=retention,
            verbatim=verbatim,
            counterfactual=counterfactual,
            not_run=planned.not_run,
            limits=limits(planned),
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

    @cached_property
    def test(self) -> Trial:
        """The texts and foils of recollection, at the prefix that extraction looks at."""
        plan, config = self.plan, self.plan.config
        return trial(plan.texts, self.begun, plan.unseen, self.prefix, config.suffix, config.seed)

    def recollection(
        self, texts: Signals, prefix: int
    ) -> tuple[Recollected, tuple[Recollected, ...]]:
        """What is recognised and recalled, now and while other texts are learned."""
        plan, config, self.prefix = self.plan, self.plan.config, prefix
        now = self.once(
            "recollection", Recollected,
            lambda: recollect(self.model, self.test, self.run, seen=texts, unseen=self.unseen),
        )  # fmt: skip
        if now.edits is None:
            plan.not_run["recognition beside minimal edits"] = (
                "no exchanged word changed the tokens that the model reads."
            )
        other = plan.other
        if other is None:
            return now, ()
        way = Training(lr=config.retention_lr, weight_decay=0.0, max_loss=1e3)
        try:
            curve = self.once(
                "retention", tuple[Recollected, ...],
                lambda: retained(
                    self.model, self.test.among(plan.foils).sample(ASKED), other, self.run, way,
                    config.retention_steps,
                ),
            )  # fmt: skip
        except Collapsed as error:
            plan.not_run["retention"] = f"training on other texts failed: {_reason(error)}"
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

        texts = self.once(
            "generated", list[str],
            lambda: sampled_answers(
                self.model, plan.texts, openings, run, "generate",
                longest=max(LONGEST, 2 * config.match),
            ),
        )  # fmt: skip
        try:
            return self.once(
                "verbatim", Verbatim,
                lambda: searched(
                    texts, _searched_in(plan, run), tokens, config.match, config.include_examples
                ),
            )  # fmt: skip
        except BadInput as error:  # nothing was said, or a record of the files is broken
            plan.not_run["verbatim generation"] = _reason(error, *plan.files)
            return None

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


def _reason(error: UnlearnError, *paths: Path) -> str:
    """What went wrong, as a sentence; of paths no more than the report tells elsewhere."""
    sentence = str(error).rstrip(".")
    for path in paths:
        sentence = sentence.replace(str(path), label(str(path)))
    return f"{sentence}."


def _searched_in(plan: Plan, run: Run) -> Iterator[Document]:
    """The documents of the files, or of the data."""
    if not plan.files:
        rows = plan.case.sets.forget.examples
        for i in range(len(rows)):
            yield from said(dict(rows[i]))
    for done, path in enumerate(plan.files, start=1):
        yield from documents(path)
        run.progress.advance("search files", done, len(plan.files), {})


def _counterfactual(
    plan: Plan, run: Run, work: Path, stopwatch: Stopwatch
) -> tuple[npt.NDArray[np.float64] | None, Counterfactual | None]:
    """What new models say that had a text, against those that had it not."""
    if plan.recipe is None:
        return None, None
    config = plan.config
    cache = Path(config.shadow_cache) if config.shadow_cache else work / "shadows"
    try:
        with stopwatch.phase("counterfactual"):
            found = halves(plan.texts, plan.rest, plan.recipe, run, config.shadows, cache)
    except UnlearnError as error:
        plan.not_run["counterfactual memorization"] = (
            f"training new models failed: {_reason(error)}"
        )
        return None, None
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
