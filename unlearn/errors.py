"""What can go wrong, sorted by what the user can do about it.

Every message is one or more plain sentences: what was wrong, where, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnlearnError(Exception):
    """Base of everything this package raises on purpose; printed without a traceback."""

    exit_code = 1


class BadInput(UnlearnError, ValueError):
    """A file, flag or value cannot be used as it is: change the input."""

    exit_code = 2


class MissingNeed(BadInput):
    """A method needs something the request does not have: add it, or choose another method."""


class Unsupported(UnlearnError, ValueError):
    """This model or setting is outside what the method can do: choose another."""

    exit_code = 2


class Collapsed(UnlearnError, RuntimeError):
    """Training destroyed the model (non-finite or exploding loss): use gentler settings."""


def sentence(error: BaseException) -> str:
    """What was wrong, as a sentence of its own.

    >>> sentence(BadInput("the file is empty: give records"))
    'The file is empty: give records.'
    """
    words = str(error).strip().rstrip(".")
    return f"{words[:1].upper()}{words[1:]}."


class Faults:
    """Collects everything wrong with an input, so that the user hears it all at once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Note one fault."""
        self.messages.append(message)

    def check(self, kind: type[BadInput] = BadInput) -> None:
        """Raise ``kind`` with every fault noted so far, if there is any."""
        if self.messages:
            raise kind("\n".join(self.messages))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A closing clause that names the nearest known word, or lists them all.

    >>> did_you_mean("np", ["npo", "ssd"])
    'did you mean npo?'
    """
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"known are: {', '.join(known)}"
