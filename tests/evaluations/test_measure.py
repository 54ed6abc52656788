"""What a model is asked, and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import plain
from unlearn import case as cases
from unlearn.checkpoint import inspect
from unlearn.config import AuditConfig, configure
from unlearn.evaluations import audit, measure
from unlearn.run import Run

SETS = {"forget": plain.vectors(70, 1), "retain": plain.vectors(20, 2),
        "holdout": plain.vectors(130, 3)}  # fmt: skip


def case_of(model: nn.Module, **settings: Any) -> cases.Case:
    config = configure(AuditConfig, original=model, unlearned=model, **{**SETS, **settings})
    return cases.build(config, inspect(model))


def counted(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_quick_audit_asks_each_model_once_per_record_whatever_the_attacks() -> None:
    models = [plain.factory() for _ in range(3)]
    calls = [counted(model) for model in models]
    report = audit(models[0], models[1], retrained=models[2], **SETS, audit="quick")
    assert sum(f.name.startswith("membership_") for f in report.findings) >= 4
    batches = sum(-(-len(records) // 64) for records in SETS.values())
    assert [len(c) for c in calls] == [batches] * 3


def test_what_was_measured_is_read_back(tmp_path: Path) -> None:
    model = plain.factory()
    case = case_of(model, audit="standard")
    run = Run(case.checkpoint.task, work=tmp_path)
    (tmp_path / "record.key").write_text("00" * 16)
    first = measure.measure("original", model, case, run, tmp_path, None)
    calls = counted(model)
    again = measure.measure("original", model, case, run, tmp_path, None)
    assert not calls
    assert np.array_equal(first.signals["forget"].logprob, again.signals["forget"].logprob)
    assert np.array_equal(first.curves["relearning"]["hits"], again.curves["relearning"]["hits"])
    assert np.array_equal(
        first.numbers["grad_norm"]["holdout"], again.numbers["grad_norm"]["holdout"]
    )


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = plain.factory()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    case = case_of(model, audit="standard")
    (tmp_path / "record.key").write_text("00" * 16)
    measure.measure("original", model, case, Run(case.checkpoint.task), tmp_path, None)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_sets_other_than_the_forget_set_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measure.SAMPLED, "quick", 15)
    case = case_of(plain.factory(), audit="quick")
    parts = measure.parts(case, case.checkpoint.task)
    assert {name: len(part) for name, part in parts.items()} == {
        "forget": 70, "retain": 15, "holdout": 15,
    }  # fmt: skip


def test_layers_of_a_deep_model_are_thinned_evenly() -> None:
    names = [str(i) for i in range(33)]
    kept = measure.thinned(names)
    assert len(kept) == measure.LAYERS
    assert (kept[0], kept[-1]) == ("0", "32")
    assert measure.thinned(names[:3]) == names[:3]
