"""Quantisation: does rounding the weights bring back what small updates hid?

Zhang et al. 2024 (arXiv 2410.16454): unlearning that moves weights by less than half a
quantisation step is undone by quantisation. Here weights make a round trip through ``bits``-bit
integers, nearest value, one scale per ``group`` weights of an output's row (absmax: the largest
weight is exact):

    s = max |w| / (2^(bits-1) - 1);   w' = s round(w / s)

Every linear and convolution layer is rounded, the output layer and embeddings are not, as in
common 4-bit loaders. Fused experts of mixtures are not rounded either.

The searches round as such loaders do. With a GPU and bitsandbytes that library does it: LLM.int8()
rounds to 8 bits with one scale per row (Dettmers et al. 2022, arXiv 2208.07339), NF4 to the nearest
of 16 quantiles of a normal distribution with one scale per 64 weights (Dettmers et al. 2023, arXiv
2305.14314). Elsewhere the round trip above stands in for both, with the same scales. Activations
keep their precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unlearn.attacks.interface import Array, Ground, Inapplicable, Search
from unlearn.attacks.signals import collect, hit_rates
from unlearn.attacks.weights import put_back
from unlearn.errors import BadInput
from unlearn.run import Run
from unlearn.tasks.base import Task

GROUP = 64


def rounded(weight: Tensor, bits: int = 4, group: int = GROUP) -> Tensor:
    """The weight after its round trip, same shape and dtype.

    Args:
        weight: rows are outputs: shape (outputs, ...).
        bits: of the integers, sign included; 2 to 8.
        group: consecutive weights of a row that share a scale; the last group may be shorter.

    >>> import torch
    >>> rounded(torch.tensor([[7.0, 3.4, -0.4]]), bits=4)
    tensor([[7., 3., -0.]])
    """
    if not 2 <= bits <= 8 or group < 1:
        raise BadInput(f"bits must be 2 to 8 and group at least 1, not {bits} and {group}")
    rows = weight.detach().reshape(len(weight), -1)
    padded = nn.functional.pad(rows, (0, -rows.shape[1] % group))
    parts = padded.float().view(len(rows), -1, group)
    scale = parts.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = scale.masked_fill(scale == 0, 1.0)
    back = ((parts / scale).round() * scale).view(len(rows), -1)[:, : rows.shape[1]]
    result: Tensor = back.reshape(weight.shape).to(weight.dtype)
    return result


def quantize(model: nn.Module, task: Task, bits: int = 4, group: int = GROUP) -> int:
    """Round the weights of a model in place.

    Returns:
        The number of weights that were rounded.
    """
    count = 0
    for rows in matrices(model, task):
        rows.copy_(rounded(rows, bits, group))
        count += rows.numel()
    return count


def matrices(model: nn.Module, task: Task) -> Iterator[Tensor]:
    """Weights of linear and convolution layers but for the output layer, rows are outputs.

    They share the model's memory: what is written into them is written into the model.
    """
    head = task.output_layer(model)
    for module in model.modules():
        transposed = type(module).__name__ == "Conv1D"  # of GPT-2: rows are inputs
        linear = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if module is not head and (linear or transposed):
            weight = module.get_parameter("weight").detach()
            yield weight.T if transposed else weight


def backend(device: torch.device) -> Literal["bitsandbytes", "torch"]:
    """What the searches round with on this device."""
    installed = device.type == "cuda" and find_spec("bitsandbytes") is not None
    return "bitsandbytes" if installed else "torch"


def by_bitsandbytes(weight: Tensor, bits: Literal[4, 8]) -> Tensor:
    """The weight after bitsandbytes stored and read it: NF4, or LLM.int8(); same shape and dtype.

    Args:
        weight: rows are outputs: shape (outputs, ...).
        bits: 4 or 8.
    """
    library: Any = import_module("bitsandbytes.functional")  # has no types
    weight = weight.detach()
    if bits == 4:  # as one vector: scales run over the ends of rows, and some kernels forget that
        stored = library.quantize_4bit(weight.flatten().float(), blocksize=GROUP, quant_type="nf4")
        back = library.dequantize_4bit(*stored)
    else:  # as Linear8bitLt does
        rows = weight.reshape(len(weight), -1).contiguous().half()
        integers, largest, _ = library.int8_vectorwise_quant(rows)
        back = library.int8_vectorwise_dequant(integers, largest)
    result: Tensor = back.reshape(weight.shape).to(weight.dtype)
    return result


def _round_trip(weight: Tensor, bits: Literal[4, 8]) -> Tensor:
    if backend(weight.device) == "bitsandbytes":
        return by_bitsandbytes(weight, bits)
    return rounded(weight, bits, GROUP if bits == 4 else weight[0].numel())


def _after_rounding(bits: Literal[4, 8], model: nn.Module, ground: Ground, run: Run) -> Array:
    """Share of argmax hits of each forget record while the weights are rounded, shape (n,)."""
    layers = list(matrices(model, run.task))
    if not layers:
        raise Inapplicable(f"{type(model).__name__} has no layer to round but its output layer")
    with put_back(model):
        for rows in layers:
            rows.copy_(_round_trip(rows, bits))
        return hit_rates(collect(model, ground.forget, run, b"", f"round to {bits} bits"))


def _search(bits: Literal[4, 8], word: str) -> Search:
    return Search(
        name=f"{word}_bits",
        title=f"Weights rounded to {bits} bits: what is still answered rightly",
        unit="share of argmax hits",
        source="Zhang et al. 2024, arXiv 2410.16454",
        score=partial(_after_rounding, bits),
        tasks=("causal_lm", "classification"),
        depth="standard",
    )


SEARCHES = (_search(8, "eight"), _search(4, "four"))
