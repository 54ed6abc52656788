"""Whether a language model recognises texts, recalls them, and still does after it learned others.

Three measures of memory from psychology, as Orhan (2023, arXiv:2303.17557) takes them:

- *Recognition* is a choice between two: the share of pairs in which the text the model was trained
  on has a lower loss than a foil it never saw. Foils are unseen texts of the same kind (every text
  against every foil, which is the AUC of the loss), and *minimal edits*: the text itself with a few
  words replaced by words of other records, in what the model reads of it. A true text is better
  prose than an edited one, so edits of unseen texts are measured, too: only what seen texts have
  above these is memory. Texts that are the same tokens when edited, such as words the tokenizer
  does not know, are no pair and are left out.
- *Recall* is what follows greedily on the beginning of a text: whether it is the rest, token for
  token, and how much of the rest is in it (recall of ROUGE-L).
- *Retention* is both, measured again while the model is trained on other texts.

Recognition needs a single exposure, recall several, and traces outlast many updates: a model that
recalls nothing may recognise everything. Losses are mean negative log-likelihoods per token, in
nats. Cost: a forward pass over texts and edits, and greedy answers to at most ``ASKED`` beginnings;
retention repeats this on at most ``ASKED`` texts at every measured step.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import cat, equal, nn

from unlearn.attacks.signals import Signals, collect
from unlearn.attacks.weights import put_back
from unlearn.data import Row, load
from unlearn.errors import BadInput
from unlearn.evaluations.extractable import (
    Estimate,
    continued,
    mean,
    proportion,
    spans,
    speaking,
)
from unlearn.evaluations.memorization import rouge_l
from unlearn.evaluations.statistics import auc, auc_interval
from unlearn.generation import greedy_answers, true_answers
from unlearn.interface import Subject
from unlearn.run import Run, Silent
from unlearn.scripts import words
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import FIELDS
from unlearn.training import Term, Training, descend, likelihood

Array = npt.NDArray[np.float64]

EDITS = 3  # words replaced in a minimal edit, and no more than a quarter of a text's words
ASKED = 200  # texts whose continuation is generated


@dataclass(frozen=True)
class Recollected:
    """What a model recognises and recalls.

    Attributes:
        step: training steps on other texts before this was measured.
        foils: recognition against unseen texts; None without any.
        edits: recognition against minimal edits of the texts themselves; None if no edit shows.
        edits_unseen: the same for unseen texts and their edits, which no memory can explain.
        exact: share of texts whose continuation is exactly the true one.
        rouge: mean ROUGE-L recall of the continuation; None if no text is long enough, as of exact.
    """

    step: int
    foils: Estimate | None
    edits: Estimate | None
    edits_unseen: Estimate | None
    exact: Estimate | None
    rouge: Estimate | None


@dataclass(frozen=True)
class Trial:
    """The texts of a test, all drawn before any model sees them.

    Attributes:
        seen: distinct texts of the training data.
        begun: tokens of each that stand before its first unit, shape (n,).
        edited: a minimal edit of each.
        unseen: texts of the same kind that were not in it, if there are any.
        unseen_edited: a minimal edit of each.
        prefix: tokens of the beginning that is given.
        suffix: tokens that should follow.
        seed: decides which beginnings are given, where there are many.
    """

    seen: Encoded
    begun: npt.NDArray[np.int64]
    edited: Encoded
    unseen: Encoded | None
    unseen_edited: Encoded | None
    prefix: int
    suffix: int
    seed: int

    def among(self, foils: Sequence[int]) -> Trial:
        """The same test with the unseen texts at these positions alone."""
        if self.unseen is None or self.unseen_edited is None or not foils:
            return replace(self, unseen=None, unseen_edited=None)
        unseen, edited = (part.select(foils) for part in (self.unseen, self.unseen_edited))
        return replace(self, unseen=unseen, unseen_edited=edited)

    def sample(self, size: int) -> Trial:
        """The same test on at most ``size`` texts of either kind."""

        def few(n: int) -> list[int]:
            return sorted(random.Random(self.seed).sample(range(n), min(n, size)))  # noqa: S311

        own = few(len(self.seen))
        others = few(len(self.unseen)) if self.unseen is not None else []
        return replace(
            self,
            seen=self.seen.select(own),
            begun=self.begun[own],
            edited=self.edited.select(own),
            unseen=self.unseen and self.unseen.select(others),
            unseen_edited=self.unseen_edited and self.unseen_edited.select(others),
        )


def trial(
    seen: Encoded,
    begun: npt.NDArray[np.int64],
    unseen: Encoded | None,
    prefix: int,
    suffix: int,
    seed: int,
) -> Trial:
    """A test of these texts; edits are made with the words of both kinds.

    Raises:
        BadInput: the texts hold a single word, so none can be edited.
    """
    others = words_of(*filter(None, (seen, unseen)))
    unseen_edited = None if unseen is None else minimal_edits(unseen, others, seed)
    return Trial(
        seen, begun, minimal_edits(seen, others, seed), unseen, unseen_edited, prefix, suffix, seed
    )


def words_of(*sets: Encoded) -> list[str]:
    """Every word of what is scored, as often as it occurs.

    Raises:
        BadInput: there is only one.
    """
    found = [w for part in sets for row in _rows(part) for w in words(row[_said(row)])]
    if len(set(found)) < 2:
        raise BadInput("a text can only be edited with other words: give records of several words")
    return found


def minimal_edits(examples: Encoded, others: Sequence[str], seed: int) -> Encoded:
    """Every text with a few of its words replaced; prompts are left as they are.

    Args:
        examples: records of a language model.
        others: what replacements are drawn from, as often as they occur; at least two kinds.
        seed: of the draws.

    Returns:
        The same records, of each at most ``EDITS`` words, a quarter of them, but at least one,
        exchanged for another word: of those the model reads, which of a text that is longer than
        the longest input are the first ones. White space is kept.
    """
    edited = []
    for i, row in enumerate(_rows(examples)):
        draw, size = random.Random(f"{seed}/{i}"), _read(examples, i, row)  # noqa: S311
        edited.append({**row, _said(row): _edit(row[_said(row)], size, others, draw)})
    return Encoded(load(edited, f"edited {examples.name}"), examples.task)


def _read(examples: Encoded, index: int, row: Mapping[str, Any]) -> int:
    """How many words of a text come before the cut with all their tokens, but at least one."""
    task, name = speaking(examples), _said(row)
    own = words(row[name])
    if examples[index]["length"] < task.max_length:
        return len(own)
    ends = [end for _, end in _places(row[name], own)]
    fits, cut = 1, len(own)  # the least and one more than the most that can be
    while cut - fits > 1:
        middle = (fits + cut) // 2
        begun = {**row, name: row[name][: ends[middle - 1]]}
        if task.encode(begun)["length"] < task.max_length:
            fits = middle
        else:
            cut = middle
    return fits


def _edit(text: str, size: int, others: Sequence[str], draw: random.Random) -> str:
    """The text with some of its first ``size`` words exchanged."""
    own = words(text)
    places = _places(text, own)
    chosen = draw.sample(range(size), max(1, min(EDITS, size // 4)))
    for place in sorted(chosen):
        new = draw.choice(others)
        while new == own[place]:
            new = draw.choice(others)
        own[place] = new
    between = [text[a:b] for (_, a), (b, _) in pairwise([(0, 0), *places])]
    return "".join(chain.from_iterable(zip(between, own, strict=True))) + text[places[-1][1] :]


def _places(text: str, own: Sequence[str]) -> list[tuple[int, int]]:
    """Where its words begin and end."""
    found, end = [], 0
    for word in own:
        begin = text.index(word, end)
        end = begin + len(word)
        found.append((begin, end))
    return found


def differing(one: Encoded, other: Encoded) -> npt.NDArray[np.bool_]:
    """Which records of two equally long sets are other tokens, shape (n,)."""
    return np.array([
        not all(equal(one[i][part], other[i][part]) for part in ("prompt", "answer"))
        for i in range(len(one))
    ], dtype=np.bool_)  # fmt: skip


def _rows(examples: Encoded) -> list[dict[str, Any]]:
    """The fields of every record that the task reads."""
    return [_fields(examples.examples[i]) for i in range(len(examples))]


def _fields(row: Row) -> dict[str, Any]:
    pair = next((pair for pair in FIELDS if all(name in row for name in pair)), ("text",))
    return {name: row[name] for name in pair}


def _said(row: Mapping[str, Any]) -> str:
    """The field that is scored: the last one."""
    return list(row)[-1]


def preferred(seen: Any, foils: Any) -> Estimate | None:
    """Recognition in pairs: the share of texts with a lower loss than their own foil.

    Equal losses are no recognition.

    Args:
        seen: losses of the texts, shape (n,).
        foils: losses of their foils, shape (n,).

    Returns:
        The share with its exact interval; None of none.
    """
    return proportion(np.asarray(seen, dtype=np.float64) < np.asarray(foils, dtype=np.float64))


def recognised(seen: Any, foils: Any) -> Estimate:
    """Recognition over all pairs of a text and a foil; equal losses count half.

    Args:
        seen: losses of the texts, shape (n,).
        foils: losses of foils, shape (m,).

    Returns:
        The share of the n times m pairs, with DeLong's interval, which takes texts and foils, not
        pairs, for independent. Its n counts the texts.
    """
    members, others = -np.asarray(seen, np.float64), -np.asarray(foils, np.float64)
    low, high = auc_interval(members, others)
    return Estimate(auc(members, others), low, high, int(members.size))


def recollect(
    model: nn.Module,
    test: Trial,
    run: Run,
    *,
    step: int = 0,
    seen: Signals | None = None,
    unseen: Signals | None = None,
) -> Recollected:
    """What a model recognises and recalls.

    Args:
        model: on ``run.device``.
        test: the texts.
        run: device and progress.
        step: is noted.
        seen: of the texts, where they were measured already.
        unseen: of the unseen ones.
    """

    def signals(examples: Encoded) -> Signals:
        return collect(model, examples, run, b"recollection", examples.name)

    def beside(examples: Encoded, losses: Array, edited: Encoded) -> Estimate | None:
        pairs = differing(examples, edited)
        return preferred(losses[pairs], signals(edited).loss()[pairs])

    seen = seen or signals(test.seen)
    foils = unknown = None
    if test.unseen is not None and test.unseen_edited is not None:
        losses = (unseen or signals(test.unseen)).loss()
        foils = recognised(seen.loss(), losses)
        unknown = beside(test.unseen, losses, test.unseen_edited)
    edits = beside(test.seen, seen.loss(), test.edited)
    where = spans([len(h) for h in seen.hits()], test.begun.tolist(), test.prefix, test.suffix)
    exact = continued(seen.hits(), where)
    shares = recalled(model, test.seen, where, run, test.seed)
    return Recollected(
        step, foils, edits, unknown,
        proportion(exact[~np.isnan(exact)]), mean(shares, (0.0, 1.0)) if shares.size else None,
    )  # fmt: skip


def recalled(
    model: nn.Module, examples: Encoded, where: Sequence[slice], run: Run, seed: int
) -> Array:
    """ROUGE-L recall of the greedy continuation of each beginning, shape (m,).

    Where the true continuation is cut within the text, its last word may be half a word and is left
    out; of the generated text as many words count as the true one has.

    Args:
        model: on ``run.device``.
        examples: n texts.
        where: the units that should follow on what is before them, n slices; texts with empty ones
            are left out. Of the others at most ``ASKED`` are asked.
        run: device and progress.
        seed: decides which.
    """
    long = [i for i, span in enumerate(where) if span.stop]
    draw = random.Random(seed)  # noqa: S311
    asked = sorted(draw.sample(long, min(len(long), ASKED)))
    if not asked:
        return np.zeros(0)
    cues = [_cue(examples[i], where[i]) for i in asked]
    part = examples.select(asked).replaced(cues)
    answers = greedy_answers(
        model, part, run, "recall", longest=2 * max(int(cue["units"]) for cue in cues)
    )
    task, truths = speaking(examples), []
    for i, truth in zip(asked, true_answers(part), strict=True):
        goes_on = examples[i]["answer"][where[i].stop :].tolist() not in ([], [task.eos])
        true = words(truth)
        truths.append(true[:-1] if goes_on and len(true) > 1 else true)
    return np.array([
        rouge_l(" ".join(truth), " ".join(words(answer)[: len(truth)])).recall
        for truth, answer in zip(truths, answers, strict=True)
    ])  # fmt: skip


def _cue(encoding: Mapping[str, Any], span: slice) -> dict[str, Any]:
    """A text of which everything before the span is the prompt, and the span is the answer."""
    answer = encoding["answer"]
    prompt = cat((encoding["prompt"], answer[: span.start]))
    rest = answer[span]
    units = len(rest)
    return {"prompt": prompt, "answer": rest, "units": units, "length": len(prompt) + units}


def steps_of(last: int) -> tuple[int, ...]:
    """When retention is measured: before any step, at powers of two, and at the last.

    >>> steps_of(12)
    (0, 1, 2, 4, 8, 12)
    """
    powers = (1 << n for n in range(last.bit_length()))
    return tuple(sorted({0, last, *(p for p in powers if p <= last)}))


def retained(
    model: nn.Module, test: Trial, other: Encoded, run: Run, settings: Training, steps: int
) -> tuple[Recollected, ...]:
    """What is recognised and recalled while the model is trained on other texts.

    Args:
        model: on ``run.device``; bit for bit the same when this returns or raises.
        test: the texts, none of which may be among the others.
        other: what the model is trained on.
        run: seed, device and progress; nothing is written to its directory.
        settings: how it is trained, the ``epochs`` replaced.
        steps: how long, in optimiser steps, at least 1.

    Returns:
        One measurement at each of :func:`steps_of`.

    Raises:
        BadInput: no steps.
        Collapsed: training destroyed the model.
    """
    if steps < 1:
        raise BadInput(f"retention is measured over at least 1 training step, got {steps}")
    # the middle of the last step: no rounding can add or lose one
    epochs = (steps - 0.5) / replace(settings, epochs=1).steps(len(other))
    watch = _Watch(model, test, run, steps_of(steps))
    with put_back(model):
        watch.advance("retention", 0, steps, {})
        quiet = Run(speaking(other), run.seed_of("retention"), run.device, progress=watch)
        term = Term("other", other, likelihood, "unit")
        descend(Subject(model), [term], replace(settings, epochs=epochs), quiet)
    return tuple(watch.found)


class _Watch(Silent):
    """Is told about every training step, and tests the model at some of them."""

    def __init__(self, model: nn.Module, test: Trial, run: Run, steps: Sequence[int]) -> None:
        self.model, self.test, self.run, self.steps = model, test, run, steps
        self.found: list[Recollected] = []

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """A step was taken."""
        if done in self.steps:
            quiet = Run(self.run.task, self.run.seed, self.run.device)
            self.found.append(recollect(self.model, self.test, quiet, step=done))
        self.run.progress.advance("retention", done, total, {})
