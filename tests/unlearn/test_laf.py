"""Forgetting without labels: the losses by hand, the two optimisers, and that no label is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

import unlearn
from unlearn.data import load
from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Need, Records, Request, Subject
from unlearn.methods.laf import (
    EXTRACT,
    LAF,
    RepresentationVAE,
    _Alignment,
    _Standard,
    alignment_loss,
    cosine_distance,
    extraction_score,
    vae_loss,
)
from unlearn.run import Run
from unlearn.tasks.base import IGNORED, Encoded
from unlearn.tasks.classification import Classification
from unlearn.training import schedule

CLASSES = 3
UNLABELLED = Classification(CLASSES).reading(Need.NO)
SHORT: dict[str, Any] = {
    "epochs": 2, "batch_size": 4, "lr": 1e-2, "align_lr": 5e-3, "latent": 2, "vae_steps": 30,
}  # fmt: skip


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def rows(n: int, seed: int, **extra: Any) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    return [{"features": torch.randn(4, generator=draw).tolist(), **extra} for _ in range(n)]


def request(task: Classification = UNLABELLED, **extra: Any) -> Request:
    forget = Encoded(load(rows(6, 1), "forget"), task.reading(Need.NO))
    return Request(Records(6), forget, Encoded(load(rows(20, 2, **extra), "retain"), task))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unlearned(method: LAF, **run: Any) -> dict[str, Tensor]:
    subject = Subject(network())
    return weights(method.unlearn(subject, request(), Run(Classification(CLASSES), **run)).model)


# ------------------------------------------------------------------------------- losses by hand


def test_extraction_score_by_hand() -> None:
    said = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    vectors = torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    wanted = [math.exp(5 / 6), 1.0]  # mean squared errors 5 and 0
    assert extraction_score(said, vectors).tolist() == pytest.approx(wanted, abs=1e-12)
    far = extraction_score(1e6 * said, vectors)[0]
    assert float(far) < math.e


def test_extraction_score_has_its_gradient() -> None:
    """d exp(m/(m+1)) / dh = exp(m/(m+1)) / (m+1)^2 * 2 (h - said) / dim."""
    draw = torch.Generator().manual_seed(0)
    said, vectors = torch.randn(2, 3, 5, generator=draw, dtype=torch.float64)
    vectors.requires_grad_()
    extraction_score(said, vectors).sum().backward()
    m = (said - vectors).square().mean(1, keepdim=True)
    wanted = (m / (m + 1)).exp() / (m + 1) ** 2 * 2 * (vectors - said) / 5
    assert torch.allclose(vectors.grad, wanted, atol=1e-12)
    assert torch.autograd.gradcheck(extraction_score, (said, vectors))


def test_vae_loss_by_hand() -> None:
    one = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    said = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    mean = torch.tensor([[2.0], [0.0]], dtype=torch.float64)
    spread = torch.tensor([[0.0], [math.log(4)]], dtype=torch.float64)
    # errors 5 and 1; divergences 4/2 and (4 - 1 - log 4)/2
    wanted = (5 + 1) / 2 + 0.025 * (2 + (3 - math.log(4)) / 2) / 2
    assert vae_loss(said, one, mean, spread).item() == pytest.approx(wanted, abs=1e-12)
    normal = torch.distributions.Normal
    own = normal(mean, (0.5 * spread).exp())
    kl = torch.distributions.kl_divergence(own, normal(torch.zeros(1), torch.ones(1))).sum(1)
    assert vae_loss(one, one, mean, spread).item() == pytest.approx(0.025 * kl.mean().item())


def test_alignment_loss_by_hand() -> None:
    retain = torch.tensor([0.1, 0.3], dtype=torch.float64)
    forget = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    pushed = math.log((math.exp(0.25) + math.exp(0.5) + math.exp(1.0)) / 3)
    assert alignment_loss(retain, forget, 2.0).item() == pytest.approx(0.2 - pushed, abs=1e-12)
    inputs = (retain.requires_grad_(), forget.requires_grad_())
    assert torch.autograd.gradcheck(lambda r, f: alignment_loss(r, f, 2.0), inputs)


def test_alignment_loss_is_the_published_one_up_to_a_constant() -> None:
    """sum_i log(exp(d_i) / sum_j exp(d_j / t)), over the batch and without log of its size."""
    draw = torch.Generator().manual_seed(0)
    retain, forget = torch.rand(2, 5, generator=draw, dtype=torch.float64)
    published = torch.log(retain.exp() / (forget / 20).exp().sum()).sum()
    found = alignment_loss(retain, forget, 20.0).item()
    assert found == pytest.approx(published.item() / 5 + math.log(5), abs=1e-12)


def test_cosine_distance_is_that_of_the_embedding_loss() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 6, 4, generator=draw, dtype=torch.float64)
    wanted = F.cosine_embedding_loss(one, other, torch.ones(6), reduction="none")
    assert torch.allclose(cosine_distance(one, other), wanted, atol=1e-10)


# ---------------------------------------------------------------------------------- autoencoder


def test_the_autoencoder_draws_noise_in_train_mode_only() -> None:
    vae, vectors = RepresentationVAE(6, 2), torch.ones(3, 6)
    assert not torch.equal(vae(vectors)[0], vae(vectors)[0])
    vae.eval()
    assert torch.equal(vae(vectors)[0], vae(vectors)[0])


def test_the_autoencoder_fits_what_a_sigmoid_cannot() -> None:
    """Standardised representations are negative or above 1 most of the time."""
    draw = torch.Generator().manual_seed(0)
    line = torch.randn(200, 1, generator=draw).double() * torch.linspace(1, 8, 8).double() + 5
    examples = request().retain_set()
    vectors = _Standard(line, torch.device("cpu"))(line)
    vae = LAF(latent=2, vae_steps=600)._autoencoder(vectors, examples, Run(UNLABELLED))
    error = (vae(vectors)[0] - vectors).square().mean().item()
    clipped = (vectors.clamp(0, 1) - vectors).square().mean().item()
    assert error < 0.5 * clipped
    assert not any(p.requires_grad for p in vae.parameters())


def test_dimensions_are_standardised_and_dead_ones_do_not_explode() -> None:
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(50, 3, generator=draw, dtype=torch.float64) * torch.tensor(
        [1.0, 50.0, 0.0]
    )
    standard = _Standard(vectors + 7, torch.device("cpu"))
    found = standard(vectors + 7)
    assert torch.allclose(found.mean(0), torch.zeros(3).double(), atol=1e-12)
    assert found[:, 1].std(correction=0).item() == pytest.approx(1)
    assert float(standard(vectors + 8)[:, 2].abs().max()) < 1


# ------------------------------------------------------------------------------- the descent


def representations(model: nn.Module, data: Encoded, indices: list[int]) -> Tensor:
    hidden: Tensor = model[1](model[0](data.batch(indices)["features"].double()))  # type: ignore[index, operator]
    return hidden


@pytest.mark.parametrize("micro", [1, 3, 64])
def test_alignment_gradients_do_not_depend_on_micro_batches(micro: int) -> None:
    model, asked = network(), request()
    forget, retain = asked.forget_set(), asked.retain_set()
    draw = torch.Generator().manual_seed(3)
    starts = {"forget": torch.randn(6, 8, generator=draw).double(),
              "retain": torch.randn(20, 8, generator=draw).double()}  # fmt: skip
    method = LAF(batch_size=6, micro_batch_size=micro, temperature=0.7)
    align = _Alignment(method, forget, retain, starts, Run(UNLABELLED))
    value = align._gradients(model, 0)
    found = [p.grad for p in model.parameters()]
    distances = [
        cosine_distance(representations(model, data, chosen), starts[data.name][chosen])
        for data, chosen in ((retain, align.plan[1][0]), (forget, align.plan[0][0]))
    ]
    loss = alignment_loss(*distances, 0.7)
    wanted = torch.autograd.grad(loss, list(model.parameters())[:2])
    assert value == pytest.approx(loss.item(), abs=1e-12)
    for ours, theirs in zip(found[:2], wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert found[2:] == [None, None]


def test_two_optimisers_alternate_as_in_the_paper() -> None:
    method = LAF(**SHORT, micro_batch_size=3, max_grad_norm=1e9)
    run, asked, model = Run(UNLABELLED), request(), network()
    forget, retain = asked.forget_set(), asked.retain_set()
    with torch.no_grad():
        starts = [representations(model, e, list(range(len(e)))) for e in (forget, retain)]
    standard = _Standard(starts[1], run.device)
    vaes = [method._autoencoder(standard(h), e, run)
            for h, e in zip(starts, (forget, retain), strict=True)]  # fmt: skip
    one = torch.optim.Adam(model.parameters(), method.lr)
    two = torch.optim.Adam(model.parameters(), method.align_lr)
    for f, r in zip(*schedule(method, [6, 20], run, EXTRACT), strict=True):
        scores = []
        for data, chosen, vae in ((forget, f, vaes[0]), (retain, r, vaes[1])):
            h = standard(representations(model, data, chosen))
            scores.append(extraction_score(vae(h)[0], h).mean())
        one.zero_grad()
        (scores[1] - scores[0]).backward()
        one.step()
        away = cosine_distance(representations(model, forget, f), starts[0][f])
        held = cosine_distance(representations(model, retain, r), starts[1][r])
        two.zero_grad()
        alignment_loss(held, away, method.temperature).backward()
        two.step()
    found = unlearned(method)
    for name, value in weights(model).items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-9), name
    assert not torch.equal(found["0.weight"], network()[0].weight)
    assert torch.equal(found["2.weight"], network()[2].weight)


class Stopped(Exception):
    pass


class StopAt:
    """Progress that kills the run after a step."""

    def advance(self, phase: str, done: int, total: int, numbers: object) -> None:
        if phase == f"unlearn {EXTRACT}" and done == 3:
            raise Stopped

    def say(self, sentence: str) -> None: ...


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_interrupted_run_ends_in_the_same_weights(tmp_path: Path, optimizer: str) -> None:
    method = LAF(**{**SHORT, "epochs": 3}, optimizer=optimizer)  # type: ignore[arg-type]
    whole = unlearned(method)
    with pytest.raises(Stopped):
        unlearned(method, work=tmp_path, save_every=0.0, progress=StopAt())
    resumed = unlearned(method, work=tmp_path, save_every=0.0)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_scopes_that_cannot_work_are_refused() -> None:
    with pytest.raises(BadInput, match="moves representations"):
        unlearned(LAF(scope="head"))
    with pytest.raises(Unsupported, match="needs labels"):
        unlearned(LAF(scope="saliency:0.5"))
    with pytest.raises(BadInput, match="in front of the output layer"):
        unlearned(LAF(**SHORT, scope="^2"))
    found = unlearned(LAF(**SHORT, scope=r"0\.weight@2"))
    moved = (found["0.weight"] != network()[0].weight).any(1).tolist()
    assert moved == [False, False, True, *[False] * 5]


# -------------------------------------------------------------------------------------- repair


def test_repair_reads_the_labels_there_are_and_moves_the_head_alone() -> None:
    asked = request(Classification(CLASSES).reading(Need.OPTIONAL))
    labelled = [
        {**row, "label": i % CLASSES} if i < 7 else row for i, row in enumerate(rows(20, 2))
    ]
    retain = Encoded(load(labelled, "retain"), Classification(CLASSES).reading(Need.OPTIONAL))
    asked = Request(asked.target, asked.forget, retain)
    run, subject = Run(Classification(CLASSES)), Subject(network())
    method = LAF(**SHORT, repair_epochs=4, repair_lr=1e-2)
    assert method.needs.labels is Need.OPTIONAL
    assert LAF().needs.labels is Need.NO
    plain = unlearned(LAF(**SHORT))
    found = weights(method.unlearn(subject, asked, run).model)
    assert torch.equal(found["0.weight"], plain["0.weight"])
    assert not torch.equal(found["2.weight"], plain["2.weight"])
    assert "7 labelled" in run.notes[-1]
    batch = retain.batch(range(7))
    before = network()
    before.load_state_dict(plain)
    assert run.task.nll(subject.model, batch).sum() < run.task.nll(before, batch).sum()


def test_repair_without_any_label_is_refused_before_anything_moves() -> None:
    model, task = network(), Classification(CLASSES).reading(Need.OPTIONAL)
    with pytest.raises(BadInput, match="no retain record has a label"):
        LAF(**SHORT, repair_epochs=1).unlearn(Subject(model), request(task), Run(task))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters(), strict=True)
    )


# ------------------------------------------------------------------------- labels stay unread


class Guarded(dict[str, Any]):
    """A record whose label may be known to exist, but not read."""

    def __getitem__(self, key: str) -> Any:
        if key == "label":
            raise AssertionError("the label was read")
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]


def vectors(n: int) -> list[dict[str, Any]]:
    return rows(n, 5)


def pictures(n: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(5)
    return [{"image": torch.rand(3, 4, 4, generator=draw)} for _ in range(n)]


def texts(n: int) -> list[dict[str, Any]]:
    return [{"text": " ".join("ab"[(i >> k) & 1] for k in range(5))} for i in range(n)]


def of_vectors() -> Subject:
    return Subject(network().float())


def of_pictures() -> Subject:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES)]
    return Subject(nn.Sequential(*layers))


def of_texts() -> Subject:
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    raw = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, "[UNK]"))
    raw.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
    )
    config = BertConfig(
        vocab_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=16, num_labels=CLASSES, pad_token_id=0,
    )  # fmt: skip
    return Subject(BertForSequenceClassification(config), tokenizer)


KINDS = [(vectors, of_vectors), (pictures, of_pictures), (texts, of_texts)]


def run(subject: Subject, **settings: Any) -> Any:
    before = {n: p.clone() for n, p in subject.model.named_parameters()}
    hyper = {**SHORT, "epochs": 1, "vae_steps": 5}
    unlearn.forget(
        subject, method="laf", set=hyper, audit="none", task="classification", **settings
    )
    assert any(not torch.equal(p, before[n]) for n, p in subject.model.named_parameters())


@pytest.mark.parametrize(("records", "made"), KINDS)
@pytest.mark.parametrize("guarded", [False, True], ids=["without labels", "labels raise"])
def test_a_run_from_end_to_end_reads_no_label(
    records: Callable[[int], list[dict[str, Any]]], made: Callable[[], Subject], guarded: bool
) -> None:
    data = records(16)
    if guarded:
        data = [Guarded({**row, "label": "never read"}) for row in data]
    run(made(), forget=data[:4], retain=data[4:])
    run(made(), data=data, forget_ids="0:4")
    run(made(), data=data, forget=data[:4])


def test_a_reference_model_does_not_ask_for_labels_either(tmp_path: Path) -> None:
    from tests import plain
    from unlearn.weights import save

    torch.manual_seed(0)
    for name in ("one", "two"):
        save(Subject(plain.factory()), torch.float32, tmp_path / name)
    data = [{"features": torch.randn(5).tolist()} for _ in range(12)]
    settings = {"model": "tests.plain:factory", "task": "classification", "audit": "none"}
    unlearn.forget(
        tmp_path / "one" / "model.safetensors", method="laf", forget=data[:3], retain=data[3:],
        set={**SHORT, "vae_steps": 5}, retrained=tmp_path / "two" / "model.safetensors", **settings,
    )  # fmt: skip


def test_withheld_labels_count_for_nothing() -> None:
    asked = request()
    batch = asked.forget_set().batch([0, 1])
    assert bool((batch["labels"] == IGNORED).all())
