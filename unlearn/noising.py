"""Noising and its inverse, for every kind of prediction (Ho et al. 2020; Salimans & Ho 2022).

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,      sigma_t = sqrt((1 - abar_t) / abar_t)
    v   = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0

``abar`` is the cumulative product of 1 - beta, gathered at integer times. All functions take one
value of ``abar`` per row and broadcast it over the rest of the shape.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["epsilon", "v_prediction", "sample"]


def noised(x_0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """x_t from data and noise of the same shape (rows, ...), ``abar`` of shape (rows,)."""
    signal, noise = _shares(abar, x_0)
    return signal * x_0 + noise * eps


def to_eps(predicted: Tensor, x_t: Tensor, abar: Tensor, kind: Kind) -> Tensor:
    """The noise that a prediction of this kind stands for."""
    signal, noise = _shares(abar, x_t)
    if kind == "epsilon":
        return predicted
    if kind == "v_prediction":
        return signal * predicted + noise * x_t
    return (x_t - signal * predicted) / noise


def to_x0(predicted: Tensor, x_t: Tensor, abar: Tensor, kind: Kind) -> Tensor:
    """The data that a prediction of this kind stands for."""
    signal, noise = _shares(abar, x_t)
    if kind == "sample":
        return predicted
    if kind == "v_prediction":
        return signal * x_t - noise * predicted
    return (x_t - noise * predicted) / signal


def from_eps(eps: Tensor, x_t: Tensor, abar: Tensor, kind: Kind) -> Tensor:
    """What a network of this kind would have to predict for this noise."""
    signal, noise = _shares(abar, x_t)
    if kind == "epsilon":
        return eps
    x_0 = (x_t - noise * eps) / signal
    return x_0 if kind == "sample" else signal * eps - noise * x_0


def target(x_0: Tensor, eps: Tensor, abar: Tensor, kind: Kind) -> Tensor:
    """What a network of this kind is trained to predict."""
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x_0
    signal, noise = _shares(abar, x_0)
    return signal * eps - noise * x_0


def time_of(sigma: float, abars: Tensor) -> int:
    """The time whose noise level is nearest to ``sigma``, by its logarithm.

    Args:
        sigma: sqrt((1 - abar) / abar), above 0.
        abars: of all times, shape (T,).
    """
    levels = ((1 - abars) / abars).clamp_min(1e-20).log() / 2
    return int((levels - torch.tensor(float(sigma)).log()).abs().argmin())


def _shares(abar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(abar) and sqrt(1 - abar), rounded afterwards: half precision has no 1 - abar near 0."""
    wide = abar.double().view(-1, *[1] * (like.ndim - 1))
    return wide.sqrt().to(like), (1 - wide).sqrt().to(like)
