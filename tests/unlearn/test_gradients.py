"""Gradients and curvature of whole sets, against dense references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from unlearn import demo
from unlearn.data import load
from unlearn.errors import BadInput, Unsupported
from unlearn.gradients import curvature_product, mean_gradient, salient
from unlearn.run import Run
from unlearn.scope import in_scope
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.tasks.classification import Classification

CLASSES = 3


def network(hidden: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(4, hidden), nn.Tanh(), nn.Dropout(0.5), nn.Linear(hidden, CLASSES)]
        return nn.Sequential(*layers).double()


def examples(n: int = 10) -> Encoded:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    labels = torch.randint(CLASSES, (n,), generator=draw)
    return Encoded(load((inputs, labels), "retain"), Classification(CLASSES))


def language() -> tuple[nn.Module, Encoded, Run]:
    world = demo.people(seed=1, forget=1, retain=1, holdout=1)
    subject = demo.tiny_llama([*world.forget, *world.retain], width=16, depth=1)
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    return subject.model.double(), Encoded(load(world.retain[:5], "retain"), task), Run(task)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def parts(vector: Tensor, like: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    pieces = torch.split(vector, [p.numel() for p in like.values()])
    return {n: x.view(p.shape) for (n, p), x in zip(like.items(), pieces, strict=True)}


def direction(like: dict[str, nn.Parameter], seed: int = 3) -> Tensor:
    size = sum(p.numel() for p in like.values())
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=draw, dtype=torch.float64)


def dense(model: nn.Module, data: Encoded, kind: str) -> Tensor:
    """The whole matrix of the mean NLL in eval mode, from autograd's own functions."""
    model.eval()
    named, batch = dict(model.named_parameters()), data.batch(range(len(data)))

    def logits(vector: Tensor) -> Tensor:
        return functional_call(model, parts(vector, named), (batch["features"],))

    def loss(vector: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(vector), batch["labels"][:, 0])

    at = flat({n: p.detach() for n, p in named.items()})
    if kind == "hessian":
        return torch.autograd.functional.hessian(loss, at)
    jacobian = torch.autograd.functional.jacobian(logits, at)  # (n, classes, weights)
    p = logits(at).detach().softmax(-1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncw,ncd,ndv->wv", jacobian, inner, jacobian) / len(data)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_mean_gradient_is_that_of_one_dense_pass(batch_size: int) -> None:
    model, data = network(), examples()
    model.eval()
    batch = data.batch(range(len(data)))
    nn.functional.cross_entropy(model(batch["features"]), batch["labels"][:, 0]).backward()
    model.train()
    named = dict(model.named_parameters())
    found = mean_gradient(model, data, named, Run(data.task), batch_size)
    for name, p in named.items():
        assert torch.allclose(found[name], p.grad, rtol=0, atol=1e-12)


def test_mean_gradient_leaves_the_model_as_it_was() -> None:
    model, data = network(), examples()
    model.train()
    model[0].eval()
    model[3].bias.requires_grad_(False)
    named = {"0.weight": model[0].weight, "3.bias": model[3].bias}
    found = mean_gradient(model, data, named, Run(data.task))
    assert found.keys() == named.keys()
    assert bool(found["3.bias"].any())
    assert [m.training for m in model] == [False, True, True, True]
    assert not model[3].bias.requires_grad
    assert model[3].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_takes_no_part_has_gradient_zero() -> None:
    model, data = network(), examples()
    model.spare = nn.Linear(2, 2).double()
    model.forward = lambda x: model[3](model[1](model[0](x)))  # type: ignore[method-assign]
    named = {"spare": model.spare.weight, "head": model[3].weight}
    run = Run(data.task)
    assert not bool(mean_gradient(model, data, named, run)["spare"].any())
    for kind in ("hessian", "gauss_newton"):
        vector = {name: torch.ones_like(p) for name, p in named.items()}
        found = curvature_product(model, data, named, vector, run, kind=kind)
        assert not bool(found["spare"].any())
        assert bool(found["head"].any())


def test_the_largest_entries_of_all_tensors_together() -> None:
    gradient = {"a": torch.tensor([[1.0, -5.0], [0.0, 3.0]]), "b": torch.tensor([-4.0, 2.0])}
    found = salient(gradient, 0.5)
    assert found["a"].tolist() == [[False, True], [False, True]]
    assert found["b"].tolist() == [True, False]


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=1, max_size=30), st.floats(0.01, 1))
def test_ties_are_cut_to_the_share_and_always_alike(values: list[float], share: float) -> None:
    half = len(values) // 2
    gradient = {"a": torch.tensor(values[:half]), "b": torch.tensor(values[half:])}
    first, second = salient(gradient, share), salient(gradient, share)
    chosen = torch.cat([first["a"], first["b"]])
    assert int(chosen.sum()) == max(1, int(share * len(values)))
    assert torch.equal(chosen, torch.cat([second["a"], second["b"]]))
    sizes = torch.tensor(values).abs()
    if not bool(chosen.all()):
        assert float(sizes[chosen].min()) >= float(sizes[~chosen].max())


def test_a_share_of_one_is_everything() -> None:
    assert bool(salient({"a": torch.zeros(3, 2)}, 1.0)["a"].all())


def test_scopes_name_whole_parameters() -> None:
    model, task = network(), Classification(CLASSES)
    assert list(in_scope(model, task, "all")) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    assert list(in_scope(model, task, "head")) == ["3.weight", "3.bias"]
    assert list(in_scope(model, task, "bias ^0")) == ["0.weight", "0.bias", "3.bias"]
    with pytest.raises(BadInput, match="matches no parameter"):
        in_scope(model, task, "nowhere")
    for scope in ("lora", "lora:0", "saliency:0.5", r"3\.weight@1"):
        with pytest.raises(Unsupported, match="whole weights"):
            in_scope(model, task, scope)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_products_equal_the_dense_matrix(kind: str, batch_size: int) -> None:
    model, data = network(), examples()
    named = dict(model.named_parameters())
    matrix, vector = dense(model, data, kind), direction(named)
    model.train()
    found = curvature_product(
        model, data, named, parts(vector, named), Run(data.task), kind=kind, batch_size=batch_size
    )
    assert torch.allclose(flat(found), matrix @ vector, rtol=0, atol=1e-12)
    assert all(m.training for m in model)
    assert all(p.grad is None and p.requires_grad for p in named.values())


def test_the_network_hessian_is_indefinite_and_gauss_newton_is_not() -> None:
    """Why the second is the default of what inverts them."""
    model, data = network(), examples()
    lowest = {
        k: torch.linalg.eigvalsh(dense(model, data, k))[0] for k in ("hessian", "gauss_newton")
    }
    assert lowest["hessian"] < -1e-3
    assert lowest["gauss_newton"] > -1e-12


def test_both_are_the_same_where_logits_are_linear() -> None:
    data = examples()
    model = nn.Linear(4, CLASSES).double()
    named, run = dict(model.named_parameters()), Run(data.task)
    vector = parts(direction(named), named)
    found = [flat(curvature_product(model, data, named, vector, run, kind=k))
             for k in ("hessian", "gauss_newton")]  # fmt: skip
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-13)


def test_hessian_products_of_a_language_model_are_differences_of_gradients() -> None:
    model, data, run = language()
    named = dict(model.named_parameters())
    vector = parts(direction(named), named)
    found = flat(curvature_product(model, data, named, vector, run, kind="hessian", batch_size=2))
    sides = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, p in named.items():
                p += sign * 1e-4 * vector[name]
        sides.append(flat(mean_gradient(model, data, named, run)))
    wanted = (sides[0] - sides[1]) / 2e-4
    # its norms compute in float32
    assert float((found - wanted).norm()) < 1e-3 * float(wanted.norm())


def test_gauss_newton_of_a_language_model_is_symmetric_and_positive() -> None:
    model, data, run = language()
    named = dict(model.named_parameters())
    one, other = direction(named, 1), direction(named, 2)

    def times(vector: Tensor, size: int) -> Tensor:
        split = parts(vector, named)
        return flat(curvature_product(model, data, named, split, run, batch_size=size))

    image = times(one, 2)
    assert float(one @ image) > 0
    assert float(other @ image) == pytest.approx(float(one @ times(other, 64)), rel=1e-6)
