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

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils import _pytree as pytree

from unlearn.errors import Unsupported
from unlearn.squares import Call, total_squares, versions_of


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
        Unsupported: a module mixes the examples, or its gradients cannot be told apart.

    >>> layer = nn.Linear(2, 1)
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> squared_gradients(layer, lambda: layer(x)[:, 0], {"w": layer.weight})["w"]
    tensor([[10., 20.]])
    """
    recorder = _Recorder(parameters)
    with _requires_grad([*model.parameters(), *parameters.values()], False):
        with _requires_grad(parameters.values(), True), recorder.listening_to(model):
            losses = nll()
        recorder.differentiate(losses)
    return {name: recorder.totals[id(p)] for name, p in parameters.items()}


@contextmanager
def _requires_grad(parameters: Iterable[nn.Parameter], flag: bool) -> Iterator[None]:
    found = {p: p.requires_grad for p in parameters}
    try:
        for p in found:
            p.requires_grad_(flag)
        yield
    finally:
        for p, before in found.items():
            p.requires_grad_(before)


class _Tap(torch.autograd.Function):
    """The identity; hands over the gradient that comes back, and gives the graph a beginning."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, arrive: Callable[[Tensor], None]) -> Any:
        ctx.arrive = arrive
        return output.detach()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:
        arrive, ctx.arrive = ctx.arrive, None  # what it holds is free again
        arrive(delta)
        return delta, None, None


class _Recorder:
    """Follows the modules that own wanted parameters through the forward and backward pass.

    Wanted parameters require gradients except while their owner runs. One that is used elsewhere
    therefore shows up in the graph, and is refused rather than missed.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.wanted = {id(p): (name, p) for name, p in parameters.items()}
        self.totals: dict[int, Tensor] = {}
        self.uses: dict[int, list[tuple[Call, str]]] = defaultdict(list)
        self.open: list[Call] = []
        self.batch = 0
        self.given: list[Any] = []  # what the outermost module was called with
        self.anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def listening_to(self, model: nn.Module) -> Iterator[None]:
        """Record every call made inside."""
        handles: list[Any] = []
        try:
            for name, module in model.named_modules():
                handles += self._listen(module, f"{name or 'the model'} ({type(module).__name__})")
            with torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _listen(self, module: nn.Module, label: str) -> Iterator[Any]:
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise Unsupported(f"{label}: batch statistics mix the examples; call model.eval()")
        # attention reads the weights of its output projection without calling it
        within = isinstance(module, nn.MultiheadAttention)
        members = module.named_parameters(recurse=within, remove_duplicate=False)
        owned = {name: p for name, p in members if id(p) in self.wanted}
        keys = list({id(p) for p in owned.values()})
        if owned and isinstance(module, ParametrizationList):
            raise Unsupported(f"{label}: remove the parametrization first")
        if owned and not getattr(module, "batch_first", True):
            raise Unsupported(f"{label}: the batch does not lead its input; use batch_first=True")

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self.batch and not owned:
                return
            inputs, structure = pytree.tree_flatten((args, kwargs))
            if not self.batch:  # the outermost module's first input tells
                self.batch = next((len(x) for x in inputs if isinstance(x, Tensor) and x.dim()), 0)
                self.given = [x for x in inputs if isinstance(x, Tensor)]
            if owned:
                labels = any(x is y for x in inputs for y in self.given)
                inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
                versions = versions_of(inputs)
                call = Call(module, label, keys, self.batch, inputs, structure, versions, labels)
                self.open.append(call)
            for p in owned.values():
                p.requires_grad_(False)

        def leave(_: nn.Module, args: Any, output: Any) -> Any:
            call = self.open.pop()
            for name, p in owned.items():
                p.requires_grad_(True)
                self.uses[id(p)].append((call, name))
            return self._tapped(call, output)

        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        if owned:
            yield module.register_forward_hook(leave, prepend=True)

    def _tapped(self, call: Call, output: Any) -> Any:
        leaves, structure = pytree.tree_flatten(output)
        shared = not any(call.has_batch(x) for x in call.inputs)
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                if shared and leaf.shape[:1] == (1,):  # positions, the same for all examples
                    leaf = leaf.expand(call.batch, *leaf.shape[1:])
                arrive = partial(self._arrive, call, place)
                leaves[place] = _Tap.apply(leaf, self.anchor, arrive)  # type: ignore[no-untyped-call]
                call.outputs += 1
        call.require(call.outputs > 0, "its output holds no tensor")
        return pytree.tree_unflatten(leaves, structure)

    def _arrive(self, call: Call, place: int, delta: Tensor) -> None:
        call.deltas[place] = delta
        for key in call.parameters if len(call.deltas) == call.outputs else ():
            if all(len(c.deltas) == c.outputs for c, _ in self.uses[key]):
                self._settle(key)

    def _settle(self, key: int) -> None:
        uses = [(call, name) for call, name in self.uses.pop(key, ()) if call.deltas]
        for call, _ in uses:
            call.check()
        with torch.no_grad():
            self.totals[key] = total_squares(uses, self.wanted[key][1])

    def differentiate(self, losses: Tensor) -> None:
        """Run the backward pass from the losses, shape (batch,), and complete the totals."""
        if self.batch and losses.shape != (self.batch,):
            shape = tuple(losses.shape)
            raise Unsupported(f"the losses have shape {shape} for a batch of {self.batch}")
        for leaf in _leaves(losses):
            if id(leaf) in self.wanted:
                name, _ = self.wanted[id(leaf)]
                raise Unsupported(f"{name}: it is used outside the module that owns it")
        if losses.requires_grad:
            torch.autograd.grad(losses.sum(), self.anchor, allow_unused=True)
        for key in self.wanted.keys() - self.totals.keys():
            self._settle(key)


def _leaves(output: Tensor) -> Iterator[Tensor]:
    nodes: list[Any] = [output.grad_fn]
    seen = {None}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            if hasattr(node, "variable"):
                yield node.variable
