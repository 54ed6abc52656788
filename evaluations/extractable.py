"""How much of a set of texts a language model goes on with word for word, once it is begun.

A text is *k-extractable* if greedy decoding from k of its tokens gives exactly the tokens that come
next (Carlini et al., 2023, arXiv:2202.07646, Definition 3.1; they ask for 50). Here the k tokens
are its first ones, after its prompt if it has one. As long as every token is predicted right, what
greedy decoding reads is the true text, so one teacher-forced pass answers for every k at once.
*(n, p)-discoverable* is a text that n samples contain with probability p (Hayes et al., 2024,
arXiv:2410.19482); the samples are drawn from the whole distribution at temperature 1.

Extraction grows with the logarithm of how often a text was in the training data (Carlini et al.,
2023, section 4.2). Copies are records that are equal but for white space; near-duplicates count as
texts of their own. The unit of every share is the distinct text: copies of one text are extracted
together, and an interval that took them for independent would be too narrow.

Cost: one forward pass, see :func:`unlearn.attacks.signals.collect`; this file reads its tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unlearn.attacks.signals import Signals
from unlearn.errors import BadInput
from unlearn.evaluations.memorization import (
    continuation_matches,
    extractable,
    extraction_probability,
    extraction_strength,
)
from unlearn.evaluations.privacy import clopper_pearson
from unlearn.evaluations.statistics import mean_interval
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

PREFIXES = (8, 16, 32, 50, 100, 200, 400, 800)  # tokens
SAMPLES = (1, 10, 100, 1000)  # n of (n, p)-discoverable
CHANCES = (0.5, 0.9)  # p of it


@dataclass(frozen=True)
class Estimate:
    """A number, its 95 % confidence interval, and how many texts it is about."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Row:
    """The texts of one group that are long enough for one prefix.

    Attributes:
        prefix: k, in tokens.
        least: copies of these texts in the data at least.
        most: copies at most; None where copies are not told apart.
        share: of them that are extractable; None if no text is long enough.
    """

    prefix: int
    least: int
    most: int | None
    share: Estimate | None


@dataclass(frozen=True)
class Discoverable:
    """Share of texts that ``samples`` draws contain with probability ``chance``."""

    prefix: int
    samples: int
    chance: float
    share: Estimate


@dataclass(frozen=True)
class Extractable:
    """What can be extracted of a set.

    Attributes:
        suffix: tokens that must come out.
        prefix: the k that is looked at more closely: the longest that half of the texts allow.
        by_prefix: all texts, by k.
        by_copies: by k and by the number of copies: 1, 2, 3 to 4, 5 to 8, and so on.
        slope: by k, what each doubling of the copies adds to the extractable share; None if all
            texts have equally many copies.
        discoverable: by k, n and p.
        strength: mean extraction strength: how much of a text follows its shortest sufficient
            prefix, whatever its length.
    """

    suffix: int
    prefix: int
    by_prefix: tuple[Row, ...]
    by_copies: tuple[Row, ...]
    slope: dict[int, Estimate | None]
    discoverable: tuple[Discoverable, ...]
    strength: Estimate


def keys(examples: Encoded) -> list[bytes]:
    """What each record says in the fields that are read, white space between words aside."""
    content = examples.task.content
    fields = (content(examples.examples[i]).split(b"\x00") for i in range(len(examples)))
    return [b"\x00".join(" ".join(f.decode().split()).encode() for f in row) for row in fields]


def distinct(examples: Encoded) -> tuple[list[int], Counts]:
    """Texts without their copies.

    Args:
        examples: records of a language model.

    Returns:
        The first position of every text, ascending, and how many records hold it, shape (n,).
        Records hold the same text if they have the same one of :func:`keys`.
    """
    first, copies = dict[bytes, int](), dict[int, int]()
    for i, key in enumerate(keys(examples)):
        position = first.setdefault(key, i)
        copies[position] = copies.get(position, 0) + 1
    return list(copies), np.array(list(copies.values()), dtype=np.int64)


def begun(examples: Encoded) -> Counts:
    """How many true tokens of each text stand before its first unit, shape (n,).

    One where the tokenizer has no token that begins a text, so that the first one is only read;
    otherwise none, for the prompt of a record is not counted.
    """
    task = speaking(examples)
    bare = task.tokenizer.bos_token_id is None
    texts = (task.texts(examples.examples[i])[0] for i in range(len(examples)))
    return np.array([int(bare and not prompt) for prompt in texts], dtype=np.int64)


def speaking(examples: Encoded) -> CausalLM:
    """The task of these records, which is that of a language model."""
    if not isinstance(examples.task, CausalLM):
        raise TypeError("only texts of language models can be continued")
    return examples.task


def spans(units: Sequence[int], begun: Sequence[int], prefix: int, suffix: int) -> list[slice]:
    """Where the ``suffix`` tokens after the first ``prefix`` ones stand among a text's units.

    An empty slice where the text is too short, or its first ``prefix`` tokens end before a unit.

    >>> spans([10, 4], [0, 0], prefix=3, suffix=2)
    [slice(3, 5, None), slice(0, 0, None)]
    """
    starts = [prefix - before for before in begun]
    return [
        slice(start, start + suffix) if start >= 0 and start + suffix <= n else slice(0, 0)
        for n, start in zip(units, starts, strict=True)
    ]


def usable(
    units: Sequence[int], begun: Sequence[int], asked: Sequence[int], suffix: int
) -> tuple[int, ...]:
    """The prefix lengths that at least one text is long enough for.

    Args:
        units: tokens of each text that are scored, without a closing end of sequence, shape (n,).
        begun: tokens before them, see :func:`begun`.
        asked: prefix lengths.
        suffix: tokens that must come out.

    Raises:
        BadInput: there is none; says which suffix would do.
    """
    found = tuple(k for k in asked if any(s.stop for s in spans(units, begun, k, suffix)))
    if not found:
        longest = max(n + before for n, before in zip(units, begun, strict=True))
        half = max(1, int(np.median(units)) // 2)
        raise BadInput(
            f"no text is long enough for a prefix of {min(asked)} tokens and a suffix of {suffix}: "
            f"the longest has {longest}; pass a shorter --suffix or --prefixes, such as --suffix "
            f"{half} --prefixes {max(1, half // 2)},{half}"
        )
    return found


def measured(
    signals: Signals, copies: Any, begun: Any, prefixes: Sequence[int], suffix: int
) -> Extractable:
    """What can be extracted, from what a model said of every token.

    Args:
        signals: of n distinct texts.
        copies: how many records hold each of them, shape (n,).
        begun: see :func:`begun`, shape (n,).
        prefixes: values of k, in tokens; at least one text is long enough for each.
        suffix: tokens that must come out.
    """
    counts, hits = np.asarray(copies, dtype=np.int64), signals.hits()
    units = [len(h) for h in hits]
    groups = doublings(counts)
    by_prefix, by_copies, found = [], [], []
    slopes: dict[int, Estimate | None] = {}
    headline = prefixes[0]
    for k in sorted(prefixes):
        out = continued(hits, spans(units, begun, k, suffix))
        long = ~np.isnan(out)
        by_prefix.append(Row(k, 1, None, proportion(out[long])))
        by_copies += [
            Row(k, least, most, proportion(out[long & (counts >= least) & (counts <= most)]))
            for least, most in groups
        ]
        slopes[k] = slope(counts[long], out[long])
        p_z = drawn(signals, spans(units, begun, k, suffix))[long]
        for n in SAMPLES:
            for p in CHANCES:
                share = proportion([extractable(z, n, p) for z in p_z])
                if share is not None:
                    found.append(Discoverable(k, n, p, share))
        if 2 * long.sum() >= len(hits):
            headline = k
    strengths = [extraction_strength(h.astype(int), np.ones(len(h), int)) for h in hits]
    return Extractable(
        suffix, headline, tuple(by_prefix), tuple(by_copies), slopes, tuple(found),
        mean(strengths, (0.0, 1.0)),
    )  # fmt: skip


def continued(hits: Sequence[Any], where: Sequence[slice]) -> Array:
    """1 for every text whose tokens there are all predicted right, 0 for others, shape (n,).

    NaN where the slice is empty.
    """
    out = np.full(len(hits), np.nan)
    for i, (row, span) in enumerate(zip(hits, where, strict=True)):
        if span.stop:
            right = np.asarray(row[span], dtype=np.int64)
            out[i] = continuation_matches(right, np.ones_like(right))
    return out


def drawn(signals: Signals, where: Sequence[slice]) -> Array:
    """Probability that one sample is the text there, shape (n,); NaN where the slice is empty."""
    rows = signals.rows(signals.logprob)
    return np.array([
        extraction_probability(np.minimum(row[span], 0.0)) if span.stop else np.nan
        for row, span in zip(rows, where, strict=True)
    ])  # fmt: skip


def doublings(copies: Counts) -> list[tuple[int, int]]:
    """Groups of copies that are not empty, (least, most): 1, 2, 3 to 4, 5 to 8, and so on.

    >>> doublings(np.array([1, 2, 3, 9]))
    [(1, 1), (2, 2), (3, 4), (9, 16)]
    """
    steps = sorted({int(m - 1).bit_length() for m in copies.tolist()})
    return [((1 << step) // 2 + 1, 1 << step) if step else (1, 1) for step in steps]


def slope(copies: Any, extracted: Any) -> Estimate | None:
    """What each doubling of the copies adds to the extractable share.

    The least-squares slope of extracted (0 or 1) over log2 of the copies. It is a weighted sum of
    the shares at each number of copies, sum_m n_m (x_m - mean x) p_m / sum_i (x_i - mean x)^2, and
    its interval combines their exact intervals as :func:`difference_interval` does two of them
    (MOVER; Zou and Donner, 2008): it holds where shares are 0 or 1.

    Args:
        copies: shape (n,), at least 1.
        extracted: 0 or 1, shape (n,).

    Returns:
        The slope per doubling; None if all copies are equally many.
    """
    x, y = np.log2(np.asarray(copies, dtype=np.float64)), np.asarray(extracted, dtype=np.float64)
    if x.size == 0 or np.ptp(x) == 0.0:
        return None
    squares = float(((x - x.mean()) ** 2).sum())
    value = below = above = 0.0
    for at in np.unique(x):
        group = y[x == at]
        weight = group.size * float(at - x.mean()) / squares
        low, high = clopper_pearson(int(group.sum()), group.size)
        ends = sorted((weight * low, weight * high))
        part = weight * float(group.mean())
        value += part
        below += (part - ends[0]) ** 2
        above += (ends[1] - part) ** 2
    return Estimate(value, value - math.sqrt(below), value + math.sqrt(above), int(x.size))


def proportion(flags: Any) -> Estimate | None:
    """A share of independent cases with its exact interval; None of none."""
    found = np.asarray(flags, dtype=np.float64)
    if found.size == 0:
        return None
    low, high = clopper_pearson(int(found.sum()), found.size)
    return Estimate(float(found.mean()), low, high, int(found.size))


def mean(values: Any, bounds: tuple[float, float] | None = None) -> Estimate:
    """A mean with its interval."""
    found = np.asarray(values, dtype=np.float64)
    low, high = mean_interval(found, bounds=bounds)
    return Estimate(float(found.mean()), low, high, int(found.size))
