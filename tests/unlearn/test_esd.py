"""ESD and the bank of noised pictures it trains on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unlearn
from tests import digits, shapes
from unlearn import registry
from unlearn.data import load
from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Classes, Concepts, Request, Subject
from unlearn.latents import anchor_of, beneath, conditions, generated, neighbours, renoised
from unlearn.methods.esd import esd_target, unconditional
from unlearn.pipeline import Pipeline, read
from unlearn.run import Run
from unlearn.scope import matching
from unlearn.tasks.base import Encoded
from unlearn.tasks.diffusion import task_of

SHORT = {"pictures": 4, "draws": 4, "sampling_steps": 2, "batch_size": 8, "epochs": 2}
FIVE = Classes((5,), ("5",))


class Killed(Exception):
    """The run was stopped."""


class Killer:
    """Stops a run in the middle of training."""

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        if phase == "unlearn" and done == 2:
            raise Killed

    def say(self, sentence: str) -> None: ...


def small(null: int | None = digits.NULL) -> Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return digits.untrained(null).eval()


def weights(model: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def trained(method: str, run: Run | None = None, **settings: Any) -> dict[str, Tensor]:
    model = small()
    built = registry.build(method, {**SHORT, **settings})
    built.unlearn(Subject(model), Request(FIVE), run or Run(task_of(model)))
    return weights(model)


def test_the_target_by_hand() -> None:
    source, concept, null = (torch.tensor([v]) for v in (1.0, 3.0, 2.5))
    assert float(esd_target(source, concept, null, 2.0)) == 0.0
    assert float(esd_target(concept, concept, null, 1.0)) == 2.5  # eta 1: the null prediction


def test_a_bank_holds_what_the_starting_model_said() -> None:
    model = small()
    method = registry.build("esd", {**SHORT, "eta": 1.5})
    concept, retain = method.terms(Subject(model), Request(FIVE), Run(task_of(model)))  # type: ignore[attr-defined]
    assert len(concept.examples) == 16
    assert (concept.held, retain.held) == (False, True)
    batch = concept.examples.batch(list(range(16)))
    x_t, t = batch["x_t"], batch["t"]
    with torch.no_grad():
        told, null = (model.eps(x_t, t, torch.full((16,), label)) for label in (5, 10))
        assert torch.allclose(batch["aim"], told - 1.5 * (told - null), atol=1e-5)
        found = concept.forward(model, batch)
        assert torch.allclose(found, told, atol=1e-6)
        by_hand = (found - batch["aim"]).square().mean((1, 2, 3))
        assert torch.allclose(concept.loss(found, batch), by_hand)
        held = retain.examples.batch(list(range(16)))
        assert float(retain.loss(retain.forward(model, held), held).max()) < 1e-9
    assert sorted({int(retain.examples.table[i]) for i in held["told"]}) == [0, 1, 2, 3]


def test_times_are_stratified_and_noise_is_whole() -> None:
    model = small()
    x_0 = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    x_t, t = renoised(x_0, 4, model, torch.Generator().manual_seed(1))
    assert ((t.view(6, 4) * 4) // 1000).tolist() == [[0, 1, 2, 3]] * 6
    abar = model.abars[t][:, None, None, None]
    eps = (x_t - abar.sqrt() * x_0.repeat_interleave(4, 0)) / (1 - abar).sqrt()
    assert abs(float(eps[1::2].std()) - 1) < 0.1


def test_pictures_are_made_once(tmp_path: Path) -> None:
    model = small()
    run = Run(task_of(model), work=tmp_path)
    first = generated(model, [1, 2], 3, run, "test", steps=2)
    with torch.no_grad():
        model.denoiser.conv_out.bias += 1
    assert torch.equal(generated(model, [1, 2], 3, run, "test", steps=2), first)
    alone = generated(model, [1, 2], 3, Run(task_of(model)), "test", steps=2)
    assert not torch.equal(alone, first)


def test_without_a_null_class_the_mean_of_the_others_stands_for_it() -> None:
    values = {0: 1.0, 1: 3.0, 4: 8.0}
    found = unconditional(
        small(null=None), list(values), 2, lambda told: torch.tensor([values[int(i)] for i in told])
    )
    assert found.tolist() == [4.0, 4.0]
    model = small(null=None)
    run = Run(task_of(model))
    registry.build("esd", SHORT).unlearn(Subject(model), Request(FIVE), run)
    assert any("no null class" in note for note in run.notes)


def test_neighbours_and_anchors() -> None:
    task = task_of(small())
    assert neighbours(Classes((3, 4), ("3", "4")), task) == [0, 1, 2, 5, 6, 7, 8, 9]
    assert anchor_of(Classes((3, 4), ("3", "4")), task) == 5
    assert anchor_of(Classes((9,), ("9",)), task) == 0
    assert anchor_of(Classes((9,), ("9",), anchor=4), task) == 4
    assert neighbours(Concepts(("a",), "b", ("c", "b")), task) == ["b", "c"]
    with pytest.raises(BadInput, match="--anchor"):
        anchor_of(Concepts(("a",)), task)


@pytest.mark.parametrize("method", ["esd", "concept_ablation", "doco"])
def test_a_killed_run_goes_on_to_the_same_bits(method: str, tmp_path: Path) -> None:
    more = {"warmup_steps": 3} if method == "doco" else {}
    whole = trained(method, **more)
    task = task_of(small())
    run = Run(task, work=tmp_path, save_every=0, progress=Killer())
    with pytest.raises(Killed):
        trained(method, run, **more)
    resumed = trained(method, Run(task, work=tmp_path, save_every=0), **more)
    other = trained(method, Run(task, seed=1), **more)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert not all(torch.equal(whole[k], other[k]) for k in whole)


def test_what_is_refused() -> None:
    model = small()
    subject, run = Subject(model), Run(task_of(model))
    for settings, target, what in (
        ({"contexts": "a photo"}, FIVE, "no {} for a prompt"),
        ({"erase_from": "a thing"}, FIVE, "erase_from is a prompt"),
    ):
        with pytest.raises(BadInput, match=what):
            registry.build("esd", settings).unlearn(subject, Request(target), run)
    with pytest.raises(Unsupported, match="FSDP"):
        registry.build("esd").unlearn(subject, Request(FIVE), Run(run.task, sharded=True))
    with pytest.raises(Unsupported, match="not a diffusion pipeline"):
        beneath(torch.nn.Linear(1, 1))


def test_a_digit_is_erased_and_the_others_stay(
    digits_pipeline: Path, digits_judge: digits.Judge
) -> None:
    few = {"pictures": 32, "sampling_steps": 8, "lr": 1e-3}
    run = {"forget_classes": "3", "audit": "none", "device": "cpu"}
    result = unlearn.forget(digits_pipeline, method="esd", set=few, **run)
    before, after = read(digits_pipeline, torch.float32), result.subject.model
    assert isinstance(after, Pipeline)

    def hits(model: Pipeline, label: int) -> float:
        return digits.hits(model, digits_judge, label, 24, guidance=2.0, steps=8)

    assert hits(before, 3) > 0.9
    assert hits(after, 3) < 0.1
    others = [c for c in range(10) if c != 3]
    kept, had = (sum(hits(model, c) for c in others) for model in (after, before))
    assert kept >= 0.9 * had


def test_a_forget_set_gives_pictures_and_conditions() -> None:
    model = small()
    task = task_of(model)
    rows = [row for row in digits.records(60) if row["label"] == 5]
    forget = Encoded(load(rows, "forget"), task)
    method = registry.build("esd", {**SHORT, "draws": 2})
    concept = method.terms(Subject(model), Request(FIVE, forget), Run(task))[0]  # type: ignore[attr-defined]
    batch = concept.examples.batch(list(range(len(concept.examples))))
    assert len(batch["t"]) == 8
    assert concept.examples.table.tolist() == [5] * 4
    early = int(batch["t"].argmin())  # hardly noised: still one of the digits
    x_0 = 2 * torch.stack([row["image"] for row in rows]) - 1
    abar = model.abars[batch["t"][early]]
    distance = (batch["x_t"][early] - abar.sqrt() * x_0).square().mean((1, 2, 3)).min()
    assert float(distance) < 1.5 * float(1 - abar)


CAPTIONS = "|".join(f"a {colour} {{}}" for colour in shapes.COLOURS)


def shape_hits(model: Pipeline, judge: shapes.Judge, shape: str, count: int = 4) -> float:
    """Share of the pictures drawn for a shape in every colour that show it."""
    prompts = [shapes.caption(colour, shape) for colour in shapes.COLOURS for _ in range(count)]
    drawn = model.sample(prompts, torch.Generator().manual_seed(5), steps=8, guidance=3.0)
    with torch.no_grad():
        said = judge(drawn)[1].argmax(1)
    return float((said == shapes.SHAPES.index(shape)).float().mean())


def test_the_scope_that_parameters_stand_for() -> None:
    model = Pipeline(shapes._untrained())
    names = {sets: _moving(model, sets) for sets in ("x", "x-strict", "u", "all")}
    assert all("attn2" in n for n in names["x"])
    assert all(".attn2.to_k." in n or ".attn2.to_v." in n for n in names["x-strict"])
    assert names["x-strict"] < names["x"]
    assert names["u"] | names["x"] == names["all"] == {n for n, _ in model.named_parameters()}
    assert not names["u"] & names["x"]
    own = registry.build("esd", {"scope": "attn1"})
    request, run = Request(Concepts(("disc",))), Run(task_of(model))
    assert own.prepared(model, request, run).scope == "attn1"  # type: ignore[attr-defined]


def _moving(model: Pipeline, parameters: str) -> set[str]:
    method = registry.build("esd", {"parameters": parameters})
    request, run = Request(Concepts(("disc",))), Run(task_of(model))
    scope = method.prepared(model, request, run).scope  # type: ignore[attr-defined]
    return set(matching(scope, [n for n, _ in model.named_parameters()]))


def test_prompts_stand_in_contexts_and_wider_prompts_lose_them() -> None:
    model = Pipeline(shapes._untrained())
    settings = {**SHORT, "contexts": "a red {}|a blue {}", "erase_from": "thing", "eta": 1.0}
    method, run = registry.build("esd", settings), Run(task_of(model))
    assert method.within(["disc", "box"]) == [  # type: ignore[attr-defined]
        "a red disc", "a red box", "a blue disc", "a blue box",
    ]  # fmt: skip
    target = Concepts(("disc",), "box", ("plus",))
    concept, retain = method.terms(Subject(model), Request(target), run)  # type: ignore[attr-defined]
    wider = conditions(model, ["a red thing", "a blue thing"])
    assert torch.equal(concept.examples.table, wider)
    assert torch.equal(
        retain.examples.table,
        conditions(model, ["a red box", "a red plus", "a blue box", "a blue plus", ""]),
    )
    batch = concept.examples.batch([0, 7])
    source = wider[batch["told"]]
    about = conditions(model, ["a red disc", "a blue disc"])[batch["told"]]
    with torch.no_grad():
        said = [model.eps(batch["x_t"], batch["t"], c) for c in (source, about, model.null(2))]
    assert torch.allclose(batch["aim"], said[0] - (said[1] - said[2]), atol=1e-5)


def test_a_shape_is_erased_and_the_others_stay() -> None:
    judge, before = shapes.judge(), shapes.pipeline()
    settings = {
        "contexts": CAPTIONS, "pictures": 32, "sampling_steps": 8, "epochs": 4, "lr": 3e-3,
        "retain_weight": 4,
    }  # fmt: skip
    result = unlearn.forget(
        shapes.HOME, method="esd", forget_concepts="disc", anchor="box",
        keep_concepts="wedge,plus", audit="none", device="cpu", set=settings,
    )  # fmt: skip
    after = result.subject.model.float()
    assert isinstance(after, Pipeline)
    assert shape_hits(before, judge, "disc") >= 0.75
    assert shape_hits(after, judge, "disc") <= 0.35
    others = ("box", "wedge", "plus")
    kept, had = (sum(shape_hits(m, judge, s) for s in others) for m in (after, before))
    assert kept >= 0.75 * had
