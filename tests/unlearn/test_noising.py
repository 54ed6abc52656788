"""Noising and its inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unlearn.noising import Kind, from_eps, noised, target, time_of, to_eps, to_x0

KINDS: tuple[Kind, ...] = ("epsilon", "v_prediction", "sample")
LEVELS = st.floats(0.01, 0.99)
SEEDS = st.integers(0, 10_000)


def _pair(seed: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x_0, eps = torch.randn(2, rows, 2, 4, 4, generator=draw, dtype=torch.float64)
    return x_0, eps


def test_by_hand() -> None:
    x_0, eps = torch.tensor([[3.0]]), torch.tensor([[-1.0]])
    abar = torch.tensor([0.64])
    x_t = noised(x_0, eps, abar)
    assert x_t.item() == pytest.approx(0.8 * 3 - 0.6)
    assert target(x_0, eps, abar, "v_prediction").item() == pytest.approx(-0.8 - 0.6 * 3)
    assert target(x_0, eps, abar, "epsilon") is eps
    assert target(x_0, eps, abar, "sample") is x_0


@given(SEEDS, LEVELS, st.sampled_from(KINDS))
def test_what_a_network_is_trained_on_stands_for_its_noise_and_data(
    seed: int, level: float, kind: Kind
) -> None:
    x_0, eps = _pair(seed)
    abar = torch.full((3,), level, dtype=torch.float64)
    x_t = noised(x_0, eps, abar)
    aim = target(x_0, eps, abar, kind)
    torch.testing.assert_close(to_eps(aim, x_t, abar, kind), eps)
    torch.testing.assert_close(to_x0(aim, x_t, abar, kind), x_0)


@given(SEEDS, LEVELS, st.sampled_from(KINDS))
def test_there_and_back(seed: int, level: float, kind: Kind) -> None:
    """For any prediction, not only a right one."""
    x_t, predicted = _pair(seed)
    abar = torch.full((3,), level, dtype=torch.float64)
    eps = to_eps(predicted, x_t, abar, kind)
    torch.testing.assert_close(from_eps(eps, x_t, abar, kind), predicted)
    torch.testing.assert_close(noised(to_x0(predicted, x_t, abar, kind), eps, abar), x_t)


@given(SEEDS, LEVELS)
def test_errors_of_the_three_kinds_differ_by_known_factors(seed: int, level: float) -> None:
    """|eps - eps'|^2 : |x - x'|^2 : |v - v'|^2 = abar : 1 - abar : 1 for one predicted noise."""
    x_0, eps = _pair(seed)
    abar = torch.full((3,), level, dtype=torch.float64)
    x_t, guess = noised(x_0, eps, abar), eps + 0.1 * x_0

    def error(kind: Kind) -> torch.Tensor:
        said = from_eps(guess, x_t, abar, kind)
        return (said - target(x_0, eps, abar, kind)).square().mean()

    torch.testing.assert_close(error("epsilon"), level * error("v_prediction"))
    torch.testing.assert_close(error("sample"), (1 - level) * error("v_prediction"))


def test_every_row_has_its_own_level() -> None:
    x_0, eps = _pair(0)
    abar = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    whole = noised(x_0, eps, abar)
    for i in range(3):
        torch.testing.assert_close(whole[i : i + 1], noised(x_0[i:], eps[i:], abar[i:])[:1])


@given(st.integers(0, 99))
def test_the_time_of_a_noise_level(t: int) -> None:
    abars = torch.linspace(0.999, 0.001, 100, dtype=torch.float64)
    sigma = float(((1 - abars[t]) / abars[t]).sqrt())
    assert time_of(sigma, abars) == t
    assert time_of(sigma * 1.0001, abars) == t
