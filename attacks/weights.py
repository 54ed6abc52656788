"""What attacks do to a model's weights is undone when they are through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, every number, mode and gradient is afterwards as it was."""
    kept = {name: t.detach().to("cpu", copy=True) for name, t in _tensors(model).items()}
    gradients = {name: p.grad for name, p in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    for parameter in model.parameters():
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in _tensors(model).items():
                tensor.copy_(kept[name])
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        for module, training in modes.items():
            module.training = training


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
