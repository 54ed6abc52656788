"""Revival embeddings: the closed form against a minimiser, and what erasing them changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import unlearn
from tests import shapes
from unlearn import registry
from unlearn.cross_attention import Embeddings, erasure
from unlearn.interface import Concepts, Request, Subject
from unlearn.methods.rece import gram, revived
from unlearn.pipeline import Pipeline
from unlearn.run import Run
from unlearn.tasks.diffusion import task_of

DOUBLE = torch.float64


def world(dim: int = 10) -> tuple[dict[str, nn.Linear], Embeddings]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = {str(n): nn.Linear(dim, n, bias=False).double() for n in (6, 10, 14)}
    draw = torch.Generator().manual_seed(0)
    rows = (3, 3, 4)
    drawn = (torch.randn(n, dim, generator=draw, dtype=DOUBLE) for n in rows)
    return layers, Embeddings(*drawn)


def error(layers: dict[str, nn.Linear], m: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """How far the edited layers' reading of ``new`` is from the original ones' of ``old``."""
    return sum(((new @ (w.weight @ m).T - old @ w.weight.T) ** 2).sum() for w in layers.values())  # type: ignore[return-value]


@pytest.mark.parametrize("lamb", [1e-3, 0.1, 5.0])
def test_the_revived_embedding_minimises_its_objective(lamb: float) -> None:
    layers, at = world()
    m = erasure(at, 0.5, 1.0, 1.0)
    c = revived(at.erased, m, gram(layers), lamb).requires_grad_(True)
    objective = error(layers, m, c, at.erased) + lamb * (c**2).sum()
    (slope,) = torch.autograd.grad(objective, c)
    assert slope.abs().max() < 1e-10
    for seed in range(5):  # convex: no other embedding is better
        aside = c + 0.01 * torch.randn(c.shape, generator=torch.Generator().manual_seed(seed))
        assert error(layers, m, aside, at.erased) + lamb * (aside**2).sum() > objective


def test_without_an_edit_a_concept_revives_itself() -> None:
    layers, at = world()
    c = revived(at.erased, torch.eye(10, dtype=DOUBLE), gram(layers), 1e-12)
    assert torch.allclose(c, at.erased, atol=1e-8)


def test_erasing_what_revives_ends_its_effect() -> None:
    layers, at = world()
    g, lamb = gram(layers), 0.1
    m = erasure(at, 0.5, 1.0, 1.0)
    c = revived(at.erased, m, g, lamb)
    both = Embeddings(torch.cat([at.erased, c]), at.anchors.repeat(2, 1), at.kept)
    after = erasure(both, 0.5, 1.0, 1.0)
    assert error(layers, after, c, at.erased) > 5 * error(layers, m, c, at.erased)
    again = revived(at.erased, after, g, lamb)
    assert error(layers, after, again, at.erased) > error(layers, m, c, at.erased)


def edited(method: str, **settings: object) -> Pipeline:
    subject, target = Subject(shapes.pipeline()), Concepts(("disc",), "box", ("wedge", "plus"))
    run = Run(task_of(subject.model))  # type: ignore[arg-type]
    found = registry.build(method, settings).unlearn(subject, Request(target), run).model
    assert isinstance(found, Pipeline)
    return found


def test_on_a_pipeline_reviving_gets_harder_with_every_epoch() -> None:
    original = shapes.pipeline()
    ends = ("attn2.to_k.weight", "attn2.to_v.weight")
    read = {n: w.double() for n, w in original.state_dict().items() if n.endswith(ends)}
    c = original.condition(["a red disc"])[0].detach().double()  # type: ignore[index]

    def best(model: Pipeline) -> float:
        """The smallest error of any embedding, by dense least squares over all layers."""
        new = torch.cat([model.state_dict()[n].double() for n in read])
        old = torch.cat(list(read.values())) @ c.T
        rows = [new, 0.3 * torch.eye(new.shape[1], dtype=DOUBLE)]
        wanted = [old, torch.zeros(new.shape[1], len(c), dtype=DOUBLE)]
        found = torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution
        return float((new @ found - old).square().sum())

    settings = {"templates": "a red {},a blue {}"}
    errors = [
        best(original),
        best(edited("uce", **settings)),
        *(best(edited("rece", epochs=epochs, **settings)) for epochs in (1, 3)),
    ]
    assert errors == sorted(errors)
    assert errors[-1] > 1.2 * errors[1]


def test_a_run_forgets_and_keeps() -> None:
    request = {"forget_concepts": "disc", "anchor": "box", "keep_concepts": "wedge,plus"}
    templates = ",".join(f"a {colour} {{}}" for colour in shapes.COLOURS)
    found = unlearn.forget(
        Subject(shapes.pipeline()), method="rece", **request, set={"templates": templates},
        audit="none",
    ).subject.model  # fmt: skip
    judge, rates = shapes.judge(), {}
    for shape in shapes.SHAPES:
        prompts = [shapes.caption(colour, shape) for colour in shapes.COLOURS for _ in range(4)]
        with torch.no_grad():
            seen = judge(found.sample(prompts, torch.Generator().manual_seed(2), 10, 3.0))[1]
        rates[shape] = float((seen.argmax(1) == shapes.SHAPES.index(shape)).float().mean())
    assert rates["disc"] < 0.4
    assert (rates["box"] + rates["wedge"] + rates["plus"]) / 3 > 0.75
