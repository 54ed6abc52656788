"""Rules that turn measurements into verdicts: stated beforehand, decided from confidence bounds.

A check passes when its interval lies within the rule's limits at the criteria's level, fails when
it lies beyond them also after Holm's correction over all checks of the audit, and is inconclusive
in between. Passing needs no correction: every required check must pass (intersection-union).

A check is evidence of forgetting only if the original model would not pass it. Where the original
is within the limits, too, the check is powerless and not counted; where it seems to lie beyond
them and too few records were measured to be sure, the check stays open.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unlearn.case import SetName
from unlearn.errors import BadInput, Faults, did_you_mean
from unlearn.evaluations.statistics import Bounds, holm

Interval = Callable[[float], Bounds]
Outcome = Literal["pass", "fail", "inconclusive", "invalid", "not_run", "info"]
FAMILIES = ("membership", "revival")  # one rule for all attacks of a kind, named after it
CERTAIN, NARROWEST = 1e-9, 0.499  # tails between which p-values are looked for


class Rule(BaseModel):
    """How far a check may be from its reference, and whether `forgotten` needs it to pass."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    margin: float = Field(ge=0, le=1)
    required: bool = False


class Criteria(BaseModel):
    """The rules of one audit.

    Attributes:
        version: of the format.
        level: of every one-sided confidence bound.
        rules: by finding, as "name.set" or "name"; "membership" and "revival" stand for
            every attack of that kind.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = 1
    level: float = Field(default=0.95, gt=0.5, lt=1)
    rules: dict[str, Rule]
    text: str = Field(default="", exclude=True)

    def rule(self, name: str, subset: str) -> Rule | None:
        """The most specific rule for a finding."""
        family = next((f for f in FAMILIES if name.startswith(f"{f}_")), name)
        for key in (f"{name}.{subset}", name, family):
            if key in self.rules:
                return self.rules[key]
        return None

    def digest(self) -> str:
        """SHA-256 of the text the criteria were read from."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def looser_than_shipped(self) -> list[str]:
        """Findings of which these rules allow more, or demand less, than the shipped ones do."""
        shipped, found = read(), []
        for key in {**shipped.rules, **self.rules}:
            name, _, subset = key.partition(".")
            theirs, ours = shipped.rule(name, subset), self.rule(name, subset)
            if theirs is not None and (
                ours is None
                or ours.margin > theirs.margin
                or (theirs.required and not ours.required)
            ):
                found.append(key)
        return [*found, *(["level"] if self.level < shipped.level else [])]


def read(source: Any = None) -> Criteria:
    """Criteria from a YAML file, a mapping, or (None) those that ship.

    Raises:
        BadInput: an unreadable file, a rule for something that is not measured, a margin outside
            [0, 1].
    """
    named = source is not None and not isinstance(source, Mapping)
    where = f"the criteria {source}" if named else "the criteria"
    try:
        if isinstance(source, Mapping):
            text = yaml.safe_dump(dict(source), sort_keys=False)
        elif source is None:
            text = (resources.files("unlearn.evaluations") / "criteria.yaml").read_text("utf-8")
        else:
            text = Path(source).read_text("utf-8")
        criteria = Criteria.model_validate({**yaml.safe_load(text), "text": text})
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{where} cannot be read: {error}") from error
    except (yaml.YAMLError, TypeError) as error:
        raise BadInput(f"{where} hold no rules: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        places = [(".".join(map(str, f["loc"])), f["msg"]) for f in error.errors()]
        faults = "\n".join(f"{where}: {place}: {message}" for place, message in places)
        raise BadInput(faults) from error
    if source is not None:
        _check_names(criteria, where)
    return criteria


def _check_names(criteria: Criteria, where: str) -> None:
    """Refuse rules that nothing would ever be held against."""
    from unlearn.attacks.membership import attacks
    from unlearn.evaluations.findings import METRICS  # which needs this file first
    from unlearn.evaluations.robustness import SEARCHES, compressed

    known = {key.partition(".")[0] for key in read().rules}
    known |= {metric.name for metric in METRICS if metric.bounds is not None}
    known |= {f"membership_{attack.name}" for attack in attacks()}
    known |= {search.name for search in (*SEARCHES, compressed(1))}
    faults = Faults()
    for key in criteria.rules:
        name, dot, subset = key.partition(".")
        if name not in known:
            faults.add(f"{where} have a rule for {key!r}: {did_you_mean(name, known)}")
        elif dot and subset not in get_args(SetName):
            hint = did_you_mean(subset, get_args(SetName))
            faults.add(f"{where} have a rule for {key!r}, which is no set: {hint}")
    faults.check()


@dataclass(frozen=True)
class Effect:
    """How far something is from where it should be, and how far it may be.

    Attributes:
        interval: from a two-sided level to the confidence interval of the distance.
        low: smallest distance allowed.
        high: largest distance allowed.
        criterion: the rule in words.
    """

    interval: Interval
    low: float
    high: float
    criterion: str

    def within(self, tail: float) -> bool:
        """Whether both one-sided bounds, each of which may err by ``tail``, lie in the limits."""
        bounds = self.interval(1 - 2 * tail)
        return self.low <= bounds.low and bounds.high <= self.high

    def beyond(self, tail: float) -> bool:
        """Whether the interval whose sides may err by ``tail`` each lies beyond a limit."""
        bounds = self.interval(1 - 2 * tail)
        return bounds.low > self.high or bounds.high < self.low

    def p_beyond(self) -> float:
        """One-sided p-value of lying beyond a limit: the smallest tail at which it does.

        Found by bisection to a hundredth of itself, and rounded up; ``CERTAIN`` at least, and 1
        where not even the narrowest interval lies beyond.
        """
        if not self.beyond(NARROWEST):
            return 1.0
        if self.beyond(CERTAIN):
            return CERTAIN
        inside, outside = CERTAIN, NARROWEST
        while outside > 1.01 * inside:
            middle = math.sqrt(inside * outside)
            inside, outside = (inside, middle) if self.beyond(middle) else (middle, outside)
        return outside


@dataclass(frozen=True)
class Check:
    """A measurement that waits for its verdict.

    Attributes:
        name: of the finding.
        subset: the set it is about.
        effect: what is decided; None: for information, or ``state`` says why not.
        before: the same effect with the original model in the place of the unlearned one; None
            where the original is the reference.
        state: a verdict that is settled already, and why.
        fields: everything else the finding shows.
    """

    name: str
    subset: SetName
    effect: Effect | None = None
    before: Effect | None = None
    state: tuple[Outcome, str] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """What came of a check.

    Attributes:
        verdict: the outcome.
        reason: one sentence, where it is not obvious.
        required: whether `forgotten` needs it to pass.
        powered: whether the check surely tells the original from a model that forgot; None: not
            asked.
        p_value: Holm-adjusted, of lying beyond the limits; None without an effect.
    """

    verdict: Outcome
    reason: str = ""
    required: bool = False
    powered: bool | None = None
    p_value: float | None = None


UNSURE = "The confidence interval crosses the limit: more records would decide it."
ALONE = "Beyond the limit taken alone, not after correcting for the number of checks."
TOO_FEW = "Too few records to be sure that it tells even the original from a model that forgot."
POWERLESS = (
    "It does not tell the original from a model that forgot either, so it is no evidence and not "
    "counted."
)


def decide(checks: Sequence[Check], criteria: Criteria) -> list[Decision]:
    """The verdict of every check, corrected for their number."""
    rules = [criteria.rule(check.name, check.subset) for check in checks]
    alone = {
        i: check.effect.p_beyond()
        for i, (check, rule) in enumerate(zip(checks, rules, strict=True))
        if check.effect is not None and check.state is None and rule is not None
    }
    adjusted = dict(zip(alone, holm(list(alone.values())), strict=True)) if alone else {}
    return [
        _decide(check, rule, criteria.level, alone.get(i), adjusted.get(i))
        for i, (check, rule) in enumerate(zip(checks, rules, strict=True))
    ]


def _decide(
    check: Check, rule: Rule | None, level: float, alone: float | None, adjusted: float | None
) -> Decision:
    required = rule is not None and rule.required
    if check.state is not None:
        verdict, reason = check.state
        return Decision(verdict, reason, required and verdict != "info")
    if check.effect is None or alone is None or adjusted is None:
        return Decision("info")
    tail, p_value = 1 - level, float(adjusted)
    if p_value <= tail:
        return Decision("fail", "", required, None, p_value)
    if check.before is not None and not check.before.beyond(tail):
        seems = check.before.beyond(NARROWEST)  # few records must not make it easier to pass
        reason = TOO_FEW if seems else POWERLESS
        return Decision("inconclusive", reason, required and seems, False, p_value)
    powered = None if check.before is None else True
    if check.effect.within(tail):
        return Decision("pass", "", required, powered, p_value)
    reason = ALONE if alone <= tail else UNSURE
    return Decision("inconclusive", reason, required, powered, p_value)
