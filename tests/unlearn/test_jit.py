"""JiT: the loss by hand, the noise it draws, and forgetting without labels or other data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import unlearn
from unlearn.data import load
from unlearn.interface import Need, Records, Request, Subject
from unlearn.methods.jit import JiT, steepness
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification


def data(n: int = 12, seed: int = 1, name: str = "forget") -> Encoded:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 3, generator=draw, dtype=torch.float64)
    return Encoded(load((inputs, [2] * n), name), Classification(4))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def weights(subject: Subject) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in subject.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[k], other[k]) for k in one)


def test_steepness_by_hand() -> None:
    output = torch.tensor([[3.0, 4.0], [1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    moved = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    step = torch.tensor([[[2.0], [0.0]], [[1.0], [1.0]], [[0.0], [0.0]]], dtype=torch.float64)
    step[2, 1] = 4.0
    assert steepness(output, moved, step).tolist() == pytest.approx([2.5, 0.0, 0.5])


def test_steepness_has_a_gradient_even_where_nothing_changes() -> None:
    """Same output (a dead unit), or a step that was clamped away: 0, not NaN."""
    output = torch.ones(2, 2, requires_grad=True)
    total = steepness(output, torch.ones(2, 2), torch.tensor([[1.0], [0.0]])).sum()
    (gradient,) = torch.autograd.grad(total, output)
    assert float(total.detach()) == 0
    assert torch.equal(gradient, torch.zeros(2, 2))


def test_no_gradient_flows_into_the_perturbed_output() -> None:
    weight = torch.tensor([[1.0, 2.0]], requires_grad=True)
    here, there = torch.tensor([[1.0], [0.0]]), torch.tensor([[3.0], [0.0]])
    output, moved = (weight @ here), (weight @ there)
    (gradient,) = torch.autograd.grad(steepness(output, moved, there[:1] - here[:1]).sum(), weight)
    assert torch.equal(
        gradient, torch.tensor([[-0.5, 0.0]])
    )  # -x / |e|; through both: (x' - x)/|e|


def test_a_step_equals_a_dense_reference() -> None:
    """One step of plain gradient descent with the same noise, everything written out."""
    forget, model, sigma, draws = data(6), network(), 0.3, 4
    method = JiT(sigma=sigma, draws=draws, batch_size=6)
    (term,) = method.terms(Subject(model), Request(Records(6), forget), Run(forget.task))
    batch = forget.batch(range(6))
    torch.manual_seed(9)
    assert term.forward is not None
    term.forward(model, batch).mean().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(9)
    x = torch.stack([forget[i]["features"] for i in range(6)])
    loss = torch.zeros((), dtype=torch.float64)
    for _ in range(draws):
        moved = (x + sigma * torch.randn(x.shape, dtype=x.dtype)).clamp(x.min(), x.max())
        change = model(x) - model(moved).detach()
        loss = loss + (change.square().sum(1).sqrt() / (moved - x).square().sum(1).sqrt()).sum()
    (loss / draws / 6).backward()
    for p, gradient in zip(model.parameters(), found, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-10)


def test_perturbed_inputs_stay_in_the_range_of_the_set() -> None:
    forget, model = data(6), network()
    values = torch.stack([forget[i]["features"] for i in range(6)])
    seen = []
    method = JiT(sigma=50.0, draws=3)
    (term,) = method.terms(Subject(model), Request(Records(6), forget), Run(forget.task))
    model.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    assert term.forward is not None
    term.forward(model, forget.batch([0, 1]))
    assert len(seen) == 4
    moved = torch.cat(seen[1:])
    assert moved.min() == values.min()
    assert moved.max() == values.max()
    assert not torch.equal(seen[1], seen[2])


def test_labels_and_retained_data_are_not_used() -> None:
    assert JiT().needs.labels is Need.NO
    assert JiT().needs.retain is Need.NO
    inputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for labels in ([0] * 6, [1, 2, 3, 0, 1, 2]):
        model = network().float()
        forget = Encoded(load((inputs, labels), "forget"), Classification(4))
        after = JiT(lr=0.1).unlearn(Subject(model), Request(Records(6), forget), Run(forget.task))
        results.append(weights(after))
    assert same(*results)
    records = [{"features": row.tolist()} for row in inputs]
    unlearn.forget(network().float(), method="jit", forget=records, audit="none")


def test_what_was_memorised_gives_way_to_what_holds_nearby() -> None:
    """The label of x is its sign, but three points were learnt by heart with the other label."""
    x = torch.linspace(-2, 2, 41)[:, None]
    labels = (x[:, 0] > 0).long()
    odd = [6, 22, 33]
    labels[odd] = 1 - labels[odd]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
        )
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(600):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
            optimizer.step()
    forget = Encoded(load((x[odd], labels[odd]), "forget"), Classification(2))
    plain = [i for i in range(41) if i not in odd]

    def accuracy(model: nn.Module) -> tuple[float, float]:
        hits = (model(x).argmax(1) == labels).float()
        return float(hits[odd].mean()), float(hits[plain].mean())

    before = accuracy(model)
    method = JiT(lr=0.01, epochs=60, sigma=0.4)
    after = method.unlearn(Subject(model), Request(Records(3), forget), Run(forget.task)).model
    assert before == (1.0, 1.0)
    assert accuracy(after)[0] < 0.5
    assert accuracy(after)[1] > 0.8


class Stopped(Exception):
    pass


def test_an_interrupted_run_goes_on_with_the_same_noise(tmp_path: Path) -> None:
    method, forget = JiT(epochs=3, batch_size=4, lr=0.05, draws=3), data()
    request = Request(Records(12), forget)
    whole = weights(method.unlearn(Subject(network()), request, Run(forget.task)))

    class StopAt:
        def advance(self, phase: str, done: int, total: int, numbers: object) -> None:
            if phase == "unlearn" and done == 5:
                raise Stopped

        def say(self, sentence: str) -> None: ...

    run = Run(forget.task, work=tmp_path, save_every=0.0, progress=StopAt())
    with pytest.raises(Stopped):
        method.unlearn(Subject(network()), request, run)
    run = Run(forget.task, work=tmp_path, save_every=0.0)
    assert same(whole, weights(method.unlearn(Subject(network()), request, run)))
    other = weights(method.unlearn(Subject(network()), request, Run(forget.task, seed=1)))
    assert not same(whole, other)
