"""Selective amnesia: without data, from what the model draws itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unlearn
from tests import digits
from unlearn.data import load
from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Classes, Request, Subject
from unlearn.methods.selective_amnesia import SelectiveAmnesia, elastic
from unlearn.pipeline import Pipeline, read
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.diffusion import Diffusion, task_of

THREE = Classes((3,), ("3",))
QUICK: dict[str, Any] = {
    "images": 12, "times": 4, "sampling_steps": 6, "batch_size": 16, "lr": 1e-3,
}  # fmt: skip


@pytest.fixture
def model() -> Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return digits.untrained().eval()


def test_the_elastic_term_and_its_gradient() -> None:
    weights = {"a": torch.tensor([1.0, 2.0], requires_grad=True), "b": torch.tensor([5.0])}
    start = {"a": torch.tensor([0.0, 4.0]), "b": torch.tensor([5.0])}
    fisher = {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([7.0])}
    found = elastic(weights, start, fisher)
    assert float(found) == 3 * 1 + 0.5 * 4
    (gradient,) = torch.autograd.grad(found, weights["a"])
    assert gradient.tolist() == [6.0, -2.0]


def test_fisher_is_the_mean_of_squared_gradients_of_single_pictures(model: Pipeline) -> None:
    model.double()
    task = task_of(model)
    own = Encoded(load(digits.records(3), "own"), task)
    method = SelectiveAmnesia(times=6)
    found = method._fisher(model, own, Run(task))
    task.draws = 6
    named = dict(model.named_parameters())
    expected = {n: torch.zeros_like(p) for n, p in named.items()}
    for i in range(3):
        per_draw = [task.nll(model, one).sum() for one in task.singly(own.batch([i]))]
        gradients = [torch.autograd.grad(x, list(named.values()), allow_unused=True)
                     for x in per_draw]  # fmt: skip
        for place, name in enumerate(named):
            parts = [g[place] for g in gradients if g[place] is not None]
            if parts:  # the mean over the times comes before the square
                expected[name] += torch.stack(parts).sum(0).div(6).square() / 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-16)


def _terms(model: Pipeline, method: SelectiveAmnesia, request: Request) -> list[Any]:
    return method.terms(Subject(model), request, Run(task_of(model)))


def test_what_is_replayed_and_what_is_led_astray(model: Pipeline) -> None:
    method = SelectiveAmnesia(images=2, times=2, sampling_steps=1)
    replay, astray, stiff = _terms(model, method, Request(THREE))
    assert [replay.examples[i]["label"] for i in range(len(replay.examples))] == [
        c for c in range(10) if c != 3 for _ in range(2)
    ]
    assert [astray.examples[i]["label"] for i in range(2)] == [3, 3]
    assert (replay.weight, stiff.weight) == (1.0, 1000.0)
    batch = stiff.examples.batch([0])
    assert float(stiff.forward(model, batch)) == 0
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    assert float(stiff.forward(model, batch)) > 0


def test_noise_pictures_are_new_in_every_step_and_uniform(model: Pipeline) -> None:
    seen: list[Tensor] = []

    class Watched(Diffusion):
        def nll(self, model: Any, batch: Any) -> Tensor:
            seen.append(batch["pixel_values"])
            return super().nll(model, batch)

    task = task_of(model)
    method = SelectiveAmnesia(images=8, times=2, sampling_steps=1)
    run = Run(Watched(task.shape, task.classes))
    _, astray, _ = method.terms(Subject(model), Request(THREE), run)
    assert astray.forward is not None
    seen.clear()
    for _ in range(2):
        astray.forward(model, astray.examples.batch(range(8)))
    one, two = seen
    assert not torch.equal(one, two)
    assert float(one.min()) >= 0
    assert float(one.max()) <= 1
    assert float(one.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(one.var()) == pytest.approx(1 / 12, abs=0.02)


def test_an_anchor_gives_the_pictures(model: Pipeline) -> None:
    method = SelectiveAmnesia(images=2, times=2, sampling_steps=1)
    target = replace(THREE, anchor=5)
    _, astray, _ = _terms(model, method, Request(target))
    drawn = model.sample([5, 5], Run(task_of(model)).generator("anchor_pictures"), 1, 2.0)
    batch = astray.examples.batch([0, 1])
    torch.testing.assert_close(batch["pixel_values"], drawn)
    assert batch["labels"].flatten().tolist() == [3, 3]


def test_a_retain_set_is_replayed_instead(model: Pipeline) -> None:
    rows = [row for row in digits.records(20) if row["label"] != 3]
    retain = Encoded(load(rows, "retain"), task_of(model))
    method = SelectiveAmnesia(images=1, times=2, sampling_steps=1)
    replay, *_ = _terms(model, method, Request(THREE, None, retain))
    assert replay.examples is retain


def test_what_it_cannot_do(model: Pipeline) -> None:
    every = Classes(tuple(range(10)), tuple(map(str, range(10))))
    with pytest.raises(BadInput, match="nothing would be left"):
        _terms(model, SelectiveAmnesia(), Request(every))
    with pytest.raises(Unsupported, match="use another scope"):
        _terms(model, SelectiveAmnesia(scope="lora"), Request(THREE))


def test_a_class_goes_without_any_data(digits_pipeline: Path, digits_judge: digits.Judge) -> None:
    done = unlearn.forget(
        digits_pipeline, method="selective_amnesia", forget_classes="3", audit="none",
        set={**QUICK, "epochs": 8, "stiffness": 100},
    )  # fmt: skip
    model: Any = done.subject.model
    shown = [digits.hits(model, digits_judge, c, 24, guidance=2.0, steps=8) for c in range(10)]
    assert shown.pop(3) <= 0.25
    assert sum(shown) / 9 >= 0.9


def test_stiffness_holds_the_weights_that_matter(digits_pipeline: Path) -> None:
    start = dict(read(digits_pipeline, torch.float32).named_parameters())
    moved = []
    for stiffness in (0.0, 1e6):
        done = unlearn.forget(
            digits_pipeline, method="selective_amnesia", forget_classes="3", audit="none",
            set={**QUICK, "images": 4, "epochs": 4, "stiffness": stiffness},
        )  # fmt: skip
        named = dict(done.subject.model.named_parameters())
        moved.append(sum(float((named[n] - p).square().sum()) for n, p in start.items()))
    assert moved[1] < 0.8 * moved[0]
