"""How well a series of requests went, each judged on what it was to forget and what must stay."""

from __future__ import annotations

from unlearn.errors import BadInput


def h_mean(drop: float, retained: float) -> float:
    """The harmonic mean of what was forgotten and what was kept: 2 drop retained / (sum of both).

    From GS-LoRA (Zhao et al. 2024, arXiv 2403.11530, sec. 5.1). ``drop`` is the accuracy on the
    forgotten classes before less that after, so the most it can be is what was known before.

    Args:
        drop: lost accuracy on what was to be forgotten, as a share or in percent.
        retained: accuracy afterwards on what was to stay, in the same unit, >= 0.

    Returns:
        In the same unit; 0 where nothing was forgotten (or more is known than before) or kept.

    Raises:
        BadInput: an accuracy below zero.

    >>> round(h_mean(74.65, 74.16), 2)
    74.4
    """
    if retained < 0:
        raise BadInput(f"the retained accuracy is {retained}: accuracies cannot be below zero")
    if drop <= 0 or retained == 0:
        return 0.0
    return 2 * drop * retained / (drop + retained)
