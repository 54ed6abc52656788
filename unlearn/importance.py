"""Which weights matter to which examples: exact sums of squared per-example gradients.

The diagonal of the empirical Fisher information is sum_i (d nll_i / d p)^2: each example's own
gradient, squared. Squaring the mean gradient of a batch estimates something else, which moves
with the batch size and the order of the data.

One forward and one backward pass suffice. Every module that owns wanted parameters keeps its
input ``a``; when the backward pass brings ``delta``, the gradient at the module's output, a rule
for its type turns the pair into squares:

- one vector per example through a linear map: (delta^2)^T (a^2);
- up to ``PAIRED`` vectors: (sum_t delta_t a_t^T)^2 multiplied out over the pairs of positions;
- more: delta_i^T a_i for a cache-sized chunk of examples, squared and summed;
- a convolution: one of these three, on the windows of its input;
- an embedding: rows added up per example and token, then squared;
- anything else: a vectorised vector-Jacobian product of that module alone.

The gradients of a parameter used more than once (tied embeddings, a module called twice) are
added before they are squared. Ordinary weight gradients are not computed, which pays for most
of this; memory is that of a training step and one chunk.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from unlearn.errors import Unsupported

PAIRED = 4  # positions up to which pairs cost less than materialising (measured on CPU)
CHUNK = {"cpu": 2**20, "other": 2**25}  # elements held at once: a cache full, a launch's worth


def squared_gradients(
    model: nn.Module, nll: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Sum over the examples of one batch of the squared gradient of each example's loss.

    Gradients, modes and ``requires_grad`` are left as they were found.

    Args:
        model: the network; its modules see the batch as their leading dimension.
        nll: runs the model once and returns each example's loss, shape (batch,).
        parameters: the wanted parameters by name, as ``dict(model.named_parameters())``.

    Returns:
        By name, sum_i (d nll_i / d p)^2 in the parameter's shape; zeros where it took no part.

    Raises:
        Unsupported: a module mixes examples, hides which is which, or defeats the method.

    >>> layer = nn.Linear(2, 1)
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> squared_gradients(layer, lambda: layer(x)[:, 0], {"w": layer.weight})["w"]
    tensor([[10., 20.]])
    """
    recorder = _Recorder(parameters)
    with _frozen((*model.parameters(), *parameters.values())):
        with recorder.listening_to(model):
            losses = nll()
        recorder.differentiate(losses)
    return {name: recorder.totals[id(p)] for name, p in parameters.items()}


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    flags = {p: p.requires_grad for p in parameters}
    try:
        for p in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags.items():
            p.requires_grad_(flag)


@dataclass(eq=False)
class _Call:
    """One call of a module: what went in, and what the backward pass brings to what came out."""

    module: nn.Module
    label: str
    batch: int
    inputs: list[Any]  # the leaves of (args, kwargs), of which ``structure`` is the shape
    structure: pytree.TreeSpec
    versions: list[int]
    outputs: int = 0
    deltas: dict[int, Tensor] = field(default_factory=dict)  # by place among the output's leaves

    @property
    def a(self) -> Tensor:
        """The input of a module that has one; what all examples share is expanded."""
        a: Tensor = self.inputs[0]
        if a.shape[:1] not in ((1,), (self.batch,)):
            raise Unsupported(f"{self.label}: the batch is not the leading dimension of its input")
        return a.expand(self.batch, *a.shape[1:])

    @property
    def delta(self) -> Tensor:
        """The gradient at the output of a module that has one."""
        return self.deltas[0]

    def check(self) -> None:
        """Refuse inputs that changed after the call and outputs without the batch in front."""
        if any(leaf._version != v for leaf, v in zip(self.inputs, self.versions, strict=True)
               if isinstance(leaf, Tensor)):
            raise Unsupported(f"{self.label}: its input is modified in place after the call")
        if any(delta.shape[:1] != (self.batch,) for delta in self.deltas.values()):
            raise Unsupported(f"{self.label}: the batch is not the leading dimension of its output")


class _Tap(torch.autograd.Function):
    """The identity; hands over the gradient that comes back, and gives the graph its beginning."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, arrive: Callable[[Tensor], None]) -> Tensor:
        ctx.arrive = arrive
        return output.detach()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        arrive, ctx.arrive = ctx.arrive, None
        arrive(delta)
        return delta, None, None


class _Recorder:
    """Follows the calls of the modules that own wanted parameters, forward and backward.

    Wanted parameters require gradients except while their owner runs. One that is used elsewhere
    therefore shows up in the graph, and is refused rather than missed.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names = {id(p): name for name, p in parameters.items()}
        self.wanted = {id(p): p for p in parameters.values()}
        self.totals: dict[int, Tensor] = {}
        self.uses: dict[int, list[tuple[_Call, str]]] = defaultdict(list)
        self.open: list[_Call] = []
        self.batch: int | None = None
        self.anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def listening_to(self, model: nn.Module) -> Iterator[None]:
        handles: list[Any] = []
        try:
            for p in self.wanted.values():
                p.requires_grad_(True)
            for name, module in model.named_modules():
                label = f"{name or 'the model'} ({type(module).__name__})"
                handles += self._listen(module, label)
            with torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for p in self.wanted.values():
                p.requires_grad_(False)

    def _listen(self, module: nn.Module, label: str) -> list[Any]:
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise Unsupported(f"{label}: batch statistics mix the examples; call model.eval()")
        # an attention layer reads the weights of its output projection without calling it
        everything = isinstance(module, nn.MultiheadAttention)
        owned = {
            name: p
            for name, p in module.named_parameters(recurse=everything, remove_duplicate=False)
            if id(p) in self.wanted
        }
        if owned and isinstance(module, ParametrizationList):
            raise Unsupported(f"{label}: remove the parametrization first")
        if owned and not getattr(module, "batch_first", True):
            raise Unsupported(f"{label}: the batch is not the leading dimension (batch_first)")

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            inputs, structure = pytree.tree_flatten((args, kwargs))
            if self.batch is None:
                self.batch = next((len(x) for x in inputs if isinstance(x, Tensor) and x.dim()), None)
            if not owned:
                return
            for p in owned.values():
                p.requires_grad_(False)
            versions = [x._version if isinstance(x, Tensor) else 0 for x in inputs]
            inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
            self.open.append(_Call(module, label, self.batch or 0, inputs, structure, versions))

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            for p in owned.values():
                p.requires_grad_(True)
            call = self.open.pop()
            for name, p in owned.items():
                self.uses[id(p)].append((call, name))
            return self._tapped(call, output)

        handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
        if owned:
            handles.append(module.register_forward_hook(after, prepend=True))
        return handles

    def _tapped(self, call: _Call, output: Any) -> Any:
        leaves, structure = pytree.tree_flatten(output)
        shared = not any(isinstance(x, Tensor) and len(x) == call.batch for x in call.inputs)
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                call.outputs += 1
                if shared and leaf.shape[:1] == (1,):  # positions: one row that all examples use
                    leaf = leaf.expand(call.batch, *leaf.shape[1:])
                leaves[place] = _Tap.apply(leaf, self.anchor, partial(self._arrive, call, place))
        if not call.outputs:
            raise Unsupported(f"{call.label}: its output holds no tensor")
        return pytree.tree_unflatten(leaves, structure)

    def _arrive(self, call: _Call, place: int, delta: Tensor) -> None:
        call.deltas[place] = delta
        for key in [key for key, uses in self.uses.items() if any(c is call for c, _ in uses)]:
            if all(len(c.deltas) == c.outputs for c, _ in self.uses[key]):
                self._settle(key)

    def _settle(self, key: int) -> None:
        uses = [(call, name) for call, name in self.uses.pop(key, ()) if call.deltas]
        for call, _ in uses:
            call.check()
        with torch.no_grad():
            self.totals[key] = _total(uses, self.wanted[key])

    def differentiate(self, losses: Tensor) -> None:
        """Run the backward pass from the losses, shape (batch,), and complete the totals."""
        if self.batch is not None and losses.shape != (self.batch,):
            raise Unsupported(
                f"nll returned losses of shape {tuple(losses.shape)} for a batch of {self.batch}"
            )
        for leaf in _leaves(losses):
            if id(leaf) in self.names:
                raise Unsupported(
                    f"{self.names[id(leaf)]} is used outside the module that owns it"
                )
        if losses.requires_grad:
            torch.autograd.grad(losses.sum(), self.anchor, allow_unused=True)
        for key in self.wanted.keys() - self.totals.keys():
            self._settle(key)


def _leaves(output: Tensor) -> Iterator[Tensor]:
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [parent for parent, _ in node.next_functions]


# From calls to squares. Shapes: n examples, g groups, t positions, o outputs, k inputs.


def _total(uses: list[tuple[_Call, str]], parameter: nn.Parameter) -> Tensor:
    if len(uses) == 1:
        call, name = uses[0]
        rule = _RULES.get(_forward(call.module))
        if rule and name in ("weight", "bias"):
            return rule(call, name)
    total = torch.zeros_like(parameter)
    size = max([parameter.numel(), *(_size(call) for call, _ in uses)])
    for part in _chunks(uses[0][0].batch if uses else 0, size, parameter.device):
        gradients = parameter.new_zeros(part.stop - part.start, *parameter.shape)
        for call, name in uses:
            _add_gradients(gradients, call, name, part)
        _add_squares(total, gradients)
    return total


def _size(call: _Call) -> int:
    tensors = [*call.deltas.values(), *(x for x in call.inputs if isinstance(x, Tensor))]
    return max(x[0].numel() for x in tensors if len(x) == call.batch)


def _forward(module: nn.Module) -> Any:
    """What identifies the rule: a subclass that computes something else has its own forward."""
    return None if "forward" in vars(module) else type(module).forward


def _chunks(n: int, size: int, device: torch.device) -> Iterator[slice]:
    step = max(1, CHUNK.get(device.type, CHUNK["other"]) // size)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _add_squares(total: Tensor, gradients: Tensor) -> None:
    """total += sum_i gradients[i]^2; overwrites the gradients."""
    if len(gradients) == 1:
        total.addcmul_(gradients[0], gradients[0])
    else:
        total += gradients.square_().sum(0)


def _sum_of_squares(gradients: Tensor) -> Tensor:
    return gradients.square().sum(0)


def _outer(delta: Tensor, a: Tensor) -> Tensor:
    """sum_i (delta_i^T a_i)^2: (n, g, t, o), (n, g, t, k) -> (g, o, k)."""
    n, g, positions, o = delta.shape
    k = a.shape[-1]
    if positions <= PAIRED:
        i, j = torch.triu_indices(positions, positions, device=delta.device)
        times = torch.where(i == j, 1.0, 2.0).to(delta.dtype)[:, None]
        pairs = torch.einsum(
            "ngto,ngtk->gok", delta[:, :, i] * delta[:, :, j] * times, a[:, :, i] * a[:, :, j]
        )
        return pairs.clamp_(min=0)  # rounding may leave a cancelled square just below zero
    total = delta.new_zeros(g, o, k)
    for part in _chunks(n, g * o * k, delta.device):
        _add_squares(total, delta[part].mT @ a[part])
    return total


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(len(x), 1, -1, x.shape[-1])


def _linear(call: _Call, name: str) -> Tensor:
    delta = _tokens(call.delta)
    return _outer(delta, _tokens(call.a))[0] if name == "weight" else _sum_of_squares(delta.sum((1, 2)))


def _transposed_linear(call: _Call, name: str) -> Tensor:
    return _linear(call, name) if name == "bias" else _outer(_tokens(call.a), _tokens(call.delta))[0]


def _convolution(call: _Call, name: str) -> Tensor:
    module, a, delta = call.module, call.a, call.delta.flatten(2)
    if name == "bias":
        return _sum_of_squares(delta.sum(2))
    g, offsets = module.groups, math.prod(module.kernel_size)
    delta = delta.unflatten(1, (g, -1)).mT
    positions, o = delta.shape[2:]
    if positions <= PAIRED and offsets <= 64:
        total = _by_offset(delta, a, module)
    else:
        windows = _windows(a, module, g)
        k = windows.shape[-1] * offsets
        total = delta.new_zeros(g, o, k)
        for part in _chunks(len(a), g * k * max(o, positions), a.device):
            total += _outer(delta[part], windows[part].reshape(-1, g, positions, k))
    total = total.view(g * o, *module.kernel_size, -1)
    return total.movedim(-1, 1).contiguous()


def _windows(a: Tensor, module: nn.Module, groups: int) -> Tensor:
    """What each position of the output saw: (n, g, *positions, *kernel, channels), a view."""
    pads = module._reversed_padding_repeated_twice
    dims = a.dim() - 2
    if module.padding_mode == "zeros":
        a = F.pad(a.movedim(1, -1), [0, 0, *pads])
    else:
        a = F.pad(a, pads, module.padding_mode).movedim(1, -1)
    for i, (size, step, gap) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), 1
    ):
        a = a.unfold(i, gap * (size - 1) + 1, step)[..., ::gap]
    a = a.unflatten(1 + dims, (groups, -1))
    return a.movedim(1 + dims, 1).movedim(2 + dims, -1)


def _by_offset(delta: Tensor, a: Tensor, module: nn.Module) -> Tensor:
    """For few positions: each place in the kernel alone, without the windows padding filled."""
    g, positions, o = delta.shape[1:]
    index = torch.arange(1.0, a[0, 0].numel() + 1, dtype=torch.float64).view(1, 1, *a.shape[2:])
    sources = _windows(index, module, 1).reshape(positions, -1).long()  # 0: padding
    a = a.flatten(2).unflatten(1, (g, -1)).mT
    total = delta.new_zeros(sources.shape[1], g, o, a.shape[-1])
    for offset, source in enumerate(sources.T):
        inside = source.nonzero()[:, 0]
        if len(inside):
            total[offset] = _outer(delta[:, :, inside], a[:, :, source[inside] - 1])
    return total.permute(1, 2, 0, 3).reshape(g, o, -1)


def _embedding(call: _Call, name: str) -> Tensor:
    """sum_i of the squared rows."""
    module = call.module
    keys, rows = _rows(call, slice(0, call.batch))
    return _scatter(rows.square(), keys % module.num_embeddings, module.num_embeddings)


def _rows(call: _Call, part: slice) -> tuple[Tensor, Tensor]:
    """Each token's gradient in each example: keys example * vocabulary + token, and rows."""
    module, tokens, delta = call.module, call.a[part], call.delta[part]
    if module.padding_idx is not None:
        delta = delta.masked_fill((tokens == module.padding_idx)[..., None], 0)
    example = torch.arange(len(tokens), device=tokens.device)
    keys = tokens.flatten(1) + example[:, None] * module.num_embeddings
    keys, place = keys.unique(return_inverse=True)
    return keys, _scatter(delta.reshape(-1, delta.shape[-1]), place.flatten(), len(keys))


def _scatter(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Rows with the same index added up, in the same order every time."""
    return torch.ops.aten.embedding_dense_backward(rows, index, size, -1, False)


def _normalisation(call: _Call, name: str) -> Tensor:
    module, delta = call.module, call.delta
    if name == "weight":
        if isinstance(module, _BatchNorm):
            hat = F.batch_norm(call.a, module.running_mean, module.running_var, eps=module.eps)
        elif isinstance(module, nn.LayerNorm):
            hat = F.layer_norm(call.a, module.normalized_shape, eps=module.eps)
        else:
            hat = F.rms_norm(call.a, module.normalized_shape, eps=module.eps)
        delta = delta * hat
    if isinstance(module, _BatchNorm):
        return _sum_of_squares(delta.reshape(*delta.shape[:2], -1).sum(2))
    return _sum_of_squares(delta.reshape(len(delta), -1, *module.normalized_shape).sum(1))


_RULES: dict[Any, Callable[[_Call, str], Tensor]] = {
    nn.Linear.forward: _linear,
    Conv1D.forward: _transposed_linear,
    nn.Conv1d.forward: _convolution,
    nn.Conv2d.forward: _convolution,
    nn.Conv3d.forward: _convolution,
    nn.Embedding.forward: _embedding,
    nn.LayerNorm.forward: _normalisation,
    nn.RMSNorm.forward: _normalisation,
    _BatchNorm.forward: _normalisation,
}


def _add_gradients(gradients: Tensor, call: _Call, name: str, part: slice) -> None:
    """Add each example's gradient, shape (part, *parameter), from one call."""
    forward = _forward(call.module)
    if forward is nn.Linear.forward and name == "weight":
        gradients.baddbmm_(_tokens(call.delta[part])[:, 0].mT, _tokens(call.a[part])[:, 0])
    elif forward is nn.Embedding.forward:
        keys, rows = _rows(call, part)
        gradients.flatten(0, 1).index_add_(0, keys, rows)
    else:
        gradients += _vjp(call, name, part)


def _vjp(call: _Call, name: str, part: slice) -> Tensor:
    module = call.module
    split = [isinstance(x, Tensor) and x.shape[:1] == (call.batch,) for x in call.inputs]
    examples = [x[part] for x, batched in zip(call.inputs, split, strict=True) if batched]

    def gradient(deltas: list[Tensor], example: list[Tensor]) -> Tensor:
        parts = iter(example)
        inputs = [
            next(parts)[None] if batched else x
            for x, batched in zip(call.inputs, split, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(inputs, call.structure)

        def outputs(p: Tensor) -> list[Tensor]:
            leaves = pytree.tree_leaves(
                torch.func.functional_call(module, {name: p}, args, kwargs)
            )
            return [leaves[place] for place in call.deltas]

        _, pull = torch.func.vjp(outputs, module.get_parameter(name))
        return pull([delta[None] for delta in deltas])[0]

    try:
        return torch.func.vmap(gradient)([d[part] for d in call.deltas.values()], examples)
    except RuntimeError as error:
        raise Unsupported(f"{call.label}: it cannot be differentiated per example ({error})") from error
