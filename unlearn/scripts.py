"""Words of any script: runs without white space, and single characters where a script has none."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from itertools import groupby

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


@lru_cache(maxsize=1 << 16)
def unspaced(character: str) -> bool:
    """Whether a character is of a script without spaces, such as Chinese or Thai.

    >>> [unspaced(character) for character in "A\u4eac\u03b1"]
    [False, True, False]
    """
    return unicodedata.name(character, "").startswith(UNSPACED)


def words(text: str) -> list[str]:
    """The words of a text, in order, as they are written.

    >>> words("Ada  lives in \u5317\u4eac.")
    ['Ada', 'lives', 'in', '\u5317', '\u4eac', '.']
    """
    if text.isascii():
        return text.split()
    found = []
    for part in text.split():
        if part.isascii():
            found.append(part)
            continue
        runs = ((alone, "".join(run)) for alone, run in groupby(part, unspaced))
        for alone, run in runs:
            found += run if alone else [run]
    return found
