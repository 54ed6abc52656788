"""A search for hyperparameters: what is forgotten against what is lost, trial by trial.

Every trial is an ordinary run from the same checkpoint with the same seed, and its quick audit
gives the two numbers it is judged by (:mod:`unlearn.evaluations.trials`). First come the method's
defaults and shipped recipes, then proposals (:mod:`unlearn.evaluations.study`).
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import filelock
import yaml

from unlearn import checkpoint as checkpoints
from unlearn import distributed, ranges, registry
from unlearn.case import Case, check_out
from unlearn.config import UNREAD, RunConfig, TuneConfig, as_flags, configure
from unlearn.errors import BadInput, MissingNeed, UnlearnError, Unsupported
from unlearn.evaluations import criteria as rules
from unlearn.evaluations import guards, tuned
from unlearn.evaluations.trials import LEARNS, Trying, fixed, planned
from unlearn.evaluations.tuned import FILE, Tuned
from unlearn.interface import Classes, Records
from unlearn.plan import Plan, check_names, plan
from unlearn.ranges import Choice, Space, Subset
from unlearn.run import Progress, Silent

WHERE = {"resnet": "classification", "llama": "causal_lm"}  # recipes' names say what for


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
    try:
        from unlearn.evaluations.study import Worker, opened, quiet
    except ImportError as error:
        raise Unsupported("tune needs optuna: pip install 'unlearn-toolkit[tune]'") from error
    criteria = rules.read(config.criteria)
    base, space = requested(config)
    identity = _identity(base, space, criteria.digest())
    out = Path(config.out).absolute()
    with _begun(out, identity) as name, quiet():
        url = config.storage or f"sqlite:///{out / 'study.db'}"
        study = opened(url, identity, config.method)
        worker = Worker(study, url, base, space, config.trials, out, name, progress or Silent())
        worker.work(starts(base, space, tuple(config.range)), Trying(base, config.criteria))
        learns = config.method == LEARNS
        words = ("memorization", "quality") if learns else ("forgetting", "utility")
        done = Tuned(out, config.method, words, worker.rows(), config.seed)
        tuned.write(done, identity, name, str(base.target))
        shutil.rmtree(out / "runs", ignore_errors=True)
        (out / "study.db.lock").unlink(missing_ok=True)
    if done.best is None:
        raise UnlearnError(
            f"every trial was given up: {out / 'tune.html'} says why; name gentler ranges, such as "
            "--range lr=LOW:HIGH:log"
        )
    return done


def requested(config: TuneConfig) -> tuple[Plan, dict[str, Space]]:
    """The request with the method's defaults, all checked, and where to look."""
    if unread := config.model_fields_set & UNREAD:
        raise BadInput(
            f"{as_flags(unread)} means nothing to a search, which audits every trial quickly: "
            "leave it out"
        )
    given = {k: v for k, v in config if k in RunConfig.model_fields} | {"out": None}
    held = {*config.set} if config.scope is None else {*config.set, "scope"}
    if twice := sorted(config.range.keys() & held):
        raise BadInput(f"{twice[0]} has a range and a fixed value: say one of them")
    chosen = ranges.chosen(registry.method_class(config.method), config.method, config.range)
    space = {name: found for name, found in chosen.items() if name not in held}
    if not space:
        raise BadInput(
            f"{config.method} has nothing left to search: name a range, such as --range lr=LOW:HIGH"
        )
    base = plan(configure(RunConfig, **given, audit="quick"))
    _check_choices(base, space)
    task, sets = base.checkpoint.task.name, base.sets
    if base.checkpoint.source == checkpoints.MEMORY:
        raise BadInput(
            "every trial starts from the same weights, and a model in memory is changed in place: "
            "save it and pass its directory"
        )
    if config.method == LEARNS:
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


def _check_choices(base: Plan, space: Mapping[str, Space]) -> None:
    """Refuse choices that name parameters which the model does not have.

    Raises:
        UnlearnError: which one.
    """
    for name, found in space.items():
        for value in found.values if isinstance(found, Choice) else ():
            try:
                method = registry.build(base.method_name, {**base.given, name: value})
            except BadInput:
                continue  # it goes with other settings than the defaults
            check_names(method, base.checkpoint)


def starts(base: Plan, space: Mapping[str, Space], named: tuple[str, ...]) -> dict[str, Any]:
    """The method's defaults and the recipes that fit, by what they are called.

    Args:
        base: the request.
        space: where to look.
        named: hyperparameters of which the user said where to look; the others may lie elsewhere.
    """

    def fits(settings: Mapping[str, Any]) -> bool:
        try:
            method = planned(base, settings).method
        except UnlearnError:
            return False
        return all(
            isinstance(space[name], Subset) or space[name].holds(getattr(method, name))
            for name in named
        )

    found = {"defaults": fixed(base)}
    found |= {f"recipe {name}": {**s, **fixed(base)} for name, s in recipes(base).items()}
    return {name: settings for name, settings in found.items() if fits(settings)}


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


def _identity(base: Plan, space: Mapping[str, Space], criteria: str) -> str:
    """One hash of everything two workers of a search must have in common."""
    looked = json.dumps({name: repr(found) for name, found in space.items()
                         if not isinstance(found, Subset)}, sort_keys=True)  # fmt: skip
    return hashlib.sha256(f"{base.identity()}\n{looked}\n{criteria}".encode()).hexdigest()


@contextmanager
def _begun(out: Path, identity: str) -> Iterator[str]:
    """The directory of this worker, ours alone; made where nothing was begun.

    A request that is refused before its first trial leaves none that it made.

    Yields:
        The name of this worker, which the directory keeps for the calls that go on.

    Raises:
        BadInput: another process is at it, or it holds something else.
    """
    if not out.exists():
        check_out(out)
    lock = filelock.FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise BadInput(
            f"another process is searching in {out}: give every worker an --out of its own"
        ) from error
    try:
        if new := not out.exists():
            out.mkdir()
            name = secrets.token_hex(8)  # hosts and paths may change
            begun = {"status": "unfinished", "identity": identity, "worker": name}
            (out / FILE).write_text(json.dumps(begun))
        try:
            begun = json.loads((out / FILE).read_text())
        except (OSError, ValueError):
            begun = {}
        if begun.get("identity") != identity:
            what = "a search with another request" if begun else "something else"
            raise BadInput(f"{out} holds {what}: choose another --out, or delete it")
        try:
            yield str(begun["worker"])
        except BadInput:
            if new and not (out / "runs").exists():
                shutil.rmtree(out)
            raise
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
