"""One pass over a set, and the attack that reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from unlearn import demo
from unlearn.attacks.membership.loss import loss_score
from unlearn.attacks.signals import Signals, collect
from unlearn.data import load, record_hashes
from unlearn.evaluations.statistics import auc
from unlearn.interface import Subject
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM

WORLD = demo.people(seed=5, forget=2, retain=1, holdout=2)


@pytest.fixture(scope="module")
def trained() -> Subject:
    subject = demo.tiny_llama([*WORLD.forget, *WORLD.holdout], width=32, depth=2)
    return demo.train(subject, WORLD.forget, epochs=120)


def encoded(subject: Subject, records: list[demo.Record]) -> Encoded:
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    return Encoded(load(records, "forget"), task)


def test_signals_equal_the_model_asked_one_by_one(trained: Subject) -> None:
    examples = encoded(trained, WORLD.forget)
    found = collect(trained.model, examples, Run(examples.task), b"key", "measure")
    for i in range(len(examples)):
        with torch.no_grad():
            predictions = examples.task.predictions(trained.model, examples.batch([i]))
        assert found.nll[i] == pytest.approx(float(predictions.nll()), rel=1e-4)
        assert found.units[i] == examples[i]["units"]
        assert found.hits[i] == predictions.hits()[0, :-1].tolist()  # without end of sequence
    assert found.record == [h.hex() for h in record_hashes(
        examples.examples, examples.task.content, b"key")]  # fmt: skip


def test_one_forward_per_batch_and_nothing_else(trained: Subject) -> None:
    examples = encoded(trained, WORLD.forget)
    calls: list[int] = []
    trained.model.zero_grad()
    handle = trained.model.register_forward_hook(lambda *_: calls.append(1))
    collect(trained.model, examples, Run(examples.task), b"key", "measure")
    handle.remove()
    assert len(calls) == 1
    assert all(p.grad is None for p in trained.model.parameters())


def test_signals_survive_the_disk(trained: Subject, tmp_path: Path) -> None:
    examples = encoded(trained, WORLD.forget)
    found = collect(trained.model, examples, Run(examples.task), b"key", "measure")
    found.write(tmp_path / "signals" / "original-forget.parquet")
    back = Signals.read(tmp_path / "signals" / "original-forget.parquet")
    assert back.record == found.record
    assert back.hits == found.hits
    assert np.array_equal(back.nll, found.nll)
    assert [p.name for p in (tmp_path / "signals").iterdir()] == ["original-forget.parquet"]


def test_the_loss_attack_points_the_right_way(trained: Subject) -> None:
    scores = []
    for records in (WORLD.forget, WORLD.holdout):
        examples = encoded(trained, records)
        found = collect(trained.model, examples, Run(examples.task), b"key", "measure")
        scores.append(loss_score(found.nll, found.units))
    assert auc(*scores) > 0.9
