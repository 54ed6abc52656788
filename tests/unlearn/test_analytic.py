"""Sums that learn and forget, against least squares on the rows that are left."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.analytic import Ridge, Sketch
from unlearn.errors import BadInput

GAMMA = 0.1


def data(n: int, d: int, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=draw, dtype=torch.float64)
    return rows, torch.randint(classes, (n,), generator=draw)


def reference(rows: torch.Tensor, labels: torch.Tensor, classes: int = 3) -> np.ndarray:
    """min |Y - X W|^2 + gamma |W|^2 as one least-squares problem, solved without forming X'X."""
    d = rows.shape[1]
    left = np.vstack((rows.numpy(), np.sqrt(GAMMA) * np.eye(d)))
    right = np.vstack((np.eye(classes)[labels.numpy()], np.zeros((d, classes))))
    return np.linalg.lstsq(left, right, rcond=None)[0]


def error(ridge: Ridge, rows: torch.Tensor, labels: torch.Tensor) -> float:
    wanted = reference(rows, labels, len(ridge.counts))
    return float(np.linalg.norm(ridge.weights().numpy() - wanted) / np.linalg.norm(wanted))


def learned(rows: torch.Tensor, labels: torch.Tensor, classes: int = 3) -> Ridge:
    ridge = Ridge.empty(rows.shape[1], classes, GAMMA)
    ridge.learn(rows, labels)
    return ridge


def test_one_column_by_hand() -> None:
    ridge = Ridge.empty(1, 2, 0.5)
    ridge.learn(torch.tensor([[1.0], [2.0]]).double(), torch.tensor([0, 1]))
    assert ridge.weights().tolist() == [pytest.approx([1 / 5.5, 2 / 5.5])]  # G = 5, C = (1, 2)
    ridge.forget(torch.tensor([[1.0]]).double(), torch.tensor([0]))
    assert ridge.weights().tolist() == [pytest.approx([0.0, 2 / 4.5])]


@pytest.mark.parametrize(("n", "d"), [(400, 40), (30, 64)])  # 64 > 30: rank-deficient
def test_single_rows_come_and_go(n: int, d: int) -> None:
    rows, labels = data(n, d)
    ridge = learned(rows[: n // 2], labels[: n // 2])
    for i in range(n // 2):  # learn one, forget another, ask in between
        ridge.learn(rows[n // 2 + i, None], labels[n // 2 + i, None])
        if i < n // 3:
            ridge.forget(rows[i, None], labels[i, None])
        if i % 7 == 0:
            there = slice(min(i + 1, n // 3), n // 2 + i + 1)
            assert error(ridge, rows[there], labels[there]) < 1e-10
    assert error(ridge, rows[n // 3 :], labels[n // 3 :]) < 1e-10
    assert ridge.rows == n - n // 3


@pytest.mark.parametrize(("n", "d"), [(400, 40), (30, 64)])
def test_a_whole_class_goes_at_once(n: int, d: int) -> None:
    rows, labels = data(n, d)
    ridge, going = learned(rows, labels), labels == 1
    ridge.forget(rows[going], labels[going])
    assert error(ridge, rows[~going], labels[~going]) < 1e-10
    assert not ridge.weights()[:, 1].any()
    assert ridge.counts[1] == 0
    assert ridge.drop_empty().tolist() == [0, 2]
    assert ridge.weights().shape == (d, 2)
    wanted = reference(rows[~going], labels[~going])[:, [0, 2]]
    assert np.allclose(ridge.weights().numpy(), wanted, rtol=1e-9, atol=1e-13)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 30), st.data())
def test_any_order_is_ridge_on_the_survivors(seed: int, d: int, draw: st.DataObject) -> None:
    rows, labels = data(40, d, seed=seed)
    rows = rows * 10.0 ** draw.draw(st.integers(-1, 2))
    ridge = Ridge.empty(d, 3, GAMMA)
    inside: list[int] = []
    outside = list(range(40))
    for _ in range(draw.draw(st.integers(1, 12))):
        source, target = (inside, outside) if draw.draw(st.booleans()) else (outside, inside)
        size = draw.draw(st.integers(0, len(source)))
        moved, source[:] = source[:size], source[size:]
        target += moved
        act = ridge.forget if source is inside else ridge.learn
        act(rows[moved], labels[moved])
        if draw.draw(st.booleans()):
            ridge.weights()
    if inside:
        assert error(ridge, rows[inside], labels[inside]) < 1e-8
    else:
        assert not ridge.weights().any()
        assert not ridge.gram.any()


def test_one_factorisation_serves_until_an_eighth_of_the_width_is_pending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, labels = data(300, 80)
    ridge = learned(rows, labels)
    ridge.weights()
    factored = []
    whole = torch.linalg.cholesky_ex
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda matrix: factored.append(1) or whole(matrix)
    )
    for i in range(10):  # 80 / 8
        ridge.forget(rows[i, None], labels[i, None])
        assert error(ridge, rows[i + 1 :], labels[i + 1 :]) < 1e-11
    assert not factored
    ridge.forget(rows[10, None], labels[10, None])
    assert len(factored) == 1
    assert error(ridge, rows[11:], labels[11:]) < 1e-11


def test_a_row_alone_in_its_direction_is_subtracted_and_factored_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1 - h = gamma / (lambda + gamma) = 1e-7 there: Woodbury would lose those digits."""
    rows, labels = data(100, 16)
    rows[:, 0] = 0.0
    rows[0] = 0.0
    rows[0, 0] = 1e3
    ridge = learned(rows, labels)
    ridge.weights()
    factored = []
    whole = torch.linalg.cholesky_ex
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda matrix: factored.append(1) or whole(matrix)
    )
    ridge.forget(rows[:1], labels[:1])
    assert len(factored) == 1
    assert error(ridge, rows[1:], labels[1:]) < 1e-9


def test_new_classes_append_columns() -> None:
    rows, labels = data(60, 8, classes=5)
    old = labels < 3
    ridge = learned(rows[old], labels[old])
    ridge.grow(2)
    assert not ridge.weights()[:, 3:].any()
    ridge.learn(rows[~old], labels[~old])
    everything = (torch.cat((rows[old], rows[~old])), torch.cat((labels[old], labels[~old])))
    assert error(ridge, *everything) < 1e-12


def test_a_penalty_may_change_between_requests() -> None:
    rows, labels = data(60, 8)
    ridge = learned(rows, labels)
    other = Ridge(ridge.gram, ridge.cross, ridge.counts, 5.0)
    x, y = rows.numpy(), np.eye(3)[labels.numpy()]
    wanted = np.linalg.solve(x.T @ x + 5 * np.eye(8), x.T @ y)
    assert np.allclose(other.weights().numpy(), wanted, rtol=1e-11)


def state(ridge: Ridge) -> list[torch.Tensor]:
    return [t.clone() for t in (ridge.gram, ridge.cross, ridge.counts, ridge.weights())]


@pytest.mark.parametrize("copies", [1, 20])  # through the factor, and by subtracting sums
def test_a_row_that_reaches_too_far_is_refused_and_nothing_changes(copies: int) -> None:
    rows, labels = data(200, 16)
    ridge = learned(rows, labels)
    before = state(ridge)
    known = [rows[i] for i in range(copies)]
    stranger = torch.stack([*known, rows[0] * 100])
    with pytest.raises(BadInput, match=f"leverage of 1 or more is row {copies}"):
        ridge.forget(stranger, torch.zeros(copies + 1, dtype=torch.long))
    assert all(torch.equal(a, b) for a, b in zip(before, state(ridge), strict=True))


def test_rows_that_reach_too_far_only_together_are_refused() -> None:
    ridge = learned(torch.eye(16).double(), torch.zeros(16, dtype=torch.long))
    before = state(ridge)
    twice = torch.eye(16).double()[[3, 3]]  # leverage 0.91 each
    with pytest.raises(BadInput, match="reach further than all that was learned"):
        ridge.forget(twice, torch.tensor([0, 0]))
    assert all(torch.equal(a, b) for a, b in zip(before, state(ridge), strict=True))


def test_more_of_a_class_than_there_are_is_refused() -> None:
    rows, labels = data(50, 4)
    ridge = learned(rows, labels)
    before = state(ridge)
    short = int((labels == 2).sum())
    with pytest.raises(BadInput, match=f"{short + 1} rows of class number 2 .* and {short} are"):
        ridge.forget(rows[: short + 1] * 1e-3, torch.full((short + 1,), 2))
    assert all(torch.equal(a, b) for a, b in zip(before, state(ridge), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_values_that_would_spoil_the_sums_are_not_learned(value: float) -> None:
    rows, labels = data(5, 4)
    ridge = learned(rows, labels)
    before = state(ridge)
    with pytest.raises(BadInput, match="not finite"):
        ridge.learn(torch.full((1, 4), value, dtype=torch.float64), torch.tensor([0]))
    assert all(torch.equal(a, b) for a, b in zip(before, state(ridge), strict=True))


def test_a_penalty_below_rounding_is_refused() -> None:
    ridge = Ridge.empty(3, 2, 1e-20)
    ridge.learn(torch.ones(2, 3).double() * torch.tensor([[1.0], [3.3]]), torch.tensor([0, 1]))
    ridge.gram[0, 0] -= 1e-14  # what rounding may do to a singular matrix
    with pytest.raises(BadInput, match="larger gamma"):
        ridge.weights()


def test_what_is_written_holds_no_forgotten_row() -> None:
    rows, labels = data(80, 40)
    ridge = learned(rows, labels)
    ridge.forget(rows[:2], labels[:2])
    again = pickle.loads(pickle.dumps(ridge))
    assert again._base is None
    never = learned(rows[2:], labels[2:])
    assert torch.allclose(again.gram, never.gram, rtol=0, atol=1e-12)
    assert torch.allclose(again.weights(), ridge.weights(), rtol=1e-9)


def test_memory_does_not_grow_with_rows() -> None:
    def size(ridge: Ridge) -> int:
        base = ridge._base
        assert base is not None
        return sum(t.numel() for t in (*vars(base).values(), ridge.gram, ridge.cross))

    rows, labels = data(2000, 16)
    ridge = learned(rows[:20], labels[:20])
    ridge.weights()
    most = 0
    for i in range(20, 2000, 2):
        ridge.learn(rows[i : i + 2], labels[i : i + 2])
        ridge.forget(rows[i - 20 : i - 18], labels[i - 20 : i - 18])
        most = max(most, size(ridge))
    d, c, p = 16, 3, 2
    assert most <= 2 * d * d + 2 * d * c + p * (2 * d + c + p)


def small(slots: int) -> Sketch:
    return Sketch(torch.zeros(4, slots, dtype=torch.int32), b"salt")


def record(i: int) -> bytes:
    return f"record {i}".encode()


def test_a_sketch_knows_everything_it_was_shown() -> None:
    sketch = small(64)  # overloaded: still no known record is refused
    sketch.add(record(i) for i in range(500))
    sketch.check([record(i) for i in range(500)])
    sketch.remove([record(i) for i in range(500)])
    assert not sketch.counters.any()


def test_strangers_are_counted_and_the_first_is_named() -> None:
    sketch = Sketch.empty(b"salt")
    sketch.add(record(i) for i in range(10))
    before = sketch.counters.clone()
    with pytest.raises(BadInput, match=r"2 of the 3 records .* the first is row 1"):
        sketch.remove([record(0), record(10), record(11)])
    with pytest.raises(BadInput, match=r"1 of the 2 .* the first is number 1:"):
        sketch.remove([record(3), record(3)], "number {}".format)
    assert torch.equal(sketch.counters, before)


def test_a_record_shown_twice_may_go_twice_and_no_more() -> None:
    sketch = Sketch.empty(b"salt")
    sketch.add([record(1), record(1)])
    sketch.remove([record(1)])
    sketch.remove([record(1)])
    with pytest.raises(BadInput, match="1 of the 1"):
        sketch.check([record(1)])


@pytest.mark.parametrize("load", [256, 1024, 2048])
def test_false_acceptance_is_what_the_formula_says(load: int) -> None:
    sketch = small(1024)
    sketch.add(record(i) for i in range(load))
    accepted, tries = 0, 4000
    for i in range(tries):
        try:
            sketch.check([record(100_000 + i)])
        except BadInput:
            continue
        accepted += 1
    chance = (1 - np.exp(-load / 1024)) ** 4
    assert sketch.false_acceptance(load) == pytest.approx(chance, rel=2e-3)
    assert (
        abs(accepted / tries - chance)
        < 5 * np.sqrt(chance * (1 - chance) / tries) + 0.01 * (chance) + 4 * chance / 32
    )  # sampling, and the share of marked slots differing from its mean


def test_the_documented_rates() -> None:
    sketch = Sketch.empty(b"")
    rates = [sketch.false_acceptance(n) for n in (50_000, 100_000, 1_000_000)]
    assert rates == pytest.approx([5e-6, 7e-5, 0.14], rel=0.1)


def test_other_salts_give_other_places() -> None:
    one, other = Sketch.empty(b"1"), Sketch.empty(b"2")
    one.add([record(0)])
    other.add([record(0)])
    assert not torch.equal(one.counters, other.counters)
