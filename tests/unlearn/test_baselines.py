"""The field's baselines: their objectives against dense gradients, and what they leave alone."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unlearn
from tests import plain
from unlearn import registry
from unlearn.data import load
from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Records, Request, Subject
from unlearn.methods.amnesiac import Amnesiac, joined
from unlearn.methods.bad_teacher import BadTeacher
from unlearn.methods.cf_k import CFk
from unlearn.methods.eu_k import EUk
from unlearn.methods.finetune import Finetune
from unlearn.methods.grad_diff import GradDiff
from unlearn.methods.neg_grad_plus import NegGradPlus
from unlearn.methods.npo import NPO
from unlearn.methods.salun import SalUn
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification
from unlearn.training import schedule

TASK = Classification(plain.CLASSES)
FORGET = Encoded(load(plain.vectors(6), "forget"), TASK)
RETAIN = Encoded(load(plain.vectors(14, seed=1), "retain"), TASK)
REQUEST = Request(Records(6), FORGET, RETAIN)
ONE_STEP: dict[str, Any] = {  # plain gradient descent: Nesterov's first step is 1.9 times as long
    "epochs": 1, "batch_size": 99, "micro_batch_size": 4, "lr": 0.01 / 1.9, "optimizer": "sgd",
    "weight_decay": 0.0, "max_grad_norm": 1e9,
}  # fmt: skip


class Deep(nn.Module):
    """A stem, three blocks with batch statistics, a norm and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(plain.WIDTH, 6), nn.BatchNorm1d(6))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(3)
        )
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, plain.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        logits: Tensor = self.out(self.norm(x))
        return logits


def network(seed: int, factory: Callable[[], nn.Module] = plain.factory) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return factory().double().eval()


def start(factory: Callable[[], nn.Module] = plain.factory, **settings: Any) -> tuple[Subject, Run]:
    run = Run(TASK, **settings)
    run.initial_model = lambda init: network(torch.initial_seed() % 1000, factory)  # type: ignore[method-assign]
    return Subject(network(0, factory)), run


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def ce(model: nn.Module, examples: Encoded) -> Tensor:
    batch = examples.batch(range(len(examples)))
    return F.cross_entropy(model(batch["features"].double()), batch["labels"][:, 0])


def stepped(loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Weights after one step of plain gradient descent on a loss of the starting model."""
    model = network(0)
    gradients = torch.autograd.grad(loss(model), list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter -= 0.01 * gradient
    return state(model)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.allclose(one[n], other[n], atol=1e-12, rtol=0) for n in other)


# ------------------------------------------------------------------------------ objectives


def test_neg_grad_plus_weighs_the_two_means() -> None:
    subject, run = start()
    found = NegGradPlus(alpha=0.8, **ONE_STEP).unlearn(subject, REQUEST, run)
    wanted = stepped(lambda model: 0.8 * ce(model, RETAIN) - 0.2 * ce(model, FORGET))
    assert close(state(found.model), wanted)


def test_an_epoch_of_neg_grad_plus_is_over_the_retain_set() -> None:
    settings = NegGradPlus(epochs=2, batch_size=4)
    subject, run = start()
    first, second = settings.terms(subject, REQUEST, run)
    assert (first.examples.name, second.examples.name) == ("retain", "forget")
    plan = schedule(settings, [len(first.examples), len(second.examples)], run)
    assert Counter(i for batch in plan[0] for i in batch) == dict.fromkeys(range(14), 2)
    assert len(plan[1]) == len(plan[0])
    assert settings.trained(6, 14) == 8 * (4 + 4)


def test_amnesiac_is_a_mean_over_one_shuffled_set() -> None:
    subject, run = start()
    (term,) = Amnesiac(**ONE_STEP).terms(subject, REQUEST, run)
    wanted = stepped(lambda model: ce(model, term.examples))
    found = Amnesiac(**ONE_STEP).unlearn(subject, REQUEST, run)
    assert close(state(found.model), wanted)
    assert len(term.examples) == 20
    plan = schedule(Amnesiac(epochs=1, batch_size=5), [20], run)[0]
    assert sorted(i for batch in plan for i in batch) == list(range(20))


def test_amnesiac_relabels_the_forget_set_and_nothing_else() -> None:
    many = Encoded(load(plain.vectors(300), "forget"), TASK)
    (term,) = Amnesiac().terms(*start()[:1], Request(Records(300), many, RETAIN), start()[1])
    labels = [term.examples[i]["label"] for i in range(len(term.examples))]
    true = [many[i]["label"] for i in range(300)]
    shifts = Counter((a - b) % plain.CLASSES for a, b in zip(labels, true, strict=False))
    assert shifts[0] == 0
    assert set(shifts) == {1, 2}
    assert abs(shifts[1] - 150) < 5 * 300**0.5 / 2  # five standard deviations
    assert labels[300:] == [RETAIN[i]["label"] for i in range(14)]
    assert [many[i]["label"] for i in range(300)] == true
    for i in range(14):
        assert torch.equal(term.examples[300 + i]["features"], RETAIN[i]["features"])


def test_two_sets_joined_keep_rows_and_ids() -> None:
    both = joined(FORGET, RETAIN)
    assert len(both) == 20
    assert list(both.examples.ids) == [*FORGET.examples.ids, *RETAIN.examples.ids]
    assert both.examples.column("label") == [
        *FORGET.examples.column("label"), *RETAIN.examples.column("label")
    ]  # fmt: skip
    part = both.select([2, 7])
    assert [part[0]["label"], part[1]["label"]] == [FORGET[2]["label"], RETAIN[1]["label"]]


def soft_kl(teacher: nn.Module, student: nn.Module, examples: Encoded, t: float) -> Tensor:
    """KL(p_T(teacher) || p_T(student)), summed over classes, of every example, from definitions."""
    inputs = examples.batch(range(len(examples)))["features"].double()
    p, q = (torch.softmax(model(inputs) / t, 1) for model in (teacher, student))
    return (p.detach() * (p.detach().log() - q.log())).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_bad_teacher_averages_over_the_examples_of_both_sets(
    temperature: float, share: float
) -> None:
    subject, run = start()
    settings = BadTeacher(temperature=temperature, retain_share=share, **ONE_STEP)
    part = RETAIN.sample(round(share * 14), run.seed_of("retain share"))
    competent, incompetent = network(0), network(run.seed_of("initial weights") % 1000)

    def loss(model: nn.Module) -> Tensor:
        sums = [
            soft_kl(incompetent, model, FORGET, temperature).sum(),
            soft_kl(competent, model, part, temperature).sum(),
        ]
        return sum(sums) / (len(FORGET) + len(part))

    found = settings.unlearn(subject, REQUEST, run)
    assert close(state(found.model), stepped(loss))
    terms = settings.terms(subject, REQUEST, run)
    assert len(terms[0].examples) == max(len(FORGET), len(part))
    assert sum(term.weight for term in terms) == pytest.approx(1)


def test_bad_teacher_leads_to_its_teacher_who_is_gone_by_then() -> None:
    subject, run = start()
    drawn: list[Any] = []

    def draw(init: object) -> nn.Module:
        model = network(5)
        drawn.append(weakref.ref(model))
        return model

    run.initial_model = draw  # type: ignore[method-assign]
    living = []
    handle = subject.model.register_forward_hook(
        lambda module, *_: living.append(drawn[0]()) if torch.is_grad_enabled() else None
    )
    before = soft_kl(network(5), network(0), FORGET, 1.0).mean()
    kept = soft_kl(network(0), network(0), RETAIN, 1.0).mean()
    found = BadTeacher(epochs=60, lr=1e-2, retain_share=1).unlearn(subject, REQUEST, run)
    handle.remove()
    assert soft_kl(network(5), found.model, FORGET, 1.0).mean() < 0.2 * before
    assert soft_kl(network(0), found.model, RETAIN, 1.0).mean() < kept + 0.2 * before
    assert living
    assert all(one is None for one in living)


@pytest.mark.parametrize("method", ["bad_teacher", "eu_k"])
def test_a_bare_network_in_memory_cannot_be_drawn_anew(method: str) -> None:
    sets = {"forget": plain.vectors(6), "retain": plain.vectors(14, seed=1)}
    with pytest.raises(BadInput, match="new random weights need"):
        unlearn.forget(Subject(plain.factory()), method=method, **sets, audit="none")


# ------------------------------------------------------------------------------ saliency


def moved(before: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Where parameters differ from before, by name."""
    return {name: p.detach() != before[name] for name, p in model.named_parameters()}


def salient_by_hand(share: float) -> dict[str, Tensor]:
    """Masks of the largest gradients of the true labels, by sorting."""
    model = network(0)
    gradients = torch.autograd.grad(ce(model, FORGET), list(model.parameters()))
    flat = torch.cat([g.abs().flatten() for g in gradients])
    least = flat.sort(descending=True).values[int(share * len(flat)) - 1]
    names = [name for name, _ in model.named_parameters()]
    return {name: g.abs() >= least for name, g in zip(names, gradients, strict=True)}


ROUGH: dict[str, Any] = {"lr": 0.05, "batch_size": 3, "weight_decay": 0.1}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "method",
    [
        SalUn(epochs=4, **ROUGH),
        SalUn(epochs=4, scope="saliency:0.3", wrong_only=True, **ROUGH),
        NPO(epochs=4, scope="saliency:0.3", **ROUGH),
        NPO(epochs=4, scope="saliency:0.3", retention="kl", **ROUGH),
        GradDiff(epochs=2, scope="saliency:0.3", forget_weight=0.1, **ROUGH),
        NegGradPlus(epochs=2, scope="saliency:0.3", **ROUGH),
    ],
)
def test_only_the_salient_share_of_the_weights_moves(method: Any, optimizer: str) -> None:
    """Neither momentum nor weight decay leaks: the others are the same to the last bit."""
    method = replace(method, optimizer=optimizer)
    subject, run = start()
    before = state(subject.model)
    found = method.unlearn(subject, REQUEST, run)
    share = float(method.scope.removeprefix("saliency:"))
    wanted = salient_by_hand(share)
    total = sum(mask.numel() for mask in wanted.values())
    assert sum(int(mask.sum()) for mask in wanted.values()) == int(share * total)
    assert all(torch.equal(mask, wanted[n]) for n, mask in moved(before, found.model).items())


class Stopped(Exception):
    pass


class StopAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def advance(self, phase: str, done: int, total: int, numbers: object) -> None:
        if phase == "unlearn" and done == self.step:
            raise Stopped

    def say(self, sentence: str) -> None: ...


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "method", [SalUn(epochs=4, **ROUGH), NPO(epochs=4, scope="saliency:0.3", **ROUGH)]
)
def test_a_killed_run_goes_on_with_the_same_mask(
    tmp_path: Path, method: Any, optimizer: str
) -> None:
    method = replace(method, optimizer=optimizer)
    subject, run = start()
    whole = state(method.unlearn(subject, REQUEST, run).model)
    subject, run = start(work=tmp_path, save_every=0.0, progress=StopAt(5))
    with pytest.raises(Stopped):
        method.unlearn(subject, REQUEST, run)
    subject, run = start(work=tmp_path, save_every=0.0)
    resumed = state(method.unlearn(subject, REQUEST, run).model)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("share", ["0", "1.2", "half", ""])
@pytest.mark.parametrize("method", ["salun", "npo"])
def test_a_share_that_is_none_is_refused_by_the_plan(
    tmp_path: Path, tiny_vectors: Path, method: str, share: str
) -> None:
    with pytest.raises(BadInput, match="share must be above 0 and at most 1"):
        unlearn.forget(
            tiny_vectors, method=method, model="tests.plain:factory", scope=f"saliency:{share}",
            forget=plain.vectors(6), retain=plain.vectors(14, seed=1), out=tmp_path / "run",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [Finetune, Amnesiac])
def test_saliency_without_a_loss_on_the_forget_set_is_refused(method: Any) -> None:
    subject, run = start()
    before = state(subject.model)
    with pytest.raises(Unsupported, match="needs a method with a loss on the forget set"):
        method(scope="saliency:0.5").unlearn(subject, REQUEST, run)
    assert close(state(subject.model), before)


def test_labels_of_salun_are_uniform_over_all_or_over_the_wrong_ones() -> None:
    many = Encoded(load(plain.vectors(600), "forget"), TASK)
    request = Request(Records(600), many, RETAIN)
    for wrong_only, outcomes in ((False, {0, 1, 2}), (True, {1, 2})):
        subject, run = start()
        term = SalUn(wrong_only=wrong_only).terms(subject, request, run)[0]
        shifts = Counter((term.examples[i]["label"] - many[i]["label"]) % 3 for i in range(600))
        assert set(shifts) == outcomes
        p = 1 / len(outcomes)
        spread = (600 * p * (1 - p)) ** 0.5
        assert all(abs(count - 600 * p) < 5 * spread for count in shifts.values())


# ------------------------------------------------------------------------------ last blocks


@pytest.mark.parametrize("method", [CFk, EUk])
@pytest.mark.parametrize("k", [1, 2])
def test_everything_in_front_of_the_last_blocks_stays(method: Any, k: int) -> None:
    subject, run = start(Deep)
    before = state(subject.model)
    settings = method(k=k, epochs=2, batch_size=7, micro_batch_size=4, weight_decay=0.1)
    found = settings.unlearn(subject, REQUEST, run)
    after = state(found.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    last = tuple(f"blocks.{i}." for i in range(3 - k, 3))
    assert changed == {n for n in before if n.startswith((*last, "norm.", "out."))}
    assert all(p.requires_grad for p in found.model.parameters())


def test_cf_k_is_fine_tuning_where_it_reaches() -> None:
    """With every block in reach, only the stem is left out."""
    settings = {"epochs": 1, "batch_size": 14, "lr": 1e-3, "optimizer": "adamw"}
    subject, run = start(Deep)
    one = state(CFk(k=3, **settings).unlearn(subject, REQUEST, run).model)
    subject, run = start(Deep)
    scope = r"^blocks\. ^norm\. ^out\."
    tuned = Finetune(scope=scope, weight_decay=5e-4, **settings)
    other = state(tuned.unlearn(subject, REQUEST, run).model)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_eu_k_starts_where_retraining_would() -> None:
    """A step of no length shows what training began with; statistics begin anew, too."""
    subject, run = start(Deep)
    fresh = state(network(run.seed_of("initial weights") % 1000, Deep))
    for module in subject.model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.fill_(7.0)
    before = state(subject.model)
    settings = EUk(k=2, epochs=1, batch_size=99, micro_batch_size=99, lr=1e-30, weight_decay=0.0)
    after = state(settings.unlearn(subject, REQUEST, run).model)
    parameters = [name for name, _ in Deep().named_parameters()]
    for name in parameters:
        front = name.startswith(("stem", "blocks.0"))
        wanted = (before if front else fresh)[name]
        assert torch.allclose(after[name], wanted, atol=1e-25, rtol=0), name
    means = [name for name in after if name.endswith("running_mean")]
    for name in means:
        front = name.startswith(("stem", "blocks.0"))
        assert bool((after[name] == 7.0).all()) is front, name
        assert front or float(after[name].abs().max()) < 3.5  # one update from 0, not from 7


@pytest.mark.parametrize("method", ["cf_k", "eu_k"])
def test_what_the_last_blocks_cannot_be_is_refused(method: str) -> None:
    subject, run = start(Deep)
    before = copy.deepcopy(subject.model.state_dict())
    with pytest.raises(BadInput, match="k = 4, and the model has 3 blocks"):
        registry.build(method, {"k": 4}).unlearn(subject, REQUEST, run)
    assert close(state(subject.model), before)
    with pytest.raises(BadInput, match="k = 0: Input should be greater"):
        registry.build(method, {"k": 0})
    with pytest.raises(BadInput, match="leave scope out"):
        registry.build(method, {"scope": "head"}).check(REQUEST)  # type: ignore[attr-defined]
    flat = Subject(nn.Linear(plain.WIDTH, plain.CLASSES).double())
    with pytest.raises(Unsupported, match="has no blocks"):
        registry.build(method, {}).unlearn(flat, REQUEST, run)


def test_a_tied_output_layer_of_a_language_model_stays_with_the_input(
    tiny_lm: Path, lm_world: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    found = unlearn.forget(
        tiny_lm, method="cf_k", forget=lm_world.forget, retain=lm_world.retain, audit="none",
        set={"epochs": 1, "optimizer": "adamw"}, out=tmp_path / "run",
    )  # fmt: skip
    before = load_file(tiny_lm / "model.safetensors")
    after = found.subject.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if n.startswith(("model.layers.1.", "model.norm"))}
