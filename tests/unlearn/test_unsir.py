"""UNSIR: what the noise minimises, what the phases see, and what they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import unlearn
from unlearn.data import load
from unlearn.errors import BadInput, MissingNeed
from unlearn.interface import Classes, Records, Request, Subject
from unlearn.methods.unsir import UNSIR, noise_loss
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification

CENTRES = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]])
TARGET = Classes((2,), ("2",))


def cloud(classes: list[int], n: int, seed: int, name: str) -> Encoded:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes)[torch.arange(n) % len(classes)]
    inputs = CENTRES[labels] + 0.5 * torch.randn(n, 3, generator=draw)
    return Encoded(load((inputs, labels), name), Classification(3))


def trained() -> nn.Module:
    data = cloud([0, 1, 2], 90, 5, "data")
    batch = data.batch(range(90))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(100):
            optimizer.zero_grad()
            data.task.nll(model, batch).mean().backward()
            optimizer.step()
    model.zero_grad()
    return model.eval()


def nll(model: nn.Module, data: Encoded) -> float:
    with torch.no_grad():
        return float(data.task.nll(model, data.batch(range(len(data)))).mean())


def test_noise_loss_by_hand() -> None:
    """Logits (2, 0, 0) whatever the input; inputs of squared length 4 and 10: mean 7."""
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([2.0, 0.0, 0.0]))
    inputs = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    data = Encoded(load((inputs, [0, 1]), "noise"), Classification(3))
    total = torch.tensor([2.0, 0.0, 0.0]).logsumexp(0)
    wanted = -((total - 2) + total) / 2 + 0.1 * 7
    found = noise_loss(data.task, model, data.batch([0, 1]), 0.1)
    assert float(found.detach()) == pytest.approx(float(wanted), rel=1e-6)


def test_the_noise_is_what_the_model_takes_for_the_class_least() -> None:
    retain, model = cloud([0, 1], 20, 1, "retain"), trained()
    method = UNSIR(noise_size=6, noise_steps=40)
    noise = method._noise(model, retain, (2, 1), Run(retain.task))
    assert noise.name == "noise"
    assert [noise[i]["label"] for i in range(12)] == [2] * 6 + [1] * 6
    fresh = UNSIR(noise_size=6, noise_steps=1, noise_lr=1e-9)._noise(
        model, retain, (2, 1), Run(retain.task)
    )
    assert nll(model, noise) > nll(model, fresh) + 1
    assert all(p.grad is None for p in model.parameters())
    known = {tuple(retain[i]["features"].tolist()) for i in range(20)}
    assert not known & {tuple(noise[i]["features"].tolist()) for i in range(12)}


def test_the_penalty_keeps_the_noise_small() -> None:
    retain, model = cloud([0, 1], 20, 1, "retain"), trained()
    sizes = []
    for penalty in (0.0, 10.0):
        noise = UNSIR(penalty=penalty)._noise(model, retain, (2,), Run(retain.task))
        sizes.append(torch.stack([e["features"] for e in noise]).square().sum(1).mean())
    assert sizes[1] < 0.5 * sizes[0]


def test_the_noise_is_learnt_once(tmp_path: Path) -> None:
    retain = cloud([0, 1], 20, 1, "retain")
    run, method = Run(retain.task, work=tmp_path), UNSIR(noise_size=4)
    first = method._noise(trained(), retain, (2,), run)
    again = method._noise(nn.Linear(3, 3), retain, (2,), run)  # already impaired, say
    for i in range(4):
        assert torch.equal(first[i]["features"], again[i]["features"])


def test_a_class_is_forgotten_without_its_examples() -> None:
    forget, retain = cloud([2], 20, 1, "forget"), cloud([0, 1], 40, 2, "retain")
    model = trained()
    before = nll(model, forget), nll(model, retain)
    phases = []

    class Watch:
        def advance(self, phase: str, done: int, total: int, numbers: object) -> None:
            if not phases or phases[-1] != phase:
                phases.append(phase)

        def say(self, sentence: str) -> None: ...

    method = UNSIR(lr=0.05, repair_lr=0.02, epochs=3, batch_size=8)
    run = Run(retain.task, progress=Watch())
    after = method.unlearn(Subject(model), Request(TARGET, None, retain), run).model
    assert phases == ["noise of 2", "unlearn impair", "unlearn repair"]
    assert nll(after, forget) > before[0] + 0.5
    assert nll(after, retain) < before[1] + 0.1


def test_phases_have_their_own_learning_rates_and_one_sample() -> None:
    """With a repair that barely moves, what is left is the impaired model."""
    retain = cloud([0, 1], 40, 2, "retain")
    seen: list[set[int]] = []
    models = []
    for repair in (1e-12, 0.01):
        model = trained()
        settings = UNSIR(lr=0.02, repair_lr=repair, batch_size=8, retain_size=16)
        run = Run(retain.task, seed=4)
        sample = retain.sample(16, run.seed_of("retained sample"))
        seen.append(set(sample.examples.ids))
        models.append(settings.unlearn(Subject(model), Request(TARGET, None, retain), run).model)
    assert seen[0] == seen[1]
    assert nll(models[1], retain) < nll(models[0], retain)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("last", ["unlearn impair", "unlearn repair"])
def test_a_run_killed_in_either_phase_ends_in_the_same_weights(tmp_path: Path, last: str) -> None:
    retain = cloud([0, 1], 40, 2, "retain")
    method, request = UNSIR(lr=0.02, batch_size=8), Request(TARGET, None, retain)
    whole = method.unlearn(Subject(trained()), request, Run(retain.task)).model.state_dict()

    class StopAt:
        def advance(self, phase: str, done: int, total: int, numbers: object) -> None:
            if phase == last and done == 3:
                raise Stopped

        def say(self, sentence: str) -> None: ...

    run = Run(retain.task, work=tmp_path, save_every=0.0, progress=StopAt())
    with pytest.raises(Stopped):
        method.unlearn(Subject(trained()), request, run)
    run = Run(retain.task, work=tmp_path, save_every=0.0)
    resumed = method.unlearn(Subject(trained()), request, run).model.state_dict()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_records_and_missing_sets_are_refused() -> None:
    retain = cloud([0, 1], 20, 1, "retain")
    with pytest.raises(BadInput, match="forget-classes"):
        UNSIR().unlearn(Subject(trained()), Request(Records(3), None, retain), Run(retain.task))
    inputs = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    data = (inputs, [0, 1, 2] * 10)
    with pytest.raises(MissingNeed, match="forgets classes, not records"):
        unlearn.forget(trained(), method="unsir", data=data, forget_ids="0:5", audit="none")
    result = unlearn.forget(
        trained(), method="unsir", data=data, forget_classes="2", audit="none",
        set={"batch_size": 8},
    )  # fmt: skip
    assert not torch.equal(result.subject.model[0].weight, trained()[0].weight)
