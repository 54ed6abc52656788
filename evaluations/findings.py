"""From measurements to checks: each metric on each set, with the rule it is held against.

Membership has a file of its own; everything here is a mean of per-record numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from unlearn.case import Case, SetName
from unlearn.evaluations import divergence, memorization
from unlearn.evaluations.criteria import Check, Criteria, Effect
from unlearn.evaluations.measure import Measured, Measurements
from unlearn.evaluations.schema import CHECKPOINTS, FORGOTTEN, Checkpoint, Group, Value
from unlearn.evaluations.schema import Interval as Range
from unlearn.evaluations.statistics import (
    Bounds,
    difference_interval,
    mean_interval,
    minimum_detectable_mean,
    tost,
)
from unlearn.interface import Classes

Array = npt.NDArray[np.float64]
Better = Literal["lower", "higher", "closer_to_retrained"]
PREFIX = 50  # tokens shown, and tokens asked for
DRAWS = 1000  # samples an attacker may draw per record


@dataclass(frozen=True)
class Metric:
    """A per-record number; ``values`` is None where it does not apply.

    Attributes:
        name: of the finding.
        title: for people.
        unit: of the values.
        forget_better: which way is better on what was forgotten.
        values: (what a model showed, set) -> one number per record.
        group: what it is evidence of on what was forgotten; elsewhere it is utility.
        bounds: the range values can take, where there is one.
        source: the literature.
    """

    name: str
    title: str
    unit: str
    forget_better: Better
    values: Callable[[Measured, str], Array | None]
    group: Group = "extraction"
    bounds: tuple[float, float] | None = (0.0, 1.0)
    source: str = ""


def _per_answer(metric: Callable[[Any, Any], float]) -> Callable[[Measured, str], Array | None]:
    """A metric of predicted and true tokens, from which of them agree."""

    def values(measured: Measured, name: str) -> Array | None:
        if measured.signals[name].logits is not None:
            return None
        hits = measured.signals[name].hits()
        return np.array([metric(h.astype(int), np.ones(len(h), int)) for h in hits], np.float64)

    return values


def _sampled(measured: Measured, name: str) -> Array | None:
    signals = measured.signals[name]
    if signals.logits is not None:
        return None
    p = np.exp(-np.maximum(signals.nll(), 0.0))  # rounding may lift a certain answer above 1
    drawn = [x if np.isnan(x) else memorization.extractable(x, DRAWS, 0.5) for x in p]
    return np.array(drawn, np.float64)


def _prefix(measured: Measured, name: str) -> Array | None:
    """Of answers long enough: whether 50 tokens follow greedily from the 50 before."""
    if measured.signals[name].logits is not None:
        return None
    long = [hits for hits in measured.signals[name].hits() if len(hits) >= 2 * PREFIX]
    return np.array([float(h[PREFIX : 2 * PREFIX].all()) for h in long]) if long else None


def _accuracy(measured: Measured, name: str) -> Array | None:
    signals = measured.signals[name]
    return None if signals.logits is None else signals.hit.astype(float)


def _truth_ratio(measured: Measured, name: str) -> Array | None:
    ratios = truth_ratios(measured, name)
    if ratios is None:
        return None
    score = memorization.closer_to_one if name in FORGOTTEN else memorization.true_better
    usable = ~np.isnan(ratios)
    ratios[usable] = score(ratios[usable]) if usable.any() else np.nan
    return ratios


def truth_ratios(measured: Measured, name: str) -> Array | None:
    """Truth ratio of every record of a set, shape (n,); None without perturbed answers.

    NaN where a loss is not finite.
    """
    wrong = measured.signals.get(f"{name}/perturbed")
    if wrong is None:
        return None
    plain = measured.signals[name]
    right = measured.signals.get(f"{name}/paraphrased", plain)
    losses = [v.loss().reshape(len(plain), -1) for v in (right, wrong)]
    usable = np.isfinite(np.hstack(losses)).all(1)
    ratios = np.full(len(plain), np.nan)
    if usable.any():
        correct, others = (v[usable] for v in losses)
        ratios[usable] = memorization.truth_ratio(correct.mean(1), others)
    return ratios


def _number(key: str) -> Callable[[Measured, str], Array | None]:
    return lambda measured, name: measured.numbers.get(key, {}).get(name)


CARLINI = "Carlini et al. 2021, arXiv 2012.07805; Dorna et al. 2025, arXiv 2506.12618"
MAINI = "Maini et al. 2024, arXiv 2401.06121"
METRICS = (
    Metric("extraction_strength", "Extraction strength", "share of the answer", "lower",
           _per_answer(memorization.extraction_strength), source=CARLINI),
    Metric("exact_memorization", "Exact memorization", "share of tokens", "closer_to_retrained",
           _per_answer(memorization.exact_memorization),
           source="Tirumala et al. 2022, arXiv 2205.10770"),
    Metric("greedy_extraction", "Whole answers that greedy decoding gives away",
           "share of records", "lower", _per_answer(memorization.continuation_matches),
           source="Carlini et al. 2023, arXiv 2202.07646"),
    Metric("prefix_extraction", f"{PREFIX} tokens that greedy decoding continues from {PREFIX}",
           "share of long records", "lower", _prefix,
           source="Carlini et al. 2023, arXiv 2202.07646"),
    Metric("sampled_extraction", f"Whole answers likely to come out in {DRAWS:,} samples",
           "share of records", "lower", _sampled,
           source="Hayes et al. 2024, arXiv 2410.19482"),
    Metric("rouge_l_recall", "ROUGE-L recall of the greedy answer", "share of words",
           "closer_to_retrained", _number("rouge_l_recall"), source=MAINI),
    Metric("knowledge_memorization", "Knowledge memorization: ROUGE-L F1 of the greedy answer",
           "F1", "closer_to_retrained", _number("knowledge_memorization"),
           source="Shi et al. 2024, arXiv 2407.06460"),
    Metric("truth_ratio", "Truth ratio", "closeness to 1", "closer_to_retrained", _truth_ratio,
           source=f"{MAINI}; geometric mean over wrong answers, as the field computes it"),
    Metric("accuracy", "Accuracy", "share of records", "lower", _accuracy),
    Metric("loss", "Loss", "nats per unit", "closer_to_retrained",
           lambda m, name: m.signals[name].loss(), bounds=None),
)  # fmt: skip


def checks(
    measured: Measurements, case: Case, criteria: Criteria, blind: str | None = None
) -> list[Check]:
    """Every metric on every measured set.

    Args:
        measured: what every model showed.
        case: target and sets.
        criteria: the margins.
        blind: why forget set and holdout cannot be compared, if the blind baseline said so.
    """
    found = (
        _check(metric, subset, measured, case, criteria, blind)
        for subset in case.sets.named()
        for metric in METRICS
    )
    return [*(check for check in found if check is not None), *_model_utility(measured)]


def _check(
    metric: Metric,
    subset: SetName,
    measured: Measurements,
    case: Case,
    criteria: Criteria,
    blind: str | None,
) -> Check | None:
    values: dict[Checkpoint, Array | None] = {
        role: metric.values(measured[role], subset) for role in CHECKPOINTS if role in measured
    }
    after, before, retrained = values["unlearned"], values["original"], values.get("retrained")
    if after is None or before is None:
        return None
    name, forgotten = metric.name, subset in FORGOTTEN
    usual: Better = "lower" if name == "loss" else "higher"
    fields = shown(
        metric.title, values, metric.bounds, unit=metric.unit, source=metric.source,
        better=metric.forget_better if forgotten else usual,
        group=metric.group if forgotten else "utility",
    )  # fmt: skip
    if broken := int((~np.isfinite(after)).sum()):
        why = f"It is not finite on {broken} of {len(after)} records: the model is damaged."
        return Check(name, subset, state=("fail", why), fields=fields)
    rule = criteria.rule(name, subset)
    if rule is None:
        return Check(name, subset, fields=fields)
    if not all(v is None or np.isfinite(v).all() for v in values.values()):
        why = "It is not finite on a model to compare with: that checkpoint is damaged."
        return Check(name, subset, state=("not_run", why), fields=fields)
    if not forgotten and not before.any():
        why = "There was nothing to lose: it is 0 on the original, too."
        return Check(name, subset, state=("info", why), fields=fields)
    if not forgotten:
        effect = kept(after, before, rule.margin, points=name == "accuracy")
        return Check(name, subset, effect, fields=fields | {"criterion": effect.criterion})
    hold: Callable[[Array], Effect]
    if retrained is not None:
        hold, samples = partial(above, reference=retrained, margin=rule.margin), [after - retrained]
    elif isinstance(case.target, Classes):
        hold, samples = partial(_small, margin=rule.margin), [after]
    elif (unseen := _never_seen(metric, measured)) is not None:
        if blind is not None:
            return Check(name, subset, state=("invalid", blind), fields=fields)
        hold, samples = partial(_near, never_seen=unseen, margin=rule.margin), [after, unseen]
    else:
        why = "There is no reference: pass --retrained or --holdout."
        return Check(name, subset, state=("not_run", why), fields=fields)
    effect = hold(after)
    fields |= {"criterion": effect.criterion, "detectable": _detectable(samples, criteria.level)}
    return Check(name, subset, effect, hold(before), fields=fields)


def _never_seen(metric: Metric, measured: Measurements) -> Array | None:
    """The original's values on records it never saw; None if there are none, or not all finite."""
    if "holdout" not in measured["original"].signals:
        return None
    values = metric.values(measured["original"], "holdout")
    return values if values is not None and np.isfinite(values).all() else None


def above(after: Array, reference: Array, margin: float) -> Effect:
    """At most ``margin`` above the retrained model, record by record; values in [0, 1]."""
    apart = after - reference
    return Effect(
        lambda level: mean_interval(apart, level, (-1.0, 1.0)), -np.inf, margin,
        f"at most {margin:.2f} above the retrained model",
    )  # fmt: skip


def beside(
    name: str,
    values: Mapping[Checkpoint, Array | None],
    fields: dict[str, Any],
    criteria: Criteria,
) -> Check:
    """A mean over forget records, held against the same on the retrained model."""
    rule = criteria.rule(name, "forget")
    if rule is None:
        return Check(name, "forget", fields=fields)
    after, before, exact = (values.get(role) for role in ("unlearned", "original", "retrained"))
    if after is None or before is None or exact is None:
        why = "It means something only beside a retrained model: pass --retrained."
        if unread := [role for role, found in values.items() if found is None]:
            why = f"It could not be measured on the {' and the '.join(unread)} model."
        return Check(name, "forget", state=("not_run", why), fields=fields)
    effect, original = above(after, exact, rule.margin), above(before, exact, rule.margin)
    fields = fields | {"criterion": effect.criterion}
    return Check(name, "forget", effect, original, fields=fields)


def _small(after: Array, margin: float) -> Effect:
    """At most ``margin``, whatever other models do."""
    return Effect(
        lambda level: mean_interval(after, level, (0.0, 1.0)), -np.inf, margin,
        f"at most {margin:.2f}",
    )  # fmt: skip


def _near(after: Array, never_seen: Array, margin: float) -> Effect:
    """At most ``margin`` above other records that the original never saw."""

    def interval(level: float) -> Bounds:
        ours, theirs = (mean_interval(v, level, (0.0, 1.0)) for v in (after, never_seen))
        return difference_interval(float(after.mean()), ours, float(never_seen.mean()), theirs)

    return Effect(interval, -np.inf, margin, f"at most {margin:.2f} above the holdout")


def kept(after: Array, before: Array, margin: float, *, points: bool = False) -> Effect:
    """What may be lost besides: a share of what there was, or so many points, as of accuracy."""
    if points:
        apart, least, words = after - before, -margin, f"at most {margin:.2f} below before"
    else:
        apart, least = after - (1 - margin) * before, 0.0
        words = f"at least {1 - margin:.0%} of before"
    return Effect(lambda level: mean_interval(apart, level, (-1.0, 1.0)), least, np.inf, words)


def shown(
    title: str,
    values: Mapping[Checkpoint, Array | None],
    bounds: tuple[float, float] | None,
    **fields: Any,
) -> dict[str, Any]:
    """The fields of a finding about the mean of per-record numbers."""
    n = max(len(v) for v in values.values() if v is not None)
    found: dict[str, Any] = {role: mean_of(v, bounds) for role, v in values.items()}
    return {"title": title, "n": n, **found, **fields}


def mean_of(values: Array | None, bounds: tuple[float, float] | None) -> Value | None:
    """A mean with its interval; None where there is none."""
    if values is None or not np.isfinite(values).all():
        return None
    low, high = mean_interval(values, bounds=bounds)
    return Value(value=float(values.mean()), interval=Range(low=low, high=high))


def _detectable(samples: list[Array], level: float) -> float | None:
    """Smallest mean, or difference of two means, that samples of this spread would show."""
    n = len(samples[0])
    if min(map(len, samples)) < 2:
        return None
    variance = sum(float(v.var(ddof=1)) * n / len(v) for v in samples)
    # records that all agree do not tell how far others would spread
    return minimum_detectable_mean(math.sqrt(variance), n, level) if variance else None


def distances(measured: Measurements, case: Case, criteria: Criteria) -> list[Check]:
    """How far the model is from one that never saw the forget set; for information."""
    if "retrained" not in measured:
        return []
    return [
        *(check for subset in case.sets.named() for check in _output_distances(measured, subset)),
        *_equivalence(measured, criteria),
        *_forget_quality(measured),
        *_zero_retrain_forgetting(measured),
        *_average_gap(measured, case),
    ]


def _output_distances(measured: Measurements, subset: SetName) -> list[Check]:
    """Record by record: of class probabilities, or of a language model's losses."""
    signals = {role: measured[role].signals[subset] for role in CHECKPOINTS}
    if signals["retrained"].logits is None:
        loss = {role: s.loss() for role, s in signals.items()}
        if not np.isfinite(loss["retrained"]).all():
            return []
        fields = shown(
            "Distance of the losses from the retrained model's, record by record",
            {role: np.abs(loss[role] - loss["retrained"]) for role in ("original", "unlearned")},
            None, unit="nats per token", better="lower", group="distance",
        )  # fmt: skip
        return [Check("loss_distance", subset, fields=fields)]
    p = {role: s.probabilities() for role, s in signals.items()}
    if not all(np.isfinite(q).all() for q in p.values()):
        return []
    found = []
    for name, title, unit, source, distance in (
        ("jensen_shannon", "Jensen-Shannon divergence of the outputs", "nats", "",
         divergence.jensen_shannon),
        ("activation_distance", "Distance of the probabilities", "L2",
         "Chundawat et al. 2023, arXiv 2205.08096", divergence.activation_distance),
    ):  # fmt: skip
        fields = shown(
            f"{title} from the retrained model's",
            {role: distance(p[role], p["retrained"]) for role in ("original", "unlearned")},
            None, unit=unit, better="lower", group="distance", source=source,
        )  # fmt: skip
        found.append(Check(name, subset, fields=fields))
    return found


def _forget_quality(measured: Measurements) -> list[Check]:
    ratios = {role: truth_ratios(m, "forget") for role, m in measured.items()}
    exact = ratios.pop("retrained")
    if exact is None or np.isnan(exact).any():
        return []
    values: dict[str, Any] = {
        role: Value(value=memorization.forget_quality(r, exact))
        for role, r in ratios.items()
        if r is not None and not np.isnan(r).any()
    }
    title = "Forget quality: p-value of a Kolmogorov-Smirnov test on truth ratios"
    fields = {"title": title, "n": len(exact), "better": "higher", "group": "distance",
              "source": MAINI, **values}  # fmt: skip
    return [Check("forget_quality", "forget", fields=fields)]


def _model_utility(measured: Measurements) -> list[Check]:
    """TOFU's harmonic mean, over what a retain set with perturbed answers brings of it."""
    values: dict[str, Any] = {}
    for role, m in measured.items():
        ratios = truth_ratios(m, "retain") if "retain" in m.signals else None
        rouge = m.numbers.get("rouge_l_recall", {}).get("retain")
        if ratios is None or rouge is None:
            continue
        probability = np.exp(-m.signals["retain"].loss())
        if np.isnan(ratios).any() or np.isnan(probability).any():
            continue
        parts = [v.mean() for v in (probability, rouge, memorization.true_better(ratios))]
        values[role] = Value(value=memorization.model_utility(parts))
    if "unlearned" not in values:
        return []
    n = len(measured["unlearned"].signals["retain"])
    title = "Model utility: harmonic mean of probability, ROUGE-L recall and truth ratio"
    fields = {"title": title, "n": n, "better": "higher", "group": "utility", "source": MAINI,
              **values}  # fmt: skip
    return [Check("model_utility", "retain", fields=fields)]


def _equivalence(measured: Measurements, criteria: Criteria) -> list[Check]:
    """Two one-sided tests of the metric that decides, against the retrained model."""
    for metric in METRICS:
        rule = criteria.rule(metric.name, "forget")
        samples = {role: metric.values(m, "forget") for role, m in measured.items()}
        exact = samples.get("retrained")
        if rule is None or not rule.margin or exact is None or len(exact) < 2:
            continue
        if not np.isfinite(exact).all():
            continue
        title = (
            f"Equivalence test: p-value that {metric.title.lower()} differs from the retrained "
            f"model's by {rule.margin:.2f} or more"
        )
        fields: dict[str, Any] = {"title": title, "n": len(exact), "better": "lower",
                                  "group": "distance", "source": "Schuirmann 1987"}  # fmt: skip
        for role in ("original", "unlearned"):
            values = samples[role]
            if values is not None and np.isfinite(values).all():
                fields[role] = Value(value=tost(values, exact, rule.margin))
        return [Check("equivalence", "forget", fields=fields)]
    return []


def _zero_retrain_forgetting(measured: Measurements) -> list[Check]:
    """Against a model that knows nothing at all."""
    untrained = measured["original"].signals.get("forget/untrained")
    if untrained is None:
        return []
    p = {role: m.signals["forget"].probabilities() for role, m in measured.items()}
    values: dict[str, Any] = {
        role: Value(value=divergence.zrf(q, untrained.probabilities()))
        for role, q in p.items()
        if np.isfinite(q).all()
    }
    fields = {"title": "Zero-retrain forgetting: likeness to an untrained model",
              "n": len(untrained), "better": "closer_to_retrained", "group": "distance",
              "source": "Chundawat et al. 2023, arXiv 2205.08096", **values}  # fmt: skip
    return [Check("zero_retrain_forgetting", "forget", fields=fields)]


def _average_gap(measured: Measurements, case: Case) -> list[Check]:
    """Mean distance of the accuracies (or exact memorization) from the retrained model's."""
    texts = measured["retrained"].signals["forget"].logits is None
    metric = next(m for m in METRICS if m.name == ("exact_memorization" if texts else "accuracy"))

    def means(role: Checkpoint) -> list[float]:
        found = [metric.values(measured[role], subset) for subset in case.sets.named()]
        return [float(v.mean()) for v in found if v is not None]

    exact = means("retrained")
    values: dict[str, Any] = {
        role: Value(value=divergence.average_gap(means(role), exact))
        for role in CHECKPOINTS
        if role != "retrained"
    }
    n = sum(len(measured["unlearned"].signals[s]) for s in case.sets.named())
    title = f"Average gap: {metric.title.lower()} from the retrained model's, over all sets"
    fields = {"title": title, "n": n, "better": "lower", "group": "distance",
              "source": "Fan et al. 2024, arXiv 2310.12508", **values}  # fmt: skip
    return [Check("average_gap", "forget", fields=fields)]
