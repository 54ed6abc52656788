"""How much of a text a model still carries: token agreement and text overlap.

*Exact memorization* (Tirumala et al., 2022, arXiv:2205.10770) is the share of tokens the model
predicts correctly under teacher forcing. *Extraction strength* (Carlini et al., 2021,
arXiv:2012.07805, in the form of Dorna et al., 2025, arXiv:2506.12618) is the share of the text that
follows the shortest prefix from which greedy decoding reproduces the rest; because every later
prefix is then the true one, one teacher-forced pass answers it. *ROUGE-L* (Lin, 2004) is the
longest common subsequence of words of two texts.

Sequences hold the answer tokens only: whether the closing end-of-text token counts is the caller's
decision, and published numbers leave it out.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from unlearn.errors import BadInput
from unlearn.evaluations import porter


class Rouge(NamedTuple):
    """Overlap of two texts: of the hypothesis, of the reference, and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def extraction_strength(predicted: Any, labels: Any) -> float:
    """Share of the sequence that greedy decoding reproduces from its shortest sufficient prefix.

    1 - k/T, where k is the smallest start from which every prediction up to the end is right; 0
    when not even the last token is. (Some published code returns 1/T there, which makes a wrong
    answer of one token count as fully extracted.)

    Args:
        predicted: Most likely token at each position under teacher forcing, integers of shape (T,).
        labels: True tokens, integers of shape (T,).

    Returns:
        A share in [0, 1]; higher means more of the text comes out.

    Raises:
        BadInput: Empty sequences, different lengths, or not integers of one dimension.

    >>> extraction_strength([7, 2, 3, 4], [1, 2, 3, 4])
    0.75
    >>> extraction_strength([1, 2, 3, 9], [1, 2, 3, 4])
    0.0
    """
    hits = _hits(predicted, labels)
    wrong = np.flatnonzero(~hits)
    start = int(wrong[-1]) + 1 if wrong.size else 0
    return (hits.size - start) / hits.size


def exact_memorization(predicted: Any, labels: Any) -> float:
    """Share of tokens predicted correctly under teacher forcing.

    Args:
        predicted: Most likely token at each position, integers of shape (T,).
        labels: True tokens, integers of shape (T,).

    Returns:
        A share in [0, 1]; higher means more is remembered.

    Raises:
        BadInput: Empty sequences, different lengths, or not integers of one dimension.

    >>> exact_memorization([1, 2, 3, 9], [1, 2, 3, 4])
    0.75
    """
    return float(_hits(predicted, labels).mean())


def rouge_l(reference: str, hypothesis: str, stemmer: bool = True) -> Rouge:
    """ROUGE-L of two texts, word for word as the rouge-score package computes it.

    Texts are lowercased, everything but a-z and 0-9 separates words, and with ``stemmer`` words
    longer than three letters are reduced to their Porter stem. Letters outside a-z separate words
    too, so the score means little for languages written with them.

    Args:
        reference: The true text.
        hypothesis: The generated text.
        stemmer: Compare stems rather than words.

    Returns:
        Precision (share of the hypothesis), recall (share of the reference) and F1, all 0 when no
        word is shared.

    >>> rouge_l("The cat sat on the mat.", "the cats sat")
    Rouge(precision=1.0, recall=0.5, f1=0.6666666666666666)
    """
    target, words = _words(reference, stemmer), _words(hypothesis, stemmer)
    shared = _common_subsequence(target, words)
    if not shared:
        return Rouge(0.0, 0.0, 0.0)
    precision, recall = shared / len(words), shared / len(target)
    return Rouge(precision, recall, 2.0 * precision * recall / (precision + recall))


def _hits(predicted: Any, labels: Any) -> npt.NDArray[np.bool_]:
    """Where the prediction is right, shape (T,)."""
    sequences = []
    for name, tokens in (("predicted", predicted), ("labels", labels)):
        array = np.asarray(tokens.detach().cpu() if hasattr(tokens, "detach") else tokens)
        if array.ndim != 1 or array.size == 0:
            raise BadInput(
                f"{name} must be one nonempty sequence of tokens, got shape {array.shape}."
            )
        if not np.issubdtype(array.dtype, np.integer):
            raise BadInput(f"{name} must hold integer token ids, got {array.dtype}.")
        sequences.append(array)
    first, second = sequences
    if first.shape != second.shape:
        raise BadInput(f"predicted has {first.size} tokens but labels has {second.size}.")
    hits: npt.NDArray[np.bool_] = first == second
    return hits


def _words(text: str, stemmer: bool) -> list[str]:
    """Words of a text as ROUGE counts them."""
    words: list[str] = re.findall("[a-z0-9]+", text.lower())
    return [porter.stem(word) if len(word) > 3 else word for word in words] if stemmer else words


def _common_subsequence(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel (Hyyrö, 2004): a zero bit marks a word of ``first`` at which the best length grows,
    so one pass over ``second`` with integers of len(first) bits does all rows of the usual table.
    """
    places: dict[str, int] = {}
    for position, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << position
    full = (1 << len(first)) - 1
    open_ = full
    for word in second:
        match = open_ & places.get(word, 0)
        open_ = ((open_ + match) | (open_ - match)) & full
    return len(first) - open_.bit_count()
