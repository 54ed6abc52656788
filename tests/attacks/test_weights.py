"""Weights come back after every way of an attack, and the strongest way counts."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from unlearn.attacks.weights import strongest
from unlearn.errors import Collapsed


def test_every_way_starts_from_the_same_weights_and_the_strongest_counts() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    seen = []

    def way(size: float) -> float:
        seen.append(model.weight.detach().clone())
        with torch.no_grad():
            model.weight.fill_(size)
        return size

    ways = [lambda size=size: way(size) for size in (1.0, 3.0, 2.0)]
    assert strongest(model, ways, lambda found: found, "trying") == 3.0
    assert strongest(model, ways, lambda found: -found, "trying") == 1.0
    assert all(torch.equal(weights, before) for weights in [*seen, model.weight])


def test_a_way_that_collapsed_is_left_out_and_its_memory_is_free() -> None:
    class Large:
        """Stands for what a training holds."""

    held: list[weakref.ref[Large]] = []

    def collapses() -> str:
        large = Large()
        held.append(weakref.ref(large))
        raise Collapsed("the loss is not finite")

    def works() -> str:
        gc.collect()
        assert held[0]() is None
        return "found"

    assert strongest(nn.Linear(1, 1), [collapses, works], len, "trying") == "found"
    with pytest.raises(Collapsed, match=r"trying failed in every way .* the loss is not finite"):
        strongest(nn.Linear(1, 1), [collapses, collapses], len, "trying")
