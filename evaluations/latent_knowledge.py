"""Latent knowledge: do hidden states tell true answers from wrong ones, whatever the model says?

A model reads a question with one answer, and its state at the last token of the answer is taken
after several blocks; the same with wrong answers (:func:`~unlearn.evaluations.downstream.choices`).
Two probes look for a direction along which true answers lie further than wrong ones. Both are made
on retain records, which the model is meant to know, and read forget records (Lynch et al. 2024,
arXiv 2402.16835):

* supervised: logistic regression on the differences true - wrong of pairs with one question;
* unsupervised: contrast-consistent search (Burns et al. 2022, arXiv 2212.03827, section 2.2). With
  p(x) = sigmoid(w x + b) of a state, and x1, x2 the states of a pair in random order,

      L = [p(x1) - (1 - p(x2))]^2 + min(p(x1), p(x2))^2

  asks that exactly one of the two be true, and no label. What is found has no sign: retain records
  give it one. In the paper x1 and x2 end in "yes" and "no", and each side is centred by itself to
  take that word away; here the sides differ by chance alone and are standardised together.

No label of a forget record is used in making a probe: block, strength and sign follow from retain
records. True and wrong answers may also differ in ways that a reader without any knowledge can see,
so the score means something only beside that of a model that never saw the records.

Cost: a forward pass over every answer of at most ``ASKED`` records of each set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from unlearn.attacks.interface import Ground, Inapplicable, Search
from unlearn.errors import BadInput
from unlearn.evaluations.downstream import Choices, choices
from unlearn.evaluations.measure import ASKED, thinned
from unlearn.evaluations.probes import STRENGTHS, linear_probe, reduced, states_after
from unlearn.generation import language_model
from unlearn.run import Run
from unlearn.tasks.base import Encoded, Encoding, evaluating

Array = npt.NDArray[np.float64]

PARTS = 4  # of the retain records, to choose block and strength by
FEWEST = 2 * PARTS  # retain records
TRIES, STEPS, RATE, DECAY = 10, 300, 1e-2, 1e-2  # of contrast-consistent search


@dataclass(frozen=True)
class States:
    """What a block holds once it has read an answer.

    Attributes:
        true: after the true answer of each of n records, shape (n, dim).
        wrong: after k wrong ones, shape (n, k, dim).
    """

    true: Array
    wrong: Array

    def differences(self) -> Array:
        """True less wrong, record by record, shape (n k, dim)."""
        return np.asarray((self.true[:, None] - self.wrong).reshape(-1, self.true.shape[1]))

    def pairs(self) -> tuple[Array, Array]:
        """The true answer's state and the wrong one's for every pair, each (n k, dim)."""
        n, k, dim = self.wrong.shape
        return np.repeat(self.true, k, axis=0), self.wrong.reshape(n * k, dim)


@dataclass(frozen=True)
class Direction:
    """What contrast-consistent search found.

    Attributes:
        weight: shape (dim,), on standardised states.
        bias: a number.
        mean: of the states it was made on, shape (dim,).
        scale: their standard deviation, shape (dim,).
    """

    weight: Array
    bias: float
    mean: Array
    scale: Array

    def first(self, one: Array, other: Array) -> Array:
        """Probability that the first of a pair is the true one, up to the sign, shape (m,).

        (p(x1) + 1 - p(x2)) / 2, as in the paper; exactly one half where both are the same.
        """
        p, q = (
            1 / (1 + np.exp(-((x - self.mean) / self.scale @ self.weight + self.bias)))
            for x in (one, other)
        )
        return np.asarray(0.5 + (p - q) / 2)


def supervised(known: Sequence[Sequence[States]], found: Sequence[States], seed: int = 0) -> Array:
    """Share of the wrong answers of each record that a probe puts below the true one.

    Block and strength are those that tell most pairs apart in a part of the retain records when the
    probe learned on the others.

    Args:
        known: of every part of the retain records, block by block. No part borrows from another.
        found: of the records under search, the same blocks.
        seed: unused; nothing is drawn.

    Returns:
        Values in [0, 1], shape (n,); one half where nothing is told apart.
    """
    apart = [[block.differences() for block in part] for part in known]

    def validated(way: tuple[int, float]) -> float:
        block, strength = way
        told = [
            _told_apart(_others(apart, i, block), part[block], strength)
            for i, part in enumerate(apart)
        ]
        return float(np.concatenate(told).mean())

    block, strength = max(product(range(len(found)), STRENGTHS), key=validated)
    told = _told_apart(_others(apart, -1, block), found[block].differences(), strength)
    return np.asarray(told.reshape(found[block].wrong.shape[:2]).mean(1))


def unsupervised(
    known: Sequence[Sequence[States]], found: Sequence[States], seed: int = 0
) -> Array:
    """The same by contrast-consistent search, from a random order of every pair.

    The block is the one whose direction tells most pairs of retain records apart, either way round;
    arguments as for :func:`supervised`.
    """
    best, told = -1.0, np.zeros(0)
    for block, there in enumerate(found):
        pairs = [part[block].pairs() for part in known]
        true, wrong = (np.concatenate(side) for side in zip(*pairs, strict=True))
        swap = np.random.default_rng(seed).random((len(true), 1)) < 0.5
        direction = contrast_consistent(
            np.where(swap, wrong, true), np.where(swap, true, wrong), seed
        )
        right = float(_sides(direction.first(true, wrong)).mean())
        if max(right, 1 - right) > best:
            best = max(right, 1 - right)
            first = _sides(direction.first(*there.pairs()))
            first = first if right >= 0.5 else 1 - first
            told = first.reshape(there.wrong.shape[:2]).mean(1)
    return told


def _sides(first: Array) -> Array:
    """1 where the first of a pair is taken for the true one, 0 where the other is, 1/2 at a tie."""
    return np.asarray((1 + np.sign(first - 0.5)) / 2)


def contrast_consistent(one: Array, other: Array, seed: int = 0) -> Direction:
    """Contrast-consistent search: the most consistent and confident of ``TRIES`` directions.

    Args:
        one: states of one answer of each pair, shape (m, dim).
        other: of the other answer, shape (m, dim).
        seed: of the starting points.
    """
    both = np.concatenate([one, other])
    mean, scale = both.mean(0), both.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    a, b = (torch.from_numpy((x - mean) / scale) for x in (one, other))
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(TRIES, a.shape[1], generator=draw, dtype=torch.float64)
    weight = (weight / a.shape[1] ** 0.5).requires_grad_()
    bias = torch.zeros(TRIES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], RATE, weight_decay=DECAY)
    for _ in range(STEPS):
        losses = _inconsistency(a @ weight.T + bias, b @ weight.T + bias)
        optimizer.zero_grad()
        losses.sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        best = int(_inconsistency(a @ weight.T + bias, b @ weight.T + bias).argmin())
    return Direction(weight[best].detach().numpy(), float(bias[best].detach()), mean, scale)


def _inconsistency(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The loss of every try, shape (tries,), from logits of shape (pairs, tries)."""
    p, q = one.sigmoid(), other.sigmoid()
    return ((p - (1 - q)).square() + torch.minimum(p, q).square()).mean(0)


def _others(apart: Sequence[Sequence[Array]], left_out: int, block: int) -> Array:
    return np.concatenate([part[block] for i, part in enumerate(apart) if i != left_out])


def _told_apart(known: Array, found: Array, strength: float) -> Array:
    """Whether logistic regression takes each difference for one of true less wrong, 0 or 1.

    It learns every difference both ways round, so it has no use for an intercept. One half where
    there is no difference.
    """
    x, test = reduced(np.concatenate([known, -known]), found)
    labels = np.repeat([1, 0], len(known))
    told = np.asarray(linear_probe(x, labels, test, strengths=(strength,)), dtype=np.float64)
    return np.where(found.any(1), told, 0.5)


def _read(model: nn.Module, options: Choices, run: Run) -> list[States]:
    """States after some of the blocks, first to last."""
    true, wrong = (_ends(model, part, run) for part in options)
    n = len(options.true)
    return [States(t, w.reshape(n, -1, t.shape[1])) for t, w in zip(true, wrong, strict=True)]


def _ends(model: nn.Module, answers: Encoded, run: Run) -> list[Array]:
    """By block, the state once the answer has been read, shape (n, dim)."""
    answers = answers.replaced(map(_closed(answers), range(len(answers))))
    names = list(answers.task.layers(model))
    kept = [names.index(name) for name in thinned(names)]
    ends: list[list[Array]] = [[] for _ in kept]
    order: list[int] = []
    with evaluating(model), states_after(model, answers) as states:
        for indices in run.batches(answers, "latent knowledge"):
            batch = answers.batch(indices, run.device)
            rows, last = torch.arange(len(indices)), batch["units"].cpu() - 1
            after = states(batch)
            for held, block in zip(ends, kept, strict=True):
                held.append(after[block][rows, last].double().cpu().numpy())
            order += indices
    back = np.argsort(order)
    found = [np.concatenate(held)[back] for held in ends]
    if not all(np.isfinite(held).all() for held in found):
        raise BadInput("some hidden states are not finite: the model has diverged")
    return found


def _closed(answers: Encoded) -> Callable[[int], Encoding]:
    """Encodings whose last token closes the answer: that is predicted, and never read."""
    special = set(language_model(answers).tokenizer.all_special_ids)

    def closed(place: int) -> Encoding:
        one: Encoding = answers[place]
        if int(one["answer"][-1]) in special:
            return one
        longer = torch.cat((one["answer"], one["answer"][-1:]))
        return {**one, "answer": longer, "units": one["units"] + 1, "length": one["length"] + 1}

    return closed


def _both(model: nn.Module, ground: Ground, run: Run) -> tuple[list[list[States]], list[States]]:
    """States of retain records and of those under search."""
    sought = choices(ground.forget, ground.retain, run.seed)
    if ground.retain is None or len(ground.retain) < FEWEST:
        raise BadInput(
            "latent knowledge is read by probes that learn on retain records: "
            f"give at least {FEWEST} of them"
        )
    retain = ground.retain.sample(ASKED, run.seed)
    try:
        known = [choices(retain.select(range(i, len(retain), PARTS)), None, run.seed)
                 for i in range(PARTS)]  # fmt: skip
    except Inapplicable as error:  # other retain records would do
        raise BadInput(str(error)) from error
    return [_read(model, part, run) for part in known], _read(model, sought, run)


def _score(probe: Callable[..., Array]) -> Callable[[nn.Module, Ground, Run], Array]:
    def score(model: nn.Module, ground: Ground, run: Run) -> Array:
        return probe(*_both(model, ground, run), run.seed)

    return score


SOURCE = "Lynch et al. 2024, arXiv 2402.16835"
SEARCH = Search(
    "latent_knowledge",
    "Latent knowledge: wrong answers that a probe puts below the true one",
    "share of wrong answers",
    SOURCE,
    _score(supervised),
    needs=("retain",),
    records=ASKED,
)
UNSUPERVISED = Search(
    "latent_knowledge_unsupervised",
    "Latent knowledge, found without labels: wrong answers put below the true one",
    "share of wrong answers",
    f"{SOURCE}; Burns et al. 2022, arXiv 2212.03827",
    _score(unsupervised),
    needs=("retain",),
    records=ASKED,
)
