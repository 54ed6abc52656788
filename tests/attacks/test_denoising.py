"""Membership from denoising: closed forms, a perfect memoriser, and a network that over-fitted."""

import math
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from tests import digits, shapes
from unlearn.attacks.denoising import (
    SIGMA,
    WALK,
    denoising_scores,
    loss_scores,
    pia_scores,
    pian_scores,
    secmi_scores,
    walk,
)
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.evaluations.statistics import auc
from unlearn.noising import from_eps
from unlearn.pipeline import Pipeline
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.diffusion import Diffusion, task_of

NAMES = ("secmi", "pia", "pian")


class Known(Pipeline):
    """Data of a known distribution, and the best denoiser there is for it.

    Args:
        spread: standard deviation of independent Gaussian pixels around 0.
        seen: instead, these pictures (n, 1, 8, 8) with equal probability, and nothing else.
        scheduler: settings of the noise schedule.
    """

    def __init__(self, spread: float = 1.0, seen: Tensor | None = None, **scheduler: Any) -> None:
        inner = digits.untrained().double().pipeline
        inner.scheduler = diffusers.DDPMScheduler(**scheduler)
        super().__init__(inner)
        self.spread, self.seen = spread, seen

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        a = self.abars[t].view(-1, 1, 1, 1)
        if self.seen is None:
            x_0 = a.sqrt() * self.spread**2 * x_t / (a * self.spread**2 + 1 - a)
        else:
            near = -(x_t[:, None] - a[:, None].sqrt() * self.seen).square().flatten(2).sum(2)
            weight = (near / (2 * (1 - a.view(-1, 1)))).softmax(1)
            x_0 = torch.einsum("bn,nchw->bchw", weight, self.seen)
        return from_eps((x_t - a.sqrt() * x_0) / (1 - a).sqrt(), x_t, a.flatten(), self.kind)


def examples(rows: list[dict[str, Any]], model: Pipeline, draws: int = 4) -> Encoded:
    return Encoded(load(rows, "forget"), Diffusion(model.picture_shape, 10, draws=draws))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_scores_of_gaussian_data_are_those_worked_out_by_hand(kind: str) -> None:
    """For pixels of variance s^2 the best guess of the noise is x sqrt(1 - a) / (a s^2 + 1 - a)."""
    model, rows = Known(0.5, prediction_type=kind), digits.records(6)
    found = denoising_scores(model, examples(rows, model), Run(task_of(model)))
    x = 2 * np.stack([row["image"].double().numpy() for row in rows]) - 1
    a = model.abars.numpy()
    slope = np.sqrt(1 - a) / (a * 0.25 + 1 - a)
    path = walk(SIGMA, model.abars)

    def moved(here: int, there: int) -> float:
        guess = (1 - math.sqrt(1 - a[here]) * slope[here]) / math.sqrt(a[here])
        return math.sqrt(a[there]) * guess + math.sqrt(1 - a[there]) * slope[here]

    there = math.prod(moved(*step) for step in pairwise(path[:-1]))
    back = moved(path[-2], path[-1]) * moved(path[-1], path[-2]) - 1
    np.testing.assert_allclose(
        found["secmi"], -((there * back) ** 2) * (x**2).mean((1, 2, 3)), rtol=1e-6
    )
    t, start = path[-2], slope[0] * x
    unit = start * math.sqrt(2 / math.pi) / np.abs(start).mean((1, 2, 3), keepdims=True)
    for name, e in (("pia", start), ("pian", unit)):
        said = slope[t] * (math.sqrt(a[t]) * x + math.sqrt(1 - a[t]) * e)
        np.testing.assert_allclose(found[name], -((e - said) ** 4).mean((1, 2, 3)), rtol=1e-6)
    assert all(scores.dtype == np.float64 for scores in found.values())


def test_loss_is_the_negated_loss_of_the_task() -> None:
    model = digits.untrained()
    known, run = examples(digits.records(5), model), Run(task_of(model))
    with torch.no_grad():
        nll = known.task.nll(model.eval(), known.batch(range(5)))
    np.testing.assert_allclose(loss_scores(model, known, run), -nll.numpy(), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_each_score_can_be_had_alone(name: str) -> None:
    model = digits.untrained()
    known, run = examples(digits.records(3), model), Run(task_of(model))
    alone = {"secmi": secmi_scores, "pia": pia_scores, "pian": pian_scores}[name]
    every = denoising_scores(model, known, run, sigma=0.5)
    np.testing.assert_array_equal(alone(model, known, run, 0.5), every[name])


def test_batches_do_not_matter_and_conditions_do() -> None:
    model = digits.untrained()
    known, run = examples(digits.records(7), model), Run(task_of(model))
    others = examples([{**r, "label": (r["label"] + 1) % 10} for r in digits.records(7)], model)
    whole, cut = (denoising_scores(model, known, run, size=size) for size in (64, 3))
    told = denoising_scores(model, others, run)
    for name in NAMES:
        np.testing.assert_allclose(whole[name], cut[name], rtol=1e-3)
        assert np.abs(whole[name] / told[name] - 1).max() > 1e-2
    np.testing.assert_allclose(
        loss_scores(model, known, run), loss_scores(model, known, run, 3), rtol=1e-4
    )


def test_schedules_of_other_shapes_and_lengths_are_asked_at_the_same_noise() -> None:
    """With fine schedules the scores of the same data hardly differ."""
    fine = {"num_train_timesteps": 4000, "beta_end": 0.02 / 4, "beta_start": 1e-4 / 4}
    found = []
    for settings in (fine, {**fine, "beta_schedule": "squaredcos_cap_v2"}):
        model = Known(0.5, **settings)
        path = walk(SIGMA, model.abars)
        a = model.abars[path[1:]]
        wanted = [SIGMA * k / WALK for k in range(1, WALK + 2)]
        np.testing.assert_allclose(((1 - a) / a).sqrt(), wanted, rtol=0.06)
        found.append(
            denoising_scores(model, examples(digits.records(4), model), Run(task_of(model)))
        )
    np.testing.assert_allclose(found[0]["pia"], found[1]["pia"], rtol=0.3)
    np.testing.assert_allclose(found[0]["pian"], found[1]["pian"], rtol=0.1)
    np.testing.assert_allclose(found[0]["secmi"], found[1]["secmi"], rtol=0.3)


def test_a_coarse_schedule_is_walked_in_fewer_steps() -> None:
    abars = 1 / (1 + torch.tensor([0.01, 0.15, 0.3, 0.6]).double() ** 2)
    assert walk(0.3, abars) == [0, 1, 2, 3]
    assert walk(0.15, abars) == [0, 1, 2]


@pytest.mark.parametrize("sigma", [-1.0, 0.0, 0.01, 0.5, math.nan])
def test_noise_that_is_not_in_the_schedule_is_refused(sigma: float) -> None:
    abars = 1 / (1 + torch.tensor([0.01, 0.15, 0.3, 0.6]).double() ** 2)
    with pytest.raises(BadInput, match=r"between 0\.01 and 0\.3"):
        walk(sigma, abars)


def test_a_perfect_memoriser_is_seen_through_by_every_score() -> None:
    rows = digits.records(120)
    seen = torch.stack([2 * row["image"].double() - 1 for row in rows[:40]])
    model = Known(seen=seen, beta_schedule="squaredcos_cap_v2")
    members, others = examples(rows[:40], model), examples(rows[40:], model)
    run = Run(task_of(model))
    inside, outside = (denoising_scores(model, some, run) for some in (members, others))
    for name in NAMES:
        assert auc(inside[name], outside[name]) > 0.95, name
    assert auc(loss_scores(model, members, run), loss_scores(model, others, run)) > 0.98


@pytest.fixture(scope="session")
def overfitted() -> Pipeline:
    """A network that saw the first 64 digits again and again."""
    return digits.trained(300, torch.arange(1437) < 64)


def test_an_overfitted_network_gives_its_records_away(overfitted: Pipeline) -> None:
    rows = digits.records(192)
    for model, leaks in ((overfitted, True), (digits.untrained(), False)):
        members, others = (examples(some, model, 16) for some in (rows[:64], rows[64:]))
        run = Run(task_of(model))
        for scores in (loss_scores, pia_scores):
            found = auc(scores(model, members, run), scores(model, others, run))
            assert found > 0.9 if leaks else 0.35 < found < 0.65


def test_latents_are_attacked_under_their_captions() -> None:
    model = shapes.pipeline()
    task, rows = task_of(model), shapes.records(4)
    other = [{**row, "text": "a blue plus"} for row in rows]
    told, untold = (
        denoising_scores(model, Encoded(load(some, "forget"), task), Run(task), ("pia",))["pia"]
        for some in (rows, other)
    )
    assert told.shape == (4,)
    assert np.isfinite(told).all()
    assert (told != untold).all()


def test_an_unknown_score_is_refused() -> None:
    model = digits.untrained()
    known, run = examples(digits.records(1), model), Run(task_of(model))
    with pytest.raises(BadInput, match="secmi, pia, pian"):
        denoising_scores(model, known, run, ("gradnorm",))
