"""Concept editing: the closed form against least squares, and what a run of it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import unlearn
from tests import shapes
from unlearn import registry
from unlearn.checkpoint import inspect
from unlearn.cross_attention import Embeddings, embeddings, erasure, factors, known_templates
from unlearn.errors import BadInput, MissingNeed
from unlearn.interface import Concepts, Request, Subject
from unlearn.pipeline import Pipeline
from unlearn.run import Run
from unlearn.tasks.diffusion import task_of

REQUEST = {"forget_concepts": "disc", "anchor": "box", "keep_concepts": "wedge,plus"}
COLOURS = ",".join(f"a {colour} {{}}" for colour in shapes.COLOURS)
DOUBLE = torch.float64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes pipeline in float32; do not write into it."""
    directory = tmp_path_factory.mktemp("shapes") / "base"
    shapes.pipeline().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def judge() -> shapes.Judge:
    return shapes.judge()


def rates(model: Pipeline, judge: nn.Module, shape: str) -> tuple[float, float]:
    """Shares of pictures with the shape and with the colour that the prompts name."""
    wanted = [colour for colour in shapes.COLOURS for _ in range(4)]
    prompts = [shapes.caption(colour, shape) for colour in wanted]
    with torch.no_grad():
        seen = judge(model.sample(prompts, torch.Generator().manual_seed(2), 10, 3.0))
    colours = torch.tensor([list(shapes.COLOURS).index(colour) for colour in wanted])
    right = seen[1].argmax(1) == shapes.SHAPES.index(shape)
    return float(right.float().mean()), float((seen[0].argmax(1) == colours).float().mean())


def drawn(seed: int = 0, dim: int = 12) -> Embeddings:
    draw = torch.Generator().manual_seed(seed)
    rows = (5, 5, 9)
    return Embeddings(*(torch.randn(n, dim, generator=draw, dtype=DOUBLE) for n in rows))


@pytest.mark.parametrize("weights", [(0.5, 1.0, 1.0), (0.1, 2.0, 0.3), (3.0, 0.5, 0.0)])
def test_every_layer_gets_the_dense_least_squares_solution(
    weights: tuple[float, float, float],
) -> None:
    lamb, s_e, s_p = weights
    at = drawn()
    m = erasure(at, *weights)
    for seed, rows in ((1, 7), (2, 20)):
        w = torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
        left = [s_e**0.5 * at.erased, s_p**0.5 * at.kept, lamb**0.5 * torch.eye(12, dtype=DOUBLE)]
        right = [s_e**0.5 * at.anchors @ w.T, s_p**0.5 * at.kept @ w.T, lamb**0.5 * w.T]
        dense = np.linalg.lstsq(torch.cat(left), torch.cat(right), rcond=None)[0].T
        assert np.abs((w @ m).numpy() - np.asarray(dense)).max() < 1e-8


def test_the_edit_has_no_more_dimensions_than_embeddings_were_erased() -> None:
    at = drawn()
    m = erasure(at, 0.5, 1.0, 1.0)
    u, v = factors(m)
    assert u.shape == (12, 5)
    assert v.shape == (5, 12)
    assert torch.allclose(u @ v, m - torch.eye(12, dtype=DOUBLE), atol=1e-12)


def test_limits_of_the_weights() -> None:
    at = drawn()
    still = erasure(at, 1e12, 1.0, 1.0)
    assert torch.allclose(still, torch.eye(12, dtype=DOUBLE), atol=1e-9)
    alone = Embeddings(at.erased, at.anchors, at.kept[:0])
    assert torch.allclose(at.erased @ erasure(alone, 1e-10, 1.0, 1.0).T, at.anchors, atol=1e-6)
    held = erasure(at, 1e-3, 1.0, 1e9)
    assert torch.allclose(at.kept @ held.T, at.kept, atol=1e-4)


def request(prompts: tuple[str, ...] = ("disc",), anchor: str = "box") -> Request:
    return Request(Concepts(prompts, anchor, ("plus",)))


def test_positions_stand_beside_those_of_the_anchor() -> None:
    model = shapes.pipeline()
    run = Run(task_of(model))
    at = embeddings(model, request(), "{},a red {}", run)
    length = model.tokenizer.model_max_length
    assert at.erased.shape == at.anchors.shape == (2 * length, 32)
    assert at.kept.shape == (5 * length, 32)  # nothing, plus, box, a red plus, a red box
    told = model.condition(["a red disc", "a red box"]).detach().double()
    assert torch.allclose(at.erased[length:], told[0], atol=1e-6)
    assert torch.allclose(at.anchors[length:], told[1], atol=1e-6)
    same = (at.erased == at.anchors).all(1)
    assert same[length : length + 3].all()  # the text encoder is causal: start, a, red
    assert not same[length + 3 :].any()
    nothing = embeddings(model, request(anchor=""), "{},a red {}", run).anchors
    empty = model.condition([""])[0].detach().double()
    assert torch.allclose(nothing, empty.repeat(2, 1), atol=1e-6)


def test_templates_that_cannot_be_used_are_named() -> None:
    model = shapes.pipeline()
    run = Run(task_of(model))
    assert known_templates("a {},qqq# {}", run) in (["a {}"], ["a {}", "qqq# {}"])
    with pytest.raises(BadInput, match="where the concept goes"):
        known_templates("a disc", run)
    with pytest.raises(BadInput, match="no template"):
        known_templates("!!! {}", run)
    with pytest.raises(BadInput, match="as the same"):
        embeddings(model, request(prompts=("box",)), "{}", run)


def test_the_shape_goes_and_the_others_stay(base: Path, judge: shapes.Judge) -> None:
    found = unlearn.forget(
        base, method="uce", **REQUEST, set={"templates": COLOURS}, audit="none"
    ).subject.model
    assert isinstance(found, Pipeline)
    assert rates(shapes.pipeline(), judge, "disc")[0] > 0.8
    assert rates(found, judge, "disc")[0] < 0.3
    kept = [rates(found, judge, shape) for shape in ("box", "wedge", "plus")]
    assert sum(shape for shape, _ in kept) / 3 > 0.8
    assert min(colour for _, colour in kept) > 0.8


def test_a_run_keeps_the_edit_as_an_adapter_or_merged(base: Path, tmp_path: Path) -> None:
    apart = unlearn.forget(base, method="uce", **REQUEST, audit="none", out=tmp_path / "apart")
    unlearn.forget(base, method="uce", **REQUEST, merge=True, audit="none", out=tmp_path / "whole")
    assert json.loads((tmp_path / "apart/run.json").read_text())["model_kind"] == "adapter"
    assert json.loads((tmp_path / "whole/run.json").read_text())["model_kind"] == "pipeline"
    before = inspect(base).load().model
    target = Concepts(("disc",), "box", ("wedge", "plus"))
    templates = registry.values(registry.build("uce"))["templates"]
    at = embeddings(before, Request(target), templates, Run(task_of(before)))
    m = erasure(at, 0.5, 1.0, 1.0)
    found = [inspect(tmp_path / name).load().model for name in ("apart", "whole")]
    models = [apart.subject.model, *found]
    weights = [model.state_dict() for model in models]
    for name, old in before.state_dict().items():
        assert torch.equal(weights[0][name], weights[1][name])
        assert torch.equal(weights[0][name], weights[2][name])
        edited = ".attn2.to_k" in name or ".attn2.to_v" in name
        exact = (old.double() @ m).float() if edited else old
        assert torch.allclose(weights[0][name], exact, atol=1e-6, rtol=0)
    again = unlearn.forget(
        tmp_path / "apart", method="uce", forget_concepts="plus", anchor="box", audit="none",
        out=tmp_path / "again",
    )  # fmt: skip
    read = inspect(tmp_path / "again")
    assert len(read.lineage) == 2
    state = read.load().model.state_dict()
    assert all(torch.equal(state[n], p) for n, p in again.subject.model.state_dict().items())


def test_a_pipeline_in_memory_is_edited_where_it_is() -> None:
    model = shapes.pipeline()
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"
    before = model.state_dict()[name].clone()
    found = unlearn.forget(Subject(model), method="uce", **REQUEST, audit="none").subject.model
    assert not torch.equal(found.state_dict()[name], before)
    assert all(p.requires_grad for p in found.parameters())
    assert not found.training


def test_pipelines_without_prompts_are_refused(digits_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingNeed, match="uce forgets concepts, not classes"):
        unlearn.forget(digits_pipeline, method="uce", forget_classes="3", out=tmp_path / "run")
    with pytest.raises(BadInput):
        unlearn.forget(digits_pipeline, method="uce", forget_concepts="3", out=tmp_path / "run")
    assert not list(tmp_path.iterdir())
