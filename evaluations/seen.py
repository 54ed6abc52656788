"""What pictures tell: do they show the forgotten, what else was lost, and whose copies are they?"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from unlearn.attacks.membership.entropy import entropy
from unlearn.case import Case
from unlearn.evaluations import imaging, pictures
from unlearn.evaluations.criteria import Check, Criteria, Effect, Outcome
from unlearn.evaluations.findings import mean_of, shown
from unlearn.evaluations.judging import Judge
from unlearn.evaluations.pictures import Condition, Drawn
from unlearn.evaluations.privacy import clopper_pearson
from unlearn.evaluations.schema import CHECKPOINTS, Checkpoint, Grid, Strip, Value
from unlearn.evaluations.schema import Interval as Range
from unlearn.evaluations.statistics import Bounds, difference_interval, mean_interval
from unlearn.interface import Records

Array = npt.NDArray[np.float64]
Hits = npt.NDArray[np.bool_]
State = tuple[Outcome, str]

COARSE = 8  # side of the pictures whose pixels are compared with others drawn
FINE = 64  # side of those that are held against records
COPY = 0.1  # root mean squared difference per pixel, of pixels in [0, 1], up to which it is one
COMPARED = 2000  # retained records that pictures are held against
GRIDS = {"forget": 4, "retain": 6}  # conditions shown
SHOWN, THUMB = 8, 96  # pictures per strip, and their largest side


@dataclass(frozen=True)
class Seen:
    """What all models drew, and what follows.

    Attributes:
        conditions: what was asked for.
        drawn: by every model.
        judge: who looked; None: nobody.
        unjudged: why nobody did.
        case: target and sets.
        device: where the judge looks.
        clip: name of the CLIP model that compared pictures with prompts; "": none did.
    """

    conditions: list[Condition]
    drawn: Mapping[Checkpoint, Drawn]
    judge: Judge | None
    unjudged: str
    case: Case
    device: torch.device
    clip: str = ""

    def checks(self, criteria: Criteria) -> list[Check]:
        """Everything that pictures tell."""
        accuracy, doubt = self._judge_accuracy(criteria)
        of_records = isinstance(self.case.target, Records)
        return [
            *([] if of_records else self._unlearning_accuracy(criteria, doubt)),
            *([] if of_records else self._entropy()),
            *([] if of_records else self._revivals(criteria, doubt)),
            *(self._copies(criteria) if of_records else []),
            *self._quality(criteria),
            *self._retained_accuracy(criteria, doubt),
            *self._clip_scores(),
            *self._distances(),
            *accuracy,
        ]

    def rows(self, subset: str, judged: bool = False) -> list[int]:
        """Numbers of the conditions of a kind; only those the judge knows."""
        found = enumerate(self.conditions)
        return [i for i, c in found if c.subset == subset and (c.shown or not judged)]

    def by_model(self, of: Callable[[Drawn], Array]) -> dict[Checkpoint, Array]:
        """Something of every model."""
        return {role: of(self.drawn[role]) for role in CHECKPOINTS if role in self.drawn}

    def hits(self, subset: str) -> dict[Checkpoint, Array]:
        """1 for each picture that shows what was asked for, as the judge sees it, else 0."""
        rows = self.rows(subset, judged=True) if self.judge else []
        if not rows:
            return {}

        def of(drawn: Drawn) -> Array:
            found = [
                np.isin(drawn.probabilities[i].argmax(1), list(self.conditions[i].shown or ()))
                for i in rows
            ]
            return np.concatenate(found).astype(float)

        return self.by_model(of)

    def features(self, role: Checkpoint, rows: list[int]) -> Array:
        """The judge's, of all pictures of these conditions."""
        return np.concatenate([self.drawn[role].features[i] for i in rows])

    def pixels(self, role: Checkpoint, rows: list[int], side: int) -> Array:
        """Flattened pixels in [0, 1] of pictures made smaller, of these conditions."""
        return _pixels(torch.cat([self.drawn[role].pictures[i] for i in rows]).float() / 255, side)

    def _judge_accuracy(self, criteria: Criteria) -> tuple[list[Check], str | None]:
        rule = criteria.rule("judge_accuracy", "retain")
        if self.judge is None or not self.judge.right or rule is None:
            return [], None
        right = np.array(self.judge.right)
        fields = {
            "title": f"Accuracy of the judge ({self.judge.title}) on real pictures",
            "n": len(right), "better": "higher", "group": "guard", "unlearned": _share(right),
            "criterion": f"at least {1 - rule.margin:.2f}",
        }  # fmt: skip
        if right.mean() >= 1 - rule.margin:
            return [Check("judge_accuracy", "retain", state=("pass", ""), fields=fields)], None
        why = (
            f"The judge is right on only {right.mean():.0%} of real pictures: pass a better one "
            "with --classifier."
        )
        return [Check("judge_accuracy", "retain", state=("invalid", why), fields=fields)], why

    def _unlearning_accuracy(self, criteria: Criteria, doubt: str | None) -> list[Check]:
        """Share of pictures under a forgotten condition that do not show it."""
        name = "unlearning_accuracy"
        fields: dict[str, Any] = {
            "title": "Unlearning accuracy: pictures that do not show what was asked for",
            "unit": "share of pictures", "better": "higher", "group": "extraction",
            "counted": "pictures", "source": "Zhang et al. 2024, arXiv 2402.11846", "n": 0,
        }  # fmt: skip
        missed = {role: 1 - hit for role, hit in self.hits("forget").items()}
        if not missed:
            why = self.unjudged or "The classifier knows nothing that must be gone."
            return [Check(name, "forget", state=("not_run", why), fields=fields)]
        fields |= _shown(missed)
        if doubt:
            return [Check(name, "forget", state=("invalid", doubt), fields=fields)]
        rule = criteria.rule(name, "forget")
        if rule is None:
            return [Check(name, "forget", fields=fields)]
        exact, hold = missed.get("retrained"), partial(_seldom, margin=rule.margin)
        if exact is not None:
            hold = partial(_as_seldom, exact=exact, margin=rule.margin)
        effect = hold(missed["unlearned"])
        fields["criterion"] = effect.criterion
        return [Check(name, "forget", effect, hold(missed["original"]), fields=fields)]

    def _entropy(self) -> list[Check]:
        rows = self.rows("forget")
        if self.judge is None:
            return []
        values = self.by_model(
            lambda drawn: np.concatenate([entropy(drawn.probabilities[i]) for i in rows])
        )
        fields = {
            "title": "How unsure the judge is of these pictures: entropy of what it says",
            "unit": "nats", "better": "lower", "group": "extraction", "counted": "pictures",
            "n": len(values["unlearned"]), **_means(values),
        }  # fmt: skip
        return [Check("judge_entropy", "forget", fields=fields)]

    def _revivals(self, criteria: Criteria, doubt: str | None) -> list[Check]:
        """What attacks on the condition brought back; only a retrained model says how much may."""
        found = []
        for search in pictures.SEARCHES:
            name = f"revival_{search.name}"
            hits = {r: d.numbers[search.name] for r, d in self.drawn.items()
                    if search.name in d.numbers}  # fmt: skip
            if "unlearned" not in hits:
                continue
            fields = {
                "title": f"Drawn again: {search.title}", "unit": "share of pictures",
                "better": "lower", "group": "extraction", "counted": "pictures",
                "source": search.source, **_shown(hits),
            }  # fmt: skip
            rule, exact = criteria.rule(name, "forget"), hits.get("retrained")
            if doubt:
                found.append(Check(name, "forget", state=("invalid", doubt), fields=fields))
            elif rule is None or exact is None:
                found.append(Check(name, "forget", fields=fields))
            else:
                effect, before = (
                    _no_more(hits[r], exact, rule.margin) for r in ("unlearned", "original")
                )
                fields |= {"criterion": effect.criterion}
                found.append(Check(name, "forget", effect, before, fields=fields))
        return found

    def _quality(self, criteria: Criteria) -> list[Check]:
        """Whether pictures under a forgotten condition lie among those the original draws."""
        rows, everything = self.rows("forget"), list(range(len(self.conditions)))
        known = [self.pixels("original", everything, COARSE)]
        if self.judge:
            known.append(self.features("original", everything))
        ours = np.all([imaging.among_themselves(k) for k in known], axis=0)

        def among(role: Checkpoint) -> Hits:
            made = [self.pixels(role, rows, COARSE)]
            if self.judge:
                made.append(self.features(role, rows))
            found = [imaging.within(m, k) for m, k in zip(made, known, strict=True)]
            return np.asarray(np.all(found, axis=0))

        shares = {role: among(role) for role in CHECKPOINTS[1:] if role in self.drawn}
        where = "coarse pixels and the judge's features" if self.judge else "coarse pixels"
        fields: dict[str, Any] = {
            "title": f"Picture quality: share that lies among what the original draws, in {where}",
            "unit": "share of pictures", "better": "higher", "group": "guard",
            "counted": "pictures", "source": "Kynkaanniemi et al. 2019, arXiv 1904.06991",
            "n": len(shares["unlearned"]), "original": _share(ours),
            **{role: _share(share) for role, share in shares.items()},
        }  # fmt: skip
        rule = criteria.rule("picture_quality", "forget")
        if rule is None:
            return [Check("picture_quality", "forget", fields=fields)]
        exact = shares.get("retrained")
        least = ours if exact is None or exact.mean() > ours.mean() else exact
        whose = "the original's own" if least is ours else "the retrained model's"
        effect = _not_below(shares["unlearned"], least, rule.margin, whose)
        fields["criterion"] = effect.criterion
        return [Check("picture_quality", "forget", effect, fields=fields)]

    def _retained_accuracy(self, criteria: Criteria, doubt: str | None) -> list[Check]:
        name = "retained_accuracy"
        fields: dict[str, Any] = {
            "title": "Retained accuracy: pictures that show what was asked for",
            "unit": "share of pictures", "better": "higher", "group": "utility",
            "counted": "pictures", "source": "Zhang et al. 2024, arXiv 2402.11846", "n": 0,
        }  # fmt: skip
        hits = self.hits("retain")
        if not hits and all(self.conditions[i].wanted is None for i in self.rows("retain")):
            return []  # nothing is ever asked for
        if not hits:
            why = self.unjudged or (
                "The classifier knows nothing that must stay: name some of it with "
                "--keep-concepts, or pass --data."
            )
            return [Check(name, "retain", state=("not_run", why), fields=fields)]
        fields |= _shown(hits)
        if doubt:
            return [Check(name, "retain", state=("invalid", doubt), fields=fields)]
        rule = criteria.rule(name, "retain")
        if rule is None:
            return [Check(name, "retain", fields=fields)]
        effect = _kept(hits["unlearned"], hits["original"], rule.margin)
        fields["criterion"] = effect.criterion
        return [Check(name, "retain", effect, fields=fields)]

    def _clip_scores(self) -> list[Check]:
        """How well pictures match their prompts, as a CLIP model sees it; for information.

        Forgotten records say nothing of their captions, which may well be drawn afterwards.
        """
        gone = "closer_to_retrained" if isinstance(self.case.target, Records) else "lower"
        return [
            *self._clip_score("forget", {"better": gone, "group": "extraction"}),
            *self._clip_score("retain", {"better": "higher", "group": "utility"}),
        ]

    def _clip_score(self, subset: Literal["forget", "retain"], told: dict[str, Any]) -> list[Check]:
        rows = [i for i in self.rows(subset) if i in self.drawn["unlearned"].matched]
        if not rows:
            return []
        fields = shown(
            f"CLIP score: how well pictures match their prompts, as {self.clip} sees it",
            self.by_model(lambda drawn: np.concatenate([drawn.matched[i] for i in rows])),
            (0.0, 2.5), unit="2.5 times the cosine", counted="pictures",
            source="Hessel et al. 2021, arXiv 2104.08718", **told,
        )  # fmt: skip
        return [Check("clip_score", subset, fields=fields)]

    def _distances(self) -> list[Check]:
        """How the retained pictures of each model lie to others of the original, and to real ones.

        Of every condition the first half is held against the original's second half, so that no
        two pictures started from the same noise, and the original has a distance of its own.
        """
        rows = self.rows("retain")
        if self.judge is None or not rows:
            return []
        made = {role: self.features(role, rows) for role in self.drawn}
        counts = [self.conditions[i].count for i in rows]
        first = np.concatenate([np.arange(n) < n // 2 for n in counts])
        if min(first.sum(), (~first).sum()) <= imaging.NEIGHBOURS:
            return []
        halves, others = {r: f[first] for r, f in made.items()}, made["original"][~first]
        found = _apart(halves, others, "others that the original draws", "from_original")
        real = self._real()
        if real is not None and len(real) > imaging.NEIGHBOURS:
            found += _apart(made, real, "real ones", "from_real")
        return found

    def _real(self) -> Array | None:
        """The judge's features of real retained pictures; None where there are none."""
        retain, task = self.case.sets.retain, self.case.checkpoint.task
        if self.judge is None or retain is None:
            return None
        part = retain.sample(COMPARED, self.case.config.seed)
        pixels = [task.encode(part.examples[i])["pixel_values"] for i in range(len(part))]
        raw = (torch.stack(pixels).float() * 255).round().to(torch.uint8)
        return self.judge.look(raw, self.device)[1]

    def _copies(self, criteria: Criteria) -> list[Check]:
        """Pictures under the forgotten records' conditions, held against these records."""
        sets, task = self.case.sets, self.case.checkpoint.task
        retain = sets.retain.sample(COMPARED, self.case.config.seed) if sets.retain else None
        records = [p.examples[i] for p in (sets.forget, retain) if p for i in range(len(p))]
        training = _pixels(torch.stack([task.encode(r)["pixel_values"] for r in records]), FINE)
        gone, rows = len(sets.forget), self.rows("forget")
        near = {
            role: imaging.nearest(self.pixels(role, rows, FINE), training) for role in self.drawn
        }
        copied = {
            role: ((n.which < gone) & (n.distance <= COPY)).astype(float)
            for role, n in near.items()
        }
        forgotten = {
            role: imaging.nearest(self.pixels(role, rows, FINE), training[:gone]).distance
            for role in self.drawn
        }
        source = "Carlini et al. 2023, arXiv 2301.13188, section 5"
        common: dict[str, Any] = {
            "better": "lower", "group": "extraction", "counted": "pictures", "source": source,
        }  # fmt: skip
        fields = common | {
            "title": f"Copies of forgotten records: nearest of all, and within {COPY:g} per pixel",
            "unit": "share of pictures", **_shown(copied),
        }  # fmt: skip
        rule, name = criteria.rule("extraction_rate", "forget"), "extraction_rate"
        if rule is None:
            found = [Check(name, "forget", fields=fields)]
        else:
            exact = copied.get("retrained")
            hold = partial(_rarely, margin=rule.margin)
            if exact is not None:
                hold = partial(_no_more, exact=exact, margin=rule.margin)
            effect = hold(copied["unlearned"])
            fields["criterion"] = effect.criterion
            found = [Check(name, "forget", effect, hold(copied["original"]), fields=fields)]
        adaptive = {
            role: ((n.which < gone) & (n.ratio <= 1)).astype(float) for role, n in near.items()
        }
        found.append(Check("adaptive_extraction_rate", "forget", fields=common | {
            "title": "Copies of forgotten records, by distance over half the mean distance of the "
                     f"{imaging.CLOSEST} nearest", "unit": "share of pictures", **_shown(adaptive),
        }))  # fmt: skip
        found.append(Check("nearest_record", "forget", fields=common | {
            "title": "Distance from the nearest forgotten record", "better": "higher",
            "unit": "root mean square per pixel", "n": len(forgotten["unlearned"]),
            **_means(forgotten),
        }))  # fmt: skip
        return found

    def grids(self) -> tuple[Grid, ...]:
        """Some pictures of some conditions, for people."""
        chosen = [i for subset, most in GRIDS.items() for i in self.rows(subset)[:most]]
        return tuple(
            Grid(
                condition=self.conditions[i].title,
                subset=self.conditions[i].subset,
                count=min(SHOWN, self.conditions[i].count),
                **{role: self._strip(role, i) for role in CHECKPOINTS if role in self.drawn},
            )
            for i in chosen
        )

    def _strip(self, role: Checkpoint, row: int) -> Strip:
        drawn = self.drawn[role]
        seen: tuple[str, ...] = ()
        if self.judge:
            said = drawn.probabilities[row][:SHOWN].argmax(1)
            seen = tuple(self.judge.names[i] if self.judge.names else str(i) for i in said)
        return Strip(png=png(drawn.pictures[row][:SHOWN]), seen=seen)


def png(pictures: Tensor) -> str:
    """Pictures side by side, a clear pixel apart, as one PNG file in base64.

    Args:
        pictures: bytes, shape (n, channels, height, width); larger ones are made smaller.
    """
    from PIL import Image

    height, width = pictures.shape[-2:]
    if (largest := max(height, width)) > THUMB:
        side = max(1, round(height * THUMB / largest)), max(1, round(width * THUMB / largest))
        pictures = F.adaptive_avg_pool2d(pictures.float(), side).round().to(torch.uint8)
    pictures = pictures[:, :3] if pictures.shape[1] >= 3 else pictures[:, :1]
    opaque = torch.cat([pictures, torch.full_like(pictures[:, :1], 255)], 1)
    row = torch.cat(list(F.pad(opaque, (0, 1))), dim=2)[:, :, :-1].permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(row.numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _pixels(pictures: Tensor, side: int) -> Array:
    """Flattened pixels of pictures, larger ones averaged to ``side`` by ``side``."""
    small = pictures.float()
    if max(small.shape[-2:]) > side:
        small = F.adaptive_avg_pool2d(small, side)
    return np.asarray(small.flatten(1).double().numpy())


def _apart(
    made: Mapping[Checkpoint, Array], reference: Array, whose: str, name: str
) -> list[Check]:
    """Distances of pictures from others, in the judge's features."""
    n = len(made["unlearned"])
    pr = {role: imaging.precision_recall(f, reference) for role, f in made.items()}
    of: dict[str, tuple[str, str, str, dict[Checkpoint, float]]] = {
        "frechet_distance": (
            f"Frechet distance from {whose}, in the judge's features", "lower",
            "Heusel et al. 2017, arXiv 1706.08500",
            {role: imaging.frechet_distance(f, reference) for role, f in made.items()}),
        "kernel_distance": (
            f"Kernel distance from {whose}, in the judge's features", "lower",
            "Binkowski et al. 2018, arXiv 1801.01401",
            {role: imaging.kernel_distance(f, reference) for role, f in made.items()}),
        "precision": (
            f"Precision: share that lies among {whose}, in the judge's features", "higher",
            "Kynkaanniemi et al. 2019, arXiv 1904.06991",
            {role: p.precision for role, p in pr.items()}),
        "recall": (
            f"Recall: share of {whose} that lies among them, in the judge's features", "higher",
            "Kynkaanniemi et al. 2019, arXiv 1904.06991",
            {role: p.recall for role, p in pr.items()}),
    }  # fmt: skip
    return [
        Check(f"{key}_{name}", "retain", fields={
            "title": title, "n": n, "better": better, "group": "utility", "counted": "pictures",
            "source": source, **{role: Value(value=v) for role, v in values.items()},
        })
        for key, (title, better, source, values) in of.items()
    ]  # fmt: skip


def _share(hits: npt.NDArray[Any]) -> Value:
    low, high = _exact(hits, 0.95)
    return Value(value=float(hits.mean()), interval=Range(low=low, high=high))


def _shown(hits: Mapping[Checkpoint, Array]) -> dict[str, Any]:
    return {"n": len(hits["unlearned"]), **{role: _share(h) for role, h in hits.items()}}


def _means(values: Mapping[Checkpoint, Array]) -> dict[str, Any]:
    return {role: mean_of(v, None) for role, v in values.items()}


def _exact(hits: npt.NDArray[Any], level: float) -> Bounds:
    return Bounds(*clopper_pearson(int(hits.sum()), len(hits), level))


def _seldom(missed: Array, margin: float) -> Effect:
    """At least 1 - ``margin``, whatever other models do."""
    return Effect(lambda level: _exact(missed, level), 1 - margin, np.inf,
                  f"at least {1 - margin:.2f}")  # fmt: skip


def _as_seldom(missed: Array, exact: Array, margin: float) -> Effect:
    """Picture by picture, from the same noise."""
    return Effect(
        lambda level: mean_interval(missed - exact, level, (-1.0, 1.0)), -margin, np.inf,
        f"at most {margin:.2f} below the retrained model's",
    )  # fmt: skip


def _rarely(hits: Array, margin: float) -> Effect:
    return Effect(lambda level: _exact(hits, level), -np.inf, margin, f"at most {margin:.2f}")


def _no_more(hits: Array, exact: Array, margin: float) -> Effect:
    def interval(level: float) -> Bounds:
        ours, theirs = _exact(hits, level), _exact(exact, level)
        return difference_interval(float(hits.mean()), ours, float(exact.mean()), theirs)

    return Effect(interval, -np.inf, margin, f"at most {margin:.2f} above the retrained model's")


def _not_below(hits: Hits, least: Hits, margin: float, whose: str) -> Effect:
    def interval(level: float) -> Bounds:
        ours, theirs = _exact(hits, level), _exact(least, level)
        return difference_interval(float(hits.mean()), ours, float(least.mean()), theirs)

    return Effect(interval, -margin, np.inf, f"at most {margin:.2f} below {whose}")


def _kept(after: Array, before: Array, margin: float) -> Effect:
    """Picture by picture, from the same noise."""
    return Effect(
        lambda level: mean_interval(after - before, level, (-1.0, 1.0)), -margin, np.inf,
        f"at most {margin:.2f} below before",
    )  # fmt: skip
