"""EraseDiff: erasing as a constraint, and what its multiplier does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unlearn
from tests import digits
from unlearn.data import load
from unlearn.interface import Classes, Request, Subject
from unlearn.methods.erase_diff import EraseDiff, multiplier
from unlearn.pipeline import Pipeline
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.diffusion import task_of

SETTINGS: dict[str, Any] = {"lr": 1e-3, "epochs": 4, "batch_size": 16}


def test_the_multiplier_by_hand() -> None:
    assert multiplier("constant", 0.1, 9.0, 9.0, 9.0, 9.0) == 0.1
    assert multiplier("cosine", 0.1, 9.0, -2.0, 1.0, 4.0) == pytest.approx(0.6)
    assert multiplier("cosine", 0.1, 9.0, 2.0, 1.0, 4.0) == 0
    assert multiplier("barrier", 0.5, 3.0, -1.0, 9.0, 2.0) == pytest.approx(2.5 / 4)
    assert multiplier("barrier", 0.5, 0.0, 1.0, 9.0, 2.0) == 0  # low enough already
    assert multiplier("barrier", 0.5, 3.0, 0.0, 1.0, 0.0) == 0
    assert multiplier("cosine", 0.5, 3.0, 0.0, 0.0, 1.0) == 0


def test_a_step_lowers_the_constraint_as_fast_as_it_asks() -> None:
    """<grad L_r + lambda grad f, grad f> = eta q wherever lambda is above 0."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        keeps, erases = torch.randn(2, 5, generator=draw, dtype=torch.float64)
        inner = float(keeps @ erases)
        found = multiplier("barrier", 0.7, 2.0, inner, float(keeps.norm()), float(erases.norm()))
        descent = float((keeps + found * erases) @ erases)
        assert descent == pytest.approx(1.4) if found > 0 else descent >= 1.4


class World:
    """An untrained pipeline with sets, and the one term of a method."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model: Pipeline = digits.untrained().eval()
        task = task_of(self.model)
        rows = digits.records(60)
        self.forget = Encoded(load([r for r in rows if r["label"] == 3], "forget"), task)
        self.retain = Encoded(load([r for r in rows if r["label"] != 3], "retain"), task)
        self.run = Run(task)

    def losses(self, method: EraseDiff) -> Tensor:
        request = Request(Classes((3,), ("3",)), self.forget, self.retain)
        (term,) = method.terms(Subject(self.model), request, self.run)
        assert term.forward is not None
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found: Tensor = term.forward(self.model, term.examples.batch([0, 1, 2, 3]))
        return found


def _gradient(world: World, method: EraseDiff) -> Tensor:
    moving = list(world.model.parameters())
    found = torch.autograd.grad(world.losses(method).mean(), moving, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("toward", ["label", "noise"])
def test_the_inner_steps_leave_the_weights_alone(toward: Any) -> None:
    world = World()
    before = {k: v.clone() for k, v in world.model.state_dict().items()}
    world.losses(EraseDiff(toward=toward, weighting="barrier", inner_steps=3))
    assert all(torch.equal(v, before[k]) for k, v in world.model.state_dict().items())


def test_the_inner_steps_reach_lower() -> None:
    found = []
    point = torch.nn.Parameter(torch.tensor([4.0]))
    for steps in (1, 2, 50):
        method = EraseDiff(inner_steps=steps, inner_lr=0.1)
        found.append(method._reached(lambda: point.square(), [point]))
    assert found[0] == pytest.approx((4 * 0.8) ** 2)
    assert found[1] == pytest.approx((4 * 0.64) ** 2)
    assert found[2] < 1e-6
    assert point.item() == 4


def test_inner_steps_decide_with_the_barrier_alone() -> None:
    """With a constant lambda or the cosine they would add a constant to the loss."""
    world = World()

    def between(weighting: Any) -> float:
        one, other = (
            _gradient(world, EraseDiff(weighting=weighting, eta=1.5, inner_steps=k, inner_lr=0.05))
            for k in (1, 4)
        )
        return float((one - other).norm() / one.norm())

    assert between("constant") == 0
    assert between("cosine") == 0
    assert between("barrier") > 1e-3


def test_lambda_is_the_one_of_the_formula() -> None:
    world = World()
    erases = _gradient(world, EraseDiff(weighting="constant", eta=1.0)) - _gradient(
        world, EraseDiff(weighting="constant", eta=1e-12)
    )
    keeps = _gradient(world, EraseDiff(weighting="constant", eta=1e-12))
    total = _gradient(world, EraseDiff(weighting="cosine", eta=2.0))
    expected = 2.0 - torch.cosine_similarity(keeps, erases, dim=0)
    torch.testing.assert_close(total, keeps + expected * erases, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weighting", ["barrier", "constant"])
def test_a_class_goes_and_the_others_stay(
    digits_pipeline: Path, digits_judge: digits.Judge, weighting: str
) -> None:
    done = unlearn.forget(
        digits_pipeline, method="erase_diff", data=digits.records(500), forget_classes="3",
        audit="none", set={**SETTINGS, "weighting": weighting},
    )  # fmt: skip
    model: Any = done.subject.model
    shown = [digits.hits(model, digits_judge, c, 24, guidance=2.0, steps=8) for c in range(10)]
    assert shown.pop(3) <= 0.1
    assert sum(shown) / 9 >= 0.9


def test_toward_noise(digits_pipeline: Path, digits_judge: digits.Judge) -> None:
    done = unlearn.forget(
        digits_pipeline, method="erase_diff", data=digits.records(500), forget_classes="3",
        audit="none", set={**SETTINGS, "toward": "noise", "weighting": "constant", "eta": 0.3},
    )  # fmt: skip
    model: Any = done.subject.model
    assert digits.hits(model, digits_judge, 3, 24, guidance=2.0, steps=8) <= 0.25
    assert digits.hits(model, digits_judge, 0, 24, guidance=2.0, steps=8) >= 0.9
