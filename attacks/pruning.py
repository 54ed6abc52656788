"""Pruning: does dropping the smallest weights bring back what small updates hid?

In every layer the share of weights that are smallest in absolute value is set to zero, at once and
without data (Han et al. 2015, arXiv 1506.02626), as pipelines that make models smaller do. Weights
stand for what a model knows and small changes for what hides it: pruning revived abilities that
fine-tuning had only wrapped (Jain et al. 2023, arXiv 2311.12786). The same layers are pruned as
are rounded by quantisation: all linear and convolution layers but the output layer.

A search tries several shares, and the one with the most hits counts, in every model alike.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from torch import Tensor, nn

from unlearn.attacks.interface import Array, Ground, Inapplicable, Search
from unlearn.attacks.quantization import matrices
from unlearn.attacks.signals import collect, hit_rates
from unlearn.attacks.weights import strongest
from unlearn.errors import BadInput
from unlearn.run import Run
from unlearn.tasks.base import Task

SHARES = (0.3, 0.5)


def pruned(weight: Tensor, share: float) -> Tensor:
    """The weight without its ``floor(share n)`` smallest of n values; of equal ones the first go.

    >>> import torch
    >>> pruned(torch.tensor([[3.0, -1.0], [2.0, -4.0]]), 0.5)
    tensor([[ 3.,  0.],
            [ 0., -4.]])
    """
    if not 0 <= share <= 1:
        raise BadInput(f"the share of weights to prune must be from 0 to 1, not {share}")
    flat = weight.detach().flatten()
    # the smallest share of 10 weights is 3 at 0.3, though 0.3 * 10 may fall short of it
    smallest = flat.abs().argsort(stable=True)[: int(share * len(flat) + 1e-9)]
    return flat.index_fill(0, smallest, 0.0).view(weight.shape)


def prune(model: nn.Module, task: Task, share: float) -> int:
    """Prune every layer of a model in place.

    Returns:
        The number of weights in the pruned layers, those that were kept among them.
    """
    count = 0
    for rows in matrices(model, task):
        rows.copy_(pruned(rows, share))
        count += rows.numel()
    return count


def after_pruning(model: nn.Module, ground: Ground, run: Run) -> Array:
    """Share of argmax hits of each forget record while weights are pruned, shape (n,).

    Cost: a copy of the weights on the CPU and a forward pass for each of ``SHARES``.

    Raises:
        Inapplicable: no layer to prune.
    """

    def left(share: float) -> Array:
        if not prune(model, run.task, share):
            name = type(model).__name__
            raise Inapplicable(f"{name} has no layer to prune but its output layer")
        return hit_rates(collect(model, ground.forget, run, b"", f"prune {share:.0%}"))

    return strongest(model, [partial(left, share) for share in SHARES], np.mean, "pruning")


SEARCHES = (
    Search(
        name="pruning",
        title="Smallest weights set to zero: what is still answered rightly",
        unit="share of argmax hits",
        source="Han et al. 2015, arXiv 1506.02626; Jain et al. 2023, arXiv 2311.12786",
        score=after_pruning,
        tasks=("causal_lm", "classification"),
    ),
)
