"""Whether the inner layers of a model still hold what its output hides.

A probe is a small classifier trained on the features of one layer. It reads a layer, it does not
ask the model; so it sees through outputs that are masked, and through unlearning that moved the
last layer alone (Alain and Bengio 2016, arXiv 1610.01644). A probe with many labelled examples also
learns classes its features were never made for, and then says little about the model. Two things
guard against that: a control with shuffled labels (Hewitt and Liang 2019, arXiv 1909.03368), and a
one-shot probe that sees a single example of a forgotten class: it can name the others only where
the layer already keeps the class together. In either case the values of an unlearned model are to
be read against those of a model retrained without the forget set.

For language models the logit lens (nostalgebraist 2020) reads the state after every block through
the final norm and the output layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Classes, Target
from unlearn.run import Run
from unlearn.tasks.base import CHUNK, IGNORED, Batch, Encoded, evaluating

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

TRAINING = 2000  # records a probe is trained on, all classes together
DIMENSIONS = 128
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # inverse L2, on standardised features
DRAWS = 8


def linear_probe(
    train_features: Any,
    train_labels: Any,
    test_features: Any,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> Labels:
    """Labels that logistic regression reads from features.

    Features are standardised and classes weigh the same. The inverse L2 strength is the one with
    the best balanced accuracy in three-fold cross-validation; the largest where a class has a
    single example.

    Args:
        train_features: shape (n, dim).
        train_labels: shape (n,), at least two classes.
        test_features: shape (m, dim).
        seed: of the folds.
        strengths: inverse L2 strengths to choose from.

    Returns:
        Predicted labels, shape (m,).

    Raises:
        BadInput: shapes that do not fit, numbers that are not finite, or a single class.

    >>> linear_probe([[0.0], [0.1], [0.9], [1.0]], [3, 3, 7, 7], [[0.2], [0.8]])
    array([3, 7])
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, test = _checked(train_features, train_labels, test_features)
    regression = LogisticRegression(C=max(strengths), class_weight="balanced", max_iter=1000)
    model = make_pipeline(StandardScaler(), regression)
    folds = min(3, int(np.unique(y, return_counts=True)[1].min()))
    if folds > 1 and len(strengths) > 1:
        cut = StratifiedKFold(folds, shuffle=True, random_state=seed)
        grid = {"logisticregression__C": list(strengths)}
        model = GridSearchCV(model, grid, scoring="balanced_accuracy", cv=cut)
    with _one_thread():
        return np.asarray(model.fit(x, y).predict(test), dtype=np.int64)


def knn_probe(train_features: Any, train_labels: Any, test_features: Any, k: int = 5) -> Labels:
    """Labels by majority of the k nearest neighbours in cosine distance.

    Args:
        train_features: shape (n, dim).
        train_labels: shape (n,), at least two classes.
        test_features: shape (m, dim).
        k: number of neighbours; all n where there are fewer.

    Returns:
        Predicted labels, shape (m,).

    Raises:
        BadInput: as for :func:`linear_probe`.
    """
    from sklearn.neighbors import KNeighborsClassifier

    x, y, test = _checked(train_features, train_labels, test_features)
    model = KNeighborsClassifier(min(k, len(y)), metric="cosine", algorithm="brute")
    with _one_thread():
        return np.asarray(model.fit(x, y).predict(test), dtype=np.int64)


def one_shot_probe(
    train_features: Any,
    train_labels: Any,
    shown_features: Any,
    shown_labels: Any,
    test_features: Any,
    seed: int = 0,
) -> Labels:
    """Labels that a linear probe reads when it saw one example of each shown class.

    It is trained at the largest strength, on all of the training examples and one shown example per
    shown class, drawn anew ``DRAWS`` times.

    Args:
        train_features: examples of other classes, shape (n, dim).
        train_labels: shape (n,).
        shown_features: examples to draw from, shape (s, dim).
        shown_labels: shape (s,).
        test_features: shape (m, dim).
        seed: of the draws.

    Returns:
        Predicted labels in each draw, shape (``DRAWS``, m).

    Raises:
        BadInput: as for :func:`linear_probe`.
    """
    x, y = _matrix(train_features), _labels(train_labels)
    shown, labels = _matrix(shown_features), _labels(shown_labels)
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(DRAWS):
        one = [draw.choice(np.flatnonzero(labels == c)) for c in np.unique(labels)]
        known, names = np.concatenate([x, shown[one]]), np.concatenate([y, labels[one]])
        found.append(linear_probe(known, names, test_features, strengths=STRENGTHS[-1:]))
    return np.array(found)


def shuffled_control(
    train_features: Any, train_labels: Any, test_features: Any, seed: int = 0
) -> Labels:
    """What the linear probe says after training on shuffled labels, when there is nothing to read.

    At the largest strength, which fits chance best; labels are shuffled anew ``DRAWS`` times,
    because similar records are all right or all wrong together.

    Args:
        train_features: shape (n, dim).
        train_labels: shape (n,).
        test_features: shape (m, dim).
        seed: of the permutations.

    Returns:
        Predicted labels in each draw, shape (``DRAWS``, m).

    Raises:
        BadInput: as for :func:`linear_probe`.
    """
    labels, draw = _labels(train_labels), np.random.default_rng(seed)
    found = [
        linear_probe(train_features, draw.permutation(labels), test_features, 0, STRENGTHS[-1:])
        for _ in range(DRAWS)
    ]
    return np.array(found)


class Split(NamedTuple):
    """Rows a probe is trained on and rows it is evaluated on.

    Attributes:
        kept: training rows of the retain set.
        shown: training rows of the forget set, none if single records were forgotten.
        held: rows of the forget set it is evaluated on; none of them is in ``shown``.
    """

    kept: Labels
    shown: Labels
    held: Labels


def probe_split(forget_labels: Any, retain_labels: Any, target: Target, seed: int = 0) -> Split:
    """Which records train a probe; a function of the arguments alone, hence alike for all models.

    For forgotten classes a random half of each is shown. For forgotten records none is: the probe
    learns the classes from the retain set. Every class gives at most an equal share of
    ``TRAINING`` records.

    Args:
        forget_labels: shape (n,).
        retain_labels: shape (r,).
        target: what was forgotten.
        seed: of the draw.

    Raises:
        BadInput: nothing to show, or nothing to evaluate.
    """
    forget, retain = _labels(forget_labels), _labels(retain_labels)
    draw = np.random.default_rng(seed)
    quota = max(1, TRAINING // len(np.unique(np.concatenate([forget, retain]))))
    kept = [draw.permutation(np.flatnonzero(retain == c))[:quota] for c in np.unique(retain)]
    rows = [draw.permutation(np.flatnonzero(forget == c)) for c in np.unique(forget)]
    nothing = np.zeros(0, dtype=np.int64)
    if not isinstance(target, Classes):
        return Split(_joined(kept), nothing, np.arange(len(forget)))
    if any(len(some) < 2 for some in rows):
        raise BadInput(
            "a probe for a forgotten class is shown some of its records and tested on others: "
            "give at least two forget records of every class"
        )
    shown = _joined([some[: len(some) // 2][:quota] for some in rows])
    return Split(_joined(kept), shown, _joined([some[len(some) // 2 :] for some in rows]))


@dataclass(frozen=True)
class ClassProbe:
    """Per record and layer, how often a probe named the true class.

    Attributes:
        records: rows of the forget set that were evaluated, shape (m,).
        layers: their names, l in number.
        linear: whether the linear probe was right, 0 or 1, shape (l, m).
        knn: the same of the k-nearest-neighbours probe.
        one_shot: share of the draws in which the one-shot probe was right, in [0, 1]; None if
            single records were forgotten. It tells a hidden class from one never learnt best.
        control: share of the draws in which the linear probe was right after training on shuffled
            labels, shape (l, m).
    """

    records: Labels
    layers: tuple[str, ...]
    linear: Array
    knn: Array
    one_shot: Array | None
    control: Array


def class_probe(
    features: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, Any],
    target: Target,
    seed: int = 0,
) -> ClassProbe:
    """Probe every layer of a classifier for the true classes of its forget records.

    No record a probe is evaluated on was seen in its training (:func:`probe_split`). Layers of more
    than ``DIMENSIONS`` dimensions are reduced to as many principal components of the training
    records.

    Args:
        features: by set ("forget", "retain") and layer, shape (records, dim).
        labels: true labels by set, shape (records,).
        target: what was forgotten.
        seed: of everything random; take the same one for every model.

    Raises:
        BadInput: too few records or classes, or features that are not finite.
    """
    known = {name: _labels(labels[name]) for name in ("forget", "retain")}
    split = probe_split(known["forget"], known["retain"], target, seed)
    truth = known["forget"][split.held]
    y_kept, y_shown = known["retain"][split.kept], known["forget"][split.shown]
    y = np.concatenate([y_kept, y_shown])
    linear, knn, one_shot, control = [], [], [], []
    for layer in features["forget"]:
        forget, retain = (_matrix(features[name][layer]) for name in ("forget", "retain"))
        x = np.concatenate([retain[split.kept], forget[split.shown]])
        x, test = reduced(x, forget[split.held])
        linear.append(linear_probe(x, y, test, seed) == truth)
        knn.append(knn_probe(x, y, test) == truth)
        control.append((shuffled_control(x, y, test, seed) == truth).mean(0))
        if len(split.shown):
            kept, shown = x[: len(y_kept)], x[len(y_kept) :]
            found = one_shot_probe(kept, y_kept, shown, y_shown, test, seed)
            one_shot.append((found == truth).mean(0))
    return ClassProbe(
        split.held,
        tuple(features["forget"]),
        np.array(linear, dtype=np.float64),
        np.array(knn, dtype=np.float64),
        np.array(one_shot) if one_shot else None,
        np.array(control),
    )


class Lens(NamedTuple):
    """What the logit lens reads.

    Attributes:
        layers: names of the blocks, first to last, l in number.
        logprob: mean log-probability per answer token of each record's true answer, in nats,
            shape (l, n).
    """

    layers: tuple[str, ...]
    logprob: Array


def lens(
    model: nn.Module,
    examples: Encoded,
    run: Run,
    head: Callable[[Tensor], Tensor] | None = None,
) -> Lens:
    """Read the true answers from the state after every block.

    Cost: one forward pass, and the output layer once per block and answer token, ``CHUNK`` logits
    at a time.

    Args:
        model: a language model on ``run.device``.
        examples: whose answers are read.
        run: task, device and progress.
        head: from states, shape (tokens, dim), to logits: the :func:`decoder` of another model.
            That of the original model reads what the model itself can no longer say, if only its
            last layer was changed. None: the model's own.

    Raises:
        Unsupported: not a language model built from blocks, or one that does more between its last
            block and its logits than can be repeated.
    """
    names = tuple(_blocks(model, examples))
    logprob = np.zeros((len(names), len(examples)))
    with evaluating(model), ExitStack() as hooks:
        read = head if head is not None else _decoding(model, examples, run)
        states = hooks.enter_context(states_after(model, examples))
        for indices in run.batches(examples, "logit lens", 16):
            batch = examples.batch(indices, run.device)
            scored = batch["labels"] != IGNORED
            truth, units = batch["labels"][scored], batch["units"].cpu().numpy()
            starts = np.concatenate([[0], np.cumsum(units)[:-1]])
            for row, state in zip(logprob, states(batch), strict=True):
                found = _logprob(read, state[scored], truth, examples.task.classes)
                row[indices] = np.add.reduceat(found, starts) / units
    return Lens(names, logprob)


def decoder(model: nn.Module, examples: Encoded, run: Run) -> nn.Module:
    """A copy of what turns the state after the last block into logits: final norm, output layer.

    It stays as it is, whatever becomes of ``model``.

    Args:
        model: a language model on ``run.device``.
        examples: of its task; one is run through it to see which modules are used.
        run: the device.

    Raises:
        Unsupported: as for :func:`lens`.
    """
    with evaluating(model):
        kept = copy.deepcopy(_decoding(model, examples, run))
    return kept.requires_grad_(False)


def _blocks(model: nn.Module, examples: Encoded) -> dict[str, nn.Module]:
    if "positions" not in examples.batch([0]):
        raise Unsupported("the logit lens reads language models: use class_probe for classifiers")
    blocks = examples.task.layers(model)
    if not blocks:
        raise Unsupported(f"{type(model).__name__} is not built from blocks the lens could read")
    return blocks


@contextmanager
def states_after(model: nn.Module, examples: Encoded) -> Iterator[Callable[[Batch], list[Tensor]]]:
    """A function from a batch to the state after each block, each (batch, units, dim)."""
    kept: dict[str, Tensor] = {}
    where: list[Tensor] = []

    def keeper(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            index = where[-1][..., None].expand(-1, -1, hidden.shape[-1])
            kept[name] = hidden.gather(1, index)

        return keep

    def states(batch: Batch) -> list[Tensor]:
        where[:] = [batch["positions"]]
        examples.task.compact(model, batch)
        return [kept[name] for name in blocks]

    blocks = _blocks(model, examples)
    with ExitStack() as hooks:
        for name, block in blocks.items():
            hooks.callback(block.register_forward_hook(keeper(name)).remove)
        yield states


def _decoding(model: nn.Module, examples: Encoded, run: Run) -> nn.Sequential:
    """The modules that run after the last block, output layer included; checked to be all."""
    task, head = examples.task, examples.task.output_layer(model)
    blocks = list(_blocks(model, examples).values())
    inside = {module for block in blocks for module in block.modules()}
    between: list[str] = []
    after = False

    def ended(*_: Any) -> None:
        nonlocal after
        after = True
        between.clear()

    def reached(*_: Any) -> None:
        nonlocal after
        after = False

    def began(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            if after and not any(name.startswith(f"{outer}.") for outer in between):
                between.append(name)

        return note

    batch = examples.batch([0], run.device)
    with ExitStack() as hooks:
        hooks.callback(blocks[-1].register_forward_hook(ended).remove)
        hooks.callback(head.register_forward_pre_hook(reached, prepend=True).remove)
        for name, module in model.named_modules():
            if module is not head and module not in inside:
                hooks.callback(module.register_forward_pre_hook(began(name)).remove)
        whole = task.logits(model, batch)
    found = nn.Sequential(*(model.get_submodule(name) for name in between), head)
    with states_after(model, examples) as states:
        repeated = found(states(batch)[-1])
    if repeated.shape != whole.shape or not torch.allclose(repeated, whole, rtol=1e-3, atol=1e-3):
        raise Unsupported(
            f"what {type(model).__name__} does between its last block and its logits is more than "
            "modules applied in turn, so the logit lens cannot repeat it: leave the lens out"
        )
    return found


def _logprob(read: Callable[[Tensor], Tensor], state: Tensor, truth: Tensor, classes: int) -> Array:
    """Log-probability of every token, shape (tokens,), in nats."""
    size, found = max(1, CHUNK // classes), []
    for start in range(0, len(truth), size):
        logits = read(state[start : start + size])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found.append(-F.cross_entropy(logits, truth[start : start + size], reduction="none"))
    return np.asarray(torch.cat(found).double().cpu().numpy())


def _one_thread() -> Any:
    # many small products: handing them to several threads takes longer than computing them
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    return threadpool_limits(1)


def reduced(train: Array, test: Array) -> tuple[Array, Array]:
    """Both in the first ``DIMENSIONS`` principal components of the first, where there are more."""
    if train.shape[1] <= DIMENSIONS or len(train) <= DIMENSIONS:
        return train, test
    from sklearn.decomposition import PCA

    with _one_thread():
        components = PCA(DIMENSIONS, random_state=0).fit(train)
        return components.transform(train), components.transform(test)


def _joined(rows: list[Labels]) -> Labels:
    return np.sort(np.concatenate(rows)) if rows else np.zeros(0, dtype=np.int64)


def _numbers(values: Any) -> npt.NDArray[Any]:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _labels(values: Any) -> Labels:
    labels = np.asarray(_numbers(values), dtype=np.int64)
    if labels.ndim != 1:
        raise BadInput(f"labels must have one dimension, got shape {labels.shape}.")
    return labels


def _matrix(values: Any) -> Array:
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2:
        raise BadInput(f"features must have shape (records, dim), got {matrix.shape}.")
    if not np.isfinite(matrix).all():
        raise BadInput("features hold numbers that are not finite: the model has diverged.")
    return matrix


def _checked(train: Any, labels: Any, test: Any) -> tuple[Array, Labels, Array]:
    x, y, new = _matrix(train), _labels(labels), _matrix(test)
    if len(x) != len(y) or x.shape[1] != new.shape[1]:
        raise BadInput(
            f"a probe needs one label per training record and as many dimensions in training and "
            f"test; got features {x.shape}, labels {y.shape}, test features {new.shape}."
        )
    if len(np.unique(y)) < 2:
        raise BadInput("a probe needs examples of at least two classes to tell apart.")
    return x, y, new
