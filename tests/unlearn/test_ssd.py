"""Selective synaptic dampening against pencil and paper, and against recomputing everything."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import unlearn
from unlearn.checkpoint import inspect
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.interface import Classes, Need, Request, Subject
from unlearn.methods.ssd import SSD, dampen, output_size, ratio_percentile
from unlearn.run import Run
from unlearn.tasks.base import Encoded, Predictions
from unlearn.tasks.classification import Classification
from unlearn.weights import read_state, write_state

CLASSES = 3


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def examples(name: str, n: int, seed: int) -> Encoded:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    labels = torch.randint(CLASSES, (n,), generator=draw)
    return Encoded(load((inputs, labels), name), Classification(CLASSES))


def request(forget: Encoded, retain: Encoded | None) -> Request:
    return Request(Classes((0,), ("0",)), forget, retain)


def importances(model: nn.Module, data: Encoded) -> dict[str, torch.Tensor]:
    """One backward per example: slow and plain."""
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(len(data)):
        model.zero_grad()
        data.task.nll(model, data.batch([i])).sum().backward()
        for n, p in model.named_parameters():
            sums[n] += p.grad.square()
    model.zero_grad()
    return sums


def test_dampening_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0]))
    on_forget = {"w": torch.tensor([1.0, 1.0, 1.0, 0.0, 4.0])}
    on_all = {"w": torch.tensor([0.1, 0.5, 0.0, 0.0, 2.0])}
    # ratios 10, 2 (not above alpha), infinite, undefined, 2
    assert dampen({"w": weight}, on_forget, on_all, alpha=2.0, dampening=1.0) == 2
    assert weight.tolist() == pytest.approx([0.2, 2.0, 0.0, 2.0, 2.0])


def test_dampening_never_amplifies() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    dampen({"w": weight}, {"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])}, 2.0, 50.0)
    assert weight.tolist() == [2.0]


def test_two_parameter_model_by_hand() -> None:
    """Logits (0, w x + b): the gradient of the NLL is (p - y) (x, 1)."""

    class Logistic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(1, 1).double()
            with torch.no_grad():
                self.line.weight.fill_(0.7)
                self.line.bias.fill_(-0.2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = self.line(x)
            return torch.cat((torch.zeros_like(z), z), dim=1)

    def square(x: float, y: int) -> tuple[float, float]:
        g = 1 / (1 + math.exp(-(0.7 * x - 0.2))) - y
        return (g * x) ** 2, g**2

    forget, retain = [(1.5, 1), (2.0, 1)], [(0.1, 0), (-1.0, 0), (0.2, 1)]
    f = [sum(v) / 2 for v in zip(*(square(*e) for e in forget), strict=True)]
    a = [sum(v) / 5 for v in zip(*(square(*e) for e in forget + retain), strict=True)]
    alpha = 0.5 * (f[0] / a[0] + f[1] / a[1])  # selects exactly one of the two
    wanted = [
        theta * (min(a_i / f_i, 1) if f_i > alpha * a_i else 1)
        for theta, f_i, a_i in zip((0.7, -0.2), f, a, strict=True)
    ]

    def encoded(rows: list[tuple[float, int]], name: str) -> Encoded:
        inputs = torch.tensor([[x] for x, _ in rows], dtype=torch.float64)
        return Encoded(load((inputs, [y for _, y in rows]), name), Classification(2))

    sets = encoded(forget, "forget"), encoded(retain, "retain")
    subject = SSD(alpha=alpha).unlearn(Subject(Logistic()), request(*sets), Run(sets[0].task))
    line = subject.model.line
    assert line.weight.item() == pytest.approx(wanted[0], rel=1e-12)
    assert line.bias.item() == pytest.approx(wanted[1], rel=1e-12)


def test_two_layer_model_equals_one_backward_per_example() -> None:
    forget, retain = examples("forget", 5, 1), examples("retain", 20, 2)
    model = network()
    sums_f, sums_r = importances(model, forget), importances(model, retain)
    mean_f = {n: s / 5 for n, s in sums_f.items()}
    mean_all = {n: (sums_f[n] + sums_r[n]) / 25 for n in sums_f}
    wanted = network()
    dampen(dict(wanted.named_parameters()), mean_f, mean_all, 2.0, 1.0)
    got = SSD(alpha=2.0, batch_size=3).unlearn(
        Subject(model), request(forget, retain), Run(forget.task)
    )
    for (name, p), q in zip(wanted.named_parameters(), got.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9), name
    assert any(
        not torch.equal(p, q)
        for p, q in zip(wanted.parameters(), network().parameters(), strict=True)
    )


def test_kept_state_is_exactly_that_of_the_remaining_data() -> None:
    forget, retain = examples("forget", 5, 1), examples("retain", 20, 2)
    wanted = importances(network(), retain)
    after = SSD().unlearn(Subject(network()), request(forget, retain), Run(forget.task))
    assert after.note["ssd.count"] == "20"
    for name, value in wanted.items():
        assert torch.allclose(after.state[f"ssd.{name}"].double(), value, rtol=1e-5, atol=1e-12)


def test_a_later_request_reads_the_forget_set_alone() -> None:
    forget, retain = examples("forget", 5, 1), examples("retain", 20, 2)
    first = SSD().unlearn(Subject(network()), request(forget, retain), Run(forget.task))
    seen = []
    first.model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    run = Run(forget.task)
    second = SSD(batch_size=4).unlearn(first, request(examples("forget", 4, 3), None), run)
    assert sum(seen) == 4
    assert second.note["ssd.count"] == "16"
    assert any("only the forget set was read" in note for note in run.notes)


def test_state_that_covers_too_little_is_refused() -> None:
    forget, retain = examples("forget", 5, 1), examples("retain", 4, 2)
    first = SSD().unlearn(Subject(network()), request(forget, retain), Run(forget.task))
    with pytest.raises(BadInput, match="nothing would remain"):
        SSD().unlearn(first, request(examples("forget", 4, 3), None), Run(forget.task))


def test_percentile_is_chosen_by_the_share_and_explained() -> None:
    forget, retain = examples("forget", 5, 1), examples("retain", 45, 2)
    run = Run(forget.task)
    model = network()
    SSD().unlearn(Subject(model), request(forget, retain), run)
    percentile = 100 - math.log(1 + 100 * 5 / 50)
    assert any(f"{percentile:.2f}th percentile" in note for note in run.notes)
    total = sum(p.numel() for p in model.parameters())
    changed = sum(
        int((p != q).sum()) for p, q in zip(model.parameters(), network().parameters(), strict=True)
    )
    assert changed == round((1 - percentile / 100) * total)


def test_ratio_percentile_ignores_weights_without_influence() -> None:
    on_forget = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0, 1.0, 0.0])}
    on_all = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])}  # 1 2 3 4 inf nan
    assert ratio_percentile(on_forget, on_all, 50) == 2.0
    assert ratio_percentile(on_forget, on_all, 100) == 4.0


def test_a_fixed_alpha_beyond_the_exact_cap_warns_and_does_nothing() -> None:
    forget, retain = examples("forget", 5, 1), examples("retain", 20, 2)
    run = Run(forget.task)
    after = SSD(alpha=5.0).unlearn(Subject(network()), request(forget, retain), run)
    assert any("does nothing" in note for note in run.notes)
    assert all(
        torch.equal(p, q)
        for p, q in zip(after.model.parameters(), network().parameters(), strict=True)
    )


def test_compat_squares_batch_means_in_data_order() -> None:
    forget, retain = examples("forget", 5, 1), examples("retain", 7, 2)
    model = network()
    order = [(retain, i) for i in range(7)] + [(forget, i) for i in range(5)]
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for start in range(0, 12, 5):  # the last, smaller batch weighs as much
        part = order[start : start + 5]
        model.zero_grad()
        batch = forget.task.collate([e[i] for e, i in part])
        forget.task.nll(model, batch).mean().backward()
        for n, p in model.named_parameters():
            sums[n] += p.grad.square() / 3
    got = SSD(estimator="compat", batch_size=5)._compat(
        model, [retain, forget], Run(forget.task), "all"
    )
    for name, value in sums.items():
        assert torch.allclose(got[name], value, rtol=1e-12)


def test_a_third_request_dampens_no_more_than_it_selects() -> None:
    """Kept sums are of earlier weights; they must never make an unrelated weight look useless."""
    retain = examples("retain", 40, 2)
    subject = SSD(percentile=80).unlearn(
        Subject(network()), request(examples("forget", 5, 1), retain), Run(retain.task)
    )
    total = sum(p.numel() for p in subject.model.parameters())
    for seed in (3, 4, 5):
        run = Run(retain.task)
        forget = examples("forget", 5, seed)
        subject = SSD(percentile=80).unlearn(subject, request(forget, None), run)
        zeros = sum(int((p == 0).sum()) for p in subject.model.parameters())
        assert zeros < 0.05 * total


def test_compat_leaves_no_stale_state() -> None:
    forget, retain = examples("forget", 5, 1), examples("retain", 20, 2)
    first = SSD().unlearn(Subject(network()), request(forget, retain), Run(forget.task))
    again = SSD(estimator="compat").unlearn(first, request(forget, retain), Run(forget.task))
    assert not again.state


def union(*sets: Encoded, seed: int = 0) -> Encoded:
    """All examples of several sets, shuffled."""
    encodings = [e[i] for e in sets for i in range(len(e))]
    order = torch.randperm(len(encodings), generator=torch.Generator().manual_seed(seed)).tolist()
    inputs = torch.stack([encodings[i]["features"] for i in order])
    labels = [encodings[i]["label"] for i in order]
    return Encoded(load((inputs, labels), "data"), sets[0].task)


@pytest.mark.parametrize("importance", ["loss", "output"])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_prepared_importances_give_the_same_bits_as_recomputed_ones(
    precision: torch.dtype, importance: str
) -> None:
    """Measured before the request was known, over the data in another order."""
    forget, retain = examples("forget", 5, 1), examples("retain", 40, 2)
    method = SSD(percentile=80, batch_size=8, importance=importance)

    def start() -> Subject:
        return Subject(network().to(precision))

    recomputed = method.unlearn(start(), request(forget, retain), Run(forget.task))
    prepared = method.prepare(start(), union(forget, retain), Run(forget.task))
    assert prepared.note["ssd.count"] == "45"
    assert all(
        torch.equal(p, q)
        for p, q in zip(prepared.model.parameters(), start().model.parameters(), strict=True)
    )
    seen = []
    prepared.model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    cached = method.unlearn(prepared, request(forget, None), Run(forget.task))
    assert sum(seen) == 5
    assert cached.note == recomputed.note
    assert cached.state.keys() == recomputed.state.keys()
    for name, value in cached.state.items():
        assert value.dtype == precision
        assert torch.equal(value, recomputed.state[name])
    moved = 0
    for p, q, r in zip(
        cached.model.parameters(), recomputed.model.parameters(), start().model.parameters(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(p, q)
        moved += int((p != r).sum())
    assert moved > 0


def test_prepared_importances_survive_the_disk_and_serve_forget(tmp_path: Path) -> None:
    forget, retain = examples("forget", 5, 1), examples("retain", 40, 2)
    model = network().float()
    prepared = SSD().prepare(Subject(model), union(forget, retain), Run(forget.task))
    write_state(tmp_path / "state", prepared.state, prepared.note)
    subject = Subject(network().float(), None, *read_state(tmp_path / "state"))
    rows = [{"features": forget.examples[i]["features"], "label": forget[i]["label"]}
            for i in range(5)]  # fmt: skip
    result = unlearn.forget(subject, method="ssd", forget=rows, audit="none")
    wanted = (
        SSD().unlearn(Subject(network().float()), request(forget, retain), Run(forget.task)).model
    )
    for p, q in zip(result.subject.model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(p, q)


def test_compat_cannot_prepare() -> None:
    with pytest.raises(BadInput, match="keeps no state"):
        SSD(estimator="compat").prepare(
            Subject(network()), examples("data", 4, 1), Run(Classification(CLASSES))
        )


def output_squares(model: nn.Module, data: Encoded) -> dict[str, torch.Tensor]:
    """Sums of squared gradients of |f(x)|^2, one backward per example."""
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(len(data)):
        model.zero_grad()
        model(data[i]["features"][None]).square().sum().backward()
        for n, p in model.named_parameters():
            sums[n] += p.grad.square()
    model.zero_grad()
    return sums


def test_output_importances_are_roots_of_mean_squares() -> None:
    forget, retain = examples("forget", 5, 1), examples("retain", 20, 2)
    model = network()
    sums_f, sums_r = output_squares(model, forget), output_squares(model, retain)
    rms_f = {n: (s / 5).sqrt() for n, s in sums_f.items()}
    rms_all = {n: ((sums_f[n] + sums_r[n]) / 25).sqrt() for n in sums_f}
    wanted = network()
    assert dampen(dict(wanted.named_parameters()), rms_f, rms_all, 1.2, 1.0) > 0
    method = SSD(importance="output", alpha=1.2, batch_size=3)
    got = method.unlearn(Subject(model), request(forget, retain), Run(forget.task))
    for (name, p), q in zip(wanted.named_parameters(), got.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9), name
    for name, value in sums_r.items():  # kept are sums of squares, which subtract
        assert torch.allclose(got.state[f"ssd.{name}"], value, rtol=1e-7, atol=1e-12)


def test_output_importances_need_no_labels() -> None:
    assert SSD().needs.labels is Need.REQUIRED
    assert SSD(importance="output").needs.labels is Need.NO
    unread = Classification(CLASSES).reading(Need.NO)
    weights = []
    for task in (Classification(CLASSES), unread):
        sets = [
            Encoded(examples(name, n, n).examples, task)
            for name, n in (("forget", 5), ("retain", 20))
        ]
        method = SSD(importance="output", percentile=80)
        weights.append(method.unlearn(Subject(network()), request(*sets), Run(task)).model)
    assert [sets[0][i]["label"] for i in range(5)] == [-100] * 5
    for p, q in zip(weights[0].parameters(), weights[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12)
    rows = [{"features": [1.0, float(i), 0.0, 2.0]} for i in range(6)]
    set_ = {"importance": "output", "percentile": 50}
    result = unlearn.forget(
        network().float(), method="ssd", data=rows, forget_ids="0:2", audit="none", set=set_
    )
    assert result.subject.note["ssd.importance"] == "output"


def test_output_size_covers_every_unit_and_no_padding() -> None:
    logits = torch.tensor([[[1.0, 2.0], [3.0, 0.0]], [[2.0, 2.0], [9.0, 9.0]]])
    labels = torch.tensor([[0, 1], [1, -100]])
    units = torch.tensor([2, 1])
    assert output_size(Predictions(logits, labels), units).tolist() == [14.0, 8.0]
    withheld = torch.full((2, 2), -100)
    assert output_size(Predictions(logits, withheld), units).tolist() == [14.0, 8.0]
    through_a_head = Predictions(logits, labels, lambda x: 2 * x, rows=1)
    assert output_size(through_a_head, units).tolist() == [56.0, 32.0]


def test_output_importances_of_a_language_model(tiny_lm: Path) -> None:
    """Squares of the gradient of all answer logits together, by one backward per record."""
    found = inspect(tiny_lm)
    rows = [{"question": "a b?", "answer": "c"}, {"question": "b?", "answer": "a b c d"}]
    data = Encoded(load(rows, "forget"), found.task)
    model = found.load().model
    sums = SSD(importance="output")._exact(model, [data], Run(found.task), "forget")
    wanted = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(2):
        model.zero_grad()
        batch = data.batch([i])
        found.task.logits(model, batch).square().sum().backward()
        for n, p in model.named_parameters():
            wanted[n] += p.grad.square()
    for name, value in wanted.items():
        assert torch.allclose(sums[name].float(), value, rtol=1e-3, atol=1e-9), name


def test_output_importances_as_the_authors_take_them() -> None:
    """Means over batches of absolute batch gradients."""
    forget = examples("forget", 5, 1)
    model = network()
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for start in (0, 3):
        x = torch.stack([forget[i]["features"] for i in range(start, min(start + 3, 5))])
        model.zero_grad()
        model(x).square().sum(1).mean().backward()
        for n, p in model.named_parameters():
            sums[n] += p.grad.abs() / 2
    got = SSD(estimator="compat", importance="output", batch_size=3)._compat(
        model, [forget], Run(forget.task), "forget"
    )
    for name, value in sums.items():
        assert torch.allclose(got[name], value, rtol=1e-12)


def test_kinds_of_importances_are_never_mixed() -> None:
    forget, retain = examples("forget", 5, 1), examples("retain", 20, 2)
    run = Run(forget.task)
    later = examples("forget", 4, 3)
    for first, second in (("loss", "output"), ("output", "loss")):
        subject = SSD(importance=first).unlearn(Subject(network()), request(forget, retain), run)
        with pytest.raises(BadInput, match=f"gradients of the {first}"):
            SSD(importance=second).unlearn(subject, request(later, None), run)
        after = SSD(importance=second).unlearn(subject, request(later, retain), run)
        assert after.note["ssd.importance"] == second
        assert after.note["ssd.count"] == "20"


def test_the_cap_on_output_ratios_is_a_root() -> None:
    forget, retain = examples("forget", 5, 1), examples("retain", 20, 2)
    for alpha, idle in ((2.3, True), (2.2, False)):  # the root of 5 is 2.236
        run = Run(forget.task)
        method = SSD(importance="output", alpha=alpha)
        after = method.unlearn(Subject(network()), request(forget, retain), run)
        assert any("does nothing" in note for note in run.notes) == idle
        if idle:
            for p, q in zip(after.model.parameters(), network().parameters(), strict=True):
                assert torch.equal(p, q)


def test_the_default_threshold_is_the_adaptive_rule() -> None:
    """alpha is the finite ratio at rank p of P, p = 100 - ln(1 + 100 n_f / n) (ASSD)."""
    forget, retain = examples("forget", 5, 1), examples("retain", 45, 2)
    model = network()
    sums_f, sums_r = importances(model, forget), importances(model, retain)
    ratios = torch.cat(
        [((sums_f[n] / 5) / ((sums_f[n] + sums_r[n]) / 50)).flatten() for n in sums_f]
    )
    share = 1 - math.log(1 + 100 * 5 / 50) / 100
    alpha = float(ratios.sort().values[round(share * len(ratios)) - 1])
    wanted = (
        SSD(alpha=alpha)
        .unlearn(Subject(network()), request(forget, retain), Run(forget.task))
        .model
    )
    got = SSD().unlearn(Subject(network()), request(forget, retain), Run(forget.task)).model
    for p, q in zip(wanted.parameters(), got.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9)
