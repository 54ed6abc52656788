"""The trials of a search as optuna keeps them: claimed, carried out, and told of.

The proposals are those of optuna's tree-structured Parzen estimator for several objectives (Ozaki
et al. 2020, doi 10.1145/3377930.3389817), seeded by the number of the trial and the hyperparameter.
Its pruning is not used: it is for a single objective.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import optuna
from optuna.trial import Trial, TrialState
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from unlearn import registry
from unlearn.errors import BadInput, MissingNeed, UnlearnError
from unlearn.evaluations.objectives import Objectives
from unlearn.evaluations.trials import Trying, fixed, planned
from unlearn.evaluations.tuned import Row, short
from unlearn.plan import Plan
from unlearn.ranges import Choice, Space, Subset
from unlearn.run import Progress, execute

STUDY = "unlearn tune"
EITHER = Choice((False, True))
DOMINATED = Objectives(1.0, 0.0)  # nothing forgotten, everything lost: a trial that was given up


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is said by optuna itself."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def opened(url: str, identity: str, method: str) -> optuna.Study:
    """The study of a storage, ours from the start.

    Raises:
        BadInput: it cannot be opened or kept, or is about something else.
    """
    if in_memory(url):
        raise BadInput(
            f"{url} is kept in memory and gone with its process, so that nobody could go on from "
            "it: pass --storage sqlite:///FILE, or none"
        )
    waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    try:
        with alone(url):
            study: optuna.Study = optuna.create_study(
                study_name=STUDY, storage=optuna.storages.RDBStorage(url, engine_kwargs=waits),
                directions=("minimize", "maximize"), load_if_exists=True,
                sampler=optuna.samplers.TPESampler(seed=0),  # optuna 4 would take another
            )  # fmt: skip
            held = study.user_attrs.get("identity")
            if held is None:
                study.set_user_attr("method", method)
                study.set_user_attr("identity", identity)
    except Exception as error:
        why = str(error).strip().splitlines()[:1]
        raise BadInput(
            f"the storage {shown(url)} cannot be opened ({''.join(why)}): pass --storage "
            "sqlite:///FILE"
        ) from error
    if held not in (None, identity):
        raise BadInput(
            f"{shown(url)} holds a search for {study.user_attrs.get('method')} with another "
            "method, checkpoint, range or data: choose another --storage, or repeat its command"
        )
    return study


def shown(url: str) -> str:
    """A storage for people: without its password, or what may hold one where it is malformed."""
    place = parsed(url)
    if place is not None:
        return place.render_as_string(hide_password=True)
    kind, is_url, _ = url.partition("://")
    return f"{kind}://***" if is_url else url


def in_memory(url: str) -> bool:
    """Whether a storage is a database of SQLite that is in no file."""
    place = parsed(url)
    if place is None or place.get_backend_name() != "sqlite":
        return False
    return ":memory:" in (place.database or ":memory:")


def parsed(url: str) -> URL | None:
    """The parts of a URL; None: it is none."""
    try:
        return make_url(url)
    except (ArgumentError, ValueError):  # the latter by a port that is no number
        return None


@contextmanager
def alone(url: str) -> Iterator[None]:
    """Nobody else claims trials from this file; other databases lock their rows themselves."""
    file = url.partition("///")[2]
    if not (url.startswith("sqlite") and file and Path(file).parent.is_dir()):
        yield
        return
    with filelock.FileLock(f"{file}.lock"):
        yield


@dataclass(frozen=True)
class Worker:
    """Carries out trials until there are enough.

    Attributes:
        study: shared by all workers.
        url: where it is kept.
        base: the request with the method's defaults.
        space: where to look.
        trials: that the study is to hold.
        out: of this worker alone.
        name: of this worker, in this call and in those that go on from it.
        progress: told about every step.
    """

    study: optuna.Study
    url: str
    base: Plan
    space: Mapping[str, Space]
    trials: int
    out: Path
    name: str
    progress: Progress

    def work(self, starts: Mapping[str, Mapping[str, Any]], trying: Trying) -> None:
        """Until the study holds enough trials that are finished, or that others are at.

        Args:
            starts: settings to try first, by what they are called.
            trying: what audits the trials.
        """
        with alone(self.url):
            left = self._left()
            self.begin(starts)
        for trial in left:
            self._carry_out(trial, trying)
        while (trial := self.claim()) is not None:
            self._carry_out(trial, trying)

    def begin(self, starts: Mapping[str, Mapping[str, Any]]) -> None:
        """Put these settings first in line, unless they are there."""
        there = {trial.user_attrs.get("origin") for trial in self.study.trials}
        for origin, settings in starts.items():
            if origin in there:
                continue
            method = registry.values(registry.build(self.base.method_name, settings))
            asked = {name: self._asked(name, found, method[name])
                     for name, found in self.space.items()}  # fmt: skip
            known = [name for name, answers in asked.items() if answers]
            given = {**{name: method[name] for name in known}, **settings}
            attrs = {"origin": origin, "proposed": known, "settings": given}
            answers = {key: value for name in known for key, value in asked[name].items()}
            self.study.enqueue_trial(answers, user_attrs=_storable(attrs))

    def claim(self) -> Trial | None:
        """A trial that nobody is at; None when there are enough."""
        with alone(self.url):
            if len(self._counted()) >= self.trials:
                return None
            trial = self.study.ask()
            trial.set_user_attr("worker", self.name)
            return trial

    def rows(self) -> tuple[Row, ...]:
        """All finished trials of all workers."""
        return tuple(
            Row(
                trial.number,
                trial.user_attrs.get("origin", "search"),
                trial.user_attrs["settings"],
                Objectives(trial.values[0], trial.values[1], trial.user_attrs["parts"]),
                trial.user_attrs["rejected"],
                trial.user_attrs["seconds"],
            )
            for trial in self.study.get_trials(states=(TrialState.COMPLETE,))
        )

    def _counted(self) -> list[optuna.trial.FrozenTrial]:
        """Trials that are finished, or that a worker is at."""
        return list(self.study.get_trials(states=(TrialState.COMPLETE, TrialState.RUNNING)))

    def _left(self) -> list[Trial]:
        """What this worker was at when it was killed."""
        # in a file that is ours alone now, a trial of nobody lost its worker as it was claimed
        lost = {self.name, None} if self.url.startswith("sqlite") else {self.name}
        found = []
        for frozen in self.study.get_trials(states=(TrialState.RUNNING,)):
            if frozen.user_attrs.get("worker") in lost:
                trial = Trial(self.study, frozen._trial_id)  # optuna has no other way back to it
                trial.set_user_attr("worker", self.name)
                found.append(trial)
        return found

    def _settings(self, trial: Trial) -> dict[str, Any]:
        """What a trial tries: what it was given, or what the sampler proposes."""
        if "settings" in trial.user_attrs:
            for name in trial.user_attrs.get("proposed", ()):  # the sampler learns from it, too
                self._proposal(trial, name, self.space[name])
            return dict(trial.user_attrs["settings"])
        proposed = {name: self._proposal(trial, name, f) for name, f in self.space.items()}
        return {**fixed(self.base), **proposed}

    def _proposal(self, trial: Trial, name: str, found: Space) -> Any:
        """What the sampler says for one hyperparameter, in terms of the method."""
        if isinstance(found, Subset):  # every part is a yes or no of its own
            parts = self._parts(found)
            chosen = [p for p in parts if self._proposal(trial, f"{name}.{p}", EITHER)]
            # no part at all is no run, and as the worst of all trials it would speak against
            # leaving any of them out
            return ",".join(chosen or [parts[trial.number % len(parts)]])
        self._seed(trial, name)
        if isinstance(found, Choice):
            return trial.suggest_categorical(name, found.values)
        if found.whole:
            low, high, step = int(found.low), int(found.high), int(found.step or 1)
            return trial.suggest_int(name, low, high, step=step, log=found.log)
        return trial.suggest_float(name, found.low, found.high, step=found.step, log=found.log)

    def _seed(self, trial: Trial, name: str) -> None:
        """Draw for each hyperparameter anew: a trial may go on where some are drawn already."""
        seed = f"{self.base.config.seed}/trial {trial.number}/{name}".encode()
        self.study.sampler = optuna.samplers.TPESampler(
            seed=int.from_bytes(hashlib.sha256(seed).digest()[:4], "big")
        )

    def _asked(self, name: str, found: Space, value: Any) -> dict[str, Any]:
        """A value of the method in terms of the sampler; empty where it would not propose it."""
        if isinstance(found, Subset):
            every = value == found.every
            return {f"{name}.{part}": True for part in self._parts(found)} if every else {}
        return {name: value} if found.holds(value) else {}

    def _parts(self, found: Subset) -> list[str]:
        return list(found.of(self.base.checkpoint.parameter_names()))

    def _carry_out(self, trial: Trial, trying: Trying) -> None:
        """Run, audit, tell; what a run that was killed has done already is not done again."""
        settings = _storable(self._settings(trial))
        trial.set_user_attr("settings", settings)
        done = sum(t.state.is_finished() for t in self._counted())
        words = ", ".join(f"{name}={short(value)}" for name, value in settings.items())
        self.progress.say(f"Trial {done + 1} of {self.trials}: {words or 'the defaults'}.")
        place = self.out / "runs" / f"{trial.number:04d}"
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)  # finished, and killed before it was counted
        started, why = time.monotonic(), ""
        try:
            request = planned(self.base, settings, place)
            found: Objectives = execute(request, trying, self.progress).report
        except MissingNeed:
            raise
        except UnlearnError as error:
            found, why = DOMINATED, str(error).splitlines()[0]
            self.progress.say(f"Given up: {why}.")
        trial.set_user_attr("rejected", why)
        trial.set_user_attr("parts", dict(found.parts))
        trial.set_user_attr("seconds", round(time.monotonic() - started, 1))
        self.study.tell(trial.number, found.point)
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(place.with_name(f".{place.name}.partial"), ignore_errors=True)


def _storable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a database and YAML can hold them."""
    made: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
    return made
