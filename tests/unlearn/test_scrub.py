"""SCRUB: passes, losses, the frozen teacher, and the way back of SCRUB+R."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unlearn
from tests import plain
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.interface import Classes, Records, Request, Subject
from unlearn.methods.scrub import SCRUB, distillation, matched_error
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification

TASK = Classification(plain.CLASSES)
FORGET = Encoded(load(plain.vectors(6), "forget"), TASK)
RETAIN = Encoded(load(plain.vectors(14, seed=1), "retain"), TASK)
REQUEST = Request(Records(6), FORGET, RETAIN)


class Stopped(Exception):
    pass


class Watched:
    """Keeps what a run says and does; raises after a step of a phase."""

    def __init__(self, at: tuple[str, int] | None = None) -> None:
        self.at = at
        self.seen: list[tuple[str, int]] = []
        self.said: list[str] = []

    def advance(self, phase: str, done: int, total: int, numbers: object) -> None:
        if phase.startswith("unlearn "):
            self.seen.append((phase.removeprefix("unlearn "), done))
            if self.seen[-1] == self.at:
                raise Stopped

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return plain.with_statistics().double().eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_distillation_by_hand() -> None:
    """Two classes at T = 2: p = sigmoid of half the difference of the logits."""
    student, teacher, t = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]), 2.0
    p, q = 1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-0.5))
    wanted = t**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    found = distillation(student.double(), torch.tensor([0]), teacher.double(), t)
    assert float(found) == pytest.approx(wanted, rel=1e-12)


def test_gradients_of_distillation_keep_their_size_at_high_temperature() -> None:
    """As T grows, T^2 KL becomes half the squared distance of centred logits, over classes."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 5, generator=draw, dtype=torch.float64)
    centred = (student - student.mean()) - (teacher - teacher.mean())
    found = distillation(student, torch.tensor([0]), teacher, 1e4)
    assert float(found) == pytest.approx(float(centred.square().sum() / (2 * 5)), rel=1e-3)


def soft_kl(teacher: nn.Module, student: nn.Module, examples: Encoded, t: float) -> Tensor:
    inputs = examples.batch(range(len(examples)))["features"].double()
    with torch.no_grad():
        p = torch.softmax(teacher(inputs) / t, 1)
    q = torch.softmax(student(inputs) / t, 1)
    return (p * (p.log() - q.log())).sum(1).mean() * t**2


def test_passes_step_by_step_with_a_live_teacher() -> None:
    """Whole sets as batches: each pass is one step of plain descent, in train mode."""
    settings = SCRUB(
        alpha=0.5, gamma=0.7, temperature=2.0, epochs=3, msteps=2, lr=0.1 / 1.9, batch_size=99,
        micro_batch_size=99, weight_decay=0.0, max_grad_norm=1e9,
    )  # fmt: skip
    found = settings.unlearn(Subject(network()), REQUEST, Run(TASK))
    teacher, student = network(), network().train()
    for away in (True, False, True, False, False):
        if away:
            loss = -soft_kl(teacher, student, FORGET, 2.0)
        else:
            batch = RETAIN.batch(range(len(RETAIN)))
            logits = student(batch["features"].double())
            p = torch.softmax(teacher(batch["features"].double()).detach() / 2, 1)
            far = (p * (p.log() - torch.log_softmax(logits / 2, 1))).sum(1).mean() * 4
            loss = 0.7 * F.cross_entropy(logits, batch["labels"][:, 0]) + 0.5 * far
        gradients = torch.autograd.grad(loss, list(student.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(student.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    wanted = state(student)
    for name, value in state(found.model).items():
        assert torch.allclose(value, wanted[name], atol=1e-10), name


def test_the_student_moves_and_its_teacher_does_not() -> None:
    subject = Subject(network())
    settings = SCRUB(lr=0.05, batch_size=4, epochs=3, msteps=2)
    run = Run(TASK)
    away = settings._away(subject.model, FORGET, run)
    batch = FORGET.batch(range(6))

    def distance() -> Tensor:
        with torch.no_grad():
            return away.loss(run.task.predictions(subject.model, batch), batch).sum()

    assert float(distance()) == pytest.approx(0, abs=1e-12)
    before = state(subject.model)
    found = settings.unlearn(subject, REQUEST, run)
    assert not same(before, state(found.model))
    # what the teacher said before is still what the student is compared with
    assert float(distance()) / 6 == pytest.approx(
        float(soft_kl(network(), found.model, FORGET, 4.0).detach()), rel=1e-9
    )
    assert float(distance()) > 0.01


def test_the_order_of_passes_and_their_rates(tmp_path: Path) -> None:
    watched = Watched()
    settings = SCRUB(epochs=4, msteps=2, lr=0.4, schedule="linear", batch_size=99)
    settings.unlearn(Subject(network()), REQUEST, Run(TASK, work=tmp_path, progress=watched))
    passes = ["max1", "min1", "max2", "min2", "min3", "min4"]
    assert [phase for phase, _ in watched.seen] == passes
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    rates = {line["phase"]: line["lr"] for line in lines if line["event"] == "step"}
    assert rates == pytest.approx(
        dict(zip(passes, [0.32, 0.32, 0.24, 0.24, 0.16, 0.08], strict=True))
    )
    assert settings.trained(6, 14) == 2 * 6 + 4 * 14
    assert replace(settings, rewind=True).trained(6, 14) == 2 * 6 + 4 * 13


def test_without_a_weight_nothing_is_asked_of_the_teacher_on_the_retain_set(
    tmp_path: Path,
) -> None:
    SCRUB(alpha=0, epochs=1).unlearn(Subject(network()), REQUEST, Run(TASK, work=tmp_path))
    assert [f.stem for f in (tmp_path / "once").iterdir()] == ["reference_logits_forget"]


def test_errors_are_matched_by_label() -> None:
    labels, wrong = torch.tensor([0, 0, 1, 2, 2, 2, 2]), torch.tensor([1.0, 0, 1, 0, 0, 0, 1])
    same_shares = matched_error(labels, wrong, like=labels)
    assert same_shares == pytest.approx(float(wrong.mean()))
    # labels 0 and 2 as 1 to 2: (1/2 + 2/4) / 3; label 5 was never measured
    assert matched_error(labels, wrong, like=torch.tensor([2, 0, 2, 5])) == pytest.approx(1 / 3)
    with pytest.raises(BadInput, match="no record held out"):
        matched_error(labels, wrong, like=torch.tensor([3, 4]))


REWINDING = SCRUB(
    epochs=4, msteps=4, lr=0.3, batch_size=3, rewind=True, rewind_holdout=0.3, gamma=0.1,
    max_loss=1e6,
)  # fmt: skip


def errors(model: nn.Module, examples: Encoded) -> tuple[Tensor, Tensor]:
    batch = examples.batch(range(len(examples)))
    labels = batch["labels"][:, 0]
    with torch.no_grad():
        return labels, (model(batch["features"].double()).argmax(1) != labels).double()


def test_rewinding_ends_at_the_epoch_with_the_most_alike_error() -> None:
    """Against the models that runs of every length end with, on the same part of the retain set."""
    watched = Watched()
    run = Run(TASK, progress=watched)
    order = torch.randperm(14, generator=run.generator("rewind")).tolist()
    unseen, rest = RETAIN.select(sorted(order[:4]), "held out"), RETAIN.select(sorted(order[4:]))
    models = [network()]
    for epochs in range(1, 5):
        plain_run = replace(REWINDING, epochs=epochs, rewind=False)
        request = Request(Records(6), FORGET, rest)
        models.append(plain_run.unlearn(Subject(network()), request, Run(TASK)).model)
    goal = matched_error(*errors(models[-1], unseen), like=errors(models[-1], FORGET)[0])
    gaps = [abs(float(errors(model, FORGET)[1].mean()) - goal) for model in models]
    best = max(epoch for epoch, gap in enumerate(gaps) if gap == min(gaps))
    found = REWINDING.unlearn(Subject(network()), REQUEST, run)
    assert len({round(gap, 6) for gap in gaps}) > 1  # there was something to choose
    assert same(state(models[best]), state(found.model))
    assert watched.said == run.notes
    assert f"Rewound to the end of epoch {best} of 4" in run.notes[0]


def test_of_epochs_that_are_alike_the_last_is_taken() -> None:
    """No step has a length to speak of, so neither have the differences."""
    run = Run(TASK)
    still = replace(REWINDING, lr=1e-30, weight_decay=0.0)
    found = still.unlearn(Subject(network()), REQUEST, run)
    assert "epoch 4 of 4" in run.notes[0]
    for one, other in zip(network().parameters(), found.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-25, rtol=0)


@pytest.mark.parametrize("at", [("max1", 2), ("min2", 1), ("min4", 3)])
@pytest.mark.parametrize("rewind", [False, True])
def test_a_killed_run_ends_in_the_same_weights(
    tmp_path: Path, at: tuple[str, int], rewind: bool
) -> None:
    settings = replace(REWINDING, rewind=rewind, epochs=4, msteps=1)
    whole = Run(TASK)
    wanted = state(settings.unlearn(Subject(network()), REQUEST, whole).model)
    stopped = Run(TASK, work=tmp_path, save_every=0.0, progress=Watched(at))
    with pytest.raises(Stopped):
        settings.unlearn(Subject(network()), REQUEST, stopped)
    watched = Watched()
    run = Run(TASK, work=tmp_path, save_every=0.0, progress=watched)
    assert same(state(settings.unlearn(Subject(network()), REQUEST, run).model), wanted)
    assert watched.seen[0] == at
    assert run.notes == whole.notes


def test_what_scrub_cannot_do_is_refused_before_anything_starts(
    tmp_path: Path, tiny_vectors: Path
) -> None:
    def ask(**settings: Any) -> str:
        data = {"forget": plain.vectors(6), "retain": plain.vectors(14, seed=1)}
        with pytest.raises(BadInput) as caught:
            unlearn.forget(
                tiny_vectors, method="scrub", model="tests.plain:factory", out=tmp_path / "run",
                **{**data, **settings},
            )  # fmt: skip
        assert not list(tmp_path.iterdir())
        return str(caught.value)

    whole = {"forget": None, "retain": None, "data": plain.vectors(12), "forget_classes": "1"}
    assert "whole classes go" in ask(set={"rewind": True}, **whole)
    assert "more than one retain record" in ask(
        set={"rewind": True}, retain=plain.vectors(1, seed=3)
    )
    assert "scrub has passes without" in ask(scope="saliency:0.5")
    assert "rewind_holdout" in ask(set={"rewind": True, "rewind_holdout": 1})
    SCRUB(rewind=False).check(Request(Classes((1,), ("1",)), FORGET, RETAIN))


def test_a_forget_set_of_labels_nobody_else_has_cannot_be_rewound() -> None:
    only = Encoded(load([r for r in plain.vectors(12) if r["label"] == 1], "forget"), TASK)
    rest = Encoded(load([r for r in plain.vectors(12) if r["label"] != 1], "retain"), TASK)
    subject = Subject(network())
    with pytest.raises(BadInput, match="no record held out"):
        REWINDING.unlearn(subject, Request(Records(4), only, rest), Run(TASK))
    assert same(state(network()), state(subject.model))
