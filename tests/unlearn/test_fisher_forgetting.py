"""Fisher forgetting: the information against closed forms, the noise against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unlearn.data import load
from unlearn.interface import Classes, Need, Records, Request, Subject
from unlearn.methods.fisher_forgetting import FisherForgetting, fisher_information, noise_variance
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification

CLASSES = 3


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double().eval()


def data(n: int, seed: int = 1, labels: int | None = None) -> Encoded:
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 4, generator=draw, dtype=torch.float64)
    drawn = torch.randint(CLASSES, (n,), generator=draw)
    drawn = drawn if labels is None else torch.full((n,), labels)
    return Encoded(load((inputs, drawn), "retain"), Classification(CLASSES))


def one_by_one(model: nn.Module, examples: Encoded) -> dict[str, torch.Tensor]:
    """C backward passes per example, as in the definition."""
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(len(examples)):
        x = examples[i]["features"][None]
        for y in range(CLASSES):
            model.zero_grad()
            log_p = model(x).log_softmax(-1)[0, y]
            log_p.backward()
            for n, p in model.named_parameters():
                sums[n] += log_p.detach().exp() * p.grad.square() / len(examples)
    model.zero_grad()
    return sums


def test_the_information_is_exact_whatever_the_batch() -> None:
    model, examples = network(), data(11)
    wanted = one_by_one(model, examples)
    for batch_size in (4, 256):
        found = fisher_information(model, examples, Run(examples.task), None, batch_size)
        for name, value in wanted.items():
            assert torch.allclose(found[name], value, rtol=1e-9), name


def test_the_information_of_logistic_regression_by_hand() -> None:
    """For the bias of softmax regression, sum_y p_y (p_k - [y = k])^2 = p_k (1 - p_k)."""
    model = nn.Sequential(nn.Linear(4, CLASSES)).double()
    examples = data(7)
    found = fisher_information(model, examples, Run(examples.task), None, 3)
    x = torch.stack([examples[i]["features"] for i in range(7)])
    p = model(x).softmax(-1).detach()
    spread = p * (1 - p)
    assert torch.allclose(found["0.bias"], spread.mean(0), rtol=1e-9)
    assert torch.allclose(found["0.weight"], spread.T @ x.square() / 7, rtol=1e-9)


def test_drawn_labels_approach_all_classes_and_repeat() -> None:
    model, examples = network(), data(10)
    exact = fisher_information(model, examples, Run(examples.task), None, 256)
    drawn = fisher_information(model, examples, Run(examples.task), 400, 256)
    again = fisher_information(model, examples, Run(examples.task), 400, 256)
    for name, value in exact.items():
        assert torch.equal(drawn[name], again[name])
        assert not torch.equal(drawn[name], value)
        assert torch.allclose(drawn[name].mean(), value.mean(), rtol=0.1)
    other = fisher_information(model, examples, Run(examples.task, seed=1), 400, 256)
    assert not torch.equal(drawn["0.weight"], other["0.weight"])


def test_variances_by_hand() -> None:
    idle = torch.tensor([[0.0, 0.5], [2.0, 4.0]], dtype=torch.float64)
    found = noise_variance(idle, 1e-6)
    assert found[0].tolist() == pytest.approx([1e-6 * (1000 + 2) / 2] * 2)
    assert found[1].tolist() == pytest.approx([1e-6 * (0.5 + 0.25) / 2] * 2)
    vector = noise_variance(torch.tensor([0.0, 0.5], dtype=torch.float64), 1e-6)
    assert vector.tolist() == pytest.approx([1e-2, 2e-5])
    output = noise_variance(idle, 1e-6, output=True, forgotten=(1,))
    assert output[0].tolist() == pytest.approx([1e-5 * (100 + 2) / 2] * 2)
    assert output[1].tolist() == pytest.approx([1e-3] * 2)
    kernel = noise_variance(torch.ones(2, 3, 5, 5), 1.0)
    assert kernel.shape == (2, 3, 5, 5)
    assert noise_variance(torch.tensor(1.0), 1.0).shape == ()


def test_the_variance_is_averaged_along_the_inputs_alone() -> None:
    fisher = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    found = noise_variance(fisher, 1.0)
    wanted = (1 / (fisher + 1e-8)).mean(1)
    for channel in range(3):
        assert torch.allclose(found[:, channel], wanted)


@pytest.mark.parametrize("target", [Records(4), Classes((1,), ("1",))])
def test_weights_move_by_seeded_noise_of_that_variance(target: Records | Classes) -> None:
    model, examples = network(), data(9)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    fisher = one_by_one(model, examples)
    run, method = Run(examples.task, seed=5), FisherForgetting(alpha=1e-4)
    after = method.unlearn(Subject(model), Request(target, None, examples), run).model
    draw = run.generator("fisher noise")
    for name, p in after.named_parameters():
        rows = (1,) if name.startswith("2.") and isinstance(target, Classes) else ()
        variance = noise_variance(fisher[name], 1e-4, output=name.startswith("2."), forgotten=rows)
        mean = start[name].clone()
        mean[list(rows)] = 0
        wanted = mean + variance.sqrt() * torch.randn(p.shape, generator=draw, dtype=p.dtype)
        assert torch.allclose(p, wanted, rtol=1e-7), name
    assert all(p.requires_grad for p in after.parameters())


def test_labels_are_not_looked_at() -> None:
    assert FisherForgetting().needs.labels is Need.NO
    assert FisherForgetting().needs.forget is Need.NO
    results = []
    for labels in (0, 2):
        examples = data(9, labels=labels)
        request = Request(Classes((1,), ("1",)), None, examples)
        after = FisherForgetting().unlearn(Subject(network()), request, Run(examples.task))
        results.append(after.model.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_a_forgotten_class_is_no_longer_told() -> None:
    """Its row starts from zero: the logit no longer follows the input."""
    model, examples = network(), data(20)
    with torch.no_grad():
        model[2].weight[1] = 5.0
    request = Request(Classes((1,), ("1",)), None, examples)
    after = FisherForgetting().unlearn(Subject(model), request, Run(examples.task)).model
    assert after[2].weight[1].abs().max() < 0.2
    assert after[2].bias[1].abs() < 0.2
