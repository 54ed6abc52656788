"""SISS: one noisy picture stands for two, and a single picture is unlearned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unlearn
from tests import digits
from unlearn import registry
from unlearn.data import load
from unlearn.errors import MissingNeed
from unlearn.interface import Records, Request, Subject
from unlearn.methods.siss import SISS, log_density_ratio, mixture_weights, parts
from unlearn.noising import noised
from unlearn.pipeline import Pipeline, read
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.diffusion import task_of

ODD = torch.zeros(1, 8, 8)
ODD[:, ::2, ::2] = ODD[:, 1::2, 1::2] = 1.0  # a chequerboard among the eights


def test_weights_by_hand() -> None:
    ratio = torch.tensor([0.0, 3.0]).double()
    keeps, goes = mixture_weights(ratio, 0.25)
    r = ratio.exp()
    torch.testing.assert_close(keeps, 1 / (0.75 + 0.25 * r))
    torch.testing.assert_close(goes, r / (0.75 + 0.25 * r))
    torch.testing.assert_close(0.75 * keeps + 0.25 * goes, torch.ones(2).double())


def test_weights_stay_bounded_where_densities_do_not_overlap() -> None:
    ratio = torch.tensor([-torch.inf, -1e4, 1e4, torch.inf]).double()
    keeps, goes = mixture_weights(ratio, 0.2)
    torch.testing.assert_close(keeps, torch.tensor([1.25, 1.25, 0, 0]).double())
    torch.testing.assert_close(goes, torch.tensor([0, 0, 5.0, 5.0]).double())


def test_the_ratio_is_that_of_two_gaussians() -> None:
    draw = torch.Generator().manual_seed(0)
    x_t, x, a = torch.randn(3, 5, 2, 3, generator=draw, dtype=torch.float64)
    abar = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)

    def log_density(origin: Tensor) -> Tensor:
        around = torch.distributions.Normal(
            abar.sqrt().view(-1, 1, 1) * origin, (1 - abar).sqrt().view(-1, 1, 1)
        )
        return around.log_prob(x_t).sum((1, 2))

    expected = log_density(a) - log_density(x)
    torch.testing.assert_close(log_density_ratio(x_t, x, a, abar), expected)


@pytest.mark.parametrize("mixture", [0.2, 0.5])
def test_both_parts_are_unbiased(mixture: float) -> None:
    """In the mean over x_t they are the losses on x and on a, noised each for itself."""
    count, abar = 400_000, 0.4
    draw = torch.Generator().manual_seed(1)
    x, a = torch.tensor([0.3, -0.2]).double(), torch.tensor([-0.4, 0.5]).double()
    level = torch.full((count,), abar, dtype=torch.float64)

    def network(x_t: Tensor) -> Tensor:
        return (x_t * 0.7 + 0.1).tanh()

    def separate(origin: Tensor) -> Tensor:
        eps = torch.randn(count, 2, generator=draw, dtype=torch.float64)
        x_t = noised(origin.expand(count, 2), eps, level)
        return (network(x_t) - eps).square().mean(1)

    chosen = torch.rand(count, generator=draw) < mixture
    origin = torch.where(chosen[:, None], a, x)
    eps = torch.randn(count, 2, generator=draw, dtype=torch.float64)
    x_t = noised(origin, eps, level)
    pair = x.expand(count, 2), a.expand(count, 2)
    ratio = log_density_ratio(x_t, *pair, level)
    found = parts(network(x_t), x_t, *pair, level, ratio, mixture)
    for part, origin in zip(found, (x, a), strict=True):
        expected = separate(origin)
        error = ((part.var() + expected.var()) / count).sqrt()
        assert abs(part.mean() - expected.mean()) < 4 * error
        assert error < 0.005  # so that a wrong weight shows


class World:
    """A pipeline that learned the odd picture, and the sets of the request."""

    def __init__(self, model: Pipeline) -> None:
        self.model = model
        self.weights = {k: v.clone() for k, v in model.state_dict().items()}
        self.task = task_of(model)
        self.forget = [{"image": ODD, "label": 8}]
        self.retain = digits.records(200)

    def fresh(self) -> Pipeline:
        self.model.load_state_dict(self.weights)
        return self.model.eval()

    def losses(self) -> tuple[float, float]:
        """Of the odd picture and of others, over many draws."""
        self.task.draws = 16
        sets = [load(self.forget, "forget"), load(self.retain, "retain")]
        with torch.no_grad():
            forget, retain = (Encoded(examples, self.task) for examples in sets)
            found = [(forget, range(1)), (retain, range(100))]
            one, other = (self.task.nll(self.model, e.batch(list(r))) for e, r in found)
        self.task.draws = 4
        return float(one.mean()), float(other.mean())


@pytest.fixture(scope="module")
def world(digits_pipeline: Path) -> World:
    model = read(digits_pipeline, torch.float32).train()
    x, y = (part[:400] for part in digits.pictures())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(100):
            chosen = torch.randint(400, (48,))
            pictures, labels = x[chosen], y[chosen]
            pictures[:6], labels[:6] = ODD, 8
            t, eps = torch.randint(1000, (48,)), torch.randn(48, 1, 8, 8)
            x_t = noised(2 * pictures - 1, eps, model.abars[t])
            loss = (model(x_t, t, labels) - eps).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return World(model)


def test_one_picture_goes_and_the_others_stay(world: World) -> None:
    model = world.fresh()
    learned, others = world.losses()
    unlearn.forget(
        model, method="siss", forget=world.forget, retain=world.retain, audit="none",
        set={"lr": 3e-4, "epochs": 3, "batch_size": 16},
    )  # fmt: skip
    gone, kept = world.losses()
    assert gone > learned + 0.2
    assert kept < others + 0.02


def _forward(world: World, **settings: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The losses of one batch, with the gradients of what keeps and of what goes."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(SISS):
        def _parts(self, *given: Any) -> tuple[Tensor, Tensor]:
            seen.append(super()._parts(*given))
            return seen[-1]

    model, run = world.fresh(), Run(world.task)
    sets = [Encoded(load(r, n), world.task)
            for r, n in ((world.forget, "forget"), (world.retain, "retain"))]  # fmt: skip
    method = Watched(**settings)
    (term,) = method.terms(Subject(model), Request(Records(1), *sets), run)
    assert term.forward is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        losses = term.forward(model, sets[1].batch(list(range(16))))
    moving = list(model.parameters())
    keeps, goes = (torch.autograd.grad(x.mean(), moving, retain_graph=True, allow_unused=True)
                   for x in seen[0])  # fmt: skip
    total = torch.autograd.grad(losses.mean(), moving, allow_unused=True)
    flat = [torch.cat([g.flatten() for g in gs if g is not None]) for gs in (keeps, goes, total)]
    return flat[0], flat[1], flat[2]


@pytest.mark.parametrize(("scaling_norm", "share"), [(0.03, None), (None, 0.1)])
def test_the_gradient_that_forgets_has_its_norm(
    world: World, scaling_norm: float | None, share: float | None
) -> None:
    keeps, goes, total = _forward(world, scaling_norm=scaling_norm)
    removed = keeps - total
    wanted = scaling_norm or share * keeps.norm()
    torch.testing.assert_close(removed.norm(), torch.as_tensor(wanted), rtol=1e-3, atol=1e-6)
    assert torch.cosine_similarity(removed, goes, dim=0) > 0.999


def test_pictures_told_something_else_share_no_noisy_picture(world: World) -> None:
    """All retained ones have other labels: a part is its whole bound, or nothing."""
    others = [row for row in world.retain if row["label"] != 8]
    retain = Encoded(load(others, "retain"), world.task)
    forget = Encoded(load(world.forget, "forget"), world.task)
    model = world.fresh()
    with torch.no_grad():
        keeps, goes = SISS(mixture=0.25)._parts(
            model, model, world.task, retain.batch(list(range(32))), forget.batch([0] * 32)
        )
    assert bool(((keeps == 0) != (goes == 0)).all())
    assert 0 < int((goes > 0).sum()) < 32


def test_it_forgets_records_alone_and_needs_others() -> None:
    assert registry.build("siss", {}).needs.targets == ("records",)
    with pytest.raises(MissingNeed, match="siss needs a retain set"):
        unlearn.forget(digits.untrained(), method="siss", forget=digits.records(2), audit="none")
    with pytest.raises(MissingNeed, match="siss forgets records, not classes"):
        unlearn.forget(
            digits.untrained(), method="siss", data=digits.records(20), forget_classes="3",
            audit="none",
        )  # fmt: skip


def test_same_seed_same_bits(world: World) -> None:
    found = []
    for _ in range(2):
        result = unlearn.forget(
            world.fresh(), method="siss", forget=world.forget, retain=world.retain[:32],
            audit="none", set={"epochs": 1, "batch_size": 16},
        )  # fmt: skip
        found.append({k: v.clone() for k, v in result.subject.model.state_dict().items()})
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
