"""Gradient surgery: what it does to vectors, and to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from unlearn import registry
from unlearn.data import load
from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Records, Request, Subject
from unlearn.run import Run
from unlearn.surgery import Surgery, freed
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification

# products of smaller ones are zero
floats = st.floats(-100, 100).filter(lambda x: x == 0 or abs(x) > 1e-100)
numbers = st.lists(floats, min_size=3, max_size=3).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)


@given(numbers, numbers)
def test_what_is_left_never_raises_the_held_loss(g_u: Tensor, g_r: Tensor) -> None:
    left = freed(g_u, g_r)
    assert float(left @ g_r) >= -1e-9
    assert float(left.norm()) <= float(g_u.norm()) * (1 + 1e-12)
    if float(g_u @ g_r) >= 0:
        assert torch.equal(left, g_u)


def test_by_hand() -> None:
    g_u, g_r = torch.tensor([-3.0, 4.0]).double(), torch.tensor([2.0, 0.0]).double()
    assert freed(g_u, g_r).tolist() == [0.0, 4.0]
    # cos = -3/5; g_u - cos g_r / |g_r| = (-3 + 0.6, 4): the conflict is hardly touched
    assert torch.allclose(freed(g_u, g_r, "as_published"), torch.tensor([-2.4, 4.0]).double())
    unit = g_u / 5
    assert torch.allclose(freed(unit, g_r, "as_published"), freed(unit, g_r))
    assert torch.equal(freed(g_u, -g_r), g_u)
    assert torch.equal(freed(g_u, 0 * g_r), g_u)
    assert torch.equal(freed(g_u, g_r, "none"), g_u)


@pytest.mark.parametrize(("adds", "joined"), [(True, [2.0, 4.0]), (False, [0.0, 4.0])])
def test_what_a_step_follows(adds: bool, joined: list[float]) -> None:
    three = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    three[0].grad, three[2].grad = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
    g_u = torch.tensor([-3.0, 4.0])
    Surgery("projection", adds).operate(three, [g_u, g_u, None])
    assert three[0].grad is not None
    assert three[0].grad.tolist() == joined
    assert three[1].grad is g_u  # nothing held: nothing to conflict with
    assert (three[2].grad is not None) == adds


class World:
    """Records to forget that look like those to keep, and a network that learned them all."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        labels = torch.arange(90) % 3
        centres = torch.tensor([[0.0, 0, 0, 0], [1.5, 0.5, 0, 0], [0, 2, 1, 0]])
        x = centres[labels] + torch.randn(90, 4, generator=draw)
        task = Classification(3)
        gone = torch.arange(90) < 30
        self.forget = Encoded(load((x[gone], labels[gone]), "forget"), task)
        self.retain = Encoded(load((x[~gone], labels[~gone]), "retain"), task)
        self.task = task
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
        optimizer = torch.optim.Adam(self.net.parameters(), 0.02)
        for _ in range(20):  # not to the end: there, what lowers one raises the other
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(x), labels).backward()
            optimizer.step()
        self.weights = {k: v.clone() for k, v in self.net.state_dict().items()}

    def loss(self, examples: Encoded) -> float:
        with torch.no_grad():
            return float(self.task.nll(self.net, examples.batch(range(len(examples)))).mean())

    def unlearn(self, name: str, run: Run | None = None, **settings: Any) -> dict[str, Tensor]:
        self.net.load_state_dict(self.weights)
        method = registry.build(name, {"epochs": 6, "batch_size": 15, "lr": 0.02,
                                       "optimizer": "sgd", **settings})  # fmt: skip
        request = Request(Records(30), self.forget, self.retain)
        method.unlearn(Subject(self.net), request, run or Run(self.task))
        return {k: v.clone() for k, v in self.net.state_dict().items()}


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize("name", ["npo", "grad_diff"])
def test_the_retain_set_loses_less(world: World, name: str) -> None:
    world.net.load_state_dict(world.weights)
    before = world.loss(world.forget)
    lost, gained = {}, {}
    for rule in ("none", "projection"):
        world.unlearn(name, surgery=rule, lr=0.05, epochs=12, retain_weight=1)
        lost[rule], gained[rule] = world.loss(world.retain), world.loss(world.forget) - before
    assert gained["projection"] > 0.1
    assert lost["projection"] < lost["none"] - 0.01


def test_a_step_is_the_freed_gradient_plus_the_held_one(world: World) -> None:
    """One plain step, against gradients taken by hand."""
    lr, whole = 0.01, {"epochs": 1, "batch_size": 60, "max_grad_norm": 1e9, "weight_decay": 0}
    world.net.load_state_dict(world.weights)
    sides = []
    for examples, sign in ((world.forget, -1), (world.retain, 1)):
        loss = sign * world.task.nll(world.net, examples.batch(range(len(examples)))).mean()
        sides.append(torch.autograd.grad(loss, list(world.net.parameters())))
    joined = [freed(g_u, g_r) + g_r for g_u, g_r in zip(*sides, strict=True)]
    assert any(float((g_u * g_r).sum()) < 0 for g_u, g_r in zip(*sides, strict=True))
    after = world.unlearn("grad_diff", surgery="projection", lr=lr, **whole)
    for (name, start), gradient in zip(world.weights.items(), joined, strict=True):
        # the first Nesterov step is 1.9 times the gradient
        assert torch.allclose(after[name], start - 1.9 * lr * gradient, atol=1e-6)


def test_micro_batches_do_not_matter(world: World) -> None:
    one, other = (
        world.unlearn("npo", surgery="projection", micro_batch_size=size) for size in (15, 4)
    )
    assert all(torch.allclose(one[k], other[k], atol=1e-5) for k in one)


@pytest.mark.parametrize("scope", ["head", "0.weight@3", "saliency:0.3"])
def test_within_a_scope(world: World, scope: str) -> None:
    plain, operated = (
        world.unlearn("grad_diff", surgery=rule, scope=scope) for rule in ("none", "projection")
    )
    moved = {k for k in plain if not torch.equal(plain[k], world.weights[k])}
    assert moved == {k for k in plain if not torch.equal(operated[k], world.weights[k])}
    assert any(not torch.equal(plain[k], operated[k]) for k in plain)


def test_a_killed_run_goes_on(world: World, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Killer:
        def advance(self, phase: str, done: int, total: int, numbers: Any) -> None:
            if phase == "unlearn" and done == 8:
                raise Killed

        def say(self, sentence: str) -> None: ...

    whole = world.unlearn("grad_diff", surgery="projection")
    run = Run(world.task, work=tmp_path, save_every=0, progress=Killer())
    with pytest.raises(Killed):
        world.unlearn("grad_diff", run, surgery="projection")
    resumed = world.unlearn(
        "grad_diff", Run(world.task, work=tmp_path, save_every=0), surgery="projection"
    )
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_it_needs_two_sides_and_whole_gradients(world: World) -> None:
    with pytest.raises(BadInput, match="one of them only"):
        world.unlearn("npo", surgery="projection", retention="none")
    with pytest.raises(Unsupported, match="without FSDP"):
        world.unlearn("npo", Run(world.task, sharded=True), surgery="projection")
