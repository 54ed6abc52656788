"""The trials of a search as optuna keeps them: what is proposed, killed in between or not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import Trial, TrialState
from safetensors.torch import save_model

from tests import plain
from unlearn.config import TuneConfig, configure
from unlearn.evaluations import study, tuning
from unlearn.evaluations.objectives import Objectives
from unlearn.plan import Plan
from unlearn.ranges import Space
from unlearn.run import Silent

STARTUP = 10  # trials before the estimator proposes; until then they are drawn without it


def asked(folder: Path, **changes: Any) -> tuple[Plan, dict[str, Space]]:
    """A request, whose trials nobody will carry out."""
    for name, seed in (("data", 0), ("holdout", 1)):
        rows = map(json.dumps, plain.vectors(30, seed=seed))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_model(plain.factory(), str(folder / "net.safetensors"))
    request = {
        "checkpoint": folder / "net.safetensors", "model": "tests.plain:factory",
        "data": folder / "data.jsonl", "forget_classes": "2", "method": "grad_diff",
        "holdout": folder / "holdout.jsonl", "device": "cpu", **changes,
    }  # fmt: skip
    return tuning.requested(configure(TuneConfig, **request))


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, dict[str, Space]]:
    ranges = {"lr": "1e-3:1e-1:log", "epochs": "1:9", "batch_size": "8,16,32"}
    return asked(tmp_path_factory.mktemp("asked"), range=ranges)


def worth(plan: Plan, *_: Any) -> Any:
    """What a trial would be worth, by its settings alone."""
    s = plan.given
    return SimpleNamespace(report=Objectives(abs(s["lr"] - 0.01), 1 / s["epochs"], {}))


def worked(request: tuple[Plan, dict[str, Space]], out: Path, trials: int) -> list[dict[str, Any]]:
    """The settings of all trials, once there are so many; the study is opened for it."""
    out.mkdir(exist_ok=True)
    url = f"sqlite:///{out / 'study.db'}"
    with study.quiet():
        found = study.opened(url, "identity", "grad_diff")
        worker = study.Worker(found, url, *request, trials, out, "name", Silent())
        worker.work({}, SimpleNamespace())  # type: ignore[arg-type]
    return [dict(row.settings) for row in worker.rows()]


def test_a_study_begins_with_the_sampler_that_goes_on(tmp_path: Path) -> None:
    found = study.opened(f"sqlite:///{tmp_path / 'study.db'}", "identity", "grad_diff")
    assert isinstance(found.sampler, optuna.samplers.TPESampler)


def test_the_estimator_proposes_the_same_whether_killed_or_not(
    request_: tuple[Plan, dict[str, Space]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "execute", worth)
    whole = worked(request_, tmp_path / "whole", STARTUP + 4)
    assert len({settings["lr"] for settings in whole}) == STARTUP + 4
    for trials in (STARTUP - 1, STARTUP + 1, STARTUP + 2):
        assert worked(request_, tmp_path / "parts", trials) == whole[:trials]

    suggest, drawn = Trial.suggest_float, []

    def killed(self: Trial, name: str, *args: Any, **more: Any) -> Any:
        if self.params and not drawn:
            drawn.extend(self.params)
            raise KeyboardInterrupt
        return suggest(self, name, *args, **more)

    monkeypatch.setattr(Trial, "suggest_float", killed)
    with pytest.raises(KeyboardInterrupt):
        worked(request_, tmp_path / "parts", STARTUP + 4)
    assert set(drawn) < request_[1].keys()  # some were drawn, some were not
    assert worked(request_, tmp_path / "parts", STARTUP + 4) == whole


def test_a_trial_of_another_worker_is_left_alone(
    request_: tuple[Plan, dict[str, Space]], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    found = study.opened(url, "identity", "grad_diff")
    one, two = (study.Worker(found, url, *request_, 9, tmp_path, n, Silent()) for n in "ab")
    trial = one.claim()
    assert trial is not None
    assert [left.number for left in one._left()] == [trial.number]
    assert two._left() == []


def test_where_no_part_is_proposed_they_take_turns(tmp_path: Path) -> None:
    request = asked(tmp_path, method="memcontrol", set={"lr": 1e-3})
    url = f"sqlite:///{tmp_path / 'study.db'}"
    found = study.opened(url, "identity", "memcontrol")
    worker = study.Worker(found, url, *request, 4, tmp_path, "name", Silent())
    for _ in range(3):
        found.enqueue_trial({"moves.other.1": False, "moves.other.2": False})
    found.enqueue_trial({"moves.other.1": True, "moves.other.2": True})
    moved = []
    while (trial := worker.claim()) is not None:
        moved.append(worker._settings(trial)["moves"])
    assert moved == ["other.1", "other.2", "other.1", "other.1,other.2"]
    assert found.get_trials(states=(TrialState.RUNNING,))[0].params["moves.other.1"] is False
