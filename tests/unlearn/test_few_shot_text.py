"""Erasing through the text encoder: the bounded ascent, what moves, and what a run leaves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import unlearn
from tests import shapes
from unlearn.checkpoint import inspect
from unlearn.data import load
from unlearn.errors import BadInput, Collapsed, MissingNeed, Unsupported
from unlearn.interface import Concepts, Records, Request, Subject
from unlearn.methods.few_shot_text import FewShotText, ascent, scope_of
from unlearn.pipeline import Pipeline
from unlearn.run import Run
from unlearn.tasks.base import Encoded, evaluating
from unlearn.tasks.diffusion import task_of

DISCS = [r for r in shapes.records(16) if str(r["text"]).endswith("disc")]
COLOURS = ",".join(f"a {colour} {{}}" for colour in shapes.COLOURS)
SHORT = {"lr": 1e-3, "epochs": 2, "batch_size": 2}


def test_ascent_is_bounded_where_the_loss_has_grown_enough() -> None:
    start = torch.tensor([1.0, 2.0, 0.5])
    loss = torch.tensor([1.5, 4.5, 0.1], requires_grad=True)
    found = ascent(loss, start, 2.0)
    assert found.tolist() == pytest.approx([-1.5, -4.0, -0.1])
    found.sum().backward()
    assert loss.grad is not None
    assert loss.grad.tolist() == [-1.0, 0.0, -1.0]


def test_mlps_and_the_last_attention_move_and_nothing_else() -> None:
    model = shapes.pipeline()
    before = {n: p.clone() for n, p in model.text_encoder.named_parameters()}
    unet = {n: p.clone() for n, p in model.denoiser.named_parameters()}
    run = Run(task_of(model))
    request = Request(Records(4), Encoded(load(DISCS, "forget"), run.task))
    after = FewShotText(**SHORT).unlearn(Subject(model), request, run)
    assert after.model is model
    moved = {n for n, p in model.text_encoder.named_parameters() if not torch.equal(p, before[n])}
    expected = {n for n in before if re.search(r"\.mlp\.fc[12]\.|\.layers\.1\.self_attn\.", n)}
    still = {n for n in expected if "k_proj.bias" in n}  # softmax does not see it
    assert expected - still <= moved <= expected
    assert any(".layers.0.self_attn." in n for n in before)
    assert all(torch.equal(p, unet[n]) for n, p in model.denoiser.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in model.text_encoder.parameters())
    assert not model.training


def test_names_are_matched_by_their_ends() -> None:
    with pytest.raises(Unsupported, match="no CLIP text encoder"):
        scope_of(nn.Linear(2, 2))
    encoder = shapes.pipeline().text_encoder
    assert scope_of(encoder) == scope_of(nn.ModuleDict({"text_model": encoder}))


def loss_of(model: Pipeline, rows: list[dict[str, object]]) -> float:
    task = task_of(model)
    examples = Encoded(load(rows, "forget"), task)
    with torch.no_grad(), evaluating(model):  # in train mode its noise is drawn anew
        return float(task.nll(model, examples.batch(range(len(examples)))).mean())


def test_pictures_and_a_concept(tmp_path: Path) -> None:
    base, discs = tmp_path / "base", [r for r in shapes.records(32) if "disc" in r["text"]]
    shapes.pipeline().save_pretrained(base)
    result = unlearn.forget(
        base, method="few_shot_text", forget=discs, forget_concepts="disc",
        keep_concepts="box,wedge,plus", audit="none", out=tmp_path / "run",
        set={"lr": 1e-3, "epochs": 40, "batch_size": 8, "templates": COLOURS},
    )  # fmt: skip
    read = inspect(tmp_path / "run").load().model
    assert isinstance(read, Pipeline)
    states = read.text_encoder.state_dict()
    for name, value in result.subject.model.text_encoder.state_dict().items():
        assert torch.equal(states[name], value)
    judge, rates = shapes.judge(), {}
    for shape in shapes.SHAPES:
        prompts = [shapes.caption(colour, shape) for colour in shapes.COLOURS for _ in range(4)]
        with torch.no_grad():
            seen = judge(read.sample(prompts, torch.Generator().manual_seed(2), 8, 3.0))[1]
        rates[shape] = float((seen.argmax(1) == shapes.SHAPES.index(shape)).float().mean())
    assert rates["disc"] < 0.5
    assert (rates["box"] + rates["wedge"] + rates["plus"]) / 3 > 0.75


def test_more_steps_do_not_carry_the_loss_past_its_bound() -> None:
    """Without the bound the same steps drive it much further."""
    found = {}
    for ratio in (1.2, 1e6):
        model = shapes.pipeline()
        run = Run(task_of(model))
        request = Request(Records(4), Encoded(load(DISCS, "forget"), run.task))
        before = loss_of(model, DISCS)
        method = FewShotText(lr=2e-3, epochs=15, batch_size=4, stop_ratio=ratio)
        found[ratio] = loss_of(method.unlearn(Subject(model), request, run).model, DISCS) / before  # type: ignore[arg-type]
    assert 1.05 < found[1.2] < 0.7 * found[1e6]


def test_without_pictures_a_concept_is_enough() -> None:
    model = shapes.pipeline()
    before = model.condition(["a red disc", "a red plus"]).clone()  # type: ignore[union-attr]
    run = Run(task_of(model))
    target = Concepts(("disc",), "", ("box", "wedge", "plus"))
    method = FewShotText(lr=1e-3, epochs=10, batch_size=4, templates=COLOURS)
    method.unlearn(Subject(model), Request(target), run)
    after = model.condition(["a red disc", "a red plus"])
    gone, kept = (after - before).square().flatten(1).mean(1).tolist()  # type: ignore[operator]
    assert gone > 3 * kept


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    def states(work: Path | None, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        model = shapes.pipeline()
        run = Run(task_of(model), seed=5, work=work, save_every=0)
        if stop_at is not None:

            class Killed(Exception):
                pass

            def advance(phase: str, done: int, total: int, numbers: object) -> None:
                if done == stop_at:
                    raise Killed

            run.progress.advance = advance  # type: ignore[method-assign]
            with pytest.raises(Killed):
                method.unlearn(Subject(model), request(model), run)
        else:
            method.unlearn(Subject(model), request(model), run)
        return dict(model.text_encoder.state_dict())

    def request(model: Pipeline) -> Request:
        return Request(Records(4), Encoded(load(DISCS, "forget"), task_of(model)))

    method = FewShotText(lr=1e-3, epochs=3, batch_size=2)
    whole = states(None)
    work = tmp_path / "work"
    work.mkdir()
    states(work, stop_at=3)
    resumed = states(work)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_destroyed_encoder_is_refused(tmp_path: Path) -> None:
    settings = {"lr": 1e30, "epochs": 4, "batch_size": 4}
    with pytest.raises(Collapsed):
        unlearn.forget(
            Subject(shapes.pipeline()), method="few_shot_text", forget=DISCS, set=settings,
            audit="none",
        )  # fmt: skip


def test_pipelines_without_prompts_are_refused(digits_pipeline: Path, tmp_path: Path) -> None:
    rows = [{"image": torch.zeros(1, 8, 8), "label": 3}]
    with pytest.raises(Unsupported, match="this pipeline has none"):
        unlearn.forget(digits_pipeline, method="few_shot_text", forget=rows, out=tmp_path / "run")
    with pytest.raises(MissingNeed, match="not classes"):
        unlearn.forget(
            digits_pipeline, method="few_shot_text", forget_classes="3", out=tmp_path / "run"
        )
    with pytest.raises(BadInput):
        unlearn.forget(
            digits_pipeline, method="few_shot_text", forget_concepts="3", out=tmp_path / "run"
        )
    assert not list(tmp_path.iterdir())
