"""Methods that ask for losses alone, on a diffusion model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unlearn
from tests import digits, shapes
from unlearn import registry
from unlearn.data import load
from unlearn.importance import squared_gradients
from unlearn.interface import ALL_TASKS, Classes, Request, Subject
from unlearn.methods.ssd import SSD
from unlearn.pipeline import Pipeline, read
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.diffusion import task_of

ADAM: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.0, "batch_size": 16}
ERASE: dict[str, dict[str, Any]] = {  # settings that erase a class of the digits
    "grad_diff": {**ADAM, "lr": 5e-4, "epochs": 3, "retain_weight": 2},
    "npo": {**ADAM, "lr": 1e-3, "epochs": 10, "beta": 2, "retain_weight": 2},
    "simnpo": {**ADAM, "lr": 1e-3, "epochs": 6, "beta": 2, "forget_weight": 1.0},
    "random_label": {**ADAM, "lr": 1e-3, "epochs": 5},
    "salun": {**ADAM, "lr": 1e-3, "epochs": 5},
    "amnesiac": {**ADAM, "lr": 1e-3, "epochs": 2},
    "neg_grad_plus": {**ADAM, "lr": 5e-4, "epochs": 1, "alpha": 0.7},
    "ssd": {},
}
FAMILY = (*ERASE, "gradient_ascent", "finetune", "retrain", "task_vector", "iau")


def shown(model: Any, judge: digits.Judge) -> list[float]:
    """Share of right pictures of every class, with guidance."""
    return [digits.hits(model, judge, c, 24, guidance=2.0, steps=8) for c in range(10)]


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_says_that_it_works_on_diffusion_models(name: str) -> None:
    assert registry.build(name, {}).needs.tasks == ALL_TASKS


@pytest.mark.parametrize(("name", "records", "left"), [
    ("salun", 600, 0.1), ("npo", 600, 0.1), ("ssd", 300, 0.2), ("amnesiac", 300, 0.2),
    ("random_label", 600, 0.2), ("neg_grad_plus", 300, 0.2),
])  # fmt: skip
def test_a_class_goes_and_the_others_stay(
    digits_pipeline: Path, digits_judge: digits.Judge, name: str, records: int, left: float
) -> None:
    done = unlearn.forget(
        digits_pipeline, method=name, data=digits.records(records), forget_classes="3",
        audit="none", set=ERASE[name],
    )  # fmt: skip
    found = shown(done.subject.model, digits_judge)
    assert found.pop(3) <= left
    assert sum(found) / 9 >= 0.9


def _losses(model: Any, records: list[dict[str, Any]]) -> float:
    task = task_of(model)
    examples = Encoded(load(records, "forget"), task)
    with torch.no_grad():
        return float(task.nll(model, examples.batch(range(len(examples)))).mean())


@pytest.mark.parametrize(("name", "settings"), [
    ("gradient_ascent", {**ADAM, "lr": 2e-4, "epochs": 3}),
    ("grad_diff", ERASE["grad_diff"]),
    ("simnpo", ERASE["simnpo"]),
    ("task_vector", {**ADAM, "lr": 3e-4, "epochs": 8, "alpha": 2.0}),
    ("iau", {"lr": 0.2}),
])  # fmt: skip
def test_the_loss_of_what_goes_rises_more(
    digits_pipeline: Path, name: str, settings: dict[str, Any]
) -> None:
    rows = digits.records(200)
    sets = [[r for r in rows if (r["label"] == 3) is forgets] for forgets in (True, False)]
    model: Any = read(digits_pipeline, torch.float32)
    before = [_losses(model, part) for part in sets]
    unlearn.forget(model, method=name, data=rows, forget_classes="3", audit="none", set=settings)
    forgot, lost = (_losses(model, part) - b for part, b in zip(sets, before, strict=True))
    assert forgot > 0.01
    assert forgot > lost


def test_finetuning_and_retraining_learn_what_is_left(digits_pipeline: Path) -> None:
    rows = digits.records(200)
    kept = [row for row in rows if row["label"] != 3]
    request: dict[str, Any] = {"data": rows, "forget_classes": "3", "audit": "none"}
    settings = {**ADAM, "lr": 2e-3, "epochs": 3}
    tuned = unlearn.forget(digits_pipeline, method="finetune", set=settings, **request)
    again = unlearn.forget(digits_pipeline, method="retrain", set=settings, **request)
    one, two = tuned.subject.model, again.subject.model
    assert _losses(one, kept) < 0.3
    assert 0.3 < _losses(two, kept) < 0.9  # it began anew, and learns
    assert again.outcome.fingerprint_out != tuned.outcome.fingerprint_out


def test_salun_never_keeps_the_true_label(digits_pipeline: Path) -> None:
    """With it, the true noise would be the aim: the picture itself would be learned."""
    model = read(digits_pipeline, torch.float32)
    task = task_of(model)
    rows = [row for row in digits.records(200) if row["label"] == 3]
    forget = Encoded(load(rows, "forget"), task)
    method = registry.build("salun", {"retention": "none"})
    (term,) = method.terms(Subject(model), Request(Classes((3,), ("3",)), forget), Run(task))  # type: ignore[attr-defined]
    told = [int(term.examples[i]["instead_labels"]) for i in range(len(rows))]
    assert 3 not in told
    assert len(set(told)) > 3


# Exact importances on denoisers


def by_hand(
    model: Pipeline, examples: Encoded, wanted: dict[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    """Squared gradients of every draw of every example, added up one at a time."""
    task: Any = examples.task
    found = {n: torch.zeros_like(p) for n, p in wanted.items()}
    for i in range(len(examples)):
        for one in task.singly(examples.batch([i])):
            loss = task.nll(model, one).sum()
            gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            for name, g in zip(wanted, gradients, strict=True):
                if g is not None:
                    found[name] += g.square()
    return found


def _double(model: Pipeline) -> Pipeline:
    return model.to(torch.float64).eval()


def _compare(model: Pipeline, examples: Encoded) -> None:
    task: Any = examples.task
    wanted = dict(model.named_parameters())
    found = {n: torch.zeros_like(p) for n, p in wanted.items()}
    for one in task.singly(examples.batch(range(len(examples)))):
        for name, value in squared_gradients(
            model,
            lambda one=one: task.nll(model, one),
            wanted,  # type: ignore[misc]
        ).items():
            found[name] += value
    expected = by_hand(model, examples, wanted)
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-12 * largest)


@pytest.mark.parametrize("labels", [[3, 1, 3], [0, 1, 2, 3]])
def test_squares_of_a_class_conditional_unet(labels: list[int]) -> None:
    """Labels that happen to count upwards are no positions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _double(digits.untrained())
    rows = [{**row, "label": c} for row, c in zip(digits.records(4), labels, strict=False)]
    _compare(model, Encoded(load(rows, "forget"), task_of(model)))


def test_squares_of_a_text_conditional_unet() -> None:
    model = _double(shapes.pipeline())
    task = task_of(model)
    task.draws = 2
    _compare(model, Encoded(load(shapes.records(3), "forget"), task))


def test_ssd_dampens_by_the_squares_of_single_draws() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = digits.untrained().eval()
    task = task_of(model)
    rows = digits.records(24)
    sets = [Encoded(load([r for r in rows if (r["label"] == 3) is one], name), task)
            for name, one in (("forget", True), ("retain", False))]  # fmt: skip
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    on_forget, on_retain = (by_hand(model, e, dict(model.named_parameters())) for e in sets)
    SSD(alpha=3.0).unlearn(Subject(model), Request(Classes((3,), ("3",)), *sets), Run(task))
    for name, p in model.named_parameters():
        of = on_forget[name] / len(sets[0])
        all_of = (on_forget[name] + on_retain[name]) / len(rows)
        expected = torch.where(of > 3 * all_of, start[name] * all_of / of, start[name])
        torch.testing.assert_close(p.detach(), expected, rtol=1e-3, atol=1e-6)
