"""Several descents in one run, each with its own schedule, all of it resumable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests import plain
from unlearn.data import load
from unlearn.interface import Subject
from unlearn.run import Run
from unlearn.scope import Moving
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification
from unlearn.training import Term, Training, ascent, descend, likelihood, schedule

TASK = Classification(plain.CLASSES)
PHASES = ("", "impair", "repair1", "repair2")
STEPS = 6  # of every phase


def subject() -> Subject:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(plain.WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3),
            nn.Linear(8, plain.CLASSES),
        )  # fmt: skip
    return Subject(model.double().eval())


FORGET = Encoded(load(plain.vectors(9), "forget"), TASK)
RETAIN = Encoded(load(plain.vectors(12, seed=1), "retain"), TASK)


class Stopped(Exception):
    pass


@dataclass
class Watched:
    """Raises after a step of a phase; remembers the steps of all."""

    at: tuple[str, object] | None = None
    seen: list[tuple[str, int]] = field(default_factory=list)

    def advance(self, phase: str, done: int, total: int, numbers: object) -> None:
        if phase.startswith("unlearn"):
            self.seen.append((phase.removeprefix("unlearn").strip(), done))
            if self.seen[-1] == self.at:
                raise Stopped

    def say(self, sentence: str) -> None: ...


def averaging(moved: Moving, done: int, memory: dict[str, Tensor]) -> None:
    """A moving average of the weights, which takes their place behind the last step."""
    for name, parameter in moved.parameters.items():
        value = parameter.detach()
        memory[name] = memory[name].lerp(value, 0.5) if name in memory else value.clone()
        if done == STEPS:
            parameter.data.copy_(memory[name])


def several(
    settings: Training, run: Run, between: Callable[[str], None] = lambda _: None
) -> Subject:
    """Down and up in turn: with dropout, with a moving average, with another optimiser."""
    found = subject()
    retain, forget = (
        Term("retain", RETAIN, likelihood, "unit"),
        Term("forget", FORGET, ascent, "unit"),
    )
    for phase in PHASES:
        other = replace(settings, optimizer="sgd", lr=3e-3) if phase == "impair" else settings
        found = descend(
            found,
            [forget, retain] if phase == "impair" else [retain, forget],
            replace(other, epochs=2),
            run,
            phase=phase,
            dropout=phase == "repair1",
            after=averaging if phase == "repair2" else None,
        )
        between(phase)
    return found


def state(found: Subject) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in found.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


SETTINGS = Training(batch_size=4, micro_batch_size=3, lr=1e-2)


def test_each_phase_has_steps_and_batches_of_its_own() -> None:
    watched = Watched()
    several(SETTINGS, Run(TASK, progress=watched))
    assert [phase for phase, done in watched.seen if done == 1] == list(PHASES)
    run = Run(TASK, seed=3)
    plans = {str(schedule(SETTINGS, [9, 12], run, phase)) for phase in PHASES}
    assert len(plans) == len(PHASES)
    assert schedule(SETTINGS, [9, 12], run, "impair") == schedule(SETTINGS, [9, 12], run, "impair")


@pytest.mark.parametrize("scope", ["all", "saliency:0.4", "lora"])
def test_killed_anywhere_ends_in_the_same_bits(tmp_path: Path, scope: str) -> None:
    pytest.importorskip("peft") if scope == "lora" else None
    settings = replace(SETTINGS, scope=scope)
    whole = Watched()
    wanted = state(several(settings, Run(TASK, work=made(tmp_path / "whole"), progress=whole)))
    last = {phase: max(done for q, done in whole.seen if q == phase) for phase in PHASES}
    kills = {"": (4, "between"), "impair": (1, last["impair"]), "repair1": (4,), "repair2": (5,)}

    for phase, step in [(phase, step) for phase, steps in kills.items() for step in steps]:
        at = None if step == "between" else (phase, step)

        def stop(finished: str, phase: str = phase, at: object = at) -> None:
            if at is None and finished == phase:
                raise Stopped

        work = made(tmp_path / f"{phase}{step}")
        with pytest.raises(Stopped):
            several(settings, Run(TASK, work=work, save_every=0, progress=Watched(at)), stop)
        again = Watched()
        run = Run(TASK, work=work, save_every=0, progress=again)
        assert same(state(several(settings, run)), wanted), (phase, step)
        # nothing that was finished is done again: the step that was cut off is the first
        rest = whole.seen[whole.seen.index(at) :] if at else whole.seen[last[phase] :]
        assert again.seen == rest
        assert not list(work.glob("*.new"))


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_a_moving_average_replaces_the_weights_exactly() -> None:
    """Against one computed beside the loop, from the weights after every step."""
    seen: list[dict[str, Tensor]] = []

    def noting(moved: Moving, done: int, memory: dict[str, Tensor]) -> None:
        averaging(moved, 0, memory)
        assert done == len(seen) + 1
        seen.append({name: p.detach().clone() for name, p in moved.parameters.items()})
        if done == STEPS:
            for name, p in moved.parameters.items():
                p.data.copy_(memory[name])

    term = Term("retain", RETAIN, likelihood, "unit")
    found = descend(subject(), [term], replace(SETTINGS, epochs=2), Run(TASK), after=noting)
    for name, parameter in found.model.named_parameters():
        average = seen[0][name]
        for later in seen[1:]:
            average = 0.5 * average + 0.5 * later[name]
        assert torch.allclose(parameter, average, atol=1e-12)


def test_what_after_moves_reaches_the_model_through_single_weights() -> None:
    """A proximal step on parts of tensors: the model reads what was written into the parts."""

    def shrink(moved: Moving, done: int, memory: dict[str, Tensor]) -> None:
        for parameter in moved.parameters.values():
            parameter.data.zero_()

    found = subject()
    before = state(found)
    descend(
        found, [Term("forget", FORGET, ascent, "unit")],
        replace(SETTINGS, epochs=1, scope="saliency:0.3"), Run(TASK), after=shrink,
    )  # fmt: skip
    after = state(found)
    names = [name for name, _ in found.model.named_parameters()]
    changed = sum(int((before[n] != after[n]).sum()) for n in names)
    total = sum(before[n].numel() for n in names)
    assert changed <= int(0.3 * total)
    assert all(torch.equal(after[n], before[n].where(after[n] != 0, after[n])) for n in names)
    assert sum(int((after[n] == 0).sum()) for n in names) >= int(0.3 * total)


def test_statistics_move_with_the_scope_they_are_in() -> None:
    term = Term("retain", RETAIN, likelihood, "unit")
    for scope, moves in (("all", True), ("^1", True), (r"^1\.weight ^4", False), ("^4", False)):
        found = subject()
        settings = replace(SETTINGS, epochs=1, scope=scope)
        descend(found, [term], settings, Run(TASK), dropout=True)
        mean = found.model[1].running_mean
        assert torch.equal(mean, torch.zeros_like(mean)) is not moves, scope
        still = subject()
        descend(still, [term], settings, Run(TASK))
        assert torch.equal(still.model[1].running_mean, torch.zeros_like(mean))
