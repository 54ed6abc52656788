"""Domain correction: the discriminator, the two moves, and the guard."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import unlearn
from tests import digits, shapes
from unlearn import registry
from unlearn.errors import BadInput
from unlearn.interface import Concepts, Request
from unlearn.methods.doco import PatchGAN, _Game, taken_for
from unlearn.pipeline import Pipeline
from unlearn.run import Run
from unlearn.surgery import Surgery
from unlearn.tasks.diffusion import task_of

SHORT = {
    "pictures": 4, "draws": 4, "sampling_steps": 2, "batch_size": 8, "epochs": 1, "warmup_steps": 5,
}  # fmt: skip
CAPTIONS = "|".join(f"a {colour} {{}}" for colour in shapes.COLOURS)


@pytest.mark.parametrize(
    ("side", "strided", "map_side"), [(4, 1, 1), (8, 1, 3), (16, 2, 3), (64, 4, 3), (128, 4, 7)]
)
def test_the_discriminator_fits_the_latents(side: int, strided: int, map_side: int) -> None:
    net = PatchGAN(4, side, width=8)
    assert sum(getattr(layer, "stride", 1) == (2, 2) for layer in net) == strided
    assert net(torch.zeros(2, 4, side, side)).shape == (2, 1, map_side, map_side)


def test_rows_do_not_see_each_other() -> None:
    net, x = PatchGAN(4, 16, width=8), torch.randn(6, 4, 16, 16)
    assert torch.allclose(net(x), torch.cat([net(x[:1]), net(x[1:])]), atol=1e-6)


def test_losses_by_hand() -> None:
    logits = torch.tensor([[[[0.0, 2.0]]], [[[-1.0, -1.0]]]])
    softplus = [math.log(1 + math.exp(v)) for v in (0, 2, -1)]
    assert torch.allclose(
        taken_for(logits, 0.0), torch.tensor([(softplus[0] + softplus[1]) / 2, softplus[2]])
    )
    assert torch.allclose(taken_for(logits, 1.0)[1], torch.tensor(math.log(1 + math.exp(1))))


def game() -> tuple[_Game, Pipeline]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Pipeline(shapes._untrained())
    run = Run(task_of(model))
    method = registry.build("doco", SHORT)
    told, shown = model.condition(["disc"]), model.condition(["box"])
    assert told is not None
    assert shown is not None
    bank = method.bank(model, "concept", ["box"], ["disc"], lambda said: said(shown), run)  # type: ignore[attr-defined]
    return _Game(method, bank, run, model), model  # type: ignore[arg-type]


def test_what_both_sides_see() -> None:
    played, model = game()
    batch = played.bank.batch(list(range(16)))
    abar = model.abars[batch["t"]][:, None, None, None].float()
    with torch.no_grad():
        eps = model.eps(batch["x_t"], batch["t"], model.condition(["disc"] * 16))
        clean = (batch["x_t"] - (1 - abar).sqrt() * eps) / abar.sqrt()
        assert torch.allclose(played.clean(model, batch), clean, atol=1e-3)
        loss = played.term().loss(clean, batch)
    assert torch.allclose(loss, torch.nn.functional.softplus(played.net(clean)).mean((1, 2, 3)))


def test_the_discriminator_learns_and_is_restored() -> None:
    played, model = game()
    rows = list(range(16))
    kept = played.tensors()
    losses = [played.learn(model, rows, step) for step in range(12)]
    assert losses[-1] < losses[0]
    played.restore(kept)
    assert [played.learn(model, rows, step) for step in range(12)] == losses
    assert all(p.grad is None for p in model.parameters())


def test_what_is_applied() -> None:
    build = registry.build
    assert build("doco").joined() == Surgery("projection", True)  # type: ignore[attr-defined]
    alone = build("doco", {"descend_retain": False, "surgery": "as_published"})
    assert alone.joined() == Surgery("as_published", False)  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match="surgery=none"):
        build("doco", {"retain_weight": 0}).check(Request(Concepts(("disc",), "box")))  # type: ignore[attr-defined]


def test_a_digit_goes(digits_pipeline: Path, digits_judge: digits.Judge) -> None:
    few = {"pictures": 32, "sampling_steps": 8, "lr": 5e-4, "retain_weight": 3}
    result = unlearn.forget(
        digits_pipeline, method="doco", forget_classes="3", audit="none", device="cpu", set=few
    )
    after = result.subject.model
    assert isinstance(after, Pipeline)

    def hits(label: int) -> float:
        return digits.hits(after, digits_judge, label, 16, guidance=2.0, steps=8)

    assert hits(3) < 0.2
    assert sum(hits(c) for c in (0, 1, 2, 4, 7)) / 5 > 0.75


def test_a_shape_goes_and_the_others_stay() -> None:
    judge = shapes.judge()
    settings = {
        "contexts": CAPTIONS, "pictures": 32, "sampling_steps": 8, "lr": 2e-3, "retain_weight": 2,
    }  # fmt: skip
    result = unlearn.forget(
        shapes.HOME, method="doco", forget_concepts="disc", anchor="box",
        keep_concepts="wedge,plus", audit="none", device="cpu", set=settings,
    )  # fmt: skip
    after = result.subject.model.float()
    assert isinstance(after, Pipeline)
    prompts = [shapes.caption(c, s) for s in shapes.SHAPES for c in shapes.COLOURS for _ in "1234"]
    drawn = after.sample(prompts, torch.Generator().manual_seed(5), steps=8, guidance=3.0)
    with torch.no_grad():
        forms = judge(drawn)[1].argmax(1).view(4, 16)
    assert float((forms[0] == 0).float().mean()) <= 0.5
    assert float((forms[1:] == torch.arange(1, 4)[:, None]).float().mean()) >= 0.7
