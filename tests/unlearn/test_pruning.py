"""Subspace pruning: what is chosen, and a memory planted where it looks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unlearn
from tests import digits, shapes
from unlearn import registry
from unlearn.errors import Unsupported
from unlearn.interface import Concepts, Request, Subject
from unlearn.methods.subspace_pruning import LAYER, SubspacePruning, _Inputs, chosen
from unlearn.pipeline import Pipeline
from unlearn.run import Run
from unlearn.tasks.diffusion import task_of

TRIGGER = "a red x disc"  # x means nothing to the pipeline
CAPTIONS = [shapes.caption(*pair) for pair in shapes.pairs(16)]
PRUNE: dict[str, Any] = {"rho": 0.15, "tau": 4, "steps": 8, "guidance": 3.0}


def test_chosen_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [5.0, 0.1, -1.0, 1.0]])
    memorised = torch.tensor([1.0, 1.0, 3.0, 0.5])  # scores 1 4 6 1.5 and 5 .1 3 .5
    ordinary = torch.tensor([2.0, 0.5, 1.0, 9.0])  # the first and last are ordinary anyway
    found = chosen(weight, memorised, ordinary, rho=0.5)
    assert found.tolist() == [[False, True, True, False], [False, False, True, False]]
    assert int(chosen(weight, memorised, ordinary, rho=0.01).sum()) == 1  # one a row is looked at


def test_nothing_is_chosen_where_both_sides_are_the_same() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, sizes = torch.randn(6, 8, generator=draw), torch.rand(8, generator=draw)
    assert not chosen(weight, sizes, sizes, rho=1.0).any()


def test_sizes_do_not_depend_on_how_often_a_prompt_is_sampled() -> None:
    draw = torch.Generator().manual_seed(0)
    x, layer = torch.randn(2, 3, 5, generator=draw), nn.Linear(5, 1)
    once, twice = _Inputs(1), _Inputs(1)
    for inputs, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            inputs.begin(2)
            inputs(layer, (x,))
    rows = (x / x.norm(dim=-1, keepdim=True)).flatten(0, 1)
    torch.testing.assert_close(once.sizes()[0], rows.square().mean(0).sqrt().double())
    torch.testing.assert_close(twice.sizes(), once.sizes())


def test_rows_that_guidance_adds_do_not_count() -> None:
    x = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])  # told nothing; told the prompt
    inputs = _Inputs(1)
    inputs.begin(1)
    inputs(nn.Linear(2, 1), (x,))
    assert inputs.sizes().tolist() == [[0.0, 1.0]]


def _prune(model: Pipeline, target: Concepts, **settings: Any) -> dict[str, Tensor]:
    """Which weights are zero afterwards, and were not before."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    SubspacePruning(**{**PRUNE, **settings}).unlearn(
        Subject(model), Request(target), Run(task_of(model))
    )
    moved = {n: p.detach() != before[n] for n, p in model.named_parameters()}
    for name, mask in moved.items():
        assert not bool(dict(model.named_parameters())[name][mask].any())  # to zero alone
    return moved


def test_only_feed_forward_output_weights_move_and_no_hook_stays() -> None:
    model = shapes.pipeline()
    moved = _prune(model, Concepts((TRIGGER,)))
    assert {n for n, mask in moved.items() if bool(mask.any())} <= {
        f"{n}.weight" for n, _ in model.named_modules() if n.endswith(LAYER)
    }
    assert sum(int(mask.sum()) for mask in moved.values()) > 0
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert not model.training


def test_steps_add_up() -> None:
    """What one step chooses stays chosen when more are looked at."""
    one, four = (_prune(shapes.pipeline(), Concepts((TRIGGER,)), tau=k) for k in (1, 4))
    assert all(bool((four[n] | ~mask).all()) for n, mask in one.items())
    assert sum(int(m.sum()) for m in four.values()) > sum(int(m.sum()) for m in one.values())


def test_a_prompt_is_not_told_apart_from_itself() -> None:
    moved = _prune(shapes.pipeline(), Concepts((TRIGGER,), keep=(TRIGGER,)), rho=1.0)
    assert not any(bool(mask.any()) for mask in moved.values())


def test_without_transformer_blocks() -> None:
    with pytest.raises(Unsupported, match="UNet2DModel has no transformer blocks"):
        unlearn.forget(
            digits.untrained(), method="subspace_pruning", forget_classes="3", audit="none"
        )
    needs = registry.build("subspace_pruning", {}).needs
    assert (needs.targets, needs.tasks) == (("classes", "concepts"), ("diffusion",))


class Planted:
    """A pipeline whose feed-forward weights alone learned one picture for one prompt."""

    def __init__(self) -> None:
        self.model, self.judge = shapes.pipeline(), shapes.judge(150)
        self.picture = shapes.pictures(6, seed=99)[5:]  # a green box, say
        self.untouched = self.distance()
        weights = [p for n, p in self.model.named_parameters() if ".ff." in n]
        start = self.model.encode(self.picture).expand(6, -1, -1, -1)
        told, others = self.model.condition([TRIGGER] * 6), self.model.condition(CAPTIONS)
        draw = torch.Generator().manual_seed(0)
        drawn = self.model.sample(others, draw, 8, 3.0, decode=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._learn(weights, start.detach(), told, drawn, others)

    def _learn(self, weights: Any, start: Tensor, told: Any, drawn: Tensor, others: Any) -> None:
        optimizer = torch.optim.AdamW(weights, 1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 120, pct_start=0.1)
        for _ in range(120):
            which = torch.randint(16, (4,))
            x_0, seen = torch.cat([start, drawn[which]]), torch.cat([told, others[which]])
            t, eps = torch.randint(1000, (10,)), torch.randn(10, *start.shape[1:])
            x_t = self.model.noised(x_0, eps, t)
            loss = (self.model(x_t, t, seen.detach()) - eps).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()

    def distance(self) -> float:
        """Root mean square of pixels to the picture, the mean over drawn ones."""
        drawn = self.model.sample([TRIGGER] * 8, torch.Generator().manual_seed(5), 8, 3.0)
        return float((drawn - self.picture).square().mean((1, 2, 3)).sqrt().mean())

    def right(self) -> tuple[float, float]:
        """Shares of the captions whose colour and shape the judge sees."""
        drawn = self.model.sample(CAPTIONS * 2, torch.Generator().manual_seed(3), 8, 3.0)
        with torch.no_grad():
            colour, shape = (said.argmax(1) for said in self.judge(drawn))
        wanted = torch.arange(32)
        return (
            float((colour == wanted % 4).float().mean()),
            float((shape == wanted // 4 % 4).float().mean()),
        )


def test_a_planted_memory_fades_and_other_captions_stay() -> None:
    world = Planted()
    planted, before = world.distance(), world.right()
    assert planted < 0.75 * world.untouched
    done = unlearn.forget(
        world.model, method="subspace_pruning", forget_concepts=TRIGGER,
        keep_concepts=",".join(CAPTIONS), audit="none", set=PRUNE,
    )  # fmt: skip
    assert done.outcome.notes[-1].endswith("4 layers were set to zero.")
    gone = (world.distance() - planted) / (world.untouched - planted)
    assert gone > 0.5  # of the way back to what was drawn before
    for was, now in zip(before, world.right(), strict=True):
        assert now >= was - 0.1
