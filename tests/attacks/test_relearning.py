"""Relearning: what it measures, and that it leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from tests.plain import vectors, with_statistics
from unlearn import demo
from unlearn.attacks import relearning
from unlearn.attacks.interface import Ground
from unlearn.attacks.relearning import (
    HELD,
    SEARCHES,
    SHOWN,
    Relearned,
    recovered,
    relearn,
    split,
    steps_to,
    unrelated,
)
from unlearn.attacks.signals import collect
from unlearn.attacks.weights import put_back
from unlearn.data import load
from unlearn.errors import BadInput, Collapsed
from unlearn.interface import Subject
from unlearn.run import Run, Silent
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.tasks.classification import Classification
from unlearn.training import Term, Training, descend, likelihood

FORGOTTEN = 3
GENTLE = Training(lr=1e-2, batch_size=4, weight_decay=0.0)


def plain_sets() -> tuple[nn.Module, Encoded, Encoded, Encoded]:
    task = Classification(3)
    records = Encoded(load(vectors(30), "forget"), task)
    parts = (records.select(range(i, i + 10)) for i in (0, 10, 20))
    torch.manual_seed(0)
    return with_statistics(), *parts


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_area_by_hand() -> None:
    # over steps 0, 1, 4: trapezoids 1/2 + 3, 0 + 3/2, 1 + 3, each out of 4
    hits = [[0.0, 0.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]
    assert recovered(hits, [0, 1, 4]) == pytest.approx([3.5 / 4, 1.5 / 4, 1.0])


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=6))
def test_area_is_a_share_between_the_extremes_of_the_curve(hits: list[list[float]]) -> None:
    area = recovered(hits, np.arange(len(hits)) ** 2)
    assert np.all(area <= np.max(hits, axis=0) + 1e-12)
    assert np.all(area >= np.min(hits, axis=0) - 1e-12)


@pytest.mark.parametrize(
    ("hits", "steps"), [([[0.5]], [0]), ([[0.5], [1.0]], [0]), ([0.5, 1.0], [0, 1])]
)
def test_a_curve_needs_two_measurements(hits: list, steps: list) -> None:
    with pytest.raises(BadInput, match="recovery curve"):
        recovered(hits, steps)


def test_relearn_time() -> None:
    curve, steps = [0.1, 0.5, 0.4, 0.9], [0, 2, 4, 8]
    assert steps_to(curve, steps, 0.1) == 0
    assert steps_to(curve, steps, 0.5) == 2
    assert steps_to(curve, steps, 0.6) == 8
    assert steps_to(curve, steps, 0.95) is None


@given(st.integers(2, 1500), st.integers(0, 10))
def test_split_parts_are_disjoint_and_repeatable(n: int, seed: int) -> None:
    shown, held = split(n, seed)
    assert not set(shown) & set(held)
    assert set(shown) | set(held) <= set(range(n))
    assert len(shown) == min(n // 2, SHOWN)
    assert len(held) == min(n - n // 2, HELD)
    assert split(n, seed) == (shown, held)
    few, same = split(n, seed, shown=4)
    assert same == held
    assert len(few) == min(n // 2, 4)


def test_split_needs_two_records_and_some_to_show() -> None:
    with pytest.raises(BadInput, match="must not be 0"):
        split(50, 0, 0)
    with pytest.raises(BadInput, match="there is 1"):
        split(1, 0)


@pytest.mark.parametrize("steps", [(), (0,), (0, 2, 1), (1, 1), (-1, 2)])
def test_steps_must_ascend(steps: tuple[int, ...]) -> None:
    model, shown, held, retain = plain_sets()
    with pytest.raises(BadInput, match="ascend"):
        relearn(model, shown, held, retain, Run(shown.task), GENTLE, steps)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 32])
def test_values_are_those_of_training_for_so_many_steps(batch_size: int) -> None:
    model, shown, held, retain = plain_sets()
    way, run = replace(GENTLE, batch_size=batch_size), Run(shown.task, seed=5)
    found = relearn(model, shown, held, retain, run, way, (0, 3, 7))
    for steps, hits, loss in zip(found.steps, found.hits, found.loss, strict=True):
        copied = copy.deepcopy(model).eval()
        if steps:
            terms = [Term(name, part, likelihood, "unit")
                     for name, part in (("shown", shown), ("retain", retain))]  # fmt: skip
            passes = replace(way, epochs=1).steps(len(shown))
            # the same schedule walked up to this step
            short = replace(way, epochs=(int(steps) - 0.5) / passes)
            descend(Subject(copied), terms, short, Run(run.task, run.seed_of("relearn")))
        signals = collect(copied, held, run, b"k", "measure")
        assert loss == pytest.approx(signals.loss(), abs=1e-6)
        assert hits.tolist() == [float(row.mean()) for row in signals.hits()]


def test_nothing_remains_in_the_model_or_on_disk(tmp_path: Path) -> None:
    model, shown, held, retain = plain_sets()
    model.train()
    model[0].eval()
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    before, modes = everything(model), [m.training for m in model.modules()]
    relearn(model, shown, held, retain, Run(shown.task, work=tmp_path), steps=(0, 4))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model[0].parameters()] == [False, True]
    assert torch.equal(model[3].weight.grad, torch.ones_like(model[3].weight))
    assert model[3].bias.grad is None
    assert not list(tmp_path.iterdir())


class Impatient(Silent):
    """Interrupts after two steps."""

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        if done == 2:
            raise KeyboardInterrupt


def test_weights_are_back_after_an_interruption_and_after_a_collapse() -> None:
    model, shown, held, retain = plain_sets()
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        relearn(model, shown, held, retain, Run(shown.task, progress=Impatient()), GENTLE)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(Collapsed, match="every way"):
        relearn(model, shown, held, retain, Run(shown.task), replace(GENTLE, lr=1e30))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_same_seed_gives_the_same_curve_whatever_was_drawn_before() -> None:
    model, shown, held, retain = plain_sets()

    def curve(seed: int) -> Relearned:
        return relearn(model, shown, held, retain, Run(shown.task, seed), GENTLE, (0, 2, 5))

    first = curve(2)
    torch.rand(7)
    again, other = curve(2), curve(3)
    assert np.array_equal(first.loss, again.loss)
    assert not np.array_equal(first.loss, other.loss)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


@pytest.fixture(scope="module")
def digits() -> dict[str, Encoded]:
    data = load_digits()
    rows = [{"features": (x / 16).astype(np.float32), "label": int(y)}
            for x, y in zip(data.data, data.target, strict=True)]  # fmt: skip
    gone = [row for row in rows if row["label"] == FORGOTTEN]
    rest = [row for row in rows if row["label"] != FORGOTTEN]
    task = Classification(10)
    return {
        "all": Encoded(load(rows, "retain"), task),
        "forget": Encoded(load(gone, "forget"), task),
        "retain": Encoded(load(rest, "retain"), task),
    }


def trained(examples: Encoded, seed: int) -> nn.Module:
    settings = Training(lr=2e-3, epochs=20, batch_size=64, micro_batch_size=64)
    terms = [Term("train", examples, likelihood, "unit")]
    return descend(Subject(network(seed)), terms, settings, Run(examples.task, seed)).model


def refitted(model: nn.Module, examples: Encoded) -> nn.Module:
    """The last layer alone starts anew and never sees the forgotten class."""
    model = copy.deepcopy(model)
    torch.manual_seed(9)
    model[4].reset_parameters()
    settings = Training(lr=2e-3, epochs=6, batch_size=64, micro_batch_size=64, scope="head")
    terms = [Term("train", examples, likelihood, "unit")]
    return descend(Subject(model), terms, settings, Run(examples.task)).model


def test_a_class_hidden_in_the_last_layer_returns_before_one_never_learnt(
    digits: dict[str, Encoded],
) -> None:
    shown, held = split(len(digits["forget"]), 0, shown=4)
    original = trained(digits["all"], 0)
    silenced = copy.deepcopy(original)
    with torch.no_grad():
        silenced[4].weight[FORGOTTEN] = 0.0
        silenced[4].bias[FORGOTTEN] = -30.0

    def area(model: nn.Module) -> float:
        found = relearn(model, digits["forget"].select(shown), digits["forget"].select(held),
                        digits["retain"], Run(digits["all"].task))  # fmt: skip
        return float(recovered(found.hits, found.steps).mean())

    never = [area(trained(digits["retain"], seed)) for seed in (1, 2)]
    null = abs(never[0] - never[1])
    assert area(original) > 0.99
    assert area(refitted(original, digits["retain"])) > max(never) + null
    assert area(silenced) > max(never)


def test_a_model_that_knows_answers_before_one_that_has_to_learn() -> None:
    world = demo.people(seed=5, forget=2, retain=4, holdout=1)
    subject = demo.tiny_llama([*world.forget, *world.retain], width=32, depth=2)
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    fresh = copy.deepcopy(subject)
    knows = demo.train(subject, [*world.forget, *world.retain], epochs=60).model
    never = demo.train(fresh, world.retain, epochs=60).model
    forget, retain = (Encoded(load(r, n), task)
                      for r, n in ((world.forget, "forget"), (world.retain, "retain")))  # fmt: skip
    shown, held = split(len(forget), 0)

    def curve(model: nn.Module) -> Relearned:
        parts = forget.select(shown), forget.select(held)
        return relearn(model, *parts, retain, Run(task), steps=(0, 2, 4, 8))

    ground = Ground(forget, retain.sample(8, seed=0))
    one, other = (unrelated(model, ground, Run(task)) for model in (knows, never))
    assert one.shape == other.shape == (len(forget),)
    assert one.mean() > other.mean() + 0.2  # nobody taught it, and it is still there
    known, learnt = curve(knows), curve(never)
    assert known.hits.shape == known.loss.shape == (4, len(held))
    assert recovered(known.hits, known.steps).mean() > recovered(learnt.hits, learnt.steps).mean()
    assert learnt.loss[-1].mean() < learnt.loss[0].mean()  # the attack does teach
    assert learnt.loss[-1].mean() > known.loss[0].mean()


def test_unrelated_records_alone_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forget, _, retain = plain_sets()
    monkeypatch.setattr(relearning, "SGD", (replace(GENTLE, optimizer="sgd"),))
    before = everything(model)
    found = SEARCHES[0].score(model, Ground(forget, retain), Run(forget.task, seed=5))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    hits = []
    for steps in relearning.STEPS:
        copied = copy.deepcopy(model).eval()
        if steps:
            way = replace(GENTLE, optimizer="sgd")
            way = replace(way, epochs=(steps - 0.5) / replace(way, epochs=1).steps(len(retain)))
            run = Run(forget.task, Run(forget.task, seed=5).seed_of("relearn"))
            descend(Subject(copied), [Term("retain", retain, likelihood, "unit")], way, run)
        signals = collect(copied, forget, Run(forget.task), b"k", "measure")
        hits.append([float(row.mean()) for row in signals.hits()])
    assert found == pytest.approx(recovered(hits, relearning.STEPS))
    with pytest.raises(BadInput, match="--retain"):
        SEARCHES[0].score(model, Ground(forget), Run(forget.task))


def test_put_back_puts_back_whatever_is_raised() -> None:
    model = with_statistics().train()
    before = everything(model)

    def spoil() -> None:
        with put_back(model), torch.no_grad():
            for value in model.eval().state_dict().values():
                value.fill_(7)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        spoil()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
