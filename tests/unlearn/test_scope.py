"""What may move: whole parameters by pattern, or one entry of a fused tensor."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Subject
from unlearn.scope import last_blocks, matching, moving
from unlearn.tasks.classification import Classification
from unlearn.training import Training, optimizer_for

TASK = Classification(3)


class Stacked(nn.Module):
    """Four linear maps in one tensor, summed, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = self.out(torch.einsum("ekd,nd->nk", self.maps.tanh(), x))
        return values


def loss(model: nn.Module, seed: int, **replaced: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 5, generator=draw), torch.randint(3, (8,), generator=draw)
    return F.cross_entropy(torch.func.functional_call(model, replaced, (x,)), y)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_entry_moves_as_if_it_were_a_parameter_of_its_own(optimizer: str) -> None:
    settings = Training(optimizer=optimizer, lr=0.05, weight_decay=0.3)
    model = Stacked()
    start = copy.deepcopy(model)
    alone = nn.Parameter(start.maps.detach()[2].clone())

    with moving(Subject(model), TASK, "maps@2", 1, 1, 0) as moved:
        assert list(moved.parameters) == ["maps@2"]
        one = optimizer_for(moved, settings)
        other = type(one)([{**one.param_groups[0], "params": [alone]}])
        for step in range(5):
            one.zero_grad()
            other.zero_grad()
            for half in (0, 1):  # gradients add up over micro-batches
                loss(model, 2 * step + half).backward()
                maps = torch.cat((start.maps[:2], alone[None], start.maps[3:]))
                loss(start, 2 * step + half, maps=maps).backward()
            assert torch.equal(moved.parameters["maps@2"].grad, alone.grad)
            assert model.maps.grad is None  # nothing is kept for the others
            one.step()
            other.step()
    assert torch.equal(model.maps[2], alone)
    assert not torch.equal(model.maps[2], start.maps[2])
    assert torch.equal(model.maps[[0, 1, 3]], start.maps[[0, 1, 3]])
    assert torch.equal(model.out.weight, start.out.weight)


def test_afterwards_all_is_as_it_was() -> None:
    model = Stacked()
    with moving(Subject(model), TASK, r"maps@0 out\.bias", 1, 1, 0) as moved:
        assert set(moved.parameters) == {"maps@0", "out.bias"}
        assert not model.out.weight.requires_grad
    assert all(p.requires_grad for p in model.parameters())
    loss(model, 0).backward()
    assert model.maps.grad is not None
    assert float(model.maps.grad[1].abs().sum()) > 0


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ("maps@4", r"of shape \(4, 6, 5\) has no entry 4"),
        ("maps@1 maps@2", "selects two entries of maps"),
        ("maps@1 a", "selects maps@1 and all of that tensor"),
        ("out nowhere", "'nowhere' matches no parameter"),
        ("maps(@1", "not a regular expression"),
    ],
)
def test_what_cannot_be_meant_is_refused(scope: str, message: str) -> None:
    model = Stacked()
    with pytest.raises(BadInput, match=message), moving(Subject(model), TASK, scope, 1, 1, 0):
        pass
    assert all(p.requires_grad for p in model.parameters())


def test_names_that_patterns_select() -> None:
    names = ["a.gate.weight", "a.experts.up", "a.experts.down", "head.weight"]
    assert matching(r"experts\.@3", names) == names[1:3]
    assert matching(r"head a\.gate", names) == [names[0], names[3]]
    assert matching("weight|up a", names) == names
    assert matching("all", names) == names


def test_experts_are_the_routed_ones() -> None:
    names = ["a.experts.up", "a.shared_experts.up", "a.gate.weight"]
    assert matching("experts", names) == names[:1]
    assert matching("experts@2 gate", names) == [names[0], names[2]]
    with pytest.raises(Unsupported, match="not a mixture of experts"):
        matching("experts", names[1:])


def test_a_gradient_that_was_left_behind_is_not_taken_for_a_part_s_own() -> None:
    found, made = [], Stacked()
    for left in (False, True):
        model = copy.deepcopy(made)
        if left:
            loss(model, 9).backward()
        with moving(Subject(model), TASK, "maps@2", 1, 1, 0) as moved:
            loss(model, 0).backward()
            found.append(moved.parameters["maps@2"].grad.clone())
    assert torch.equal(*found)


class Blocks(nn.Module):
    """Two transformer-like blocks of four linear layers each, with a norm between."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"mix": nn.Linear(6, 6), "norm": norm(6), "up": nn.Linear(6, 9),
                 "down": nn.Linear(9, 6)}
            )
            for _ in range(2)
        )  # fmt: skip
        self.norm = norm(6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block["norm"](block["mix"](x))
            x = x + block["down"](block["up"](x).tanh())
        logits: Tensor = self.out(self.norm(x))
        return logits


@pytest.mark.parametrize(
    ("scope", "wanted"),
    [
        ("lora", {f"blocks.{i}.{n}" for i in (0, 1) for n in ("mix", "up", "down")} | {"stem"}),
        ("lora:ffn", {f"blocks.{i}.{n}" for i in (0, 1) for n in ("up", "down")}),
        (r"lora:blocks\.1\.", {f"blocks.1.{n}" for n in ("mix", "up", "down")}),
        (r"lora:up \.0\.mix", {"blocks.0.up", "blocks.1.up", "blocks.0.mix"}),
    ],
)
def test_adapters_sit_where_they_were_sent(scope: str, wanted: set[str]) -> None:
    pytest.importorskip("peft")
    model = Blocks()
    start = copy.deepcopy(model.state_dict())
    with moving(Subject(model), TASK, scope, 2, 4, 0) as moved:
        assert moved.parameters
        assert all("lora_" in name for name in moved.parameters)
        for parameter in moved.parameters.values():
            nn.init.constant_(parameter, 0.1)
    after = model.state_dict()
    assert after.keys() == start.keys()
    assert {n.removesuffix(".weight") for n in start if not torch.equal(start[n], after[n])} == (
        wanted
    )


def test_adapters_without_a_layer_to_sit_on_are_refused() -> None:
    pytest.importorskip("peft")
    for scope, model in (("lora:norm", Blocks()), ("lora:ffn", nn.Sequential(nn.Linear(5, 3)))):
        with (
            pytest.raises(Unsupported, match="has no"),
            moving(Subject(model), TASK, scope, 1, 1, 0),
        ):
            pass


def test_scopes_are_checked_against_names_before_anything_is_loaded() -> None:
    names = [name for name, _ in Blocks().named_parameters()]
    for scope in ("lora", "lora:ffn", "saliency:0.2", "saliency:1"):
        assert matching(scope, names) == names
    assert matching(r"lora:\.up\.", names) == [name for name in names if ".up." in name]
    with pytest.raises(BadInput, match="'nowhere' matches no parameter"):
        matching("lora:nowhere", names)
    with pytest.raises(BadInput, match="not a regular expression"):
        matching("lora:(", names)
    for share in ("0", "1.5", "-1", "half", "nan", ""):
        with pytest.raises(BadInput, match="must be above 0 and at most 1"):
            matching(f"saliency:{share}", names)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_salient_weights_move_as_if_the_others_did_not_exist(optimizer: str) -> None:
    settings = Training(optimizer=optimizer, lr=0.05, weight_decay=0.3)
    model = Stacked()
    start = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(1)
    masks = {
        name: torch.rand(p.shape, generator=draw) < 0.4 for name, p in model.named_parameters()
    }
    masks["out.bias"][:] = True
    masks["out.weight"][:] = False
    mask = masks["maps"]
    alone = nn.Parameter(start.maps.detach()[mask])
    bias = nn.Parameter(start.out.bias.detach().clone())

    with moving(Subject(model), TASK, "saliency:0.4", 1, 1, 0, salient=masks) as moved:
        assert set(moved.parameters) == {"maps@salient", "out.bias"}
        one = optimizer_for(moved, settings)
        parts = {"maps@salient": alone, "out.bias": bias}
        mine = [parts[name] for name in moved.parameters]
        other = type(one)([{**one.param_groups[0], "params": mine}])
        for step in range(5):
            one.zero_grad()
            other.zero_grad()
            loss(model, step).backward()
            maps = start.maps.detach().masked_scatter(mask, alone)
            loss(start, step, **{"maps": maps, "out.bias": bias}).backward()
            one.step()
            other.step()
            moved.settle()
    assert torch.equal(model.maps[mask], alone)
    assert torch.equal(model.maps[~mask], start.maps[~mask])
    assert torch.equal(model.out.bias, bias)
    assert torch.equal(model.out.weight, start.out.weight)
    assert not torch.equal(model.maps, start.maps)


def test_saliency_without_masks_is_refused() -> None:
    with (
        pytest.raises(Unsupported, match="no gradients of a forget set"),
        moving(Subject(Stacked()), TASK, "saliency:0.5", 1, 1, 0),
    ):
        pass


def test_the_last_blocks_and_what_is_behind_them() -> None:
    behind = ["norm.weight", "norm.bias", "out.weight", "out.bias"]
    names = [name for name, _ in Blocks().named_parameters()]
    assert last_blocks(Blocks(), TASK, 1) == [n for n in names if "blocks.1." in n] + behind
    assert last_blocks(Blocks(), TASK, 2) == names[2:]
    counted = last_blocks(Blocks(nn.BatchNorm1d), TASK, 1)
    assert {"blocks.1.norm.running_mean", "norm.num_batches_tracked"} <= {*counted}
    assert not any(name.startswith(("stem", "blocks.0")) for name in counted)
    with pytest.raises(BadInput, match="k = 3, and the model has 2 blocks"):
        last_blocks(Blocks(), TASK, 3)
    with pytest.raises(Unsupported, match="has no blocks"):
        last_blocks(Stacked(), TASK, 1)
    plain = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    assert last_blocks(plain, TASK, 1) == ["2.weight", "2.bias", "4.weight", "4.bias"]


def test_an_output_layer_that_is_the_input_layer_is_in_front() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs = nn.Linear(5, 3)
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
            self.out = nn.Linear(5, 3)
            self.out.weight = self.inputs.weight

    assert last_blocks(Tied(), TASK, 1) == ["blocks.1.weight", "blocks.1.bias", "out.bias"]
