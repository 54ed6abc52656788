"""Gradients over whole sets, for methods that look before they step.

Everything here is in eval mode, over the parameters given, and leaves the model as it was found.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unlearn import distributed
from unlearn.run import Run
from unlearn.tasks.base import Encoded


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
    modes = {module: module.training for module in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}
    wanted = {id(p) for p in parameters.values()}
    try:
        model.eval()
        for p in flags:
            p.requires_grad_(id(p) in wanted)

        phase = f"gradient of {examples.name}"
        for number, indices in enumerate(run.batches(examples, phase, batch_size)):
            if number % distributed.world() != distributed.rank():
                continue
            batch = examples.batch(indices, run.device)
            loss = run.task.nll(model, batch).sum() / len(examples)
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for total, gradient in zip(totals.values(), found, strict=True):
                if gradient is not None:
                    total += gradient
        distributed.added(totals.values())
    finally:
        for module, training in modes.items():
            module.training = training
        for p, flag in flags.items():
            p.requires_grad_(flag)
    return totals


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
