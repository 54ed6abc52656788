"""SISA is exact: what is left after a request is what training on the rest would have made."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import unlearn
from unlearn import manifest
from unlearn.checkpoint import inspect
from unlearn.data import load
from unlearn.errors import BadInput, Collapsed, MissingNeed
from unlearn.interface import Records, Request, Subject
from unlearn.methods import sisa
from unlearn.methods.sisa import PARTS, SISA, divide
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification

CLASSES, WIDTH = 3, 4
TASK = Classification(CLASSES)
METHOD = SISA(shards=3, slices=2, epochs=2, lr=1e-2, batch_size=8)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES))


def records(n: int = 60, seed: int = 1) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, WIDTH, generator=draw).tolist()
    return [{"features": row, "label": i % CLASSES} for i, row in enumerate(rows)]


def request(forget: list[dict[str, Any]] | None, retain: list[dict[str, Any]]) -> Request:
    sets = {"forget": forget, "retain": retain}
    return Request(Records(1), **{k: Encoded(load(v, k), TASK) for k, v in sets.items() if v})


def run_in(work: Path | None = None, seed: int = 0) -> Run:
    run = Run(TASK, seed, work=work)
    run.initial_model = lambda init: network()  # type: ignore[method-assign]
    return run


def original() -> Subject:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Subject(network().eval())


def trained(retain: list[dict[str, Any]], method: SISA = METHOD, run: Run | None = None) -> Subject:
    """What a first request leaves."""
    return method.unlearn(original(), request(records(3, 9), retain), run or run_in())


def copied(subject: Subject) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in subject.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def place(record: dict[str, Any]) -> tuple[int, int]:
    """Its (shard, slice) at seed 0."""
    examples = Encoded(load([record], "forget"), TASK)
    parts = METHOD._parts(examples, run_in().seed_of("sisa"))
    return next((k, r) for k, some in enumerate(parts) for r, p in enumerate(some) if p.records)


@given(
    st.lists(st.binary(min_size=16, max_size=16), unique=True, max_size=40),
    st.integers(1, 4), st.integers(1, 3), st.randoms(),
)  # fmt: skip
def test_every_record_has_one_place_whatever_the_order(hashes, shards, slices, draw) -> None:
    parts = divide(hashes, shards, slices)
    assert (len(parts), {len(some) for some in parts}) == (shards, {slices})
    assert sorted(i for some in parts for p in some for i in p.records) == list(range(len(hashes)))
    shuffled = draw.sample(hashes, len(hashes))
    other = divide(shuffled, shards, slices)
    for one, two in zip(chain(*parts), chain(*other), strict=True):
        assert [hashes[i] for i in one.records] == [shuffled[i] for i in two.records]
        assert one.fingerprint == two.fingerprint


def test_records_spread_evenly() -> None:
    parts = SISA(shards=4, slices=5)._parts(Encoded(load(records(2000), "r"), TASK), 7)
    sizes = [len(p.records) for some in parts for p in some]
    assert sum(sizes) == 2000
    assert 60 < min(sizes) <= max(sizes) < 140  # four standard deviations around 100


def test_forgetting_is_training_on_the_rest() -> None:
    data = records()
    gone, rest = data[:2], data[2:]
    after = METHOD.unlearn(trained(data), request(gone, rest), run_in(seed=4))
    scratch = trained(rest)
    assert same(copied(after), copied(scratch))
    assert same(dict(after.state), dict(scratch.state))
    assert after.note == scratch.note


def test_one_request_after_the_other() -> None:
    data = records()
    subject = trained(data)
    for done in (1, 2, 3):
        subject = METHOD.unlearn(subject, request(data[:done], data[done:]), run_in())
    assert same(copied(subject), copied(trained(data[3:])))


def test_only_what_saw_the_record_is_trained_again(monkeypatch: pytest.MonkeyPatch) -> None:
    data = records()
    number = next(i for i, record in enumerate(data) if place(record)[1] == 1)
    shard, first = place(data[number])
    subject = trained(data)
    before = copied(subject)
    took: list[tuple[int, int]] = []
    train = sisa._train
    monkeypatch.setattr(sisa, "_train", lambda *a: took.append(a[2:4]) or train(*a))
    rest = [record for i, record in enumerate(data) if i != number]
    run = run_in()
    after = METHOD.unlearn(subject, request([data[number]], rest), run)
    assert took == [(shard, first)]
    changed = {k.split(".")[1] for k, v in copied(after).items() if not torch.equal(v, before[k])}
    assert changed == {str(shard)}
    assert f"1 of 3 shards were trained again ({shard} from slice 1)" in run.notes[-1]


def test_the_cost_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share is that of the examples that go through training, but for rounded steps."""
    method = replace(METHOD, epochs=30, batch_size=1)
    data = records()
    seen: list[int] = []

    def count(subject: Subject, terms: Any, settings: SISA, *_: Any, **__: Any) -> None:
        seen.append(settings.steps(len(terms[0].examples)))

    monkeypatch.setattr(sisa, "descend", count)
    subject = trained(data, method)
    whole = sum(seen)
    assert whole == pytest.approx(method.epochs * len(data), rel=0.15)  # slices differ in size
    seen.clear()
    run = run_in()
    method.unlearn(subject, request(data[:1], data[1:]), run)
    assert f"for {sum(seen) / whole:.0%} of the cost" in run.notes[-1]
    assert f"; for one record {(2 * 2 + 1) / (3 * 2 * 3):.0%} are" in run.notes[-1]


def test_the_estimate_is_that_of_ordinary_training() -> None:
    assert SISA(shards=2, slices=3, epochs=8, batch_size=2).trained(5, 24) == 8 * 24


def test_the_forget_set_and_the_order_of_records_do_not_matter() -> None:
    data = records()
    one = trained(data)
    other = METHOD.unlearn(original(), request(None, data[::-1]), run_in())
    assert same(copied(one), copied(other))
    assert not same(copied(one), copied(trained(data, run=run_in(seed=1))))


def test_what_was_never_trained_on_is_forgotten_already() -> None:
    subject = trained(records())
    before, run = copied(subject), run_in()
    after = METHOD.unlearn(subject, request(records(5, 77), records()), run)
    assert same(copied(after), before)
    assert "nothing changed" in run.notes[-1]


def test_state_is_one_copy_per_shard_and_slice() -> None:
    subject = trained(records())
    weights = sum(v.numel() for v in network().state_dict().values())
    assert sum(v.numel() for v in subject.state.values()) == 3 * 2 * weights
    counts = [count for some in json.loads(subject.note[PARTS]) for count, _ in some]
    assert (len(counts), sum(counts)) == (6, 60)


@pytest.mark.parametrize(
    ("forget", "retain", "says"),
    [
        (slice(0, 2), slice(4, None), "is not what this ensemble was trained on"),  # two are lost
        (slice(0, 2), slice(3, None), "is not what this ensemble was trained on"),
        (slice(0, 0), slice(2, None), "pass all that the last request retained"),
    ],
)
def test_a_retain_set_that_is_not_the_rest_is_refused(forget, retain, says) -> None:
    data = records()
    subject = trained(data)
    with pytest.raises(BadInput, match=says):
        METHOD.unlearn(subject, request(data[forget], data[retain]), run_in())


def test_records_that_come_back_are_refused() -> None:
    data = records()
    subject = METHOD.unlearn(trained(data), request(data[:2], data[2:]), run_in())
    with pytest.raises(BadInput, match="is not what this ensemble was trained on"):
        METHOD.unlearn(subject, request([data[3]], [*data[:3], *data[4:]]), run_in())


def test_a_growing_list_of_what_must_go_is_understood() -> None:
    data = records()
    subject = METHOD.unlearn(trained(data), request(data[:4], data[4:]), run_in())
    after = METHOD.unlearn(subject, request(data[:6], data[6:]), run_in())
    assert same(copied(after), copied(trained(data[6:])))


def test_other_settings_are_refused() -> None:
    data = records()
    subject = trained(data)
    with pytest.raises(BadInput, match=r"trained with lr=0.01, epochs=2; pass the same"):
        replace(METHOD, lr=0.5, epochs=9).unlearn(subject, request(data[:1], data[1:]), run_in())
    with pytest.raises(BadInput, match="shards=3"):
        replace(METHOD, shards=2).unlearn(subject, request(data[:1], data[1:]), run_in())


def test_a_shard_that_runs_dry_is_refused() -> None:
    data = records()
    left = [record for record in data if place(record)[0] != 1]
    with pytest.raises(
        BadInput, match="shard 1 would be trained on 0 records: train an ensemble of fewer shards"
    ):
        trained(left)
    gone = [record for record in data if place(record)[0] == 1]
    with pytest.raises(BadInput, match="shard 1 would be trained on 1 record:"):
        METHOD.unlearn(trained(data), request(gone[1:], [*left, gone[0]]), run_in())


def test_an_empty_slice_leaves_the_weights_as_they_are() -> None:
    data = [record for record in records() if place(record) != (1, 0)]
    state = trained(data).state
    assert all(torch.equal(state[k], state[k.replace("sisa.1.0", "sisa.1.1")])
               for k in state if k.startswith("sisa.1.0."))  # fmt: skip


def test_state_and_model_belong_together() -> None:
    kept = trained(records())
    with pytest.raises(BadInput, match="pass that run"):
        METHOD.unlearn(replace(kept, model=network()), request([], records()), run_in())


def test_another_architecture_is_no_start() -> None:
    run = run_in()
    run.initial_model = lambda init: nn.Linear(WIDTH, CLASSES)  # type: ignore[method-assign]
    with pytest.raises(BadInput, match="another architecture"):
        trained(records(), run=run)


def test_an_interrupted_run_keeps_the_shards_it_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = sisa._train
    done: list[int] = []

    def fails_at(number: int):
        def step(*given: Any) -> Any:
            if given[2] == number:
                raise KeyboardInterrupt
            done.append(given[2])
            return train(*given)

        return step

    monkeypatch.setattr(sisa, "_train", fails_at(2))
    with pytest.raises(KeyboardInterrupt):
        trained(records(), run=run_in(tmp_path))
    assert done == [0, 1]
    done.clear()
    monkeypatch.setattr(sisa, "_train", fails_at(-1))
    after = trained(records(), run=run_in(tmp_path))
    assert done == [2]
    assert same(copied(after), copied(trained(records())))


def test_processes_do_not_change_a_bit_and_leave_nothing_behind() -> None:
    two = replace(METHOD, shards=2, workers=2)
    data = records()
    assert same(copied(trained(data, two)), copied(trained(data, replace(two, workers=1))))
    with pytest.raises(Collapsed, match="the model collapsed") as caught:
        trained(data, replace(two, shards=1, lr=1e30, max_grad_norm=1e30))
    assert "In the process that trained a shard" in "".join(caught.value.__notes__)
    assert multiprocessing.active_children() == []


def test_what_cannot_be_sent_to_a_process_says_so() -> None:
    task = Classification(CLASSES, processor=lambda value: value)
    retain = Encoded(load(records(), "retain"), task)
    with pytest.raises(BadInput, match="workers=1"):
        replace(METHOD, workers=2).unlearn(original(), Request(Records(1), None, retain), run_in())


# from checkpoint to checkpoint


def test_runs_on_disk_are_exact_too(tiny_images: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = tiny_images
    settings = {"shards": 2, "slices": 2, "epochs": 1, "batch_size": 4}
    given = {"method": "sisa", "data": data, "set": settings, "audit": "none"}
    unlearn.forget(model, **given, forget_ids="0", out=tmp_path / "first")
    assert manifest.faults(tmp_path / "first") == []
    unlearn.forget(tmp_path / "first", **given, forget_ids="0,7", out=tmp_path / "second")
    unlearn.forget(model, **given, forget_ids="0,7", out=tmp_path / "scratch")
    found = {name: inspect(tmp_path / name) for name in ("first", "second", "scratch")}
    assert found["second"].fingerprint == found["scratch"].fingerprint
    assert found["second"].fingerprint == inspect(tmp_path / "second" / "model").fingerprint
    assert found["first"].fingerprint != found["second"].fingerprint
    second, scratch = (found[name].load() for name in ("second", "scratch"))
    assert same(dict(second.state), dict(scratch.state))
    assert second.note == scratch.note
    notes = json.loads((tmp_path / "first" / "run.json").read_text())["notes"]
    assert "Accuracy on the retain set: the original" in notes[0]


def test_a_later_request_without_the_rest_is_refused(
    tiny_images: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(MissingNeed, match="needs a retain set"):
        unlearn.forget(tiny_images[0], method="sisa", forget=tiny_images[1], audit="none")


@pytest.mark.parametrize("depth", ["quick", "standard"])
def test_an_audit_reads_an_ensemble(
    tiny_images: tuple[Path, Path], image_folder: Path, tmp_path: Path, depth: str
) -> None:
    model, data = tiny_images
    settings = {"shards": 2, "slices": 2, "epochs": 1, "batch_size": 4}
    given = {"method": "sisa", "data": data, "set": settings, "forget_ids": "0:4"}
    result = unlearn.forget(model, **given, audit=depth, out=tmp_path / "run")
    assert result.report.verdict in {"forgotten", "inconclusive", "not forgotten"}
    assert manifest.faults(tmp_path / "run") == []
