"""Forgetting through few groups of adapters: the losses, the proximal step, and what stays."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import unlearn
from tests.unlearn.test_objectives import UNITS, S
from tests.unlearn.test_task_vector import KillAt, Killed, killed_and_resumed
from tests.unlearn.test_training import same, start, weights
from unlearn import demo
from unlearn.checkpoint import inspect
from unlearn.data import load
from unlearn.errors import BadInput, Unsupported
from unlearn.group_sparsity import bounded, few, group_norm, grouped, shrink
from unlearn.interface import Classes, Request, Subject
from unlearn.methods.gs_lora import GSLoRA
from unlearn.methods.gs_lora_pp import GSLoRAPP, prototype_divergence, prototypes
from unlearn.run import Run, Silent
from unlearn.scope import feed_forward, moving
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification
from unlearn.training import Training

pytest.importorskip("peft")
TASK = Classification(4)
BOTH = pytest.mark.parametrize("method", [GSLoRA, GSLoRAPP])
NUMBERS = st.lists(st.floats(-100, 100), min_size=1, max_size=8)


class Deaf(nn.Module):
    """Two residual blocks, of which the first is not listened to, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(2)
        )
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0 * self.blocks[0](x)
        logits: Tensor = self.out(x + self.blocks[1](x))
        return logits


def made(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory().double().eval()


def records(n: int, classes: list[int], name: str, seed: int = 0) -> Encoded:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.tensor([classes[i % len(classes)] for i in range(n)])
    inputs = torch.randn(n, 6, generator=draw, dtype=torch.float64) + labels[:, None]
    return Encoded(load((inputs, labels), name), TASK)


def request(retained: tuple[int, ...] = (0, 1, 3)) -> Request:
    forget, retain = records(10, [2], "forget", 1), records(30, list(retained), "retain", 2)
    return Request(Classes((2,), ("2",)), forget, retain)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# ---------------------------------------------------------------------------- the losses


def test_forgetting_is_bounded_per_record_by_hand() -> None:
    """Two answers whose NLL per token is 1.7676720887... and 1.8007212024..."""
    mean = bounded(S / UNITS, 1.79).mean()
    assert float(mean) == pytest.approx((1.79 - 7.070688354909099 / 4) / 2, abs=1e-12)
    assert float(bounded(S / UNITS, 1.7).sum()) == 0


@given(NUMBERS, st.floats(0.1, 50))
def test_records_beyond_the_bound_do_not_make_up_for_others(losses: list[float], b: float) -> None:
    loss = torch.tensor(losses, dtype=torch.float64)
    each, mean = bounded(loss, b).mean(), bounded(loss.mean(), b)
    assert float(each) >= float(mean) - 1e-9
    if float(loss.max()) <= b:
        assert float(each) == pytest.approx(float(mean), abs=1e-9)


def test_divergence_from_a_prototype_by_hand() -> None:
    """softmax(0, ln 3) = (1/4, 3/4) against softmax(0, 0) = (1/2, 1/2)."""
    centres = torch.tensor([[9.0, 9.0], [0.0, math.log(3)]], dtype=torch.float64)
    found = prototype_divergence(torch.zeros(1, 2), centres, torch.tensor([1]))
    wanted = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(found[0]) == pytest.approx(wanted, abs=1e-12)


def dense(model: nn.Module, examples: Encoded) -> tuple[Tensor, Tensor, Tensor]:
    """NLL of every record, embeddings and labels, computed without the task."""
    x = torch.stack([torch.as_tensor(examples.examples[i]["features"]) for i in range(10)])
    y = torch.tensor([examples.examples[i]["label"] for i in range(10)])
    kept: list[Tensor] = []
    handle = model.out.register_forward_hook(lambda _, inputs, __: kept.append(inputs[0]))  # type: ignore[union-attr]
    loss = F.cross_entropy(model(x), y, reduction="none")
    handle.remove()
    return loss, kept[0], y


@BOTH
def test_the_objective_and_its_gradient_against_plain_autograd(method: type[Training]) -> None:
    model, asked = made(Deaf), request()
    extra: dict[str, float] = {}
    if method is GSLoRAPP:
        extra = {
            "prototype_weight": 0.3, "prototype_bound": 0.4, "prototype_retain_weight": 0.7,
        }  # fmt: skip
    settings = method(beta=0.6, bound=2.0, **extra)
    run = Run(TASK)
    terms = settings.terms(Subject(model), asked, run)
    found = torch.zeros((), dtype=torch.float64)
    for term in terms:
        batch = term.examples.batch(range(10))
        said = (term.forward or TASK.predictions)(model, batch)
        found = found + term.weight * term.loss(said, batch).mean()
    (forget_nll, e_f, y_f), (retain_nll, e_r, y_r) = (
        dense(model, examples) for examples in (asked.forget_set(), asked.retain_set())
    )
    wanted = retain_nll.mean() + 0.6 * (2.0 - forget_nll).clamp(min=0).mean()
    if method is GSLoRAPP:
        centres = prototypes(model, [asked.forget_set(), asked.retain_set()], run)
        kl_f, kl_r = (
            (centres[y].softmax(1) * (centres[y].log_softmax(1) - e.log_softmax(1))).sum(1)
            for e, y in ((e_f, y_f), (e_r, y_r))
        )
        assert bool((kl_f > 0.4).any() and (kl_f < 0.4).any())  # both sides of the bound
        wanted = wanted + 0.3 * (0.4 - kl_f).clamp(min=0).mean() + 0.7 * kl_r.mean()
    assert torch.allclose(found, wanted, atol=1e-12)
    parameters = list(model.parameters())
    pairs = zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True
    )
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in pairs)


def test_a_bound_behind_the_guard_is_refused() -> None:
    with pytest.raises(BadInput, match=r"not below 13\.9 nats"):
        GSLoRA(bound=110, max_loss=10).unlearn(Subject(made(Deaf)), request(), Run(TASK))


# --------------------------------------------------------------------- the proximal step


def test_shrinking_by_hand() -> None:
    group = [torch.tensor([[3.0], [0.0]]), torch.tensor([4.0])]
    assert shrink(group, 2.0) == pytest.approx(3.0)
    assert torch.allclose(torch.cat([t.flatten() for t in group]), torch.tensor([1.8, 0.0, 2.4]))
    assert shrink(group, 3.5) == 0
    assert not any(bool(t.any()) for t in group)
    assert shrink(group, 1.0) == 0  # at zero, where the norm has no gradient


@given(NUMBERS, st.floats(0, 200))
def test_shrinking_is_the_proximal_step(values: list[float], threshold: float) -> None:
    """At the minimiser of |x - v|^2 / 2 + t |x| a subgradient is zero."""
    v = torch.tensor(values, dtype=torch.float64)
    group = [part.clone() for part in torch.split(v, 3)]
    norm = group_norm(group)
    left = shrink(group, threshold)
    x = torch.cat(group)
    assert float(x.norm()) == pytest.approx(left, abs=1e-9)
    assert left <= norm
    assert bool((x.abs() <= v.abs()).all())
    if left:
        assert torch.allclose(x - v + threshold * x / x.norm(), torch.zeros(()).double(), atol=1e-9)
    else:
        assert not bool(x.any())
        assert norm <= threshold


def test_alpha_waits_and_then_takes_its_share_of_the_current_rate() -> None:
    settings = GSLoRA(alpha=0.5, alpha_from=0.4, lr=0.1, schedule="linear")
    weight = nn.Parameter(torch.full((4, 4), 1.0))
    memory: dict[str, Tensor] = {}
    for done in range(1, 5):
        settings.stepped({"block": {"w": weight}}, done, 10, memory)
    assert torch.equal(weight.detach(), torch.ones(4, 4))
    settings.stepped({"block": {"w": weight}}, 5, 10, memory)
    rate = 0.1 * (10 - 4) / 11  # what the fifth step was taken with
    assert torch.allclose(weight.detach(), torch.full((4, 4), 1 - 0.5 * rate))


def test_what_is_zero_stays_zero_whatever_momentum_does() -> None:
    settings = GSLoRA(alpha=0.9, alpha_from=0.0, lr=0.1, schedule="constant")
    weight = nn.Parameter(torch.full((3,), 0.05))
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
    memory: dict[str, Tensor] = {}
    weight.grad = torch.full((3,), 0.5)
    optimizer.step()
    settings.stepped({"block": {"w": weight}}, 1, 9, memory)
    assert not bool(weight.any())
    for done in range(2, 6):
        weight.grad = torch.zeros(3)
        optimizer.step()
        assert bool(weight.any())  # momentum alone moves it further than the step would take back
        settings.stepped({"block": {"w": weight}}, done, 9, memory)
        assert not bool(weight.any())


# ------------------------------------------------------------------------- what may move


def tiny(family: str) -> tuple[nn.Module, Any]:
    if family == "llama":
        subject, _, run = start()
        return subject.model, run.task
    sizes = {
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        "num_labels": 4,
    }  # fmt: skip
    if family == "vit":
        config = ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes)
        return ViTForImageClassification(config), TASK
    return BertForSequenceClassification(BertConfig(vocab_size=20, **sizes)), TASK


@pytest.mark.parametrize("family", ["llama", "vit", "bert"])
@pytest.mark.parametrize("scope", ["lora:ffn", "lora"])
def test_a_group_is_all_adapters_of_a_block(family: str, scope: str) -> None:
    model, task = tiny(family)
    blocks, inner = list(task.layers(model)), feed_forward(model, task)
    with moving(Subject(model), task, scope, 8, 1, 0) as moved:
        groups = grouped(moved.parameters, blocks)
        names = {name for group in groups.values() for name in group}
        assert names == set(moved.parameters)
    for block in blocks:
        layers = {n.removeprefix("base_model.model.").split(".lora_")[0] for n in groups[block]}
        assert layers == set(inner[block]) if scope == "lora:ffn" else layers > set(inner[block])
        assert len(groups[block]) == 2 * len(layers)
    outside = {name for name in groups if name not in blocks}
    assert (
        not outside if scope == "lora:ffn" else all(f".{name}." in str(names) for name in outside)
    )


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.Flatten(), nn.Linear(12, 4)
    )


@pytest.mark.parametrize("factory", [perceptron, convolutional])
def test_models_without_feed_forward_blocks_need_another_scope(
    factory: Callable[[], nn.Module],
) -> None:
    with pytest.raises(Unsupported, match="no blocks with feed-forward layers"):
        GSLoRA().unlearn(Subject(made(factory)), request(), Run(TASK))


def test_a_scope_without_adapters_is_refused() -> None:
    with pytest.raises(BadInput, match="trains no adapters"):
        GSLoRA(scope="all").unlearn(Subject(made(Deaf)), request(), Run(TASK))


@BOTH
def test_every_layer_is_a_group_where_there_are_no_blocks(method: type[Training]) -> None:
    run = Run(TASK)
    settings = method(scope="lora", epochs=1, batch_size=5)
    settings.unlearn(Subject(made(perceptron)), request(), run)
    assert "0 of 2 groups" in run.notes[-1]  # two layers below the output layer


@BOTH
def test_a_group_that_is_not_needed_ends_at_exactly_zero(
    tmp_path: Path, method: type[Training]
) -> None:
    """The first block of the model has no effect: the proximal step alone moves its adapters."""
    model, run = made(Deaf), Run(TASK, work=tmp_path)
    before = state(model)
    settings = method(epochs=40, batch_size=5, alpha=0.3, lr=0.02, schedule="constant")
    after = state(settings.unlearn(Subject(model), request(), run).model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"blocks.1.0.weight", "blocks.1.2.weight"}
    assert run.notes == [
        "1 of 2 groups of adapters are exactly zero: their layers are as they were."
    ]
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (norms,) = (event["norms"] for event in events if event["event"] == "groups")
    assert norms["blocks.0"] == 0 < norms["blocks.1"]


def test_a_strong_penalty_leaves_every_weight_as_it_was() -> None:
    subject, asked, run = start()
    before = weights(subject)
    after = GSLoRA(epochs=3, batch_size=4, alpha=300.0).unlearn(subject, asked, run)
    assert all(torch.equal(before[name], value) for name, value in weights(after).items())
    assert "2 of 2 groups" in run.notes[-1]


@BOTH
def test_it_forgets_to_the_bound_and_keeps_the_rest(method: type[Training]) -> None:
    model, asked = made(Deaf), request()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        sum(
            TASK.nll(model, e.batch(range(len(e)))).sum() for e in (asked.forget, asked.retain)
        ).backward()  # type: ignore[union-attr]
        optimizer.step()

    def hits(model: nn.Module, examples: Encoded) -> float:
        with torch.no_grad():
            said = TASK.predictions(model, examples.batch(range(len(examples))))
            return float(said.hits().double().mean())

    before = hits(model, asked.forget_set()), hits(model, asked.retain_set())
    assert min(before) > 0.8
    settings = method(epochs=40, batch_size=5, alpha=0.1, lr=0.02)
    model = settings.unlearn(Subject(model), asked, Run(TASK)).model
    assert hits(model, asked.forget_set()) <= 0.2
    assert hits(model, asked.retain_set()) >= before[1] - 0.1


# ------------------------------------------------------------- few records, missing classes


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 6), st.integers(0, 9))
def test_shots_are_drawn_per_class(labels: list[int], shots: int, seed: int) -> None:
    examples = Encoded(load((torch.randn(len(labels), 6), torch.tensor(labels)), "retain"), TASK)
    drawn = few(examples, shots, TASK, torch.Generator().manual_seed(seed))
    again = few(examples, shots, TASK, torch.Generator().manual_seed(seed))
    assert drawn.examples.ids == again.examples.ids == sorted(set(again.examples.ids), key=int)
    found = [labels[int(i)] for i in drawn.examples.ids]
    assert {c: found.count(c) for c in range(4)} == {
        c: min(shots, labels.count(c)) for c in range(4)
    }


def test_no_two_seeds_draw_the_same_and_texts_have_no_classes() -> None:
    examples = records(40, [0, 1], "retain")
    draws = [few(examples, 3, TASK, Run(TASK, seed).generator("shots")) for seed in (0, 1)]
    assert draws[0].examples.ids != draws[1].examples.ids
    subject, asked, run = start()
    with pytest.raises(BadInput, match="leave shots out"):
        GSLoRA(shots=4).unlearn(subject, asked, run)


@BOTH
def test_only_the_drawn_records_are_used(
    monkeypatch: pytest.MonkeyPatch, method: type[Training]
) -> None:
    used: set[str] = set()
    plain = Encoded.batch

    def batch(self: Encoded, indices: Any, device: Any = "cpu") -> Any:
        if self.name == "retain":
            used.update(self.examples.ids[i] for i in indices)
        return plain(self, indices, device)

    monkeypatch.setattr(Encoded, "batch", batch)
    method(epochs=4, batch_size=5, shots=2).unlearn(Subject(made(Deaf)), request(), Run(TASK))
    assert len(used) == 6


def test_prototypes_are_class_means_and_absent_without_records() -> None:
    model, forget = made(Deaf), records(5, [2], "forget", 1)
    retain = records(80, [0, 2], "retain", 2)
    found = prototypes(model, [forget, retain], Run(TASK))
    assert found.shape == (4, 6)
    assert not bool(found[[1, 3]].any())
    embedded = torch.cat([TASK.features(model, e.batch(range(len(e)))) for e in (forget, retain)])
    of_two = torch.tensor([2] * 5 + [0, 2] * 40) == 2
    assert torch.allclose(found[2], embedded[of_two].mean(0), atol=1e-12)


@BOTH
def test_classes_may_be_missing_from_the_retain_set(method: type[Training]) -> None:
    settings = method(epochs=4, batch_size=5, shots=3)
    after = settings.unlearn(Subject(made(Deaf)), request((3,)), Run(TASK)).model
    assert all(bool(torch.isfinite(p).all()) for p in after.parameters())


def test_one_forward_pass_serves_labels_and_prototypes() -> None:
    model, calls = made(Deaf), []
    settings = GSLoRAPP(epochs=1, batch_size=10, prototype_retain_weight=0.1)
    model.register_forward_hook(lambda *_: calls.append(1))
    settings.unlearn(Subject(model), request(), Run(TASK))
    assert len(calls) == 2 + 2  # the prototypes of both sets, then one step of both terms


# ------------------------------------------------------------------- averages and resuming


def test_weights_are_averaged_from_their_share_of_the_steps_on() -> None:
    settings = GSLoRAPP(average_decay=0.75, average_from=0.4, alpha=0.0)
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    memory: dict[str, Tensor] = {}
    for done, value in enumerate([9.0, 9.0, 1.0, 2.0, 4.0], start=1):
        with torch.no_grad():
            weight.fill_(value)
        settings.stepped({"block": {"w": weight}}, done, 5, memory)
        if done < 5:  # the average follows; training goes on from where it is
            assert weight.tolist() == [value] * 2
    by_hand = 0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 4
    assert weight.tolist() == pytest.approx([by_hand] * 2, abs=1e-12)


def test_an_average_brings_no_zero_group_back() -> None:
    settings = GSLoRAPP(average_from=0.0, alpha_from=0.5, alpha=0.9, lr=10.0, schedule="constant")
    weight, memory = nn.Parameter(torch.ones(3)), {}
    for done in range(1, 5):
        settings.stepped({"block": {"w": weight}}, done, 4, memory)
    assert not bool(weight.any())


@pytest.mark.parametrize("at", [3, 7])
def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path, at: int) -> None:
    settings = GSLoRA(epochs=5, batch_size=4, alpha=0.4)
    whole, resumed = killed_and_resumed(settings, tmp_path, at=at)
    assert same(whole, resumed)


@pytest.mark.parametrize("at", [3, 9, 16])
def test_a_killed_run_with_averages_and_prototypes_ends_in_the_same_bits(
    tmp_path: Path, at: int
) -> None:
    """Killed while averaging, too, and behind the last step, when nothing is left to do."""
    settings = GSLoRAPP(
        epochs=8, batch_size=5, alpha=0.8, lr=0.05, prototype_retain_weight=0.1, shots=5
    )
    whole = settings.unlearn(Subject(made(Deaf)), request(), run := Run(TASK)).model
    work = Run(TASK, work=tmp_path, save_every=0.0, progress=KillAt(at))
    with pytest.raises(Killed):
        settings.unlearn(Subject(made(Deaf)), request(), work)
    work = replace(work, progress=Silent(), notes=[])
    resumed = settings.unlearn(Subject(made(Deaf)), request(), work).model
    assert same(state(whole), state(resumed))
    assert work.notes == run.notes


# ------------------------------------------------------------------------- several requests


def test_a_series_keeps_an_adapter_of_zeros_or_merges(tmp_path: Path, tiny_lm: Path) -> None:
    world = demo.people(seed=2, forget=1, retain=4, holdout=1)
    asked: dict[str, Any] = {
        "method": "gs_lora", "forget": world.forget, "retain": world.retain, "audit": "none",
    }  # fmt: skip
    first = {"epochs": 3, "batch_size": 4, "alpha": 0.0}
    unlearn.forget(tiny_lm, **asked, set=first, out=tmp_path / "one")
    adapter = load_file(tmp_path / "one/model/adapter_model.safetensors")
    assert all(".mlp." in name for name in adapter)
    assert any(bool(value.any()) for value in adapter.values())
    again = unlearn.forget(
        tmp_path / "one", **asked, set=first, merge=True, out=tmp_path / "two"
    ).subject.model
    assert len(inspect(tmp_path / "two").lineage) == 2
    before, after = (state(inspect(tmp_path / d).load().model) for d in ("one", "two"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".mlp." in name for name in moved)
    assert all(torch.equal(after[name], value) for name, value in again.state_dict().items())
