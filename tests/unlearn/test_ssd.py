"""Selective synaptic dampening against pencil and paper, and against recomputing everything."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.interface import Classes, Request, Subject
from unlearn.methods.ssd import SSD, dampen, ratio_percentile
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification

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
