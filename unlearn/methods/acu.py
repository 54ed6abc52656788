"""Analytic continual unlearning (arXiv 2505.12239): an output layer that forgets exactly.

The backbone is frozen. The output layer becomes ridge regression from its inputs x (with a
constant 1 for the bias) onto one-hot labels,

    W = (G + gamma I)^-1 C,   G = sum of x x',   C = sum of x y',

and a forgotten record's terms are subtracted from G and C: the layer is then that of ridge
regression on the records that are left, for any sequence of requests (``unlearn/analytic.py``).
Bias and weights are penalised alike. A class without records gets zero weights and the bias
``NEVER``: its score of zero could win where all others are negative.

The first request on an ordinary checkpoint learns the records that stay; a later one reads the
records to forget alone. What is kept between requests has a fixed size: G, C, a count per class,
and a sketch of which records were learned, so that others are refused. A factorisation of G is not
kept: before it is renewed it still shows what was forgotten.

Differences from the paper: sums and a Cholesky factor instead of the recursion for the inverse,
which loses digits; no random expansion in front of the layer, which would not fit into the
checkpoint's own layer (:class:`AnalyticClassifier` has one).

Exactness covers the output layer: frozen features may carry what the backbone learned from the
forgotten records. Scores are those of a regression (about 1 for the class, 0 for others), not
calibrated logits. A record gives the same features in every pass bit for bit where the device
computes each row of a batch alike, since all batches have the same shape; on another kind of
device features differ by their rounding, and forgetting is exact up to that.

Cost: a forward pass over the retain set once, later over the forget set; d^2 per record and
d^3 / 3 per request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils import check_random_state, gen_batches
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from unlearn.analytic import Array, Ridge, Sketch
from unlearn.errors import BadInput, MissingNeed, Unsupported
from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.weights import fingerprint_tensors

PREFIX = "acu."
BATCH = 64  # of every forward pass: features depend on it in their last bits
NEVER = -1e4  # bias of a class without records; also float16 holds it
MEASURED = 10_000  # records on which the accuracy of both heads is compared


@dataclass(frozen=True, kw_only=True)
class ACU:
    """Replace the output layer by ridge regression, from which records are subtracted exactly."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    gamma: Annotated[
        float,
        Field(gt=0, description="ridge penalty on all weights and the bias; may change"),
        Range(1e-3, 10.0, log=True),
    ] = 0.1

    needs: ClassVar[Needs] = Needs(
        retain=Need.OPTIONAL,
        state=Need.OPTIONAL,
        tasks=("classification",),
        either=("retain", "state"),
    )

    def trained(self, forget: int, retain: int) -> int:
        """Every retained record is seen once, forward only; later requests see the forget set."""
        return retain or forget

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Subtract the forget set, or learn what stays where nothing was learned yet.

        Raises:
            BadInput: records that were never learned or are forgotten already, state of another
                backbone, or nothing would remain.
            MissingNeed: neither a retain set nor state of this method.
            Unsupported: the model's logits are not its last linear layer's, or that layer has no
                bias and a class has no records left.
        """
        if PREFIX + "gram" not in subject.state:
            if request.retain is None:
                raise MissingNeed("acu finds no state of its own here: pass --retain")
            return self.prepare(subject, request.retain, run)
        forget = request.forget_set()
        head = Head.of(subject.model.eval(), run)
        kept = Kept.of(subject, head, self.gamma, run)
        contents = [run.task.content(forget.examples[i]) for i in range(len(forget))]
        kept.sketch.remove(
            contents, lambda i: f"record {forget.examples.ids[i]} of {forget.examples.source}"
        )
        gone = Ridge.empty(head.width, run.task.classes, self.gamma, run.device)
        for indices, features in head.passes(forget, "features of what goes"):
            gone.learn(head.design(features), labels_of(forget, indices, run.device))
        kept.ridge.subtract(gone)
        if kept.ridge.rows == 0:
            raise BadInput("no record would remain: a model that knows none needs no unlearning")
        run.note(
            f"{len(forget):,} records were subtracted and {kept.ridge.rows:,} remain; only the "
            "forget set was read."
        )
        return kept.installed(subject, run)

    def prepare(self, subject: Subject, examples: Encoded, run: Run) -> Subject:
        """Learn more records, in one pass; the first time, the analytic layer replaces the model's.

        Args:
            subject: any checkpoint; where it keeps this method's state, learning goes on.
            examples: labelled records; learned as often as they are passed.
            run: the run.

        Returns:
            The same model with its output layer solved anew, ready for exact forgetting.

        Raises:
            BadInput: state of another backbone, or features that are not finite.
            Unsupported: as in :meth:`unlearn`.
        """
        head = Head.of(subject.model.eval(), run)
        kept = Kept.of(subject, head, self.gamma, run)
        draw = torch.randperm(len(examples), generator=run.generator("acu accuracy"))
        measured = set(draw[:MEASURED].tolist())

        def compute() -> dict[str, Tensor]:
            seen, labels = [], []
            for indices, features in head.passes(examples, "features of what stays"):
                now = labels_of(examples, indices, run.device)
                kept.ridge.learn(head.design(features), now)
                chosen = [j for j, i in enumerate(indices) if i in measured]
                seen.append(features[chosen])
                labels.append(now[chosen])
            kept.sketch.add(run.task.content(examples.examples[i]) for i in range(len(examples)))
            return {
                **kept.tensors(),
                "features": torch.cat(seen),
                "labels": torch.cat(labels),
            }

        found = run.once(f"acu_{examples.name}", compute)
        kept = kept.holding(found)
        before = head.accuracy(found["features"], found["labels"])
        after = kept.installed(subject, run)
        some = f" ({MEASURED:,} of its records)" if len(measured) < len(examples) else ""
        run.note(
            f"Replacing the head changed accuracy on the {examples.name} set{some} from "
            f"{before:.2%} to {head.accuracy(found['features'], found['labels']):.2%}."
        )
        return after


@dataclass(frozen=True)
class Head:
    """A model's output layer, and the features in front of it."""

    model: nn.Module
    layer: nn.Linear
    run: Run

    @classmethod
    def of(cls, model: nn.Module, run: Run) -> Head:
        """The output layer; Unsupported where it does not have one score per class."""
        layer = run.task.output_layer(model)
        if not isinstance(layer, nn.Linear) or layer.out_features != run.task.classes:
            raise Unsupported(
                f"acu needs a linear output layer with one score for each of the "
                f"{run.task.classes} classes"
            )
        return cls(model, layer, run)

    @property
    def width(self) -> int:
        """Columns of the regression: inputs, and the constant where there is a bias."""
        return self.layer.in_features + (self.layer.bias is not None)

    def design(self, features: Tensor) -> Tensor:
        """Rows of the regression, (n, width), float64."""
        return F.pad(features.double(), (0, self.width - features.shape[1]), value=1.0)

    @torch.no_grad()
    def passes(self, examples: Encoded, phase: str) -> Iterator[tuple[list[int], Tensor]]:
        """(indices, features) of every record once, computed in batches of one shape.

        Float kernels depend on the shape of a batch, so it must follow from the record alone:
        always ``BATCH`` records of one length, the last batch filled up with its first record.
        """
        task, done = self.run.task, 0
        lengths = [int(examples[i]["length"]) for i in range(len(examples))]
        order = sorted(range(len(examples)), key=lengths.__getitem__)
        for _, same in groupby(order, key=lengths.__getitem__):
            group = list(same)
            for start in range(0, len(group), BATCH):
                indices = group[start : start + BATCH]
                filled = indices + indices[:1] * (BATCH - len(indices))
                batch = examples.batch(filled, self.run.device)
                features = task.features(self.model, batch)
                if done == 0:
                    self._check(features, task.logits(self.model, batch)[:, 0])
                yield indices, features[: len(indices)]
                done += len(indices)
                self.run.progress.advance(phase, done, len(examples), {})

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of right answers of the layer as it is now."""
        with torch.no_grad():
            return float((self.layer(features).argmax(1) == labels).double().mean())

    def backbone(self) -> str:
        """Fingerprint of everything but the output layer."""
        own = {id(p) for p in self.layer.parameters()}
        state = self.model.state_dict(keep_vars=True)
        return fingerprint_tensors({k: v for k, v in state.items() if id(v) not in own})

    def _check(self, features: Tensor, logits: Tensor) -> None:
        fits = features.shape[1:] == (self.layer.in_features,)
        if not fits or not torch.allclose(self.layer(features), logits, rtol=1e-3, atol=1e-3):
            raise Unsupported(
                "acu needs logits that are the output of the model's last linear layer, and this "
                "model does something else with it"
            )


@dataclass(frozen=True)
class Kept:
    """What is known of all records learned and not forgotten."""

    ridge: Ridge
    sketch: Sketch
    head: Head

    @classmethod
    def of(cls, subject: Subject, head: Head, gamma: float, run: Run) -> Kept:
        """From a subject's state; nothing where there is none.

        Raises:
            BadInput: the state belongs to another backbone or layer.
        """
        classes = head.layer.out_features
        empty = cls(
            Ridge.empty(head.width, classes, gamma, run.device),
            Sketch.empty(f"{run.seed_of('acu sketch')}".encode()),
            head,
        )
        if PREFIX + "gram" not in subject.state:
            return empty
        found = {
            name.removeprefix(PREFIX): value.clone()
            for name, value in subject.state.items()
            if name.startswith(PREFIX)
        }
        same = {n: t.shape for n, t in empty.tensors().items()} == {
            n: t.shape for n, t in found.items()
        }
        if not same or subject.note.get(PREFIX + "backbone") != head.backbone():
            raise BadInput(
                "the state of the earlier run belongs to another backbone: pass the checkpoint it "
                "was kept with, or one without state and --retain"
            )
        if (device := subject.note[PREFIX + "device"]) != run.device.type:
            run.note(
                f"Warning: records were learned on {device} and are read on {run.device.type}, "
                "where features differ in their last bits: results are exact up to these."
            )
        sketch = Sketch(empty.sketch.counters, bytes.fromhex(subject.note[PREFIX + "salt"]))
        return cls(empty.ridge, sketch, head).holding(found)

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name; sizes follow from the output layer alone."""
        return {
            "gram": self.ridge.gram,
            "cross": self.ridge.cross,
            "counts": self.ridge.counts,
            "sketch": self.sketch.counters,
        }

    def holding(self, found: Mapping[str, Tensor]) -> Kept:
        """The same with other tensors."""
        gram, cross, counts = (
            found[name].to(self.head.run.device) for name in ("gram", "cross", "counts")
        )
        return Kept(
            Ridge(gram, cross, counts, self.ridge.gamma),
            Sketch(found["sketch"].cpu(), self.sketch.salt),
            self.head,
        )

    def installed(self, subject: Subject, run: Run) -> Subject:
        """Put the solution into the output layer, and keep the sums for the next request."""
        layer, weights = self.head.layer, self.ridge.weights()
        absent = self.ridge.counts == 0
        if bool(absent.any()):
            names = ", ".join(_names(run, absent.nonzero()[:, 0].tolist()))
            if layer.bias is None:
                raise Unsupported(
                    f"no record of {names} would remain, and an output layer without bias cannot "
                    "rule a class out: nothing was changed"
                )
            run.note(f"No record of {names} remains: the model can no longer predict it.")
        with torch.no_grad():
            layer.weight.copy_(weights[: layer.in_features].T)
            if layer.bias is not None:
                layer.bias.copy_(weights[-1].masked_fill(absent, NEVER))
        run.note(
            "Forgetting is exact for the output layer: it is what the remaining records alone give "
            "on these features. The frozen backbone may still carry what was forgotten."
        )
        return subject.with_state(
            {PREFIX + name: value for name, value in self.tensors().items()},
            {
                PREFIX + "backbone": self.head.backbone(),
                PREFIX + "salt": self.sketch.salt.hex(),
                PREFIX + "device": run.device.type,
            },
        )


def labels_of(examples: Encoded, indices: Sequence[int], device: torch.device) -> Tensor:
    """Class indices of these records, (n,)."""
    return torch.tensor([int(examples[i]["label"]) for i in indices], device=device)


def _names(run: Run, indices: Sequence[int]) -> list[str]:
    names = getattr(run.task, "names", ())
    return [f"class {names[i] if names else i}" for i in indices]


class AnalyticClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A scikit-learn classifier that forgets rows exactly: ridge regression onto one-hot labels.

    After any sequence of :meth:`partial_fit` and :meth:`partial_forget` it is the classifier that
    :meth:`fit` gives on the rows that are left, up to rounding. Memory does not grow with rows.
    New classes get a column when their first row comes, and lose it with their last.

    With ``expansion`` features are phi(x) = ReLU(x E), E fixed and uniform in +-1/sqrt(n_features)
    (arXiv 2205.14922); a constant 1 is appended in any case. All columns, the intercept's too, are
    penalised alike.

    Args:
        gamma: ridge penalty, above 0.
        expansion: number of random ReLU features; None: the features as they are.
        random_state: draws the expansion and the key of the sketch of known rows.

    Attributes:
        classes_: labels that have rows, in the order of columns: sorted by ``fit``, later ones
            appended.
        coef_: (n_classes, n_features or expansion).
        intercept_: (n_classes,).
        n_features_in_: features of a row.

    >>> model = AnalyticClassifier().fit([[0.0], [1.0], [9.0]], ["a", "b", "b"])
    >>> model.partial_forget([[9.0]], ["b"]).predict([[0.9]]).item()
    'b'
    """

    classes_: Any

    def __init__(
        self,
        gamma: float = 0.1,
        expansion: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.gamma = gamma
        self.expansion = expansion
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Learn these rows alone.

        Args:
            X: (n, n_features).
            y: labels, (n,).
        """
        return self._learn(X, y, first=True)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:  # noqa: N803
        """Learn more rows.

        Args:
            X: (n, n_features).
            y: labels, (n,); new ones get a column.
            classes: all labels allowed in ``y``; None: any. A class has a column only while it has
                rows.
        """
        if classes is not None and len(odd := np.setdiff1d(y, classes)):
            raise BadInput(f"labels {odd.tolist()} are not in classes: add them, or leave it out")
        return self._learn(X, y, first=not hasattr(self, "ridge_"))

    def partial_forget(self, X: Any, y: Any) -> Self:  # noqa: N803
        """Forget rows; what remains is as if they had never been learned.

        Args:
            X: (n, n_features), the same numbers as were learned.
            y: their labels, (n,).

        Raises:
            BadInput: rows that were never learned, or are forgotten already; nothing is changed.
        """
        check_is_fitted(self, "ridge_")
        rows, y = validate_data(self, X, y, reset=False, dtype=np.float64)
        column = {label: i for i, label in enumerate(self.classes_.tolist())}
        contents = _contents(rows, y)
        labels = torch.tensor([column.get(label, 0) for label in y.tolist()])
        self.sketch_.check(contents)
        self.ridge_.forget(self._design(rows), labels)
        self.sketch_.remove(contents)
        self.classes_ = self.classes_[self.ridge_.drop_empty().numpy()]
        return self._solve()

    def decision_function(self, X: Any) -> Array:  # noqa: N803
        """Regression scores, (n, n_classes); with two classes second minus first, (n,)."""
        check_is_fitted(self, "ridge_")
        if len(self.classes_) == 0:
            raise NotFittedError("every row was forgotten: call partial_fit first")
        rows = validate_data(self, X, reset=False, dtype=np.float64)
        scores: Array = self._expand(rows) @ self.coef_.T + self.intercept_
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: Any) -> Any:  # noqa: N803
        """The label with the highest score, (n,)."""
        scores = self.decision_function(X)
        return self.classes_[scores.argmax(1) if scores.ndim == 2 else (scores > 0).astype(int)]

    def _learn(self, X: Any, y: Any, *, first: bool) -> Self:  # noqa: N803
        rows, y = validate_data(self, X, y, reset=first, dtype=np.float64)
        check_classification_targets(y)
        if first:
            self._begin(y)
        new = np.setdiff1d(y, self.classes_)
        if len(self.classes_) and _numeric(self.classes_) != _numeric(y):
            raise BadInput("labels were numbers or text before and are the other now: convert them")
        self.classes_ = np.concatenate((self.classes_, new)) if len(self.classes_) else new
        self.ridge_.grow(len(new))
        column = {label: i for i, label in enumerate(self.classes_.tolist())}
        labels = torch.tensor([column[label] for label in y.tolist()])
        for part in gen_batches(len(rows), 4096):
            self.ridge_.learn(self._design(rows[part]), labels[part])
        self.sketch_.add(_contents(rows, y))
        return self._solve()

    def _begin(self, y: Any) -> None:
        if not self.gamma > 0:
            raise BadInput(f"gamma is {self.gamma}: it must be above 0")
        if self.expansion is not None and self.expansion < 1:
            raise BadInput(f"expansion is {self.expansion}: it must be at least 1, or None")
        draw, d = check_random_state(self.random_state), self.n_features_in_
        self.sketch_ = Sketch.empty(draw.bytes(16))
        self.projection_ = (
            None
            if self.expansion is None
            else draw.uniform(-(d**-0.5), d**-0.5, (d, self.expansion))
        )
        self.ridge_ = Ridge.empty(1 + (self.expansion or d), 0, self.gamma)
        self.classes_ = np.unique(y)[:0]

    def _expand(self, rows: Array) -> Array:
        return rows if self.projection_ is None else np.maximum(rows @ self.projection_, 0)

    def _design(self, rows: Array) -> Tensor:
        return F.pad(torch.from_numpy(self._expand(rows).copy()), (0, 1), value=1.0)

    def _solve(self) -> Self:
        weights = self.ridge_.weights().numpy()
        self.coef_, self.intercept_ = weights[:-1].T.copy(), weights[-1].copy()
        return self


def _numeric(labels: Any) -> bool:
    return np.asarray(labels).dtype.kind in "biuf"


def _contents(rows: Array, labels: Any) -> list[bytes]:
    """Bytes of every row and its label; equal numbers are equal, whatever their type."""
    names = [str(float(label) if _numeric(labels) else label) for label in labels.tolist()]
    plain = np.ascontiguousarray(rows + 0.0)  # -0.0 becomes 0.0
    return [row.tobytes() + name.encode() for row, name in zip(plain, names, strict=True)]
