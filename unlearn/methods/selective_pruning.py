"""Selective pruning (Pochinkov & Schoots 2024, arXiv 2403.01267).

Units that serve the forget set far more than the retain set are cut out. With z the activations of
a unit over a data set D (the paper's importance functions):

    freq: share of z > 0       abs: mean |z|       rms: sqrt(mean z^2)       std: sqrt(var z)
    score = I(forget) / (I(retain) + epsilon)

Each round measures both sets anew and prunes the top share of all units of a kind, over all layers
together. The paper finds neurons more selective than attention; the authors prune 2 % per round.

A unit is what one layer alone reads: a neuron of a feed-forward layer, a channel of a convolution,
an attention head (its dimensions are averaged, under the root in rms and std). Such layers are
found in the graph of one forward pass (``locate``), not by their names. Positions are all that the
model reads, padding excluded, as in the authors' code. Pruning writes zeros where the reading layer
takes the unit in: the unit's contribution is exactly zero, nothing else changes, and the checkpoint
keeps its architecture. The weights that compute the unit stay, so relearning may revive it.

The authors' code scores every dimension of a head and takes the mean or median, where dimensions
silent on the retain set weigh most; it has the variance in place of std; and it can prune single
dimensions of attention, on request after a singular value decomposition. That is not done here.

Cost: per round, one forward pass over forget and retain set, and no backward pass.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from transformers.pytorch_utils import Conv1D

from unlearn.errors import BadInput, Unsupported, did_you_mean
from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Choice, Range
from unlearn.run import Run
from unlearn.tasks.base import Encoded

Importance = Literal["freq", "abs", "rms", "std"]
Kind = Literal["neurons", "heads"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
READERS = (nn.Linear, Conv1D, *CONVOLUTIONS)


@dataclass(frozen=True, kw_only=True)
class SelectivePruning:
    """Cut out the neurons and attention heads that serve the forget set far more."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    importance: Annotated[
        Importance,
        Field(description="of a unit to a set: how often it is positive, or its size, or spread"),
        Choice(("freq", "abs", "rms", "std")),
    ] = "abs"
    share: Annotated[
        float,
        Field(gt=0, le=1, description="of all units of a kind, pruned per round"),
        Range(0.005, 0.3, log=True),
    ] = 0.02
    rounds: Annotated[
        int, Field(ge=1, description="how often to measure and prune"), Range(1, 5)
    ] = 1
    kinds: Annotated[
        Literal["neurons", "heads", "both"],
        Field(description="neurons (and channels of convolutions), attention heads, or both"),
    ] = "neurons"
    epsilon: Annotated[
        float, Field(gt=0, description="keeps scores of units silent on the retain set finite")
    ] = 1e-3
    layers: Annotated[
        str | None,
        Field(description="regular expression: only units read by layers of such names; none: all"),
    ] = None
    batch_size: Annotated[
        int, Field(ge=1, description="examples per pass; does not change the result")
    ] = 64

    needs: ClassVar[Needs] = Needs(retain=Need.REQUIRED)

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Locate the units; measure, score and prune, round by round."""
        forget, retain = request.forget_set(), request.retain_set()
        model = subject.model.eval()
        readers = self._readers(model, forget, run)
        taken: dict[Kind, list[Tensor]] = {reader.kind: [] for reader in readers.values()}
        for number in range(1, self.rounds + 1):
            on_forget = self._measure(model, readers, forget, run, f"forget_{number}")
            on_retain = self._measure(model, readers, retain, run, f"retain_{number}")
            for kind in taken:
                scores = {
                    name: score(on_forget[name], on_retain[name], self.epsilon) * reader.alive()
                    for name, reader in readers.items()
                    if reader.kind == kind
                }
                for name, chosen in top(scores, self.share).items():
                    readers[name].prune(chosen)
                    taken[kind].append((on_forget[name] - on_retain[name])[chosen])
        for kind, parts in taken.items():
            total = sum(reader.units for reader in readers.values() if reader.kind == kind)
            _report(kind, torch.cat(parts), total, run)
        return subject

    def trained(self, forget: int, retain: int) -> int:
        """A forward pass alone counts as a third of a training step."""
        return -(-self.rounds * (forget + retain) // 3)

    def _readers(self, model: nn.Module, examples: Encoded, run: Run) -> dict[str, Reader]:
        """The readers of the wanted kinds in the wanted layers."""
        batch = examples.batch([0], run.device)
        found = locate(model, lambda: run.task.predictions(model, batch, dense=True).logits)
        if run.task.name == "causal_lm":  # what its output layer reads is no hidden layer
            head = run.task.output_layer(model)
            found = {name: reader for name, reader in found.items() if reader.module is not head}
        wanted: tuple[Kind, ...] = ("neurons", "heads") if self.kinds == "both" else (self.kinds,)
        for kind in wanted:
            if all(reader.kind != kind for reader in found.values()):
                others = sorted({reader.kind for reader in found.values()})
                hint = f"set kinds to {others[0]}" if others else "use another method"
                raise Unsupported(
                    f"{type(model).__name__} has no {kind} that a linear or convolutional layer "
                    f"of its own reads, so there is nothing to prune: {hint}"
                )
        readers = {name: reader for name, reader in found.items() if reader.kind in wanted}
        if self.layers is None:
            return readers
        try:
            chosen = {n: r for n, r in readers.items() if re.search(self.layers, n)}
        except re.error as error:
            raise BadInput(f"layers {self.layers!r} is no regular expression: {error}") from error
        if not chosen:
            hint = did_you_mean(self.layers, list(readers)[:40])
            raise BadInput(f"layers {self.layers!r} matches no layer that reads units: {hint}")
        return chosen

    def _measure(
        self,
        model: nn.Module,
        readers: Mapping[str, Reader],
        examples: Encoded,
        run: Run,
        name: str,
    ) -> dict[str, Tensor]:
        """Importance of every unit to a set, by reader, shape (units,)."""

        def compute() -> dict[str, Tensor]:
            tallies = {key: Tally(self.importance) for key in readers}
            phase = f"activations on {examples.name}"
            for indices in run.batches(examples, phase, self.batch_size):
                batch = examples.batch(indices, run.device)
                with torch.no_grad(), ExitStack() as hooks:
                    for key, reader in readers.items():
                        hook = partial(_listen, tallies[key], batch.get("attention_mask"))
                        hooks.callback(reader.module.register_forward_pre_hook(hook).remove)
                    run.task.compact(model, batch)
            return {key: tallies[key].importance(readers[key].units) for key in readers}

        return run.once(f"activations_{name}", compute)


def _report(kind: Kind, surplus: Tensor, total: int, run: Run) -> None:
    """Say how many units were pruned, and whether that was too many: I(forget) - I(retain)."""
    run.note(f"{len(surplus):,} of {total:,} {kind} were pruned.")
    if harmful := int((surplus < 0).sum()):
        run.note(
            f"Warning: {harmful:,} of the pruned {kind} matter more to the retain set than to the "
            "forget set: lower share or rounds."
        )


def score(on_forget: Tensor, on_retain: Tensor, epsilon: float) -> Tensor:
    """How much more a unit serves the forget set: I_forget / (I_retain + epsilon)."""
    return on_forget / (on_retain + epsilon)


def top(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The highest scores of all layers together.

    Args:
        scores: by layer, shape (units,); units without a positive score are never chosen.
        share: of all units; at least one is chosen.

    Returns:
        By layer, which units are chosen, shape (units,).

    >>> top({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([3.0, 0.0])}, 0.5)
    {'a': tensor([False,  True]), 'b': tensor([ True, False])}
    """
    if not scores:
        return {}
    everything = torch.cat(list(scores.values()))
    order = everything.argsort(descending=True, stable=True)  # ties: the earlier layer
    chosen = torch.zeros_like(everything, dtype=torch.bool)
    chosen[order[: max(1, round(share * len(everything)))]] = True
    parts = torch.split(chosen & (everything > 0), [len(value) for value in scores.values()])
    return dict(zip(scores, parts, strict=True))


class Tally:
    """Sums over positions of what an importance is made of, per input of a layer, in float64."""

    def __init__(self, kind: Importance) -> None:
        self.kind = kind
        self.count = 0
        self.sums: Tensor | float = 0.0

    def add(self, z: Tensor) -> None:
        """Activations, shape (positions, inputs)."""
        z = z.double()
        parts = {"freq": (z > 0,), "abs": (z.abs(),), "rms": (z.square(),), "std": (z, z.square())}
        self.sums = self.sums + torch.stack([part.double().sum(0) for part in parts[self.kind]])
        self.count += len(z)

    def importance(self, units: int) -> Tensor:
        """Of every unit, shape (units,); a unit is as many neighbouring inputs as fit."""
        means = torch.as_tensor(self.sums) / self.count
        values = means[-1] - means[0].square() if self.kind == "std" else means[0]
        pooled = values.clamp_min(0).view(units, -1).mean(1)
        return pooled.sqrt() if self.kind in ("rms", "std") else pooled


def _listen(tally: Tally, mask: Tensor | None, module: nn.Module, args: tuple[Tensor]) -> None:
    """Tally what a layer reads, padding excluded."""
    z = args[0].movedim(1, -1) if isinstance(module, CONVOLUTIONS) else args[0]
    places, rows = z.shape[:-1], z.flatten(0, -2)
    if mask is not None and places != mask.shape[:1]:  # one vector per example has no padding
        if places not in (mask.shape, (mask.numel(),)):
            raise Unsupported(
                f"a {type(module).__name__} reads values of shape {tuple(args[0].shape)}, in which "
                f"the padding of a batch of shape {tuple(mask.shape)} cannot be told: use layers "
                "to leave it out"
            )
        rows = rows[mask.flatten().bool()]
    tally.add(rows)


@dataclass(frozen=True)
class Reader:
    """A layer that alone reads a row of units.

    Attributes:
        module: linear or convolutional.
        kind: of the units.
        units: how many; each is the same number of neighbouring inputs of the layer.
    """

    module: Any
    kind: Kind
    units: int

    def _weights(self) -> Tensor:
        """A view of the weights, shape (groups, inputs / groups, ...)."""
        weight: Tensor = self.module.weight.detach()
        if isinstance(self.module, Conv1D):  # stored input by output
            return weight[None]
        groups = getattr(self.module, "groups", 1)
        return weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)

    def alive(self) -> Tensor:
        """Which units have any weight, shape (units,)."""
        read = (self._weights() != 0).flatten(2).any(2).flatten()
        return read.view(self.units, -1).any(1)

    def prune(self, chosen: Tensor) -> None:
        """Zero the weights that take in the chosen units, shape (units,), in place."""
        weights = self._weights()
        inputs = weights.shape[0] * weights.shape[1]
        columns = chosen.repeat_interleave(inputs // self.units)
        weights[columns.view(weights.shape[:2])] = 0


def locate(model: nn.Module, forward: Callable[[], Tensor]) -> dict[str, Reader]:
    """The layers that read units nobody else reads.

    The graph of one forward pass is followed from a layer's input back to the layers it was
    computed by. If no value on the way goes anywhere else, these are hidden units; a residual
    stream, which many layers read, is not. With a softmax over positions on the way they are
    attention heads.

    Args:
        model: in eval mode; left as it was found.
        forward: runs it once and returns its logits, leading dimension the batch.

    Returns:
        By name, in the order of the model's modules.
    """
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    names = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, READERS) and owners[id(module.weight)] == 1  # else tied
    }
    entries: dict[str, list[Any]] = defaultdict(list)  # graph nodes at layers' inputs
    exits: dict[Any, nn.Module] = {}  # and at outputs of whatever has a weight matrix

    def enter(name: str, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args:
            return args
        marked = _Mark.apply(args[0])  # type: ignore[no-untyped-call]
        entries[name].append(marked.grad_fn)
        return (marked, *args[1:])

    def leave(module: nn.Module, _: Any, output: Any) -> Any:
        def mark(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            marked = _Mark.apply(value)  # type: ignore[no-untyped-call]
            exits[marked.grad_fn] = module
            return marked

        return pytree.tree_map(mark, output)

    with ExitStack() as stack:
        for module in model.modules():
            if any(p.ndim > 1 for p in module.parameters(recurse=False)):
                stack.callback(module.register_forward_hook(leave).remove)
        for name, module in names.items():
            hook = partial(enter, name)
            stack.callback(module.register_forward_pre_hook(hook).remove)
        stack.enter_context(_differentiable(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # shows the softmax in the graph
        output = forward()
    uses = _uses(output.grad_fn)
    found: dict[str, Reader] = {}
    for name, module in names.items():
        calls = {_units(module, entry, exits, uses, len(output)) for entry in entries[name]}
        if len(calls) == 1 and (units := calls.pop()) is not None:
            found[name] = Reader(module, *units)
    return found


class _Mark(torch.autograd.Function):
    """A copy, which leaves a node of its own in the graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        return gradient


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Record a graph through all weights."""
    before = {p: p.requires_grad for p in model.parameters() if p.is_floating_point()}
    try:
        for parameter in before:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)


def _sources(node: Any) -> list[Any]:
    """What a node was computed from, parameters left out."""
    return [n for n, _ in node.next_functions if n is not None and n.next_functions]


def _uses(end: Any) -> dict[Any, set[Any]]:
    """For every node that ``end`` depends on, the nodes that use it."""
    uses: dict[Any, set[Any]] = {end: set()}
    waiting = [end]
    while waiting:
        node = waiting.pop()
        for source in _sources(node):
            if source not in uses:
                uses[source] = set()
                waiting.append(source)
            uses[source].add(node)
    return uses


def _units(
    reader: nn.Module,
    entry: Any,
    exits: Mapping[Any, nn.Module],
    uses: Mapping[Any, set[Any]],
    batch: int,
) -> tuple[Kind, int] | None:
    """Kind and number of the units a layer reads at one call; None where it shares them."""
    if entry not in uses:
        return None  # it has no part in the logits, or reads the input itself
    between = {entry}
    waiting = _sources(entry)
    while waiting:
        node = waiting.pop()
        if node not in between:
            between.add(node)
            waiting += [] if node in exits else _sources(node)
    writers = [exits[node] for node in between if node in exits]
    if all(isinstance(writer, nn.Embedding) for writer in writers):
        return None
    if any(not uses[node] <= between for node in between - {entry}):
        return None
    inputs = reader.weight.shape[0] if isinstance(reader, Conv1D) else _inputs(reader)
    steps = {node.name() for node in between}
    softmax = [node for node in between if "Softmax" in node.name()]
    shapes = [node._saved_result.shape for node in softmax if hasattr(node, "_saved_result")]
    heads = {s[1] if len(s) == 4 else s[0] // batch for s in shapes if len(s) in (3, 4)}
    opaque = len(shapes) < len(softmax) or any(re.search("Attn|Attention", s) for s in steps)
    if heads or opaque:
        return ("heads", heads.pop()) if len(heads) == 1 and not opaque else None
    widths = {getattr(writer, "out_channels", 0) for writer in writers}
    channels = widths.pop() if len(widths) == 1 else 0
    mixed = any(re.search("Permute|Transpose", step) for step in steps)
    if isinstance(reader, nn.Linear) and channels and inputs % channels == 0 and not mixed:
        return "neurons", channels  # a flattened picture: every channel is one run of inputs
    return "neurons", inputs


def _inputs(layer: Any) -> int:
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)
