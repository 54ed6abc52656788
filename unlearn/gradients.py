"""Gradients over whole sets, for methods that look before they step.

Everything here is in eval mode, over the parameters given, and leaves the model as it was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unlearn import distributed
from unlearn.run import Run
from unlearn.tasks.base import IGNORED, Batch, Encoded, Task


def mean_gradient(
    model: nn.Module,
    examples: Encoded,
    parameters: Mapping[str, nn.Parameter],
    run: Run,
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """The gradient of the mean NLL per example, exact whatever the batch size.

    Args:
        model: the network, on ``run.device``.
        examples: the set.
        parameters: the wanted ones by name; those that take no part get zeros.
        run: the task, device and progress.
        batch_size: examples per pass; does not change the result.

    Returns:
        By name, in the parameter's shape and precision.
    """

    def of_batch(batch: Batch) -> list[Tensor | None]:
        loss = run.task.nll(model, batch).sum() / len(examples)
        return list(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))

    with _only(model, parameters):
        phase = f"gradient of {examples.name}"
        return _added(examples, parameters, run, phase, batch_size, of_batch)


def salient(gradient: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Boolean masks of the largest ``share`` of all entries by magnitude (SalUn, eq. 3).

    Args:
        gradient: by parameter name.
        share: of all entries together, above 0 and at most 1.

    Returns:
        By name; among equals, which of them is chosen is the same on every call.
    """
    sizes = torch.cat([g.abs().flatten() for g in gradient.values()])
    count = max(1, int(share * len(sizes)))
    chosen = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    threshold = sizes.kthvalue(len(sizes) - count + 1).values
    chosen |= sizes > threshold
    ties = (sizes == threshold).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    parts = torch.split(chosen, [g.numel() for g in gradient.values()])
    return {n: part.view(g.shape) for (n, g), part in zip(gradient.items(), parts, strict=True)}


Curvature = Literal["gauss_newton", "hessian"]


def curvature_product(
    model: nn.Module,
    examples: Encoded,
    parameters: Mapping[str, nn.Parameter],
    vector: Mapping[str, Tensor],
    run: Run,
    *,
    kind: Curvature = "gauss_newton",
    batch_size: int = 64,
) -> dict[str, Tensor]:
    """The curvature of the mean NLL per example times a vector; the matrix is never formed.

    hessian: two backward passes (Pearlmutter 1994). gauss_newton: the sum over units of
    J^T (diag(p) - p p^T) J, with J the derivative of the logits and p the probabilities
    (Schraudolph 2002): positive semi-definite for every network, equal to the Hessian where logits
    are linear in the parameters, and to the Fisher information.

    Args:
        model: the network, on ``run.device``.
        examples: the set the mean is over.
        parameters: those the curvature is about, by name.
        vector: one tensor per parameter, of its shape.
        run: the task, device and progress.
        kind: which matrix.
        batch_size: examples per pass; does not change the result.

    Returns:
        By name, in the parameter's shape and precision.
    """
    times = _gauss_newton_times if kind == "gauss_newton" else _hessian_times
    directions = [vector[name] for name in parameters]

    def of_batch(batch: Batch) -> list[Tensor | None]:
        found = times(model, batch, list(parameters.values()), directions, run.task)
        return [None if part is None else part / len(examples) for part in found]

    # fused attention kernels cannot be differentiated twice
    with _only(model, parameters), sdpa_kernel(SDPBackend.MATH):
        return _added(examples, parameters, run, "curvature", batch_size, of_batch)


def _added(
    examples: Encoded,
    parameters: Mapping[str, nn.Parameter],
    run: Run,
    phase: str,
    batch_size: int,
    of_batch: Callable[[Batch], list[Tensor | None]],
) -> dict[str, Tensor]:
    """The sum of what every batch contributes to every parameter, over all processes."""
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for number, indices in enumerate(run.batches(examples, phase, batch_size)):
        if number % distributed.world() != distributed.rank():
            continue
        found = of_batch(examples.batch(indices, run.device))
        for total, part in zip(totals.values(), found, strict=True):
            if part is not None:
                total += part
    distributed.added(totals.values())
    return totals


def _hessian_times(
    model: nn.Module, batch: Batch, wanted: list[nn.Parameter], vector: list[Tensor], task: Task
) -> list[Tensor | None]:
    loss = task.predictions(model, batch, dense=True).nll().sum()
    first = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    return _derivative(_along(first, vector), wanted)


def _gauss_newton_times(
    model: nn.Module, batch: Batch, wanted: list[nn.Parameter], vector: list[Tensor], task: Task
) -> list[Tensor | None]:
    predictions = task.predictions(model, batch, dense=True)
    logits = predictions.logits[predictions.labels != IGNORED]
    # u -> J^T u is linear: its derivative along the vector is J times the vector
    anything = torch.zeros_like(logits, requires_grad=True)
    back = torch.autograd.grad(logits, wanted, anything, create_graph=True, allow_unused=True)
    (forward,) = _derivative(_along(back, vector), [anything])
    if forward is None:
        return [None] * len(wanted)
    p = logits.detach().softmax(-1)
    inner = p * (forward - (p * forward).sum(-1, keepdim=True))
    return list(torch.autograd.grad(logits, wanted, inner, allow_unused=True))


def _along(gradients: tuple[Tensor | None, ...], vector: list[Tensor]) -> list[Tensor]:
    pairs = zip(gradients, vector, strict=True)
    return [(g * v).sum() for g, v in pairs if g is not None and g.requires_grad]


def _derivative(
    summands: list[Tensor], of: list[nn.Parameter] | list[Tensor]
) -> list[Tensor | None]:
    if not summands:
        return [None] * len(of)
    total = torch.stack(summands).sum()
    return list(torch.autograd.grad(total, of, retain_graph=True, allow_unused=True))


@contextmanager
def _only(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Eval mode, and gradients of these parameters alone, while this lasts."""
    modes = {module: module.training for module in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    wanted = {id(p) for p in parameters.values()}
    try:
        model.eval()
        for p in flags:
            p.requires_grad_(id(p) in wanted)
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for p, flag in flags.items():
            p.requires_grad_(flag)
