"""Concept ablation: a concept takes the place of its anchor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import unlearn
from tests import digits, shapes
from unlearn import registry
from unlearn.errors import BadInput
from unlearn.interface import Classes, Concepts, Request, Subject
from unlearn.latents import conditions
from unlearn.pipeline import Pipeline
from unlearn.run import Run
from unlearn.tasks.diffusion import task_of

SHORT = {"pictures": 4, "draws": 4, "sampling_steps": 2, "batch_size": 8}
CAPTIONS = "|".join(f"a {colour} {{}}" for colour in shapes.COLOURS)


def test_told_the_concept_it_shall_say_what_it_said_of_the_anchor() -> None:
    model = Pipeline(shapes._untrained())
    method = registry.build("concept_ablation", {**SHORT, "contexts": "a red {}|a blue {}"})
    target = Concepts(("disc", "plus"), "box", ("wedge",))
    run = Run(task_of(model))
    concept, retain = method.terms(Subject(model), Request(target), run)  # type: ignore[attr-defined]
    told = ["a red disc", "a red plus", "a blue disc", "a blue plus"]
    assert torch.equal(concept.examples.table, conditions(model, told))
    batch = concept.examples.batch(list(range(16)))
    anchors = conditions(model, ["a red box", "a red box", "a blue box", "a blue box"])
    with torch.no_grad():
        said = model.eps(batch["x_t"], batch["t"], anchors[batch["told"]])
    assert torch.allclose(batch["aim"], said, atol=1e-5)
    found = concept.forward(model, batch).detach()
    by_hand = (found - said).square().mean((1, 2, 3))
    assert torch.allclose(concept.loss(found, batch), by_hand, atol=1e-6)
    assert len(retain.examples.table) == 5  # box and wedge in two contexts, and nothing


def test_only_keys_and_values_of_cross_attention_move() -> None:
    model = Pipeline(shapes._untrained())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    target = Concepts(("disc",), "box")
    run = Run(task_of(model))
    registry.build("concept_ablation", SHORT).unlearn(Subject(model), Request(target), run)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if ".attn2.to_k." in k or ".attn2.to_v." in k}


def test_an_anchor_is_asked_for_before_anything_is_loaded(tmp_path: Path) -> None:
    for name in ("concept_ablation", "doco"):
        with pytest.raises(BadInput, match="pass --anchor"):
            registry.build(name).check(Request(Concepts(("disc",))))  # type: ignore[attr-defined]


def test_every_class_gone_leaves_no_anchor() -> None:
    with torch.random.fork_rng():
        model = digits.untrained()
    everything = Classes(tuple(range(10)), tuple(map(str, range(10))))
    with pytest.raises(BadInput, match="none is left"):
        registry.build("concept_ablation", SHORT).unlearn(
            Subject(model), Request(everything), Run(task_of(model))
        )


def test_a_digit_turns_into_another(digits_pipeline: Path, digits_judge: digits.Judge) -> None:
    few = {"pictures": 32, "sampling_steps": 8, "lr": 1e-3}
    result = unlearn.forget(
        digits_pipeline, method="concept_ablation", forget_classes="3", anchor="7", audit="none",
        device="cpu", set=few,
    )  # fmt: skip
    after = result.subject.model
    assert isinstance(after, Pipeline)
    drawn = after.sample([3] * 24, torch.Generator().manual_seed(0), steps=8, guidance=2.0)
    said = digits.says(digits_judge, drawn)
    assert (said == 3).mean() < 0.1
    assert (said == 7).mean() > 0.7
    kept = [digits.hits(after, digits_judge, c, 16, guidance=2.0, steps=8) for c in (0, 4, 7, 8)]
    assert sum(kept) / 4 > 0.8


def test_a_shape_turns_into_another_and_keeps_its_colour() -> None:
    judge = shapes.judge()
    settings = {
        "contexts": CAPTIONS, "pictures": 32, "sampling_steps": 8, "epochs": 4, "lr": 1e-2,
        "retain_weight": 2,
    }  # fmt: skip
    result = unlearn.forget(
        shapes.HOME, method="concept_ablation", forget_concepts="disc", anchor="box",
        keep_concepts="wedge,plus", audit="none", device="cpu", set=settings,
    )  # fmt: skip
    after = result.subject.model.float()
    assert isinstance(after, Pipeline)
    prompts = [shapes.caption(c, s) for s in shapes.SHAPES for c in shapes.COLOURS for _ in "1234"]
    drawn = after.sample(prompts, torch.Generator().manual_seed(5), steps=8, guidance=3.0)
    with torch.no_grad():
        colours, forms = (said.argmax(1).view(4, 16) for said in judge(drawn))
    assert float((forms[0] == 0).float().mean()) <= 0.4
    assert float((forms[1:] == torch.arange(1, 4)[:, None]).float().mean()) >= 0.75
    wanted = torch.arange(4).repeat_interleave(4)
    assert float((colours == wanted).float().mean()) >= 0.85
