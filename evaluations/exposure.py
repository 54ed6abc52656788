"""Membership: what every attack makes of the forget set, and what that says about forgetting.

Where the AUC of a perfectly unlearned model lies depends on what there is to compare with:

- forget records against a holdout of their kind, and a retrained model: at the retrained model's
  AUC. The difference of the two AUCs over the same records cancels whatever tells forget set and
  holdout apart by themselves.
- a holdout alone: at one half, if nothing but training tells the two sets apart. The blind
  baseline checks that; where it fails, the comparison is invalid.
- a retrained model alone: the forget records' scores on either model should be exchangeable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from unlearn.attacks.interface import Attack, Evidence
from unlearn.attacks.membership import attacks, runnable
from unlearn.case import Case
from unlearn.errors import BadInput
from unlearn.evaluations.criteria import Check, Criteria, Effect, Outcome
from unlearn.evaluations.measure import Measurements, nonmembers
from unlearn.evaluations.memorization import privleak
from unlearn.evaluations.privacy import epsilon_lower_bound
from unlearn.evaluations.schema import CHECKPOINTS, Checkpoint, Curve, Exposed, Value
from unlearn.evaluations.schema import Interval as Range
from unlearn.evaluations.shadowing import Shadowed
from unlearn.evaluations.statistics import (
    Bounds,
    auc,
    auc_difference,
    auc_interval,
    minimum_detectable_auc,
    tpr_at_fpr,
    tpr_interval,
)
from unlearn.interface import Classes

Array = npt.NDArray[np.float64]
LOWEST = float(np.finfo(np.float64).min)
Pair = tuple[Array, Array]
SHOWN = 10  # most exposed records
POINTS = 200  # of a drawn curve
THRESHOLDS = 100  # to choose from
PER_RECORD = ("u_lira", "lira_online", "rmia_online")  # attacks with shadow models
RATES = {"tpr_at_1_percent": 0.01, "tpr_at_0_1_percent": 0.001}


@dataclass(frozen=True)
class Scores:
    """What one attack says, by model.

    Attributes:
        attack: which one.
        members: scores of the forget records, shape (n,), by checkpoint.
        nonmembers: scores of records no model saw, shape (m,), by checkpoint; empty without a
            holdout of their kind.
        record: hashes of the forget records.
    """

    attack: Attack
    members: Mapping[Checkpoint, Array]
    nonmembers: Mapping[Checkpoint, Array]
    record: list[str]

    def pair(self, role: Checkpoint) -> Pair | None:
        """Members and nonmembers for an AUC on this model; None where there are none."""
        if role not in self.members:
            return None
        if self.nonmembers:
            return self.members[role], self.nonmembers[role]
        exact = self.members.get("retrained")
        return None if exact is None else (self.members[role], exact)

    def visible(self) -> float:
        """How well the attack sees the original's members: its AUC there; 0 if nobody can tell."""
        pair = self.pair("original")
        return auc(*pair) if pair else 0.0


def score(
    measured: Measurements, case: Case, shadowed: Shadowed | None
) -> tuple[list[Scores], list[Check]]:
    """Run every attack of the audit's depth on every model.

    Returns:
        The scores of those that ran, and a check for each that could not.
    """
    depth = case.config.audit  # type: ignore[attr-defined]
    ran, missing = [], []
    for attack in attacks(case.checkpoint.task.name, depth):
        if not case.config.shadows and {"shadows", "unlearned shadows"} & set(attack.needs):
            continue  # nobody asked for shadow models; the report's limits say so
        try:
            ran.append(_run(attack, measured, case, shadowed))
        except BadInput as error:
            fields = {"title": f"Membership, {attack.title}", "n": 0, "group": "membership",
                      "better": "closer_to_retrained", "source": attack.source}  # fmt: skip
            state: tuple[Outcome, str] = ("not_run", str(error))
            missing.append(Check(f"membership_{attack.name}", "forget", state=state, fields=fields))
    return ran, missing


def _run(attack: Attack, measured: Measurements, case: Case, shadowed: Shadowed | None) -> Scores:
    """One attack on every model.

    Raises:
        BadInput: something it needs is missing, or it cannot make sense of a damaged model.
    """
    against = nonmembers(case)
    members: dict[Checkpoint, Array] = {}
    others: dict[Checkpoint, Array] = {}
    record: list[str] = []
    for role in CHECKPOINTS:
        if role not in measured or (role == "retrained" and "reference" in attack.needs):
            continue  # the reference is no attacker's finding about itself
        held = _held(attack, measured, role, case, shadowed)
        if (why := runnable(attack, held, "forget")) is not None:
            raise BadInput(why)
        record = held.signals["forget"].record
        members[role] = _ranked(attack.score(held, "forget"))
        if against is not None:
            others[role] = _ranked(attack.score(held, against))
    return Scores(attack, members, others, record)


def _held(
    attack: Attack,
    measured: Measurements,
    role: Checkpoint,
    case: Case,
    shadowed: Shadowed | None,
) -> Evidence:
    """What an attack reads: everything, the few records measured at cost, or those of shadows."""
    needs = set(attack.needs)
    if {"grad_norm", "neighbours", "lowercase"} & needs:
        tables = {r: m.costly for r, m in measured.items()}
    elif shadowed is not None and {"shadows", "unlearned shadows"} & needs:
        tables = {
            r: {name: m.signals[name].select(rows) for name, rows in shadowed.rows.items()}
            for r, m in measured.items()
        }
        if shadowed.others is not None:
            against, left = shadowed.others
            for r, m in measured.items():
                tables[r]["population"] = m.signals[against].select(left)
    else:
        tables = {r: m.signals for r, m in measured.items()}
    return Evidence(
        tables[role],
        tables.get("retrained", {}) if role != "retrained" else {},
        measured[role].numbers,
        nonmembers(case) or "",
        case.config.seed,
        shadowed.shadows if shadowed else None,
    )


def _ranked(scores: Array) -> Array:
    """A score that is not a number is as unlike a member as can be; damage shows elsewhere."""
    return np.nan_to_num(np.asarray(scores, np.float64), nan=LOWEST, neginf=LOWEST)


def checks(scores: list[Scores], case: Case, criteria: Criteria, blind: str | None) -> list[Check]:
    """One check of the AUC per attack, then the worst case.

    Args:
        scores: of every attack that ran.
        case: target and sets.
        criteria: the margins.
        blind: why forget set and holdout cannot be compared, if the blind baseline said so.
    """
    found = [_check(s, case, criteria, blind) for s in scores]
    return [
        *found,
        *_worst_case(scores, case, criteria, blind),
        *_epsilon(scores, case, blind),
        *_privleak(scores),
    ]


def _check(scores: Scores, case: Case, criteria: Criteria, blind: str | None) -> Check:
    attack = scores.attack
    name = f"membership_{attack.name}"
    pairs = {role: pair for role in CHECKPOINTS if (pair := scores.pair(role)) is not None}
    fields: dict[str, Any] = {
        "title": f"Membership AUC, {attack.title}",
        "n": len(scores.record) + len(scores.nonmembers.get("unlearned", ())),
        "better": "closer_to_retrained",
        "group": "membership",
        "source": attack.source,
        **{role: value(*pair) for role, pair in pairs.items()},
    }
    if pairs and not scores.nonmembers:
        fields["title"] += ", against the same records on the retrained model"
    differences = bool(scores.nonmembers) and "retrained" in pairs
    state = _incomparable(scores, case, None if differences else blind)
    if state is not None:
        return Check(name, "forget", state=state, fields=fields)
    ours, before = pairs["unlearned"], pairs["original"]
    fields["detectable"] = minimum_detectable_auc(len(ours[0]), len(ours[1]), criteria.level)
    rule = criteria.rule(name, "forget")
    if rule is None:
        return Check(name, "forget", fields=fields)
    if differences:
        hold = partial(_beside, exact=pairs["retrained"], margin=rule.margin)
    else:
        hold = partial(_around_half, margin=rule.margin)
    effect = hold(ours)
    fields["criterion"] = effect.criterion
    return Check(name, "forget", effect, hold(before), fields=fields)


def _incomparable(scores: Scores, case: Case, blind: str | None) -> tuple[Outcome, str] | None:
    """Why an attack's scores on the unlearned model say nothing, if that is so."""
    if scores.nonmembers:
        return None if blind is None else ("invalid", blind)
    if isinstance(case.target, Classes):
        return "not_run", (
            "Two models that never saw a class may lose it by different amounts: pass a "
            "--holdout with records of the forgotten kind."
        )
    if scores.pair("unlearned") is None:
        enough = "--holdout" if "reference" in scores.attack.needs else "--holdout or --retrained"
        return "not_run", f"There is nothing to compare with: pass {enough}."
    return None


def _beside(pair: Pair, exact: Pair, margin: float) -> Effect:
    """The AUC less the retrained model's over the same records."""
    return Effect(
        lambda level: auc_difference(*pair, *exact, level).bounds,
        -margin, margin, f"within {margin:.2f} of the retrained model's, on either side",
    )  # fmt: skip


def _around_half(pair: Pair, margin: float) -> Effect:
    def interval(level: float) -> Bounds:
        low, high = auc_interval(*pair, level)
        return Bounds(low - 0.5, high - 0.5)

    return Effect(interval, -margin, margin, f"within {margin:.2f} of one half, on either side")


def _limited(pair: Pair, rate: float, margin: float) -> Effect:
    """The true positive rate at a false positive rate."""
    return Effect(
        lambda level: Bounds(*tpr_interval(*pair, rate, level)[2:]), -np.inf, rate + margin,
        f"at most {rate + margin:.3f}",
    )  # fmt: skip


def value(members: Array, others: Array) -> Value:
    """An AUC with its interval."""
    low, high = auc_interval(members, others)
    return Value(value=auc(members, others), interval=Range(low=low, high=high))


def sharpest(scores: list[Scores]) -> Scores | None:
    """The attack that sees the original's members best; chosen without the unlearned model."""
    able = [s for s in scores if s.pair("unlearned") is not None]
    return max(able, key=lambda s: (s.visible(), s.attack.name), default=None)


def _worst_case(
    scores: list[Scores], case: Case, criteria: Criteria, blind: str | None
) -> list[Check]:
    """How many records an attack finds while accusing next to nobody wrongly.

    It is the sharpest of those that scored enough nonmembers to tell.
    """
    found = []
    for name, rate in RATES.items():
        needed, rule = round(1 / rate), criteria.rule(name, "forget")
        enough = [s for s in scores if len((s.pair("unlearned") or ((), ()))[1]) >= needed]
        best = sharpest(enough or scores)
        if best is None:
            continue
        pairs = {role: pair for role in CHECKPOINTS if (pair := best.pair(role)) is not None}
        fields: dict[str, Any] = {
            "title": f"Worst case: TPR at {rate:.1%} FPR, {best.attack.title}",
            "n": len(best.record), "better": "lower", "unit": "share", "group": "membership",
            "source": "Carlini et al. 2022, arXiv 2112.03570",
        }  # fmt: skip
        if enough:
            state = _incomparable(best, case, blind)
            rates = {role: tpr_interval(*pair, rate) for role, pair in pairs.items()}
            fields |= {
                role: Value(value=r.tpr, interval=Range(low=r.low, high=r.high))
                for role, r in rates.items()
            }
        else:
            there = len(pairs["unlearned"][1])
            why = f"It takes {needed:,} scores of records no model saw, and there are {there:,}."
            state = ("not_run", why)
        if state is not None or rule is None:
            found.append(Check(name, "forget", state=state, fields=fields))
            continue
        effect, original = (
            _limited(pairs[role], rate, rule.margin) for role in ("unlearned", "original")
        )
        fields["criterion"] = effect.criterion
        found.append(Check(name, "forget", effect, original, fields=fields))
    return found


def _epsilon(scores: list[Scores], case: Case, blind: str | None) -> list[Check]:
    """The epsilon that the first of ``PER_RECORD`` attacks rules out; for information."""
    ran = {s.attack.name: s for s in scores}
    best = next((ran[name] for name in PER_RECORD if name in ran), None)
    if best is None or min(map(len, best.pair("unlearned") or ((),))) < 2:
        return []
    pairs = {role: pair for role in CHECKPOINTS if (pair := best.pair(role)) is not None}
    fields: dict[str, Any] = {
        "title": f"Empirical epsilon: at least this much, {best.attack.title}",
        "n": sum(len(part) // 2 for part in pairs["unlearned"]), "better": "lower",
        "unit": "nats, 95 % sure if records are independent", "group": "membership",
        "source": "Kairouz et al. 2015, arXiv 1311.0776",
        **{role: Value(value=ruled_out(*pair)) for role, pair in pairs.items()},
    }  # fmt: skip
    return [Check("epsilon", "forget", state=_incomparable(best, case, blind), fields=fields)]


def ruled_out(members: Array, others: Array) -> float:
    """Largest epsilon ruled out at 95 % by guesses on every other record, in nats.

    The threshold, and on which side of it members are, come from the records between.
    """

    def bound(half: int, threshold: float, above: bool) -> float:
        sides = [part[half::2] for part in (members, others)]
        called = [int(((side >= threshold) == above).sum()) for side in sides]
        return epsilon_lower_bound(called[0], len(sides[0]), called[1], len(sides[1]))

    pooled = np.unique(np.concatenate([members[0::2], others[0::2]]))
    levels = np.quantile(pooled, np.linspace(0, 1, THRESHOLDS), method="nearest")
    guesses = [(float(t), above) for t in np.unique(levels) for above in (True, False)]
    return bound(1, *max(guesses, key=lambda guess: bound(0, *guess)))


def _privleak(scores: list[Scores]) -> list[Check]:
    """MUSE's PrivLeak, on Min-K% as it defines it."""
    for s in scores:
        if s.attack.name != "min_k" or not s.nonmembers or "retrained" not in s.members:
            continue
        exact = auc(s.members["retrained"], s.nonmembers["retrained"])
        if exact == 1.0:
            return []
        values = {
            role: Value(value=privleak(auc(s.members[role], s.nonmembers[role]), exact))
            for role in ("original", "unlearned")
        }
        fields = {"title": "PrivLeak", "unit": "percent; 0 is none, negative still leaks",
                  "n": len(s.record), "better": "closer_to_retrained", "group": "membership",
                  "source": "Shi et al. 2024, arXiv 2407.06460", **values}  # fmt: skip
        return [Check("privleak", "forget", fields=fields)]
    return []


def curves(scores: list[Scores], chosen: tuple[str, ...]) -> tuple[Curve, ...]:
    """The ROC of the chosen attacks, thinned."""
    return tuple(
        Curve(
            attack=s.attack.name,
            title=s.attack.title,
            subset="forget",
            **{role: _roc(*pair) for role in CHECKPOINTS if (pair := s.pair(role))},
        )
        for s in scores
        if s.attack.name in chosen
    )


def _roc(members: Array, others: Array) -> tuple[tuple[float, float], ...]:
    rates = np.unique(np.concatenate([[0.0], np.geomspace(1 / len(others), 1.0, POINTS)]).round(6))
    return tuple((float(r), tpr_at_fpr(members, others, float(r))) for r in rates)


def exposed(scores: list[Scores]) -> tuple[Exposed, ...]:
    """The forget records the sharpest attack still finds most conspicuous."""
    best = sharpest(scores)
    if best is None:
        return ()
    shares = {
        role: np.searchsorted(np.sort(pair[1]), pair[0]) / len(pair[1])
        for role in CHECKPOINTS
        if (pair := best.pair(role)) is not None
    }
    # equal shares in the order of the scores themselves
    order = np.lexsort((best.members["unlearned"], shares["unlearned"]))[::-1][:SHOWN]
    return tuple(
        Exposed(
            record=best.record[i],
            attack=best.attack.name,
            rank=rank,
            **{role: float(share[i]) for role, share in shares.items()},
        )
        for rank, i in enumerate(order, 1)
    )
