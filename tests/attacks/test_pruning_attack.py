"""Pruning as an attack: how much goes, and that it comes back."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.plain import vectors, with_statistics
from unlearn.attacks.interface import Ground, Inapplicable
from unlearn.attacks.pruning import SEARCHES, SHARES, prune, pruned
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.run import Run, Silent
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification

TASK = Classification(3)


def records(size: int = 12) -> Encoded:
    return Encoded(load(vectors(size), "forget"), TASK)


def test_by_hand() -> None:
    weight = torch.tensor([[0.5, -3.0, 0.1], [2.0, -0.2, 0.5]])
    wanted = torch.tensor([[0.0, -3.0, 0.0], [2.0, 0.0, 0.5]])  # of equal ones the first goes
    assert torch.equal(pruned(weight, 0.5), wanted)
    assert torch.equal(pruned(weight, 0.0), weight)
    assert not pruned(weight, 1.0).any()


@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 2**16))
def test_exactly_the_share_goes_and_it_is_the_smallest(n: int, share: float, seed: int) -> None:
    weight = torch.randint(1, 9, (1, n), generator=torch.Generator().manual_seed(seed)).float()
    left = pruned(weight, share)
    gone = left == 0
    assert int(gone.sum()) == int(share * n + 1e-9)
    assert torch.equal(left[~gone], weight[~gone])
    if gone.any() and not gone.all():
        assert weight[gone].max() <= weight[~gone].min()


@pytest.mark.parametrize(("n", "share", "count"), [(10, 0.3, 3), (10, 0.7, 7), (100, 0.29, 29)])
def test_rounding_does_not_lose_a_weight(n: int, share: float, count: int) -> None:
    assert int((pruned(torch.arange(1.0, n + 1)[None], share) == 0).sum()) == count


def test_every_layer_but_the_output_layer_is_pruned_by_itself() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3)
    )
    with torch.no_grad():
        model[0].weight *= 100  # of all weights together none of these would go
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert prune(model, TASK, 0.5) == 36 + 160
    zeros = {name: int((value == 0).sum()) for name, value in model.state_dict().items()}
    assert (zeros["0.weight"], zeros["2.weight"]) == (18, 80)
    rest = before.keys() - {"0.weight", "2.weight"}
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in rest)


def test_the_better_share_counts_and_the_model_is_as_it_was() -> None:
    torch.manual_seed(0)
    model, forget = with_statistics().train(), records()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = SEARCHES[0].score(model, Ground(forget), Run(TASK))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    means = []
    batch = forget.batch(range(12))
    for share in SHARES:
        model.load_state_dict(before)
        prune(model, TASK, share)
        with torch.no_grad():
            hits = model.eval()(batch["features"]).argmax(1) == batch["labels"][:, 0]
        means.append(hits.double().mean().item())
    assert found.shape == (12,)
    assert set(found) <= {0.0, 1.0}
    assert np.mean(found) == max(means)


class Impatient(Silent):
    """Interrupts the first forward pass."""

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        raise KeyboardInterrupt


def test_weights_are_back_after_an_interruption() -> None:
    model = with_statistics()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        SEARCHES[0].score(model, Ground(records()), Run(TASK, progress=Impatient()))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_cannot_be_pruned() -> None:
    with pytest.raises(BadInput, match="from 0 to 1"):
        pruned(torch.ones(1, 2), 1.5)
    with pytest.raises(Inapplicable, match="no layer to prune"):
        SEARCHES[0].score(nn.Sequential(nn.Linear(5, 3)), Ground(records()), Run(TASK))
