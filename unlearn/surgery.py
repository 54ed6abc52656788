"""Gradient surgery: forgetting must not pull against what is held.

Per parameter tensor, where the gradient g_u of what must go and the gradient g_r of what is held
conflict, <g_u, g_r> < 0 (PCGrad, Yu et al. 2020, arXiv 2001.06782, eq. 1; DoCo, Wu et al. 2024,
arXiv 2405.15304, eq. 9):

    g_u <- g_u - <g_u, g_r> / ||g_r||^2 g_r

A step along -g_u then leaves the held loss where it is, to first order, and one along -(g_u + g_r)
lowers it. That is about plain gradient descent: an optimiser with momentum or a scale per weight
steps in another direction. DoCo's published code subtracts cos(g_u, g_r) g_r / ||g_r||, without
||g_u||: ``as_published``, which removes the conflict only where ||g_u|| = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Rule = Literal["none", "projection", "as_published"]


@dataclass(frozen=True)
class Surgery:
    """How one gradient is put together from that of what must go and that of what is held.

    Attributes:
        rule: what is done where they conflict.
        adds: the step also follows the held gradient; False: it only keeps out of its way.
    """

    rule: Rule
    adds: bool = True

    def operate(self, parameters: Sequence[nn.Parameter], forget: Sequence[Tensor | None]) -> None:
        """Replace the held gradients, which the parameters have now, by the joined ones."""
        for parameter, g_u in zip(parameters, forget, strict=True):
            g_r = parameter.grad
            if g_u is not None and g_r is not None:
                g_u = freed(g_u, g_r, self.rule)
                parameter.grad = g_u + g_r if self.adds else g_u
            elif g_u is not None or not self.adds:
                parameter.grad = g_u


def freed(g_u: Tensor, g_r: Tensor, rule: Rule = "projection") -> Tensor:
    """g_u without its conflict with g_r; unchanged where there is none.

    Args:
        g_u: gradient of what must go, of one tensor.
        g_r: gradient of what is held, same shape.
        rule: see the module.

    >>> freed(torch.tensor([-3.0, 4.0]), torch.tensor([2.0, 0.0]))
    tensor([0., 4.])
    """
    length = torch.linalg.vector_norm(g_r, dtype=torch.float64)
    if rule == "none" or not length > 0:
        return g_u
    along = g_r.double() / length
    share = (g_u.double() * along).sum()  # ||g_u|| cos
    if share >= 0:
        return g_u
    if rule == "as_published":
        share = share / torch.linalg.vector_norm(g_u, dtype=torch.float64)
    left: Tensor = g_u.double() - share * along
    return left.to(g_u.dtype)
