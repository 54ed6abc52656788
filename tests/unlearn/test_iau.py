"""Influence approximation against pencil and paper, and the restriction it is trained with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from unlearn import demo
from unlearn.data import load
from unlearn.errors import Collapsed, Unsupported
from unlearn.interface import Need, Records, Request, Subject
from unlearn.methods.iau import IAU, corrected_gradient
from unlearn.methods.retrain import Retrain, gradient_norms
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.tasks.classification import Classification

CLASSES = 3


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def examples(name: str, n: int, seed: int) -> Encoded:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    labels = torch.randint(CLASSES, (n,), generator=draw)
    return Encoded(load((inputs, labels), name), Classification(CLASSES))


def request() -> Request:
    return Request(Records(5), examples("forget", 5, 1), examples("retain", 20, 2))


def unlearned(method: IAU, asked: Request | None = None) -> nn.Module:
    run = Run(Classification(CLASSES))
    return method.unlearn(Subject(network()), asked or request(), run).model


def mean_nll(model: nn.Module, data: Encoded) -> Tensor:
    return data.task.nll(model, data.batch(range(len(data)))).mean()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in pairs)


def test_correction_by_hand() -> None:
    forget = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor(0.5)}
    retain = {"w": torch.tensor([4.0, 1.0]), "b": torch.tensor(-1.0)}
    assert corrected_gradient(forget, retain)["w"].tolist() == [3.0, 3.0]
    assert corrected_gradient(forget, retain, 0.5)["w"].tolist() == [1.0, 2.5]
    assert float(corrected_gradient(forget, retain, 2.0)["b"]) == -2.5
    assert corrected_gradient(forget, None)["w"].tolist() == [-1.0, 2.0]


def test_one_step_of_a_logistic_model_by_hand() -> None:
    """Logits (0, w x): the gradient of the NLL is (sigmoid(w x) - y) x."""

    class Logistic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(1, 1, bias=False).double()
            nn.init.constant_(self.line.weight, 0.7)

        def forward(self, x: Tensor) -> Tensor:
            z = self.line(x)
            return torch.cat((torch.zeros_like(z), z), dim=1)

    def gradient(rows: list[tuple[float, int]]) -> float:
        return sum((1 / (1 + math.exp(-0.7 * x)) - y) * x for x, y in rows) / len(rows)

    def encoded(rows: list[tuple[float, int]], name: str) -> Encoded:
        inputs = torch.tensor([[x] for x, _ in rows], dtype=torch.float64)
        return Encoded(load((inputs, [y for _, y in rows]), name), Classification(2))

    forget, retain = [(1.5, 1), (2.0, 1)], [(0.1, 0), (-1.0, 0), (0.2, 1)]
    asked = Request(Records(2), encoded(forget, "forget"), encoded(retain, "retain"))
    for settings, wanted in (
        ({}, 0.7 - 0.3 * (gradient(retain) - gradient(forget))),
        ({"correction": 2.0}, 0.7 - 0.3 * (2 * gradient(retain) - gradient(forget))),
        ({"correction": 0.0}, 0.7 + 0.3 * gradient(forget)),
        ({"step": "sign"}, 0.7 - 0.3 * math.copysign(1, gradient(retain) - gradient(forget))),
    ):
        method = IAU(lr=0.3, **settings)  # type: ignore[arg-type]
        after = method.unlearn(Subject(Logistic()), asked, Run(Classification(2))).model
        assert after.line.weight.item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_steps_are_gradient_descent_on_the_difference(steps: int, batch_size: int) -> None:
    wanted, asked = network(), request()
    optimizer = torch.optim.SGD(wanted.parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = mean_nll(wanted, asked.retain_set()) - mean_nll(wanted, asked.forget_set())
        loss.backward()
        optimizer.step()
    assert same(unlearned(IAU(lr=0.05, steps=steps, batch_size=batch_size)), wanted)


def test_a_sign_step_is_the_first_step_of_a_new_adam() -> None:
    wanted, asked = network(), request()
    optimizer = torch.optim.Adam(wanted.parameters(), 1e-3, eps=1e-30)
    (mean_nll(wanted, asked.retain_set()) - mean_nll(wanted, asked.forget_set())).backward()
    optimizer.step()
    assert same(unlearned(IAU(lr=1e-3, step="sign")), wanted)


def test_without_correction_the_retain_set_is_not_needed() -> None:
    assert IAU(correction=0.0).needs.retain is Need.NO
    assert IAU().needs.retain is Need.REQUIRED
    alone = Request(Records(5), request().forget_set())
    model = network()
    mean_nll(model, alone.forget_set()).backward()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * p.grad
    assert same(unlearned(IAU(lr=0.1, correction=0.0), alone), model)
    assert IAU(correction=0.0, steps=3).trained(5, 20) == 15
    assert IAU(steps=3).trained(5, 20) == 75


def test_scope_confines_the_step() -> None:
    before, after = network(), unlearned(IAU(scope="head", step="sign"))
    assert torch.equal(before[0].weight, after[0].weight)
    assert not torch.equal(before[2].weight, after[2].weight)
    with pytest.raises(Unsupported, match="whole weights"):
        unlearned(IAU(scope="lora"))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    with pytest.raises(Collapsed, match="after step 1"):
        IAU().unlearn(Subject(model), request(), Run(Classification(CLASSES)))


def test_gradient_norms_by_hand() -> None:
    one = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    other = nn.Parameter(torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    idle = nn.Parameter(torch.ones(2))
    # gradients: (6, 8) and 3 (1, 4); d/d one = 2 one / 5 ... of the norm |2 one| is 2 one / |one|
    loss = one.square().sum() + other.pow(3).sum()
    norms = gradient_norms(loss, [one, other, idle])
    assert norms.item() == pytest.approx(10 + math.sqrt(9 + 144))
    norms.backward()
    assert one.grad.tolist() == pytest.approx([2 * 3 / 5, 2 * 4 / 5])
    wanted = [6 * x * 3 * x**2 / math.sqrt(153) for x in (1.0, 2.0)]
    assert other.grad.flatten().tolist() == pytest.approx(wanted)


def test_a_gradient_of_zero_does_no_harm() -> None:
    w = nn.Parameter(torch.zeros(3))
    norms = gradient_norms(w.square().sum() + 0 * w.sum(), [w])
    norms.backward()
    assert norms.item() == 0
    assert bool(torch.isfinite(w.grad).all())


def restricted(alpha: float, **settings: object) -> Retrain:
    found = {
        "epochs": 1, "batch_size": 20, "micro_batch_size": 3, "optimizer": "sgd",
        "weight_decay": 0.0, "max_grad_norm": 1e9, "lr": 0.1,
    } | settings  # fmt: skip
    return Retrain(gradient_restriction=alpha, **found)  # type: ignore[arg-type]


def retrained(method: Retrain) -> nn.Module:
    data = examples("retain", 20, 2)
    run = Run(data.task)
    run.initial_model = lambda init: network()  # type: ignore[method-assign]
    subject = Subject(network())
    return method.unlearn(subject, Request(Records(5), None, data), run).model


def test_restricted_training_descends_on_loss_and_norms() -> None:
    """One step of SGD with Nesterov momentum 0.9, which is 1.9 lr times the gradient."""
    model, data = network(), examples("retain", 20, 2)
    parameters = list(model.parameters())
    loss = mean_nll(model, data)
    first = torch.autograd.grad(loss, parameters, create_graph=True)
    total = loss + 0.3 * sum(g.square().sum().sqrt() for g in first)
    with torch.no_grad():
        for p, g in zip(parameters, torch.autograd.grad(total, parameters), strict=True):
            p -= 1.9 * 0.1 * g
    assert same(retrained(restricted(0.3)), model)
    assert not same(retrained(restricted(0.0)), model)


def test_restricted_training_ends_with_smaller_gradients() -> None:
    data, norms = examples("retain", 20, 2), []
    for alpha in (0.0, 0.5):
        model = retrained(restricted(alpha, epochs=20, optimizer="adamw", lr=0.02))
        norms.append(gradient_norms(mean_nll(model, data), model.parameters()).item())
    assert norms[1] < 0.7 * norms[0]


def test_restriction_differentiates_attention_twice() -> None:
    world = demo.people(seed=1, forget=1, retain=1, holdout=1)
    subject = demo.tiny_llama([*world.forget, *world.retain], width=16, depth=1)
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    data, run = Encoded(load(world.retain, "retain"), task), Run(task)
    run.initial_model = lambda init: (
        demo.tiny_llama(  # type: ignore[method-assign]
            [*world.forget, *world.retain], 3, width=16, depth=1
        ).model
    )
    method = Retrain(gradient_restriction=0.005, epochs=2, lr=1e-3)
    after = method.unlearn(subject, Request(Records(1), None, data), run).model
    assert all(bool(p.isfinite().all()) for p in after.parameters())


def test_restriction_and_compilation_exclude_each_other() -> None:
    with pytest.raises(Unsupported, match="differentiates twice"):
        retrained(restricted(0.1, compile=True))
