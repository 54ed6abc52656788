"""Downstream questions: does a model still tell the true answer from wrong ones?

Questions with two answers to choose from, one of several ways in which Lynch et al. (2024, arXiv
2402.16835) look for what is left. A model chooses the answer to which it gives the larger mean
log-probability per token after the question. Every answer is scored on its own, so there is no
order to be sensitive to; nothing is generated, so a model that only learned to refuse still chooses
as before.

Wrong answers are those that records bring (the column ``perturbed_answer``, as in TOFU); the true
one is then worded like them (``paraphrased_answer``, where there is one). Without them the records
borrow from each other, from similar questions first, and the answer is told of what the question is
about. Every record lends as often as it borrows: no answer is more often true than others, and none
comes from a set that the model knows better. With ``WRONG`` records or fewer these cannot lend
enough; then records of the retain set lend, too, whose answers the model may know better.

Some wrong answers can be excluded without knowing the true one. The score means something only
beside that of a model that never saw the records; one half is chance.
"""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from torch import nn

from unlearn.attacks.interface import Ground, Inapplicable, Search
from unlearn.attacks.signals import collect
from unlearn.data import Row, load
from unlearn.errors import BadInput
from unlearn.evaluations.measure import ASKED, answers_given
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import fields

Array = npt.NDArray[np.float64]

WRONG = 5  # borrowed answers per question
WORD = re.compile(r"\w+")


class Choices(NamedTuple):
    """Answers to choose from.

    Attributes:
        true: n questions with their true answers.
        wrong: the same questions with wrong answers, equally many for each, question by question.
    """

    true: Encoded
    wrong: Encoded


def choices(records: Encoded, spare: Encoded | None = None, seed: int = 0) -> Choices:
    """True and wrong answers to at most ``ASKED`` of these questions.

    Args:
        records: of a language model.
        spare: lends, too, where ``records`` has no more than ``WRONG``.
        seed: of all draws.

    Raises:
        BadInput: some records without a question, or one without any wrong answer.
        Inapplicable: no record with a question.
    """
    asked = records.sample(ASKED, seed)
    rows = [_told(asked.examples[i]) for i in range(len(asked))]
    told = [row for row in rows if row is not None]
    if not told:
        raise Inapplicable(
            f"choosing between answers needs questions, and the {records.name} records are plain "
            "texts"
        )
    if len(told) < len(rows):
        raise BadInput(
            f"choosing between answers needs questions, and some of the {records.name} records "
            "have none: give them as question/answer or prompt/completion"
        )
    given = answers_given(asked)
    if "perturbed" in given:
        true = given.get("paraphrased", asked)
        wordings = len(true) // len(asked)
        return Choices(true.select(range(0, len(true), wordings)), given["perturbed"])
    pool = list(told)
    if spare is not None and len(told) <= WRONG:
        more = spare.sample(ASKED, seed)
        pool += [row for i in range(len(more)) if (row := _told(more.examples[i])) is not None]
    borrowed = _borrowed(told, pool, np.random.default_rng(seed))
    count = len(borrowed[0])
    if not count:
        raise BadInput(
            f"there is no wrong answer to some question of the {records.name} set: give records "
            "with other answers, or all of them a column perturbed_answer with wrong ones"
        )
    wrong = [
        {one.names[0]: one.question, one.names[1]: answer}
        for one, found in zip(told, borrowed, strict=True)
        for answer in found[:count]
    ]
    return Choices(asked, Encoded(load(wrong, records.name), records.task))


def score(model: nn.Module, ground: Ground, run: Run) -> Array:
    """Share of the wrong answers that the true one beats, of every question that is asked.

    Cost: a forward pass over true and wrong answers.

    Args:
        model: a language model on ``run.device``.
        ground: its forget records; where wrong answers are borrowed and it has too few, its retain
            records lend some, too.
        run: seed, device and progress.

    Returns:
        Values in [0, 1], shape (n,); a tie counts one half.

    Raises:
        BadInput: as for :func:`choices`, or a model whose likelihoods are not finite.
        Inapplicable: as for :func:`choices`.
    """
    options = choices(ground.forget, ground.retain, run.seed)
    true, wrong = (
        collect(model, part, run, b"", f"choose between {name} answers").loss()
        for name, part in zip(Choices._fields, options, strict=True)
    )
    return beaten(true, wrong.reshape(len(true), -1))


def beaten(true: Array, wrong: Array) -> Array:
    """Share of the wrong answers with a larger loss than the true one; a tie counts one half.

    Args:
        true: losses of the true answers, mean NLL per token in nats, shape (n,).
        wrong: of k wrong ones each, shape (n, k).

    Returns:
        Shape (n,).

    Raises:
        BadInput: a loss that is not finite.

    >>> beaten(np.array([1.0]), np.array([[2.0, 0.5, 1.0, 3.0]]))
    array([0.625])
    """
    if not (np.isfinite(true).all() and np.isfinite(wrong).all()):
        raise BadInput("some answers have no finite likelihood: the model has diverged")
    return np.asarray((1 + np.sign(wrong - true[:, None])).mean(1) / 2)


class _Told(NamedTuple):
    names: tuple[str, str]
    question: str
    answer: str


def _told(row: Row) -> _Told | None:
    """Question and answer of a record; None for a text without a question."""
    pair = fields(row)
    return _Told(pair, row[pair[0]], row[pair[1]]) if pair else None


def _borrowed(told: list[_Told], pool: list[_Told], draw: np.random.Generator) -> list[list[str]]:
    """At most ``WRONG`` wrong answers to every question, equally many for each.

    In every round all questions get one, no answer goes twice, and the sum of what parts the
    questions from those answered is smallest.
    """
    costs = np.array([[_unlike(one, other) for other in pool] for one in told])
    costs += 1e-6 * draw.random(costs.shape)  # ties fall anyhow
    borrowed: list[list[str]] = [[] for _ in told]
    for _ in range(WRONG):
        try:
            rows, columns = linear_sum_assignment(costs)
        except ValueError:  # some question has no answer left
            break
        for row, column in zip(rows, columns, strict=True):
            borrowed[row].append(_retold(pool[column], told[row].question))
            costs[row, column] = np.inf
    return borrowed


def _unlike(one: _Told, other: _Told) -> float:
    """How little two questions have in common, and then how different their answers are in length.

    Infinite where the other's answer would be true.
    """
    lengths = len(_words(one.answer)), len(_words(other.answer))
    if lengths[0] == lengths[1] and _words(_retold(other, one.question)) == _words(one.answer):
        return np.inf
    ours, theirs = (set(WORD.findall(row.question)) for row in (one, other))
    parted = 1 - len(ours & theirs) / max(1, len(ours | theirs))
    return parted + 0.1 * abs(lengths[0] - lengths[1]) / max(1, *lengths)


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _retold(other: _Told, question: str) -> str:
    """Another record's answer, told of what this question is about.

    Names and numbers in which the questions differ, word for word, are replaced in the answer, too:
    "Where does Ann live?", "Ann lives in Rome." becomes "Bob lives in Rome." when "Where does Bob
    live?" is asked.
    """
    theirs, ours = WORD.findall(other.question), WORD.findall(question)
    instead: dict[str, str] = {}
    for what, a, b, c, d in SequenceMatcher(None, theirs, ours, autojunk=False).get_opcodes():
        if what == "replace" and b - a == d - c:
            pairs = zip(theirs[a:b], ours[c:d], strict=True)
            instead |= {
                old: new for old, new in pairs if not (old[0].islower() or new[0].islower())
            }
    return WORD.sub(lambda word: instead.get(word[0], word[0]), other.answer)


SEARCH = Search(
    "downstream",
    "Downstream questions: wrong answers that the true one beats",
    "share of wrong answers",
    "Lynch et al. 2024, arXiv 2402.16835",
    score,
    records=ASKED,
)
