"""Boundary shrink against closed forms, and a shadow class that leaves no trace."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import unlearn
from unlearn.checkpoint import inspect
from unlearn.data import load
from unlearn.errors import Collapsed, Unsupported
from unlearn.interface import Classes, Records, Request, Subject
from unlearn.methods.boundary import Boundary, nearest_labels, shadow_class
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification
from unlearn.weights import save

CENTRES = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])


def centroid_classifier() -> nn.Module:
    """f_k(x) = -|x - c_k|^2 / 2 up to a constant: boundaries halfway between the centres."""
    model = nn.Sequential(nn.Linear(2, 3))
    with torch.no_grad():
        model[0].weight.copy_(CENTRES)
        model[0].bias.copy_(-CENTRES.square().sum(1) / 2)
    return model


def examples(inputs: torch.Tensor, labels: list[int], name: str = "forget") -> Encoded:
    return Encoded(load((inputs, labels), name), Classification(3))


def cloud(classes: list[int], n: int, seed: int, name: str) -> Encoded:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.arange(n) % len(classes)]
    return examples(CENTRES[labels] + 0.4 * torch.randn(n, 2, generator=draw), labels, name)


def nll(model: nn.Module, data: Encoded) -> float:
    with torch.no_grad():
        return float(data.task.nll(model, data.batch(range(len(data)))).mean())


def test_the_nearest_label_lies_one_step_away() -> None:
    """The slope of the NLL at class 0 points towards the likeliest other centre."""
    forget = examples(torch.tensor([[1.4, 0.2], [0.2, 1.4], [1.4, -3.0]]), [0, 0, 0])
    found = nearest_labels(forget.task, centroid_classifier(), forget.batch([0, 1, 2]), 0.3)
    assert found.tolist() == [1, 2, 1]


def test_the_step_is_along_the_sign_of_the_gradient() -> None:
    """With logits (0, a, b - h) at x and a big step, only the direction decides which one wins."""
    forget = examples(torch.tensor([[0.5, 0.4]]), [0])
    model = centroid_classifier()
    batch = forget.batch([0])
    p = (batch["features"] @ CENTRES.T - CENTRES.square().sum(1) / 2).softmax(1)[0]
    slope = p[1] * (CENTRES[1] - CENTRES[0]) + p[2] * (CENTRES[2] - CENTRES[0])
    assert slope.gt(0).all()  # both signs are +1: the step adds eps to both entries
    moved = batch["features"] + 5.0
    logits = (moved @ CENTRES.T - CENTRES.square().sum(1) / 2)[0]
    logits[0] = -math.inf
    found = nearest_labels(forget.task, model, batch, 5.0)
    assert found.tolist() == [int(logits.argmax())]


def test_the_own_label_is_never_the_nearest() -> None:
    forget = cloud([0, 1, 2], 30, 0, "forget")
    batch = forget.batch(range(30))
    found = nearest_labels(forget.task, centroid_classifier(), batch, 1e-6)
    assert not (found == batch["labels"][:, 0]).any()
    assert batch["features"].grad_fn is None


def test_labels_are_found_once_and_read_back(tmp_path: Path) -> None:
    forget, method = cloud([0], 12, 0, "forget"), Boundary()
    request = Request(Records(12), forget)
    run = Run(forget.task, work=tmp_path)
    before = method.terms(Subject(centroid_classifier()), request, run)[0].examples
    torch.manual_seed(0)
    another = nn.Sequential(nn.Linear(2, 3))  # what an interrupted run has become meanwhile
    again = method.terms(Subject(another), request, run)[0].examples
    assert [before[i]["label"] for i in range(12)] == [again[i]["label"] for i in range(12)]
    assert [forget[i]["label"] for i in range(12)] == [0] * 12


def trained() -> nn.Module:
    data = cloud([0, 1, 2], 90, 5, "data")
    batch = data.batch(range(90))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 3))
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(100):
            optimizer.zero_grad()
            data.task.nll(model, batch).mean().backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("mode", ["shrink", "expand"])
def test_the_class_is_forgotten_rather_than_the_rest(mode: str) -> None:
    forget, retain = cloud([2], 20, 1, "forget"), cloud([0, 1], 40, 2, "retain")
    model = trained()
    before = nll(model, forget), nll(model, retain)
    method = Boundary(mode=mode, lr=0.01, epochs=8, batch_size=4)
    request = Request(Classes((2,), ("2",)), forget)
    after = method.unlearn(Subject(model), request, Run(forget.task)).model
    forgot, lost = nll(after, forget) - before[0], nll(after, retain) - before[1]
    assert forgot > 0.5
    assert lost < forgot / 3


@pytest.mark.parametrize("bias", [True, False])
def test_a_shadow_class_comes_and_goes(bias: bool) -> None:
    head = nn.Linear(4, 3, bias=bias)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    logits = head(x).detach()
    with shadow_class(head, torch.Generator().manual_seed(1)) as index:
        assert index == 3
        assert head(x).shape == (5, 4)
        assert torch.equal(head.weight[:3], before["weight"])
        assert torch.allclose(head(x)[:, :3], logits, atol=1e-6)
        assert head.weight[3].abs().max() <= 0.5
        assert head.weight[3].std() > 0
        with torch.no_grad():
            head.weight[3] = 7.0
    assert head.out_features == 3
    assert {n: p.shape for n, p in head.named_parameters()} == {
        n: v.shape for n, v in before.items()
    }
    assert all(torch.equal(p, before[n]) for n, p in head.named_parameters())


class Stopped(Exception):
    pass


@pytest.mark.parametrize("mode", ["shrink", "expand"])
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, mode: str) -> None:
    forget = cloud([2], 20, 1, "forget")
    method = Boundary(mode=mode, lr=0.01, epochs=2, batch_size=4)
    request = Request(Classes((2,), ("2",)), forget)
    whole = method.unlearn(Subject(trained()), request, Run(forget.task)).model.state_dict()

    class StopAt:
        def advance(self, phase: str, done: int, total: int, numbers: object) -> None:
            if phase == "unlearn" and done == 5:
                raise Stopped

        def say(self, sentence: str) -> None: ...

    run = Run(forget.task, work=tmp_path, save_every=0.0, progress=StopAt())
    with pytest.raises(Stopped):
        method.unlearn(Subject(trained()), request, run)
    run = Run(forget.task, work=tmp_path, save_every=0.0)
    resumed = method.unlearn(Subject(trained()), request, run).model.state_dict()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_shadow_class_goes_when_training_collapses() -> None:
    forget, model = cloud([2], 8, 1, "forget"), centroid_classifier()
    request = Request(Classes((2,), ("2",)), forget)
    with pytest.raises(Collapsed):
        Boundary(mode="expand", lr=1e9, epochs=9, batch_size=4).unlearn(
            Subject(model), request, Run(forget.task)
        )
    assert model[0].weight.shape == (3, 2)


def test_a_transformers_model_keeps_its_shape_and_its_names() -> None:
    names = {0: "ant", 1: "bee", 2: "cat"}
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, id2label=names, label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTForImageClassification(config).eval()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    forget = examples(torch.rand(6, 3, 8, 8), [1] * 6)
    request, run = Request(Classes((1,), ("bee",)), forget), Run(forget.task)
    after = Boundary(mode="expand", epochs=2, lr=1e-3).unlearn(Subject(model), request, run).model
    assert {name: value.shape for name, value in after.state_dict().items()} == shapes
    assert after.config.num_labels == 3
    assert after.config.id2label == names
    assert after.classifier.out_features == 3
    assert after(torch.rand(2, 3, 8, 8)).logits.shape == (2, 3)


def test_expand_is_for_classes_and_for_linear_output_layers() -> None:
    assert "records" in Boundary().needs.targets
    assert Boundary(mode="expand").needs.targets == ("classes",)
    forget = cloud([2], 8, 1, "forget")
    model = nn.Sequential(nn.Linear(2, 4), nn.Conv1d(4, 3, 1))
    request = Request(Classes((2,), ("2",)), forget)
    with pytest.raises(Unsupported, match="one output per class"):
        Boundary(mode="expand").unlearn(Subject(model), request, Run(forget.task))


@pytest.mark.parametrize("method", ["boundary", "jit", "unsir"])
def test_tokens_are_refused_before_anything_is_loaded(
    method: str, tmp_path: Path, tiny_lm: Path
) -> None:
    tokenizer = inspect(tiny_lm).processor
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=64, num_labels=2, pad_token_id=2,
    )  # fmt: skip
    reader = BertForSequenceClassification(config)
    save(Subject(reader, tokenizer), torch.float32, tmp_path / "reader")
    records = [{"text": "a b", "label": 0}, {"text": "b a", "label": 1}]
    with pytest.raises(Unsupported, match="tokens cannot be moved"):
        unlearn.forget(
            tmp_path / "reader", method=method, data=records, forget_classes="1", audit="none",
            out=tmp_path / "run",
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
