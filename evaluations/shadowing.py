"""Shadow models for a deep audit: trained as the original was, made to forget as it was.

They are what per-example attacks compare with: for every record, what a model says that had it and
forgot it, and what one says that never had it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from unlearn import registry
from unlearn.attacks.interface import Shadows
from unlearn.attacks.shadow import Pool, check_needs, pool
from unlearn.case import Case, SetName
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.evaluations import divergence, memorization
from unlearn.evaluations.counterfactual import check_start
from unlearn.evaluations.criteria import UNSURE, Check, Criteria, Effect, Outcome
from unlearn.evaluations.findings import mean_of
from unlearn.evaluations.measure import Measurements, nonmembers, parts
from unlearn.evaluations.statistics import mean_interval
from unlearn.methods.retrain import Retrain
from unlearn.run import Run
from unlearn.tasks.base import Encoded

TARGETS = 500  # records under attack, of the forget set and of the holdout


@dataclass(frozen=True)
class Shadowed:
    """A pool, and which records of the measured sets it is about.

    Attributes:
        pool: the shadow models.
        rows: by set, positions of the attacked records.
        others: the set that the population was taken from, and its positions there.
        shadows: what the pool says about the attacked records, as attacks read it.
    """

    pool: Pool
    rows: dict[str, npt.NDArray[np.int64]]
    others: tuple[str, list[int]] | None
    shadows: Shadows


def recipe(case: Case) -> Retrain | None:
    """How the original was trained, for a deep audit; None for one without shadow models.

    Raises:
        BadInput: nobody said, or new models cannot be made.
        MissingNeed: the method under audit needs what shadow models do not have.
    """
    if case.config.audit != "deep" or not case.config.shadows:  # type: ignore[attr-defined]
        return None
    if not case.config.training:
        raise BadInput(
            "a deep audit trains shadow models as the original was trained: pass --training "
            "name=value for the settings of that training (`unlearn methods retrain` lists them), "
            "or --shadows 0 to go without"
        )
    method = registry.build("retrain", case.config.training)
    if not isinstance(method, Retrain):
        raise BadInput("another package has replaced the method retrain: uninstall it")
    if method.init is None and case.checkpoint.fresh is None:
        raise BadInput(
            "a deep audit trains new models, and only the weights of this one are known: name a "
            "checkpoint to start from with --training init=..."
        )
    check_start(method.init, case.checkpoint)
    if case.method is not None:
        check_needs(case.method, case.sets.retain is not None, case.checkpoint.task.name)
    return method


def capped(case: Case) -> list[SetName]:
    """The sets of which only ``TARGETS`` records come under attack with shadow models."""
    names: tuple[SetName | None, ...] = ("forget", nonmembers(case))
    return [n for n in names if n is not None and len(case.sets.named()[n]) > TARGETS]


def shadowed(case: Case, settings: Retrain, run: Run) -> Shadowed:
    """Train the pool, let it forget by the method under audit (if that is known), measure it."""
    sets, against = parts(case, case.checkpoint.task), nonmembers(case)
    rows: dict[str, npt.NDArray[np.int64]] = {}
    attacked = []
    for name in ("forget", *([against] if against else [])):
        draw = run.generator(f"targets/{name}")
        chosen = torch.randperm(len(sets[name]), generator=draw)[:TARGETS].sort().values
        rows[name] = chosen.numpy()
        part = sets[name].select(chosen.tolist())
        attacked += [part.examples[i] for i in range(len(part))]
    targets = Encoded(load(attacked, "targets"), case.checkpoint.task)
    measured, others = {"targets": targets}, None
    if against is not None:
        left = sorted(set(range(len(sets[against]))) - set(rows[against].tolist()))
        if left:
            measured["population"], others = sets[against].select(left), (against, left)
    cache = case.config.shadow_cache
    found = pool(
        lambda: run.initial_model(settings.init), targets, case.sets.retain, measured, settings,
        run, shadows=case.config.shadows, forget=case.method, target=case.target,
        cache=Path(cache) if cache else None,
    )  # fmt: skip
    run.progress.say(f"Shadow models were trained {found.why}.")  # with times, which differ
    run.note(f"{case.config.shadows} shadow models were trained, {found.strategy}.")
    return Shadowed(found, rows, others, _by_set(found, rows))


def _by_set(found: Pool, rows: dict[str, npt.NDArray[np.int64]]) -> Shadows:
    ends = np.cumsum([len(r) for r in rows.values()])
    spans = {name: slice(end - len(rows[name]), end) for name, end in zip(rows, ends, strict=True)}

    def cut(values: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        return {name: values[:, span] for name, span in spans.items()}

    loss = cut(found.trained["targets"].loss)
    if "population" in found.trained:
        loss["population"] = found.trained["population"].loss
    after = found.unlearned["targets"].phi if found.unlearned else None
    return Shadows(
        cut(found.member),
        cut(found.trained["targets"].phi),
        loss,
        {} if after is None else cut(after),
    )


def likeness(
    found: Shadowed, measured: Measurements, case: Case, criteria: Criteria
) -> list[Check]:
    """Whether shadow models do on records they never saw what the original does on unseen ones.

    Attacks read probabilities of the truth from them. Where these differ on average, the shadows
    were not trained as the original was, or on too little, and tell little about it.
    """
    against = nonmembers(case)
    if against is None or (rule := criteria.rule("shadow_likeness", against)) is None:
        return []
    rows = found.rows[against]
    original = np.exp(-measured["original"].signals[against].select(rows).loss())
    never = ~found.shadows.member[against]
    shadows = (np.exp(-found.shadows.loss[against]) * never).sum(0) / never.sum(0)
    apart = shadows - original
    fields: dict[str, Any] = {
        "title": "Likeness of the shadow models: probability of the truth on records they never "
        "saw, less the original's",
        "n": len(rows), "unit": "probability per unit", "better": "closer_to_retrained",
        "group": "guard", "criterion": f"within {rule.margin:.2f} of 0, on either side",
        "original": mean_of(apart, (-1.0, 1.0)),
    }  # fmt: skip
    if not np.isfinite(apart).all():
        why = "The original or a shadow model is damaged: a loss is not finite."
        return [Check("shadow_likeness", against, state=("invalid", why), fields=fields)]
    effect = Effect(lambda level: mean_interval(apart, level, (-1.0, 1.0)),
                    -rule.margin, rule.margin, fields["criterion"])  # fmt: skip
    tail = 1 - criteria.level
    if not effect.beyond(tail):
        state: tuple[Outcome, str] = (
            ("pass", "") if effect.within(tail) else ("inconclusive", UNSURE)
        )
        return [Check("shadow_likeness", against, state=state, fields=fields)]
    why = (
        f"On records they never saw, shadow models give the truth a probability of "
        f"{shadows.mean():.2f}, and the original {original.mean():.2f}: what they say tells little "
        "about the original. Check --training."
    )
    return [Check("shadow_likeness", against, state=("invalid", why), fields=fields)]


def checks(found: Shadowed) -> list[Check]:
    """What the pool says about records and method, for information."""
    pool, n = found.pool, len(found.rows["forget"])
    memorized = memorization.memorization_scores(
        pool.trained["targets"].correct[:, :n], pool.member[:, :n]
    )
    fields: dict[str, Any] = {
        "title": "Memorization score: how much training on a record raises the odds of getting "
        "it right, over shadow models",
        "n": n, "original": mean_of(memorized, (-1.0, 1.0)), "better": "closer_to_retrained",
        "unit": "share of models", "group": "membership",
        "source": "Feldman & Zhang 2020, arXiv 2008.03703",
    }  # fmt: skip
    checks = [Check("memorization_score", "forget", fields=fields)]
    if pool.unlearned is None:
        return checks
    values = {}
    half = pool.member.shape[0] // 2
    for role, table in (("original", pool.trained), ("unlearned", pool.unlearned)):
        phi, member = table["targets"].phi[:, :n], pool.member[:, :n]
        had = np.stack([phi[member[:, i], i] for i in range(n)], 1)
        never = np.stack([phi[~member[:, i], i] for i in range(n)], 1)
        values[role] = mean_of(divergence.klom(never, had), None)
    fields = {
        "title": "KLOM: margins of shadow models that forgot a record, from those of models that "
        "never had it",
        "n": n, "unit": f"nats, {half} models in either arm", "better": "lower",
        "group": "distance", "source": "Georgiev et al. 2024, arXiv 2410.23232", **values,
    }  # fmt: skip
    return [*checks, Check("klom", "forget", fields=fields)]
