"""Which parameters may move.

``all``, ``head`` (the output layer), ``lora`` (low-rank adapters on every linear layer but the
output, merged into the weights at the end; Hu et al. 2021, arXiv 2106.09685), or a regular
expression searched in parameter names. Everything else stays bit-identical.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from unlearn.errors import BadInput, Unsupported, did_you_mean
from unlearn.interface import Subject
from unlearn.tasks.base import Task

WORDS = ("all", "head", "lora")


@dataclass(frozen=True)
class Moving:
    """A model and those of its parameters that an optimiser may move, by name."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]


@contextmanager
def moving(
    subject: Subject, task: Task, scope: str, rank: int, alpha: float, seed: int
) -> Iterator[Moving]:
    """Restrict training to ``scope``; on leaving, adapters are merged and all is as it was.

    Args:
        subject: whose model is trained in place.
        task: knows the output layer.
        scope: all, head, lora, or a regular expression.
        rank: of the adapters, for lora.
        alpha: the adapters' scale is ``alpha / rank``, for lora.
        seed: of the adapters' initial values, for lora.

    Raises:
        BadInput: no parameter matches.
        Unsupported: lora without peft, or without linear layers.
    """
    model = subject.model
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    adapted = _with_adapters(model, task, rank, alpha, seed) if scope == "lora" else model
    chosen = _chosen(adapted, task, scope)
    kept = {id(p) for p in chosen.values()}
    for parameter in adapted.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    try:
        yield Moving(adapted, chosen)
    finally:
        if scope == "lora":
            adapted.merge_and_unload()  # type: ignore[operator]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, True))


def _chosen(model: nn.Module, task: Task, scope: str) -> dict[str, nn.Parameter]:
    named = dict(model.named_parameters())
    if scope == "all":
        return named
    if scope == "lora":
        return {name: p for name, p in named.items() if "lora_" in name}
    if scope == "head":
        head = {id(p) for p in task.output_layer(model).parameters()}
        return {name: p for name, p in named.items() if id(p) in head}
    return {name: named[name] for name in matching(scope, named)}


def matching(scope: str, names: Iterable[str]) -> list[str]:
    """The names a pattern selects; every name for ``all``, ``head`` and ``lora``.

    Raises:
        BadInput: not a regular expression, or nothing matches.
    """
    names = list(names)
    if scope in WORDS:
        return names
    try:
        pattern = re.compile(scope)
    except re.error as error:
        raise BadInput(f"scope {scope!r} is not a regular expression: {error}") from error
    chosen = [name for name in names if pattern.search(name)]
    if not chosen:
        raise BadInput(
            f"scope {scope!r} matches no parameter: use all, head, lora, or a pattern; "
            f"{did_you_mean(scope, names[:40])}"
        )
    return chosen


def _with_adapters(model: nn.Module, task: Task, rank: int, alpha: float, seed: int) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise Unsupported("scope lora needs peft: pip install 'unlearn-toolkit[lora]'") from error
    head = task.output_layer(model)
    targets = [
        name
        for name, module in model.named_modules()
        if module is not head
        and (isinstance(module, nn.Linear | nn.Conv2d) or type(module).__name__ == "Conv1D")
        and getattr(module, "groups", 1) == 1
    ]
    if not targets:
        raise Unsupported(f"{type(model).__name__} has no layers for adapters: use scope all")
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules="|".join(map(re.escape, targets)), lora_dropout=0.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted
