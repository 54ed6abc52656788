"""Porter's suffix stripper, the stemmer inside ROUGE.

M. F. Porter, *An algorithm for suffix stripping*, Program 14(3), 1980. Five steps strip or replace
one suffix each; a rule fires if the stem before the suffix is long enough, where length is the
measure m: the number of vowel-consonant alternations. Of the rules whose suffix fits, only the
longest is tried.

Published ROUGE scores use NLTK's variant, so its documented departures from the paper are followed
(marked "extension"): irregular words, four-letter -ies and -ied, y after any consonant, -bli,
-alli, -fulli and -logi, and two-letter stems that end in vowel-consonant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache


def _rules(pairs: str) -> list[tuple[str, str]]:
    """Read "from:to" pairs; order matters, since only the first suffix that fits is tried."""
    rules = [pair.partition(":") for pair in pairs.split()]
    return [(suffix, replacement) for suffix, _, replacement in rules]


IRREGULAR = dict(  # extension
    _rules(
        "skies:sky sky:sky dying:die lying:lie tying:tie news:news innings:inning inning:inning "
        "outings:outing outing:outing cannings:canning canning:canning howe:howe proceed:proceed "
        "exceed:exceed succeed:succeed"
    )
)
STEP_2 = _rules(
    "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble entli:ent eli:e ousli:ous "
    "ization:ize ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous aliti:al "
    "iviti:ive biliti:ble fulli:ful"
)
STEP_3 = _rules("icate:ic ative: alize:al iciti:ic ical:ic ful: ness:")
STEP_4 = _rules("al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize")


def _shape(word: str) -> str:
    """One letter per letter of the word, v for vowel and c for consonant.

    >>> _shape("syzygy")
    'cvcvcv'
    """
    kinds = ""
    for letter in word:
        kinds += "v" if letter in "aeiou" or (letter == "y" and kinds[-1:] == "c") else "c"
    return kinds


def _measure(stem: str) -> int:
    """Porter's m: how often a vowel is followed by a consonant."""
    return _shape(stem).count("vc")


def _ends_double(word: str) -> bool:
    """Whether the word ends in the same consonant twice."""
    return len(word) > 1 and word[-1] == word[-2] and _shape(word)[-1] == "c"


def _ends_short(word: str) -> bool:
    """Whether the word ends consonant-vowel-consonant, the last not w, x or y (Porter's *o)."""
    shape = _shape(word)
    return shape == "vc" or (shape.endswith("cvc") and word[-1] not in "wxy")  # vc: extension


def _replace(word: str, rules: list[tuple[str, str]], fits: Callable[[str, str], bool]) -> str:
    """Apply the first rule whose suffix the word has, provided the stem and suffix fit."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            stem = word[: len(word) - len(suffix)]
            return stem + replacement if fits(stem, suffix) else word
    return word


def _plural_and_past(word: str) -> str:
    """Steps 1a to 1c: plurals, -ed and -ing, final y."""
    if word.endswith("ies"):
        word = word[:-1] if len(word) == 4 else word[:-2]  # extension: dies -> die
    elif word.endswith("sses"):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]

    if word.endswith("ied"):
        word = word[:-1] if len(word) == 4 else word[:-2]  # extension: died -> die
    elif word.endswith("eed"):
        word = word[:-1] if _measure(word[:-3]) > 0 else word
    else:
        for suffix in ("ed", "ing"):
            stem = word.removesuffix(suffix)
            if stem != word and "v" in _shape(stem):
                word = _restore(stem)
                break

    if word.endswith("y") and len(word) > 2 and _shape(word[:-1])[-1] == "c":  # extension
        word = word[:-1] + "i"
    return word


def _restore(stem: str) -> str:
    """Mend a stem that lost -ed or -ing: conflat(ed) -> conflate, hopp(ing) -> hop."""
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if _ends_double(stem):
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _ends_short(stem) else stem


def _derived(word: str) -> str:
    """Step 2: -ational, -ization, -fulness and their like become shorter suffixes."""
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        word = word[:-2]  # extension: the shortened word goes through this step again
    if word.endswith("logi"):
        return word[:-1] if _measure(word[:-3]) > 0 else word  # extension
    return _replace(word, STEP_2, lambda stem, _: _measure(stem) > 0)


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Stem of an English word.

    Args:
        word: A lowercase word.

    Returns:
        The stem, not necessarily a word itself; words of one or two letters are returned unchanged.

    >>> [stem(word) for word in ("relational", "hopping", "ponies", "sky", "authorship")]
    ['relat', 'hop', 'poni', 'sky', 'authorship']
    """
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = _derived(_plural_and_past(word))
    word = _replace(word, STEP_3, lambda stem, _: _measure(stem) > 0)
    word = _replace(
        word,
        STEP_4,
        lambda stem, suffix: _measure(stem) > 1 and (suffix != "ion" or stem[-1] in "st"),
    )
    if word.endswith("e"):
        rest = word[:-1]
        if _measure(rest) > 1 or (_measure(rest) == 1 and not _ends_short(rest)):
            word = rest
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
