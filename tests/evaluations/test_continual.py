"""One number for a request in a series: published values, and what every mean promises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn.errors import BadInput
from unlearn.evaluations.continual import h_mean

PERCENT = st.floats(0.01, 100)


@pytest.mark.parametrize(
    ("drop", "retained", "wanted"), [(74.65, 74.16, 74.40), (73.80, 73.16, 73.48)]
)
def test_published_values(drop, retained, wanted):
    """GS-LoRA and GS-LoRA++ on faces, table 3: all of the forgotten classes' accuracy is lost."""
    assert round(h_mean(drop, retained), 2) == wanted


@given(PERCENT, PERCENT)
def test_it_lies_between_both_and_does_not_care_which_is_which(drop, retained):
    value = h_mean(drop, retained)
    assert min(drop, retained) * (1 - 1e-12) <= value <= max(drop, retained) * (1 + 1e-12)
    assert value == pytest.approx(h_mean(retained, drop), rel=1e-12)
    assert value == pytest.approx(100 * h_mean(drop / 100, retained / 100), rel=1e-9)


@pytest.mark.parametrize(("drop", "retained"), [(0, 70), (-5, 70), (0, 0), (70, 0)])
def test_nothing_forgotten_or_nothing_kept_is_worth_nothing(drop, retained):
    assert h_mean(drop, retained) == 0


def test_no_accuracy_is_negative():
    with pytest.raises(BadInput, match="below zero"):
        h_mean(50, -1)
