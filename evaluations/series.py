"""Requests one after another: carried out, and watched as a series.

Every request is an ordinary run on the output of the one before it. What is watched besides: does
what was forgotten stay forgotten, does what is retained stay, and when was it worst?
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unlearn import checkpoint as checkpoints
from unlearn import data, distributed
from unlearn.case import Case, check_out, options
from unlearn.config import RunConfig, configure
from unlearn.errors import BadInput, did_you_mean
from unlearn.evaluations import stability
from unlearn.evaluations.examination import Examination
from unlearn.evaluations.schema import Moment, Series
from unlearn.interface import Classes, Need
from unlearn.plan import Plan, plan
from unlearn.run import Progress, Role, Run, execute
from unlearn.tasks.base import Encoded
from unlearn.workplace import Outcome, written_whole

ASKED = ("forget", "forget_ids", "forget_classes", "retain")  # what may differ between requests
WATCHED = 500  # records per set
FILE = "series.json"


@dataclass
class Watch:
    """Looks at the same records after every request.

    Attributes:
        sets: what is watched: the forget set of every request ("1", "2", ...), retain, holdout.
        targets: what every request names.
        moments: what was seen so far.
    """

    sets: dict[str, Encoded]
    targets: list[str]
    moments: list[Moment] = field(default_factory=list)

    def look(self, model: nn.Module, run: Run) -> None:
        """Measure the model that the requests so far have led to."""
        right = {
            name: stability.right(model, examples, run) for name, examples in self.sets.items()
        }
        done = len(self.moments)
        self.moments.append(
            Moment(
                request=done,
                target=self.targets[done - 1] if done else "",
                forget=tuple(right[str(i + 1)] for i in range(len(self.targets))),
                retain=right.get("retain"),
                holdout=right.get("holdout"),
            )
        )

    def series(self) -> Series:
        """What was seen, and the worst of it."""
        task = next(iter(self.sets.values())).task
        unit = stability.unit_of(task)
        return Series(unit=unit, moments=tuple(self.moments), worst=worst(self.moments))


def worst(moments: Sequence[Moment]) -> dict[str, float]:
    """The worst moments of a series, by what they mean; empty before the first request."""
    done = len(moments) - 1
    if done < 1 or any(value is None for m in moments for value in m.forget):
        return {}
    forgotten = np.array([m.forget[:done] for m in moments], dtype=np.float64).T
    since = [row[i + 1 :] for i, row in enumerate(forgotten)]
    found: dict[str, float] = {
        "highest accuracy on anything forgotten, at any time since": max(s.max() for s in since),
        "largest return of something forgotten, above what its own request left": max(
            s.max() - s[0] for s in since
        ),
    }
    kept = [m.retain for m in moments if m.retain is not None]
    if len(kept) == len(moments):
        found |= stability.falls(kept, "request", "series")
    if done > 1:
        learned = [(i, i + 2) for i in range(done)]
        found["share that stays forgotten at the worst moment (WC-ACC of 1 - accuracy)"] = (
            stability.worst_case_accuracy(1 - forgotten, learned)
        )
    return {name: float(value) for name, value in found.items()}


class Watching(Examination):
    """An audit of one request that also sees the series; with depth none it only watches."""

    def __init__(self, watch: Watch, criteria: Any = None) -> None:
        super().__init__(criteria)
        self.watch = watch

    def prepare(self, case: Case) -> None:
        """As an audit does."""
        if case.config.audit != "none":  # type: ignore[attr-defined]
            super().prepare(case)

    def measure(self, role: Role, model: nn.Module, case: Case, run: Run, directory: Path) -> None:
        """Look at the model before the first request, and after each."""
        if role == "unlearned" or (role == "original" and not self.watch.moments):
            self.watch.look(model, run)
        if case.config.audit != "none":  # type: ignore[attr-defined]
            super().measure(role, model, case, run, directory)

    def conclude(self, case: Case, outcome: Outcome, run: Run, directory: Path) -> Any:
        """Keep what was seen beside the run, for the next one and for its report."""
        seconds = outcome.seconds["load"] + outcome.seconds["unlearn"] + outcome.seconds["save"]
        self.watch.moments[-1] = self.watch.moments[-1].model_copy(update={"seconds": seconds})
        self.series = self.watch.series()
        (directory / FILE).write_text(self.series.model_dump_json(indent=2) + "\n")
        if case.config.audit == "none":  # type: ignore[attr-defined]
            return None
        return super().conclude(case, outcome, run, directory)


@dataclass(frozen=True)
class Outcomes:
    """What a series of requests returns.

    Attributes:
        directory: holds one run directory per request, in their order.
        series: what was watched.
        verdicts: one per request; None without an audit.
    """

    directory: Path
    series: Series
    verdicts: list[str | None]

    @property
    def verdict(self) -> str | None:
        """The worst of all verdicts."""
        order = ("not forgotten", "inconclusive", "forgotten")
        return next((word for word in order if word in self.verdicts), None)


def _checked(requests: Sequence[Any]) -> list[dict[str, Any]]:
    if not requests:
        raise BadInput("there is no request: give a list such as `- forget_classes: cat`")
    for number, request in enumerate(requests, 1):
        if not isinstance(request, Mapping):
            raise BadInput(f"request {number} is not a mapping such as forget_ids: '0:10'")
        for key in request:
            if key not in ASKED:
                raise BadInput(f"request {number} says {key!r}: {did_you_mean(str(key), ASKED)}")
        for key in ("forget_ids", "forget_classes"):
            if not isinstance(request.get(key, ""), str) and not _one_class(key, request[key]):
                raise BadInput(
                    f"request {number} says {key}: {request[key]!r}, which is no text: put it in "
                    'quotes, as forget_ids: "10:20" (YAML reads 10:20 as a time of day)'
                )
    return [{k: v if k in ("forget", "retain") else str(v) for k, v in r.items()} for r in requests]


def _one_class(key: str, value: Any) -> bool:
    return key == "forget_classes" and isinstance(value, int) and not isinstance(value, bool)


def forget_all(
    checkpoint: Any,
    requests: Sequence[Mapping[str, Any]],
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> Outcomes:
    """Carry out requests one after another; every run goes on from the one before.

    All of them are checked before the first starts. A killed series goes on when it is called
    again with the same arguments: finished requests stay as they are.

    Args:
        checkpoint: in any form :func:`unlearn.forget` takes.
        requests: what each names: ``forget``, ``forget_ids`` or ``forget_classes``, and perhaps
            ``retain``. What an earlier one forgot is not retained by a later one.
        progress: told about every step.
        **settings: the other fields of :class:`unlearn.config.RunConfig`, for all of them; ``out``
            must be given: the runs stand there as ``001``, ``002`` and so on.

    Raises:
        unlearn.errors.UnlearnError: with a sentence on what is wrong and what to do.
    """
    asked = _checked(requests)
    if twice := sorted({key for r in asked for key in r} & settings.keys()):
        raise BadInput(f"{twice[0]} is said for all requests and by one of them: say it once")
    settings = {**settings, "merge": True}  # a chain of adapters would need every base for good
    configs = [configure(RunConfig, checkpoint=checkpoint, **settings, **r) for r in asked]
    if any(config.translations is not None for config in configs):
        raise BadInput(
            "translations name records by their number in one forget set, and every request of a "
            "series has its own: pass --translator, or audit the last run with them"
        )
    if configs[0].out is None:
        raise BadInput("a series needs a directory for its runs: pass --out")
    out = Path(configs[0].out)
    watch, identity = _watched(configs)
    finished = _begun(out, identity, len(asked))
    if finished:
        seen = Series.model_validate_json((_place(out, finished) / FILE).read_text())
        watch.moments = list(seen.moments)
    source = _place(out, finished) if finished else checkpoint
    for number, config in enumerate(configs[finished:], finished + 1):
        if progress and distributed.is_main():
            progress.say(f"Request {number} of {len(configs)}: {watch.targets[number - 1]}.")
        place = _place(out, number)
        now = config.model_copy(update={"checkpoint": source, "out": place})
        execute(plan(now), Watching(watch, config.criteria), progress)
        source = place
    reports = [_place(out, i + 1) / "report.json" for i in range(len(configs))]
    verdicts = [json.loads(r.read_text())["verdict"] if r.exists() else None for r in reports]
    done = Outcomes(out, watch.series(), verdicts)
    if distributed.is_main():
        _write(out, identity, done.series)
    return done


def _place(out: Path, number: int) -> Path:
    return out / f"{number:03d}"


def _watched(configs: Sequence[RunConfig]) -> tuple[Watch, str]:
    """Every request planned as if those before it were done; what to watch, and one hash of all."""
    found = checkpoints.inspect(configs[0].checkpoint, options(configs[0]))
    if found.task.name == "diffusion":
        raise BadInput(
            "a series watches what models answer, and this one draws: carry out its requests one "
            "by one, each on the run before"
        )
    if found.source == checkpoints.MEMORY:
        raise BadInput(
            "a series goes on from what the run before wrote: save the model and pass its directory"
        )
    key = found.record_key or secrets.token_bytes(16)
    found = replace(found, record_key=key)
    watch, parts, planned, classes = Watch({}, []), [], None, set[int]()
    for number, config in enumerate(configs, 1):
        try:
            planned = plan(config.model_copy(update={"out": None}), found)
        except BadInput as error:
            raise type(error)(f"request {number}: {error}") from error
        forget = planned.sets.forget
        watch.sets[str(number)] = forget.sample(WATCHED, config.seed)
        watch.targets.append(str(planned.target))
        parts.append(planned.identity())
        gone = data.record_hashes(forget.examples, forget.task.shown, key)
        found = replace(found, forgotten=found.forgotten | frozenset(gone))
        if planned.method.needs.state is not Need.NO:  # the run before will have kept some
            found = replace(found, state={"expected": torch.empty(0)})
        classes |= set(planned.target.indices) if isinstance(planned.target, Classes) else set()
    last: Plan = planned  # type: ignore[assignment]
    if last.sets.retain:
        watch.sets["retain"] = last.sets.retain.sample(WATCHED, configs[0].seed)
    if last.sets.holdout:
        unseen = last.sets.holdout
        if classes:
            labels = map(last.checkpoint.task.label_index, unseen.examples.column("label"))
            unseen = unseen.select([i for i, label in enumerate(labels) if label not in classes])
        if len(unseen):
            watch.sets["holdout"] = unseen.sample(WATCHED, configs[0].seed)
    watch.sets = stability.as_watched(watch.sets, last.checkpoint.task)
    return watch, hashlib.sha256("".join(parts).encode()).hexdigest()


def _begun(out: Path, identity: str, requests: int) -> int:
    """How many requests are finished there; makes the directory where nothing was begun."""
    return distributed.on_main(lambda: _begin(out, identity, requests))


def _begin(out: Path, identity: str, requests: int) -> int:
    if not out.exists():
        check_out(out)
        out.mkdir()
        _write(out, identity, None)
        return 0
    try:
        begun = json.loads((out / FILE).read_text())
    except (OSError, ValueError):
        begun = {}
    if begun.get("status") != "unfinished":
        raise BadInput(f"{out} exists already: runs are never overwritten; choose another --out")
    if begun.get("identity") != identity:
        raise BadInput(
            f"{out} holds an unfinished series with other settings or data: repeat its command to "
            "finish it, delete it, or choose another --out"
        )
    return next(i for i in range(requests + 1) if not _place(out, i + 1).exists())


def _write(out: Path, identity: str, series: Series | None) -> None:
    record = {
        "schema_version": "1",
        "status": "complete" if series else "unfinished",
        "identity": identity,
        "series": series.model_dump(mode="json") if series else None,
    }
    with written_whole(out / FILE) as new:
        new.write_text(json.dumps(record, indent=2) + "\n")
