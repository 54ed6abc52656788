"""From one recorded call of a module to sums of squared per-example gradients, by kind of layer.

The rules are told in ``unlearn/importance.py``, which records the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from unlearn.errors import Unsupported

PAIRED = 4  # positions up to which pairs cost less than chunks (measured on CPU)
CHUNK = {"cpu": 2**20, "other": 2**25}  # elements at once: what a cache holds, what fills a GPU


@dataclass(eq=False)
class Call:
    """One call of a module: what went in, and what the backward pass brings to what came out."""

    module: Any
    label: str
    parameters: list[int]
    batch: int
    inputs: list[Any]  # the leaves of (args, kwargs), which ``structure`` puts together again
    structure: pytree.TreeSpec
    versions: list[int]
    given: bool = False  # an input is one of the caller's, which the batch leads
    outputs: int = 0
    deltas: dict[int, Tensor] = field(default_factory=dict)  # by place among the output's leaves

    @property
    def a(self) -> Tensor:
        """The input of a module that has one; what all examples share is expanded."""
        a: Tensor = self.inputs[0]
        self.require(a.shape[:1] in ((1,), (self.batch,)), "the batch does not lead its input")
        return a.expand(self.batch, *a.shape[1:])

    @property
    def delta(self) -> Tensor:
        """The gradient at the output of a module that has one."""
        return self.deltas[0]

    @property
    def forward(self) -> Any:
        """What identifies the rule: a subclass that computes something else has its own."""
        return None if "forward" in vars(self.module) else type(self.module).forward

    def has_batch(self, x: Any) -> bool:
        """Whether this input has one entry per example."""
        return isinstance(x, Tensor) and x.shape[:1] == (self.batch,)

    def require(self, met: bool, problem: str) -> None:
        """Refuse what cannot be done."""
        if not met:
            raise Unsupported(f"{self.label}: {problem}")

    def check(self) -> None:
        """Refuse an input that changed after the call, and examples that cannot be told apart."""
        self.require(self.versions == versions_of(self.inputs), "its input was modified in place")
        led = all(self.has_batch(delta) for delta in self.deltas.values())
        self.require(led, "the batch does not lead its output")
        counted = isinstance(self.module, nn.Embedding) and not self.given
        if counted and self.a.dim() == 1 < self.batch:
            positions = torch.arange(self.batch, device=self.a.device)
            self.require(not self.a.equal(positions), "positions need a leading dimension of 1")


def versions_of(inputs: list[Any]) -> list[int]:
    """How often each input tensor was modified in place so far."""
    return [x._version for x in inputs if isinstance(x, Tensor)]


# From calls to squares. Shapes: n examples, g groups, t positions, o outputs, k inputs.


def total_squares(uses: list[tuple[Call, str]], parameter: Tensor) -> Tensor:
    """Sum over examples of the squared gradient of one parameter, over all its uses."""
    if len(uses) == 1 and uses[0][1] in ("weight", "bias"):
        rule = _RULES.get(uses[0][0].forward)
        if rule:
            return rule(*uses[0])
    total = torch.zeros_like(parameter)
    held = [
        x for call, _ in uses for x in (*call.inputs, *call.deltas.values()) if call.has_batch(x)
    ]
    size = max([parameter.numel(), *(x[0].numel() for x in held)])
    for part in _chunks(uses[0][0].batch if uses else 0, size, parameter.device):
        gradients = parameter.new_zeros(part.stop - part.start, *parameter.shape)
        for call, name in uses:
            _add_gradients(gradients, call, name, part)
        _add_squares(total, gradients)
    return total


def _chunks(n: int, size: int, device: torch.device) -> Iterator[slice]:
    step = max(1, CHUNK.get(device.type, CHUNK["other"]) // size)
    step -= step % torch.get_num_threads() if step > torch.get_num_threads() else 0  # an even share
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _add_squares(total: Tensor, gradients: Tensor) -> None:
    """Add sum_i gradients[i]^2; overwrites the gradients."""
    if len(gradients) == 1:
        total.addcmul_(gradients[0], gradients[0])
    else:
        total += gradients.square_().sum(0)


def _outer(delta: Tensor, k: int, a: Callable[[slice], Tensor]) -> Tensor:
    """sum_i (delta_i^T a_i)^2: (n, g, t, o) and the (n, g, t, k) of some examples -> (g, o, k)."""
    n, g, positions, o = delta.shape
    if positions <= PAIRED:
        every = torch.arange(positions, device=delta.device)
        inputs = a(slice(0, n)).permute(2, 1, 0, 3)
        return _paired(delta.permute(2, 1, 0, 3), inputs, every, every)
    total = delta.new_zeros(g, o, k)
    for part in _chunks(n, g * k * max(o, positions), delta.device):
        _add_squares(total, delta[part].mT @ a(part))
    return total


def _paired(delta: Tensor, a: Tensor, at: Tensor, seen: Tensor) -> Tensor:
    """The same over pairs of positions: (t, g, n, o), (s, g, n, k), and which t saw which s."""
    if len(at) == 1:
        return delta[at[0]].square().mT @ a[seen[0]].square()
    i, j = torch.triu_indices(len(at), len(at), device=at.device)
    times = torch.where(i == j, 1.0, 2.0).to(delta).view(-1, 1, 1, 1)
    deltas = delta.index_select(0, at[i]).mul_(delta.index_select(0, at[j])).mul_(times)
    inputs = a.index_select(0, seen[i]).mul_(a.index_select(0, seen[j]))
    squares = deltas.movedim(1, 0).flatten(1, 2).mT @ inputs.movedim(1, 0).flatten(1, 2)
    return squares.clamp_(min=0)  # rounding may leave one that cancels just below zero


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(len(x), 1, -1, x.shape[-1])


def _linear(call: Call, name: str) -> Tensor:
    delta, a = _tokens(call.delta), _tokens(call.a)
    if name == "bias":
        return delta.sum((1, 2)).square().sum(0)
    if isinstance(call.module, Conv1D):  # GPT-2's linear map, whose weight is transposed
        delta, a = a, delta
    return _outer(delta, a.shape[-1], a.__getitem__)[0]


def _convolution(call: Call, name: str) -> Tensor:
    module, a, delta = call.module, call.a, call.delta.flatten(2)
    if name == "bias":
        return delta.sum(2).square().sum(0)
    delta = delta.unflatten(1, (module.groups, -1)).mT  # type: ignore[no-untyped-call]
    g, positions, o = delta.shape[1:]
    if positions <= PAIRED and any(module._reversed_padding_repeated_twice):
        return _by_offset(delta, a, module).view_as(module.weight)
    windows, k = _windows(a, module, g), module.weight[0].numel()
    total = _outer(delta, k, lambda part: windows[part].reshape(-1, g, positions, k))
    return total.view(g * o, *module.kernel_size, -1).movedim(-1, 1).contiguous()


def _windows(a: Tensor, module: Any, groups: int) -> Tensor:
    """What each position of the output saw: (n, g, *positions, *kernel, k), as a view."""
    pads = module._reversed_padding_repeated_twice
    if module.padding_mode == "zeros":
        a = F.pad(a.movedim(1, -1), [0, 0, *pads])
    else:
        a = F.pad(a, pads, module.padding_mode).movedim(1, -1)
    dims = list(zip(module.kernel_size, module.stride, module.dilation, strict=True))
    for i, (size, step, gap) in enumerate(dims, 1):
        a = a.unfold(i, gap * (size - 1) + 1, step)[..., ::gap]
    a = a.unflatten(len(dims) + 1, (groups, -1))  # type: ignore[no-untyped-call]
    return a.movedim(len(dims) + 1, 1).movedim(len(dims) + 2, -1)


def _by_offset(delta: Tensor, a: Tensor, module: Any) -> Tensor:
    """Where padding fills much of the few windows: each place of the kernel without it."""
    n, g, positions, o = delta.shape
    numbers = torch.arange(1.0, a[0, 0].numel() + 1, dtype=torch.float64)
    windows = _windows(numbers.view(1, 1, *a.shape[2:]), module, 1)
    sources = windows.reshape(positions, -1).long().T  # by place in the kernel; 0 is padding
    delta = delta.permute(2, 1, 0, 3).contiguous()
    a = a.flatten(2).view(n, g, -1, a[0, 0].numel()).permute(3, 1, 0, 2).contiguous()
    total = delta.new_zeros(g, o, a.shape[-1], len(sources))
    for place, source in enumerate(sources):
        at = source.nonzero()[:, 0]
        if len(at):
            seen = source[at] - 1
            total[..., place] = _paired(delta, a, at.to(a.device), seen.to(a.device))
    return total


def _embedding(call: Call, name: str) -> Tensor:
    size = call.module.num_embeddings
    keys, rows = _rows(call, slice(0, call.batch))
    return _scatter(rows.square_(), keys % size, size)


def _rows(call: Call, part: slice) -> tuple[Tensor, Tensor]:
    """The gradient of each token of each example: example * vocabulary + token, and its row."""
    tokens, delta, module = call.a[part], call.delta[part], call.module
    if module.padding_idx is not None:
        delta = delta.masked_fill((tokens == module.padding_idx)[..., None], 0)
    examples = torch.arange(len(tokens), device=tokens.device)[:, None]
    keys = tokens.reshape(len(tokens), -1) + examples * module.num_embeddings
    keys, places = torch.unique(keys, return_inverse=True)
    return keys, _scatter(delta.reshape(-1, delta.shape[-1]), places.flatten(), len(keys))


def _scatter(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Rows with the same index added up, always in the same order."""
    scattered: Tensor = torch.ops.aten.embedding_dense_backward(rows, index, size, -1, False)
    return scattered


def _layer_norm(call: Call, name: str) -> Tensor:
    module, delta = call.module, call.delta
    if name == "weight":
        normalise = F.layer_norm if isinstance(module, nn.LayerNorm) else F.rms_norm
        delta = normalise(call.a, module.normalized_shape, eps=module.eps).mul_(delta)
    return delta.reshape(len(delta), -1, *module.normalized_shape).sum(1).square().sum(0)


def _batch_norm(call: Call, name: str) -> Tensor:
    module, delta = call.module, call.delta
    if name == "weight":
        mean, variance = module.running_mean, module.running_var
        delta = F.batch_norm(call.a, mean, variance, eps=module.eps).mul_(delta)
    return delta.reshape(*delta.shape[:2], -1).sum(2).square().sum(0)


def _group_norm(call: Call, name: str) -> Tensor:
    module, delta = call.module, call.delta
    if name == "weight":
        delta = F.group_norm(call.a, module.num_groups, eps=module.eps).mul_(delta)
    return delta.reshape(*delta.shape[:2], -1).sum(2).square().sum(0)


_RULES: dict[Any, Callable[[Call, str], Tensor]] = {
    nn.Linear.forward: _linear,
    Conv1D.forward: _linear,
    nn.Conv1d.forward: _convolution,
    nn.Conv2d.forward: _convolution,
    nn.Conv3d.forward: _convolution,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _layer_norm,
    nn.RMSNorm.forward: _layer_norm,
    _BatchNorm.forward: _batch_norm,
    nn.GroupNorm.forward: _group_norm,
}


def _add_gradients(gradients: Tensor, call: Call, name: str, part: slice) -> None:
    """Add what one call contributes to each example's gradient, (part, *parameter)."""
    if call.forward is nn.Linear.forward and name == "weight":
        delta, a = _tokens(call.delta[part]), _tokens(call.a[part])
        gradients.baddbmm_(delta[:, 0].mT, a[:, 0])
    elif call.forward is nn.Embedding.forward:
        gradients.flatten(0, 1).index_add_(0, *_rows(call, part))
    else:
        gradients += _vjp(call, name, part)


class _Bare(nn.Module):
    """A module without its hooks: what they change lies outside its recorded call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.forward(*args, **kwargs)


def _vjp(call: Call, name: str, part: slice) -> Tensor:
    """Any module: each example through it alone, vectorised."""
    bare = _Bare(call.module)
    dims = [0 if call.has_batch(x) else None for x in call.inputs]

    def gradient(deltas: list[Tensor], example: list[Any]) -> Tensor:
        leaves = [x if dim is None else x[None] for x, dim in zip(example, dims, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, call.structure)

        def outputs(p: Tensor) -> list[Tensor]:
            output = torch.func.functional_call(bare, {f"module.{name}": p}, args, kwargs)
            leaves = pytree.tree_leaves(output)
            return [leaves[place] for place in call.deltas]

        pull = torch.func.vjp(outputs, call.module.get_parameter(name))[1]
        pulled: Tensor = pull([delta[None] for delta in deltas])[0]
        return pulled

    deltas = [delta[part] for delta in call.deltas.values()]
    examples = [x if dim is None else x[part] for x, dim in zip(call.inputs, dims, strict=True)]
    try:
        gradients: Tensor = torch.func.vmap(gradient, in_dims=(0, dims))(deltas, examples)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise Unsupported(f"{call.label}: its examples cannot be separated: {reason}") from error
    return gradients
