"""Influence unlearning against dense inverses and against retraining."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from unlearn.data import load
from unlearn.errors import BadInput, Collapsed, Unsupported
from unlearn.interface import Records, Request, Subject
from unlearn.methods import influence
from unlearn.methods.influence import (
    Influence,
    conjugate_gradients,
    largest_curvature,
    lissa,
)
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification

CLASSES = 3
EXACT = {"iterations": 1000, "tolerance": 1e-13}


def positive(n: int = 8) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(n, n, generator=draw, dtype=torch.float64)
    return root @ root.T / n + 0.1 * torch.eye(n), torch.randn(n, generator=draw).double()


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()


def examples(name: str, n: int, seed: int) -> Encoded:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    labels = torch.randint(CLASSES, (n,), generator=draw)
    return Encoded(load((inputs, labels), name), Classification(CLASSES))


def request(forget: int = 5, retain: int = 20) -> Request:
    sets = examples("forget", forget, 1), examples("retain", retain, 2)
    return Request(Records(forget), *sets)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def unlearned(method: Influence, asked: Request | None = None, **run: object) -> Tensor:
    asked = asked or request()
    model, task = network(), asked.forget_set().task
    return weights(method.unlearn(Subject(model), asked, Run(task, **run)).model)  # type: ignore[arg-type]


def dense_step(model: nn.Module, asked: Request, damping: float, kind: str) -> Tensor:
    """(H + damping I)^-1 of the summed forget gradient over n_retain, all from autograd."""
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]
    forget, retain = (e.batch(range(len(e))) for e in (asked.forget_set(), asked.retain_set()))

    def logits(vector: Tensor, batch: dict[str, Tensor]) -> Tensor:
        pieces = torch.split(vector, sizes)
        values = {n: x.view(p.shape) for (n, p), x in zip(named.items(), pieces, strict=True)}
        return functional_call(model, values, (batch["features"],))

    def loss(vector: Tensor, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"][:, 0]
        return nn.functional.cross_entropy(logits(vector, batch), labels, reduction="sum")

    at, n = weights(model), len(asked.retain_set())
    gradient = torch.autograd.functional.jacobian(lambda v: loss(v, forget), at) / n
    if kind == "hessian":
        matrix = torch.autograd.functional.hessian(lambda v: loss(v, retain) / n, at)
    else:
        j = torch.autograd.functional.jacobian(lambda v: logits(v, retain), at)
        p = logits(at, retain).softmax(-1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        matrix = torch.einsum("ncw,ncd,ndv->wv", j, inner, j) / n
    return torch.linalg.solve(matrix + damping * torch.eye(len(at)).double(), gradient)


def test_conjugate_gradients_solve_as_numpy_does() -> None:
    matrix, target = positive()
    found = conjugate_gradients(lambda x: matrix @ x, target, 100, 1e-13)
    assert np.allclose(found, np.linalg.solve(matrix.numpy(), target.numpy()), rtol=0, atol=1e-10)


def test_conjugate_gradients_stop_at_the_tolerance_or_the_number() -> None:
    matrix, target = positive(30)
    calls: list[int] = []

    def product(x: Tensor) -> Tensor:
        calls.append(1)
        return matrix @ x

    found = conjugate_gradients(product, target, 100, 0.1)
    assert float((target - matrix @ found).norm()) <= 0.1 * float(target.norm()) * (1 + 1e-9)
    assert 0 < len(calls) < 30
    calls.clear()
    conjugate_gradients(product, target, 3, 1e-13)
    assert len(calls) == 3


def test_negative_curvature_is_refused() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    with pytest.raises(BadInput, match="raise damping"):
        conjugate_gradients(lambda x: matrix @ x, torch.ones(2).double(), 10, 1e-6)


def test_lissa_is_the_neumann_series_and_converges() -> None:
    matrix, target = positive()
    bound = 1.2 * float(torch.linalg.eigvalsh(matrix)[-1])
    rest = torch.eye(8) - matrix / bound
    wanted = sum(torch.linalg.matrix_power(rest, k) @ target for k in range(6)) / bound
    assert torch.allclose(lissa(lambda x: matrix @ x, target, 5, bound), wanted, atol=1e-12)
    found = lissa(lambda x: matrix @ x, target, 2000, bound)
    assert torch.allclose(found, torch.linalg.solve(matrix, target), atol=1e-9)


def test_power_iteration_finds_the_largest_eigenvalue() -> None:
    matrix, start = positive()
    wanted = float(torch.linalg.eigvalsh(matrix)[-1])
    assert largest_curvature(lambda x: matrix @ x, start, 300) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind", ["gauss_newton", "hessian"])
def test_the_step_equals_the_dense_inverse(kind: str) -> None:
    damping = 0.5 if kind == "hessian" else 0.01
    model = network()
    wanted = weights(model) + 2.0 * dense_step(model, request(), damping, kind)
    method = Influence(scale=2.0, damping=damping, curvature=kind, batch_size=7, **EXACT)  # type: ignore[arg-type]
    assert torch.allclose(unlearned(method), wanted, rtol=0, atol=1e-8)


def test_the_batch_size_changes_nothing() -> None:
    found = [unlearned(Influence(batch_size=size, **EXACT)) for size in (1, 6, 64)]  # type: ignore[arg-type]
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-10)
    assert torch.allclose(found[0], found[2], rtol=0, atol=1e-10)


def optimum(data: list[Encoded], ridge: float) -> nn.Module:
    """Minimiser of the summed NLL plus (ridge / 2) |theta|^2, by Newton's method."""
    model = nn.Linear(4, CLASSES).double()
    batches = [e.batch(range(len(e))) for e in data]
    x = torch.cat([b["features"] for b in batches])
    y = torch.cat([b["labels"][:, 0] for b in batches])

    def loss(vector: Tensor) -> Tensor:
        logits = x @ vector[: CLASSES * 4].view(CLASSES, 4).T + vector[CLASSES * 4 :]
        nll = nn.functional.cross_entropy(logits, y, reduction="sum")
        return nll + ridge / 2 * vector.square().sum()

    at = torch.zeros(CLASSES * 5, dtype=torch.float64)
    for _ in range(30):
        gradient = torch.autograd.functional.jacobian(loss, at)
        at = at - torch.linalg.solve(torch.autograd.functional.hessian(loss, at), gradient)
    with torch.no_grad():
        model.weight.copy_(at[: CLASSES * 4].view(CLASSES, 4))
        model.bias.copy_(at[CLASSES * 4 :])
    return model


def test_logistic_regression_lands_at_the_retrained_optimum_up_to_second_order() -> None:
    """The error is that of one Newton step: quadratic in how much is forgotten."""
    ridge, errors, retain = 1.0, [], examples("retain", 200, 6)
    one = examples("forget", 1, 5)
    for count in (1, 2, 4):
        forget = one.select([0] * count)  # the same record, learned as often
        model, wanted = optimum([forget, retain], ridge), weights(optimum([retain], ridge))
        distance = float((weights(model) - wanted).norm())
        method = Influence(damping=ridge / 200, **EXACT)  # type: ignore[arg-type]
        asked = Request(Records(count), forget, retain)
        after = weights(method.unlearn(Subject(model), asked, Run(forget.task)).model)
        errors.append(float((after - wanted).norm()))
        assert errors[-1] < 0.05 * distance
    assert all(3 < more / less < 5 for less, more in pairwise(errors))


def test_scope_confines_step_and_curvature() -> None:
    model = network()
    before = {n: p.clone() for n, p in model.named_parameters()}
    Influence(scope="head").unlearn(Subject(model), request(), Run(Classification(CLASSES)))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"2.weight", "2.bias"}
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(Unsupported, match="whole weights"):
        unlearned(Influence(scope="lora"))


def test_lissa_draws_batches_from_the_seed() -> None:
    method = Influence(solver="lissa", damping=0.2, batch_size=5, iterations=60)
    assert torch.equal(unlearned(method, seed=3), unlearned(method, seed=3))
    assert not torch.equal(unlearned(method, seed=3), unlearned(method, seed=4))
    start, exact = weights(network()), unlearned(Influence(damping=0.2, **EXACT))  # type: ignore[arg-type]
    error = (unlearned(method) - exact).norm() / (exact - start).norm()
    assert float(error) < 0.5


def test_lissa_over_whole_sets_solves_the_same_system() -> None:
    method = Influence(solver="lissa", damping=0.2, batch_size=64, iterations=300, tolerance=1e-6)
    exact = unlearned(Influence(damping=0.2, **EXACT))  # type: ignore[arg-type]
    assert torch.allclose(unlearned(method), exact, rtol=0, atol=1e-8)


def test_the_curvature_may_be_that_of_a_sample() -> None:
    some = Influence(curvature_examples=6, **EXACT)  # type: ignore[arg-type]
    assert torch.equal(unlearned(some, seed=1), unlearned(some, seed=1))
    assert not torch.equal(unlearned(some, seed=1), unlearned(some, seed=2))
    everything = unlearned(Influence(curvature_examples=20, **EXACT))  # type: ignore[arg-type]
    assert torch.equal(everything, unlearned(Influence(**EXACT)))  # type: ignore[arg-type]


def test_an_unfinished_solution_is_taken_and_told() -> None:
    run = Run(Classification(CLASSES))
    Influence(iterations=2, damping=1e-4).unlearn(Subject(network()), request(), run)
    assert any("did not converge in 2 iterations: relative residual" in n for n in run.notes)
    run = Run(Classification(CLASSES))
    Influence(**EXACT).unlearn(Subject(network()), request(), run)  # type: ignore[arg-type]
    assert not any("converge" in note for note in run.notes)


@pytest.mark.parametrize("bound", [1e-2, 1e-9])  # to large numbers, and beyond them
def test_a_diverging_series_is_refused_and_nothing_moves(bound: float) -> None:
    model = network()
    before = weights(model).clone()
    method = Influence(solver="lissa", bound=bound, batch_size=64)
    with pytest.raises(Collapsed, match="larger bound"):
        method.unlearn(Subject(model), request(), Run(Classification(CLASSES)))
    assert torch.equal(weights(model), before)


def test_non_finite_gradients_and_overflowing_steps_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(Collapsed, match="not finite"):
        Influence().unlearn(Subject(model), request(), Run(Classification(CLASSES)))
    with pytest.raises(Collapsed, match="overflows"):
        unlearned(Influence(scale=1e308, damping=1e-6))


def test_a_network_is_not_convex() -> None:
    with pytest.raises(BadInput, match="gauss_newton"):
        unlearned(Influence(curvature="hessian", damping=0.0))


def test_a_resumed_run_does_not_solve_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = unlearned(Influence(), work=tmp_path)
    monkeypatch.setattr(influence, "curvature_product", None)
    assert torch.equal(unlearned(Influence(), work=tmp_path), first)
