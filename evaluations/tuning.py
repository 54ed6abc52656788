"""A search for hyperparameters: what is forgotten against what is lost, run by run.

Every trial is an ordinary run from the same checkpoint with the same seed, and its quick audit
gives two numbers (:class:`Objectives`). Both are plain means of numbers the audit decides by:

- *forgetting*, lower is better, 0 to 1: mean distance of what is measured on the forget set from
  where it should be (``LEFT``). That is the retrained model's value if there is one; else the
  original's on the holdout, one half for the AUC of membership, and nothing at all for a class or a
  concept. Only the wrong side counts, but for membership: a record that is conspicuously unknown is
  as exposed as one that is known.
- *utility*, higher is better, 0 to 1: mean share of the original's value that is left of what must
  stay (``KEPT``). A gain in one of them does not pay for a loss in another.

For ``memcontrol``, which forgets nothing but should learn without memorising, they are the two of
its paper (arXiv 2405.19458) in this audit's terms: *memorization*, how far training records stand
out from unseen ones (extraction strength or accuracy, retain less holdout; of pipelines 2 AUC - 1
of the denoising losses), and *quality* on the holdout, as a share of the original's (accuracy, mean
probability of a token, or the inverse denoising loss).

The original and the retrained model are measured once for all trials of a worker. A model that
breaks, or that gets less than half as many of ``LOOKED`` retained records right as the original,
is not audited: its trial counts as if nothing was forgotten and everything lost, so all others
dominate it. (optuna's own pruning is for a single objective.)

The proposals are those of optuna's tree-structured Parzen estimator for several objectives (Ozaki
et al. 2020, doi 10.1145/3377930.3389817); first come the method's defaults and shipped recipes.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
import yaml
from torch import nn

from unlearn import checkpoint as checkpoints
from unlearn import distributed, ranges, registry
from unlearn.case import Case, check_out
from unlearn.config import RunConfig, TuneConfig, configure
from unlearn.errors import BadInput, MissingNeed, UnlearnError, Unsupported
from unlearn.evaluations import criteria as rules
from unlearn.evaluations import exposure, findings, guards, plots
from unlearn.evaluations.criteria import Check
from unlearn.evaluations.examination import Examination, examiner
from unlearn.evaluations.findings import FORGOTTEN
from unlearn.evaluations.report import number
from unlearn.evaluations.schema import Value
from unlearn.evaluations.stability import right
from unlearn.evaluations.statistics import auc
from unlearn.interface import Classes, Records
from unlearn.methods.memcontrol import MemControl
from unlearn.plan import Plan, plan
from unlearn.ranges import Choice, Space, Subset
from unlearn.run import Progress, Role, Run, Silent, execute
from unlearn.scope import WORDS, matching
from unlearn.workplace import Outcome, written_whole

if TYPE_CHECKING:
    import optuna

LEFT = ("accuracy", "extraction_strength", "membership_loss", "unlearning_accuracy",
        "extraction_rate", "picture_quality")  # fmt: skip
KEPT = (("accuracy", "retain"), ("accuracy", "holdout"), ("extraction_strength", "retain"),
        ("rouge_l_recall", "retain"), ("retained_accuracy", "retain"))  # fmt: skip
ENOUGH = 0.95  # of the original's utility, which the best trial keeps if any of the front does
HOPELESS = 0.5  # of the original's right answers, below which a trial is given up
LOOKED = 100  # retained records that are looked at for that
UNUSABLE = ("invalid", "not_run")
STUDY = "unlearn tune"
FILE = "trials.json"
WHERE = {"resnet": "classification", "llama": "causal_lm"}  # recipes' names say what for


class Hopeless(UnlearnError):
    """A trial whose model has lost too much to be examined."""


@dataclass(frozen=True)
class Objectives:
    """What a trial is judged by.

    Attributes:
        forgetting: lower is better; of memcontrol: memorization.
        utility: higher is better, 1 for the original; of memcontrol: quality.
        parts: what they are means of, by finding and set.
    """

    forgetting: float
    utility: float
    parts: Mapping[str, float] = field(default_factory=dict)


DOMINATED = Objectives(1.0, 0.0)


def objectives(checks: Sequence[Check], classes: bool) -> Objectives:
    """Forgetting and utility of a run, from the measurements of its audit.

    Args:
        checks: of the run.
        classes: whole classes are forgotten, not records.

    Raises:
        Hopeless: a number is not finite.
        MissingNeed: nothing says how a model that forgot would look, or what must stay.
    """
    found: dict[tuple[str, str], Check] = {(check.name, check.subset): check for check in checks}
    left, kept = dict[str, float](), dict[str, float]()
    for (name, subset), check in found.items():
        before = _of(check, "original")
        if name in LEFT and subset in FORGOTTEN and (check.state or " ")[0] not in UNUSABLE:
            goal = _goal(check, found, classes)
            if goal is not None:
                away = _away(check.fields["better"], _now(check), goal)
                left[f"{name}.{subset}"] = away
        elif (name, subset) in KEPT and before:
            kept[f"{name}.{subset}"] = min(1.0, _now(check) / before)
    if not left.keys() - {"picture_quality.forget"}:  # pictures alone do not say what they show
        raise MissingNeed(
            "nothing says how a model that forgot would look: pass --retrained, a --holdout of the "
            "same kind or, for a model that draws, --data or a --classifier that knows the pictures"
        )
    if not kept:
        raise MissingNeed("nothing says what must stay: pass --retain, --data or --holdout")
    return Objectives(_mean(left), _mean(kept), left | kept)


def _goal(check: Check, found: Mapping[tuple[str, str], Check], classes: bool) -> float | None:
    """Where a measurement should be on a model that forgot."""
    before, exact = _of(check, "original"), _of(check, "retrained")
    if check.name == "picture_quality":  # pictures like the original's own are good enough
        return min(value for value in (before, exact) if value is not None)
    if exact is not None:
        return exact
    if check.fields["group"] == "membership":
        return 0.5
    if check.name == "unlearning_accuracy":
        return 1.0
    if classes or check.name == "extraction_rate":
        return 0.0
    unseen = found.get((check.name, "holdout"))
    return _of(unseen, "original") if unseen else None


def _away(better: str, value: float, goal: float) -> float:
    """Distance on the wrong side of the goal."""
    if better == "lower":
        return max(0.0, value - goal)
    return max(0.0, goal - value) if better == "higher" else abs(value - goal)


def _of(check: Check, role: Role) -> float | None:
    found: Value | None = check.fields.get(role)
    return found.value if found else None


def _now(check: Check) -> float:
    value = _of(check, "unlearned")
    if value is None:
        raise Hopeless(f"{check.fields['title']} is not finite: the model is damaged")
    return value


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))


def memorization(checks: Sequence[Check], audit: Any) -> Objectives:
    """How far training records stand out from unseen ones, and the quality on the latter.

    Args:
        checks: of the run.
        audit: that measured it; of a pipeline it still holds the denoising losses.

    Raises:
        Hopeless: a number is not finite.
    """
    found = {(check.name, check.subset): check for check in checks}
    seen = next((name for name in ("extraction_strength", "accuracy") if (name, "retain") in found),
                None)  # fmt: skip
    if seen is None:
        known, unseen = (audit.signals["unlearned"][n].loss() for n in ("retain", "holdout"))
        if not (np.isfinite(known).all() and np.isfinite(unseen).all()):
            raise Hopeless("a denoising loss is not finite: the model is damaged")
        gap = 2 * auc(-known, -unseen) - 1
        quality = float(audit.signals["original"]["holdout"].loss().mean() / unseen.mean())
    else:
        gap = _now(found[seen, "retain"]) - _now(found[seen, "holdout"])
        right, loss = found[seen, "holdout"], found["loss", "holdout"]
        if seen == "accuracy":
            quality = _now(right) / (_of(right, "original") or math.nan)
        else:
            quality = math.exp((_of(loss, "original") or math.nan) - _now(loss))
    if not math.isfinite(quality):
        raise Hopeless("the original is of no use on the holdout: there is no quality to compare")
    parts = {"memorization": max(0.0, gap), "quality": quality}
    return Objectives(parts["memorization"], parts["quality"], parts)


class Trying:
    """The audit of all trials: the original and the retrained model are measured once.

    It decides nothing and writes no report; what it concludes are the checks.

    Attributes:
        audit: what measures.
        blind: why forget set and holdout cannot be compared, if that is so.
        before: share of right answers of the original; None where nobody looked.
    """

    def __init__(self, audit: Any, case: Case) -> None:
        self.audit = audit
        self.known: set[Role] = set()
        self.before: float | None = None
        self.audit.prepare(case)
        compared = len(case.sets.forget) > 0
        self.blind = guards.blind_baseline(case, audit.criteria)[1] if compared else None

    def prepare(self, case: Case) -> None:
        """Done already: all trials are of one case."""

    def measure(self, role: Role, model: nn.Module, case: Case, run: Run, directory: Path) -> None:
        """Measure what is not known yet.

        Raises:
            Hopeless: the unlearned model lost more than half of the original's right answers.
        """
        if role in self.known:
            return
        if role == "original":
            self.before = _looked(model, case, run)
        elif role == "unlearned" and self.before:
            now = _looked(model, case, run) or 0.0
            if now < HOPELESS * self.before:
                raise Hopeless(
                    f"it is right on {now:.1%} of retained answers, where the original is on "
                    f"{self.before:.1%}: it was not audited"
                )
        self.audit.measure(role, model, case, run, directory)
        if role != "unlearned":
            self.known.add(role)

    def conclude(self, case: Case, outcome: Outcome, run: Run, directory: Path) -> list[Check]:
        """What the audit would decide by: its measurements, and membership by the loss."""
        audit, rule = self.audit, self.audit.criteria
        if isinstance(audit, Examination):
            found = findings.checks(audit.measured, case, rule, self.blind)
            scores = exposure.score(audit.measured, case, None)[0]
        else:
            from unlearn.evaluations.drawing import Seen

            drawn = (audit.conditions, audit.drawn, audit.judge, audit.unjudged)
            found = Seen(*drawn, case, run.device).checks(rule)
            scores = audit._attacked(case)
        by_loss = [score for score in scores if score.attack.name == "loss"]
        return [*found, *exposure.checks(by_loss, case, rule, self.blind)]


def _looked(model: nn.Module, case: Case, run: Run) -> float | None:
    """Share of right answers on a few records that must stay; None of models that draw."""
    kept = case.sets.retain or case.sets.holdout
    if kept is None or run.task.name == "diffusion":
        return None
    return right(model, kept.sample(LOOKED, run.seed), run)


@dataclass(frozen=True)
class Row:
    """One finished trial.

    Attributes:
        number: in the study.
        origin: "defaults", "recipe NAME" or "search".
        settings: hyperparameters that differ from the method's defaults, or were proposed.
        objectives: what it is judged by.
        rejected: why it was given up; "" for a trial that was audited.
        seconds: what it took.
    """

    number: int
    origin: str
    settings: Mapping[str, Any]
    objectives: Objectives
    rejected: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Tuned:
    """What a search returns.

    Attributes:
        directory: holds best.yaml, trials.json and tune.html.
        method: its name.
        words: what the two objectives are called.
        rows: all finished trials, in order.
        front: numbers of those that no other beats in both objectives.
        best: the one that best.yaml holds.
        seed: of every trial.
    """

    directory: Path
    method: str
    words: tuple[str, str]
    rows: tuple[Row, ...]
    front: tuple[int, ...]
    best: Row | None
    seed: int = 0

    @property
    def recipe(self) -> dict[str, Any]:
        """What ``unlearn run --config`` and :func:`unlearn.forget` take; empty without a best."""
        if self.best is None:
            return {}
        seed = {"seed": self.seed} if self.seed else {}
        return {"method": self.method, "set": dict(self.best.settings), **seed}


def front(rows: Sequence[Row]) -> list[Row]:
    """The audited trials that no other beats: as good in both objectives and better in one."""

    def beaten(a: Objectives) -> bool:
        return any(
            b.forgetting <= a.forgetting and b.utility >= a.utility
            and (b.forgetting, b.utility) != (a.forgetting, a.utility)
            for b in (row.objectives for row in rows if not row.rejected)
        )  # fmt: skip

    return [row for row in rows if not row.rejected and not beaten(row.objectives)]


def best(rows: Sequence[Row]) -> Row | None:
    """Of the front, who forgets most with at least 95 % of the original's utility; else the knee.

    The knee is the trial of the front that is nearest to its best corner, each objective measured
    in its spread over the front. Of equals the earlier one; None where all were given up.
    """
    there = front(rows)
    if not there:
        return None
    if good := [row for row in there if row.objectives.utility >= ENOUGH]:
        return min(good, key=lambda row: (row.objectives.forgetting, -row.objectives.utility))
    points = np.array([(r.objectives.forgetting, -r.objectives.utility) for r in there])
    spread = np.ptp(points, axis=0)
    scaled = (points - points.min(0)) / np.where(spread > 0, spread, 1.0)
    return there[int(np.argmin((scaled**2).sum(1)))]


def search(config: TuneConfig, progress: Progress | None = None) -> Tuned:
    """Try hyperparameters until the study holds as many finished trials as asked for.

    Several workers, each with an ``out`` of its own, may share one storage; together they finish
    the trials. A worker that was killed goes on when its command is repeated: what it was at is
    tried again, from where the run stood. A search with a greater number of trials goes on, too.

    Args:
        config: what is asked; ``out`` must be given.
        progress: told about every step.

    Returns:
        All finished trials, and the best of them.

    Raises:
        BadInput: wrong flags, ranges or data, or a storage that cannot be opened or holds another
            search.
        MissingNeed: the method or the objectives need something that was not given.
        UnlearnError: no trial could be audited; the files are written all the same.
        Unsupported: several processes of one launch, or optuna is not installed.
    """
    if config.out is None:
        raise BadInput("a search needs a directory for its results: pass --out DIR")
    if distributed.world() > 1:
        raise Unsupported("a launch of several processes is one worker to a search: start each "
                          "with a command and an --out of its own instead")  # fmt: skip
    optuna = _optuna()
    rules.read(config.criteria)
    base, space = _planned(config)
    identity = _identity(base, space)
    progress = progress or Silent()
    out = Path(config.out).absolute()
    with _begun(out, identity), _quiet(optuna):
        url = config.storage or f"sqlite:///{out / 'study.db'}"
        with _alone(url):
            study = _opened(optuna, url, identity, base)
        _Worker(optuna, study, url, config, base, space, out, progress).work()
        done = _finished(optuna, study, config, base, out)
        _write(done, identity, base)
        shutil.rmtree(out / "runs", ignore_errors=True)
        (out / "study.db.lock").unlink(missing_ok=True)
    if done.best is None:
        raise UnlearnError(
            f"every trial was given up: {out / 'tune.html'} says why; name gentler ranges, such as "
            "--range lr=LOW:HIGH:log"
        )
    return done


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise Unsupported("tune needs optuna: pip install 'unlearn-toolkit[tune]'") from error
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _planned(config: TuneConfig) -> tuple[Plan, dict[str, Space]]:
    """The request with the method's defaults, all checked, and where to look."""
    given = {k: v for k, v in config if k in RunConfig.model_fields} | {"out": None}
    cls = registry.method_class(config.method)
    if twice := sorted(config.range.keys() & (config.set.keys() | _scope(config).keys())):
        raise BadInput(f"{twice[0]} has a range and a fixed value: say one of them")
    space = ranges.chosen(cls, config.method, config.range)
    space = {k: v for k, v in space.items() if k not in config.set and k not in _scope(config)}
    if not space:
        raise BadInput(
            f"{config.method} has nothing left to search: name a range, such as --range lr=LOW:HIGH"
        )
    base = plan(configure(RunConfig, **given, audit="quick"))
    task, sets = base.checkpoint.task.name, base.sets
    if base.checkpoint.source == checkpoints.MEMORY:
        raise BadInput(
            "every trial starts from the same weights, and a model in memory is changed in place: "
            "save it and pass its directory"
        )
    if issubclass(cls, MemControl):
        if sets.holdout is None:
            raise MissingNeed("memorization is told from unseen records: pass --holdout")
    elif task != "diffusion":
        unknown = isinstance(base.target, Records) and base.retrained is None
        if unknown and sets.holdout is None:
            raise MissingNeed(
                "nothing says how a model that forgot would look: pass --retrained or --holdout"
            )
        if sets.retain is None and (task == "causal_lm" or sets.holdout is None):
            raise MissingNeed("nothing says what must stay: pass --retain (or --data)")
        if unknown and (why := guards.blind_baseline(base, rules.read(config.criteria))[1]):
            raise MissingNeed(f"{why} Pass --retrained, or a holdout of the same kind.")
    return base, space


def _scope(config: TuneConfig) -> dict[str, Any]:
    return {} if config.scope is None else {"scope": config.scope}


def _identity(base: Plan, space: Mapping[str, Space]) -> str:
    """One hash of everything two workers of a search must have in common."""
    looked = json.dumps({name: repr(found) for name, found in space.items()
                         if not isinstance(found, Subset)}, sort_keys=True)  # fmt: skip
    return hashlib.sha256(f"{base.identity()}\n{looked}".encode()).hexdigest()


@contextmanager
def _begun(out: Path, identity: str) -> Iterator[None]:
    """The directory of this worker, ours alone; made where nothing was begun.

    Raises:
        BadInput: another process is at it, or it holds something else.
    """
    lock = filelock.FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise BadInput(
            f"another process is searching in {out}: give every worker an --out of its own"
        ) from error
    try:
        if not out.exists():
            check_out(out)
            out.mkdir()
            (out / FILE).write_text(json.dumps({"status": "unfinished", "identity": identity}))
        try:
            begun = json.loads((out / FILE).read_text())
        except (OSError, ValueError):
            begun = {}
        if begun.get("identity") != identity:
            what = "a search with another request" if begun else "something else"
            raise BadInput(f"{out} holds {what}: choose another --out, or delete it")
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _opened(optuna: Any, url: str, identity: str, base: Plan) -> optuna.Study:
    """The study of a storage, ours from the start.

    Raises:
        BadInput: it cannot be opened, or is about something else.
    """
    waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None
    try:
        study: optuna.Study = optuna.create_study(
            study_name=STUDY, storage=optuna.storages.RDBStorage(url, engine_kwargs=waits),
            directions=("minimize", "maximize"), load_if_exists=True,
        )  # fmt: skip
    except Exception as error:
        why = str(error).strip().splitlines()[:1]
        raise BadInput(
            f"the storage {url} cannot be opened ({''.join(why)}): pass --storage sqlite:///FILE"
        ) from error
    held = study.user_attrs.get("identity")
    if held is None:
        study.set_user_attr("identity", identity)
        study.set_user_attr("method", base.config.method)
    elif held != identity:
        raise BadInput(
            f"{url} holds a search for {study.user_attrs.get('method')} with another method, "
            "checkpoint, range or data: choose another --storage, or repeat its command"
        )
    return study


@contextmanager
def _alone(url: str) -> Iterator[None]:
    """Nobody else claims trials from this file; other databases lock their rows themselves."""
    file = url.partition("///")[2]
    if not (url.startswith("sqlite") and file and Path(file).parent.is_dir()):
        yield
        return
    with filelock.FileLock(f"{file}.lock"):
        yield


@dataclass(frozen=True)
class _Worker:
    """Claims trials until there are enough."""

    optuna: Any
    study: optuna.Study
    url: str
    config: TuneConfig
    base: Plan
    space: Mapping[str, Space]
    out: Path
    progress: Progress

    def work(self) -> None:
        """Until the study holds enough trials that are finished, or that others are at."""
        starts = self._starts()
        with _alone(self.url):
            self._retry()
            self._begin_with(starts)
        trying = Trying(examiner(self.base, self.config.criteria), self.base)
        while (trial := self._claim()) is not None:
            self._carry_out(trial, trying)

    @property
    def place(self) -> str:
        """Names this worker: one directory on one machine."""
        return f"{socket.gethostname()}:{self.out}"

    def _counted(self) -> list[Any]:
        """Trials that are finished, or that a worker is at."""
        states = self.optuna.trial.TrialState
        return list(self.study.get_trials(states=(states.COMPLETE, states.RUNNING)))

    def _fail(self, number: int) -> None:
        self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)

    def _retry(self) -> None:
        """What this worker was at when it was killed is to be tried again."""
        running = self.optuna.trial.TrialState.RUNNING
        # in a file that is ours alone now, a trial of nobody lost its worker as it was claimed
        lost = {self.place, None} if self.url.startswith("sqlite") else {self.place}
        for trial in self.study.get_trials(states=(running,)):
            if trial.user_attrs.get("place") in lost:
                self._fail(trial.number)
                self._again(trial)

    def _again(self, trial: Any) -> None:
        if "settings" in trial.user_attrs:
            kept = {k: v for k, v in trial.user_attrs.items() if k != "place"}
            self.study.enqueue_trial(kept.get("proposed", {}), user_attrs=kept)

    @property
    def fixed(self) -> dict[str, Any]:
        """What the user set, as the method reads it."""
        return {name: self.base.hyperparameters[name] for name in self.base.given}

    def _starts(self) -> dict[str, dict[str, Any]]:
        """The method's defaults and the recipes that fit, by what they are called."""
        found = {"defaults": self.fixed}
        found |= {f"recipe {name}": {**s, **self.fixed} for name, s in recipes(self.base).items()}
        return {name: s for name, s in found.items() if self._fits(s)}

    def _fits(self, settings: Mapping[str, Any]) -> bool:
        """Whether settings can be run, and lie where the user wants to look."""
        try:
            self._plan(settings)
        except UnlearnError:
            return False
        method = registry.build(self.config.method, settings)
        return all(
            isinstance(self.space[k], Subset) or self.space[k].holds(getattr(method, k))
            for k in self.config.range
        )

    def _begin_with(self, starts: Mapping[str, Mapping[str, Any]]) -> None:
        """Put them first in line, unless they are there."""
        states = self.optuna.trial.TrialState
        there = {t.user_attrs.get("origin") for t in self.study.trials if t.state != states.FAIL}
        for origin, settings in starts.items():
            if origin in there:
                continue
            method = registry.values(registry.build(self.config.method, settings))
            inside = {k: method[k] for k, found in self.space.items() if found.holds(method[k])}
            proposed = dict(inside)
            for name, found in self.space.items():
                if isinstance(found, Subset) and method[name] == found.every:
                    proposed |= {f"{name}.{part}": True for part in found.of(self._names())}
            attrs = {"origin": origin, "settings": {**inside, **settings}, "proposed": proposed}
            self.study.enqueue_trial(proposed, user_attrs=_plain(attrs))

    def _names(self) -> list[str]:
        return self.base.checkpoint.parameter_names()

    def _claim(self) -> Any:
        """A trial that nobody is at; None when there are enough.

        Nobody counts before having claimed, so together workers never do more than asked for.
        """
        with _alone(self.url):
            return self._claimed()

    def _claimed(self) -> Any:
        while (count := len(self._counted())) < self.config.trials:
            seed = f"{self.config.seed}/trial {count}".encode()  # a restart proposes the same
            self.study.sampler = self.optuna.samplers.TPESampler(
                seed=int.from_bytes(hashlib.sha256(seed).digest()[:4], "big")
            )
            trial = self.study.ask()
            trial.set_user_attr("place", self.place)
            others = [t for t in self._counted() if t.number != trial.number]
            origin = trial.user_attrs.get("origin", "search")
            twice = origin != "search" and any(
                t.user_attrs.get("origin") == origin and t.number < trial.number for t in others
            )
            if len(others) < self.config.trials and not twice:
                return trial
            self._fail(trial.number)
            if not twice:
                self._again(trial)
        return None

    def _settings(self, trial: Any) -> dict[str, Any]:
        """What a trial tries: what it was given, or what the sampler proposes."""
        given = trial.user_attrs.get("settings")
        known = trial.user_attrs.get("proposed", {})
        proposed = {
            name: self._proposal(trial, name, found)
            for name, found in self.space.items()
            if given is None or any(key == name or key.startswith(f"{name}.") for key in known)
        }
        if given is not None:
            return dict(given)
        return {**self.fixed, **proposed}

    def _proposal(self, trial: Any, name: str, found: Space) -> Any:
        """What the sampler says for one hyperparameter, in terms of the method."""
        if isinstance(found, Subset):  # every part is a yes or no of its own
            parts = list(found.of(self._names()))
            chosen = [trial.suggest_categorical(f"{name}.{p}", (False, True)) for p in parts]
            return ",".join(part for part, yes in zip(parts, chosen, strict=True) if yes)
        if isinstance(found, Choice):
            return trial.suggest_categorical(name, found.values)
        suggest = trial.suggest_int if found.whole else trial.suggest_float
        step = found.step or (1 if found.whole else None)
        return suggest(name, found.low, found.high, step=step, log=found.log)

    def _plan(self, settings: Mapping[str, Any], out: Path | None = None) -> Plan:
        """The request with these settings; the data is not read again.

        Raises:
            UnlearnError: the method, its needs or the scope say no.
        """
        name, base = self.config.method, self.base
        method = registry.build(name, settings)
        scope = getattr(method, "scope", "all")
        if scope not in WORDS:
            matching(scope, base.checkpoint.parameter_names())
        planned = replace(
            base,
            config=base.config.model_copy(
                update={"set": dict(settings), "scope": None, "out": out}
            ),
            method=method,
            hyperparameters=registry.values(method),
            given=settings,
        )
        if callable(check := getattr(method, "check", None)):
            check(planned.request())
        return planned

    def _carry_out(self, trial: Any, trying: Trying) -> None:
        settings = self._settings(trial)
        name = trial.user_attrs.get("run", f"{trial.number:04d}")
        for key, value in (("settings", settings), ("proposed", trial.params), ("run", name)):
            trial.set_user_attr(key, _plain({key: value})[key])
        done = sum(t.state.is_finished() for t in self._counted())
        words = ", ".join(f"{key}={_short(value)}" for key, value in settings.items())
        self.progress.say(f"Trial {done + 1} of {self.config.trials}: {words or 'the defaults'}.")
        place, started, why = self.out / "runs" / name, time.monotonic(), ""
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)  # finished, and killed before it was counted
        try:
            checks = execute(self._plan(settings, place), trying, self.progress).report
            if isinstance(self.base.method, MemControl):
                found = memorization(checks, trying.audit)
            else:
                found = objectives(checks, isinstance(self.base.target, Classes))
        except MissingNeed:
            raise
        except UnlearnError as error:
            found, why = DOMINATED, str(error).splitlines()[0]
            self.progress.say(f"Given up: {why}.")
        trial.set_user_attr("rejected", why)
        trial.set_user_attr("parts", dict(found.parts))
        trial.set_user_attr("seconds", round(time.monotonic() - started, 1))
        self.study.tell(trial.number, (found.forgetting, found.utility))
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(place.with_name(f".{name}.partial"), ignore_errors=True)


def recipes(base: Case) -> dict[str, dict[str, Any]]:
    """The settings of the shipped recipes for a method on this family and kind of target, by name.

    What a recipe is for stands in its name: ``method-target-data-model``.
    """
    found = {}
    for file in sorted(resources.files("unlearn.recipes").iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".yaml"):
            continue
        name, recipe = file.name.removesuffix(".yaml"), yaml.safe_load(file.read_text())
        words = name.split("-")
        family = next((WHERE[word] for word in words if word in WHERE), None)
        kind = {"class": Classes, "random": Records}.get(words[1]) if len(words) > 1 else None
        if (
            recipe["method"] == base.method_name
            and family in (None, base.checkpoint.task.name)
            and (kind is None or isinstance(base.target, kind))
        ):
            scope = {"scope": recipe["scope"]} if "scope" in recipe else {}
            found[name] = {**(recipe.get("set") or {}), **scope}
    return found


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a database and YAML can hold them."""
    made: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
    return made


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finished(optuna: Any, study: optuna.Study, config: TuneConfig, base: Plan, out: Path) -> Tuned:
    """All finished trials of all workers, and the best of them."""
    states = optuna.trial.TrialState
    rows = []
    for trial in study.get_trials(states=(states.COMPLETE,)):
        attrs = trial.user_attrs
        judged = Objectives(trial.values[0], trial.values[1], attrs["parts"])
        rows.append(Row(trial.number, attrs.get("origin", "search"), attrs["settings"], judged,
                        attrs["rejected"], attrs["seconds"]))  # fmt: skip
    learns = isinstance(base.method, MemControl)
    return Tuned(
        out, config.method, ("memorization", "quality") if learns else ("forgetting", "utility"),
        tuple(rows), tuple(row.number for row in front(rows)), best(rows), config.seed,
    )  # fmt: skip


def _write(done: Tuned, identity: str, base: Plan) -> None:
    """best.yaml, trials.json and tune.html; each replaces what an earlier call left."""
    out = done.directory
    (out / "best.yaml").unlink(missing_ok=True)
    if done.best is not None:
        at, words = done.best.objectives, done.words
        about = (
            f"# {done.method}, trial {done.best.number} of {len(done.rows)} of unlearn tune: "
            f"{words[0]} {at.forgetting:.3f}, {words[1]} {at.utility:.3f}\n"
        )
        with written_whole(out / "best.yaml") as new:
            new.write_text(about + yaml.safe_dump(done.recipe, sort_keys=False))
    with written_whole(out / "tune.html") as new:
        new.write_text(render(done, str(base.target)))
    with written_whole(out / FILE) as new:  # last: it says that the others are there
        record = {"schema_version": "1", "status": "complete", "identity": identity, **plain(done)}
        new.write_text(json.dumps(record, indent=2) + "\n")


def plain(done: Tuned) -> dict[str, Any]:
    """A search as plain values."""
    return {
        "directory": str(done.directory),
        "method": done.method,
        "objectives": list(done.words),
        "best": done.best.number if done.best else None,
        "front": list(done.front),
        "recipe": done.recipe,
        "trials": [asdict(row) for row in done.rows],
    }


def render(done: Tuned, target: str) -> str:
    """The search as one self-contained page: no script, no network."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = resources.files("unlearn.evaluations.templates")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=number, short=_short)
    drawing = pareto(done)
    names = dict.fromkeys(name for row in done.rows for name in row.settings)
    return environment.from_string((folder / "tune.html.j2").read_text(encoding="utf-8")).render(
        done=done,
        target=target,
        names=list(names),
        parts=list(dict.fromkeys(part for row in done.rows for part in row.objectives.parts)),
        recipe=yaml.safe_dump(done.recipe, sort_keys=False) if done.best else "",
        figure=Markup(drawing.svg),  # noqa: S704 drawn and escaped by ourselves
        note=drawing.note,
        enough=ENOUGH,
        css=Markup((folder / "report.css").read_text(encoding="utf-8")),  # noqa: S704 our own file
    )


def pareto(done: Tuned) -> plots.Drawing:
    """Both objectives of every audited trial, the front joined, the best marked."""
    shown = [row for row in done.rows if not row.rejected]
    if not shown or done.best is None:
        return plots.Drawing("", "Every trial was given up.")
    label = f"{done.words[1].capitalize()} against {done.words[0]}, trial by trial"
    line = sorted(
        (row.objectives.forgetting, row.objectives.utility)
        for row in shown
        if row.number in done.front
    )
    with plots._style():
        figure, axes = plots._axes(2.8)
        for rows, ink, size in (
            (shown, "original", 3.2),
            ([row for row in shown if row.number in done.front], "unlearned", 4.2),
        ):
            axes.plot(
                [row.objectives.forgetting for row in rows],
                [row.objectives.utility for row in rows],
                "o", color=plots.INK[ink], markersize=size, markeredgewidth=0, clip_on=False,
            )  # fmt: skip
        axes.step(
            *zip(*line, strict=True), where="post", color=plots.INK["unlearned"], linewidth=1.0
        )
        at = done.best.objectives
        axes.plot(
            [at.forgetting], [at.utility], "o", markersize=9, markerfacecolor="none",
            markeredgecolor=plots.INK["retrained"], markeredgewidth=1.4, clip_on=False,
        )  # fmt: skip
        axes.axhline(ENOUGH, color=plots.INK["muted"], linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_xlabel(f"{done.words[0]}: lower is better")
        axes.set_ylabel(f"{done.words[1]}: higher is better")
        note = (
            f"{len(line)} of {len(shown)} audited trials are beaten by none (joined by the line); "
            f"the ring is the best; the dotted line is {ENOUGH:.0%} of the original's."
        )
        return plots.Drawing(plots._svg(figure, label), note)
