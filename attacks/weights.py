"""What attacks do to weights is undone when they are through; of several, the strongest counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from unlearn.errors import Collapsed

Found = TypeVar("Found")


def strongest(
    model: nn.Module,
    ways: Iterable[Callable[[], Found]],
    worth: Callable[[Found], float],
    what: str,
) -> Found:
    """What the best of several ways finds, each from the same weights, which are put back.

    Args:
        model: what the ways work on.
        ways: at least one; may raise ``Collapsed``, after which the others are tried.
        worth: what is found, as a number; of equals the first counts.
        what: the attack, for people.

    Raises:
        Collapsed: none came to an end.
    """
    found, failure = [], ""
    for way in ways:
        try:
            with put_back(model):
                found.append(way())
        except Collapsed as error:
            failure = str(error)  # its traceback would keep what the way had in memory
    if not found:
        raise Collapsed(f"{what} failed in every way that was tried: {failure}")
    return max(found, key=worth)


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
