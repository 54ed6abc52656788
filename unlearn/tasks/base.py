"""The seam between methods and model families: a task scores one example.

Everything a method or an attack asks of a model goes through :class:`Task`. One forward pass
yields :class:`Predictions`: for every example of the batch, logits at each of its *units* (the
answer tokens of a language model, the single label of a classifier). Per-example negative
log-likelihoods, argmax hits and divergences all follow from these.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unlearn.data import Examples, Row
from unlearn.errors import BadInput

Batch = dict[str, Tensor]
Encoding = Mapping[str, Any]
IGNORED = -100
CHUNK = 1 << 24  # logits held at a time: 64 MiB in float32


@dataclass(frozen=True)
class Predictions:
    """What a model says at every unit of every example.

    Logits are made from ``compact`` by ``head`` where they are needed, ``rows`` units at a time,
    and made again in the backward pass: memory does not grow with units times classes.

    Attributes:
        compact: (batch, units, dim): the logits, or what ``head`` turns into logits.
        labels: (batch, units), -100 where an example has fewer units than the longest.
        head: from compact values to logits, for any leading shape; None: they are the logits.
        rows: units whose logits are held at a time.
    """

    compact: Tensor
    labels: Tensor
    head: Callable[[Tensor], Tensor] | None = None
    rows: int = CHUNK

    @property
    def logits(self) -> Tensor:
        """All of them, (batch, units, classes)."""
        return self.compact if self.head is None else self.head(self.compact)

    def each(self, score: Callable[..., Tensor], *beside: Predictions) -> Tensor:
        """``score(logits, labels, *other logits)`` of every unit, shape (batch, units).

        Args:
            score: gets logits of shape (n, classes), labels of shape (n,), and the logits of
                every one of ``beside`` at the same units; returns shape (n,).
            beside: what other models say at the same units.

        Returns:
            0 where padded; at least float32.
        """
        said = (self, *beside)
        present = self.labels != IGNORED
        if all(one.head is None for one in said):  # logits exist: reading them costs no memory
            whole = (_at_least_float32(one.compact.flatten(0, 1)) for one in said)
            own, *others = whole
            values = score(own, self.labels.flatten().clamp(min=0), *others)
            return values.view(self.labels.shape).masked_fill(~present, 0.0)

        def scored(labels: Tensor, *parts: Tensor) -> Tensor:
            own, *others = (
                _at_least_float32(part if one.head is None else one.head(part))
                for one, part in zip(said, parts, strict=True)
            )
            return score(own, labels, *others)

        rows = min(one.rows for one in said)
        columns = (self.labels[present], *(one.compact[present] for one in said))
        pieces = list(zip(*(torch.split(column, rows) for column in columns), strict=True))
        if len(pieces) > 1 and torch.is_grad_enabled():
            found = [checkpoint(scored, *piece, use_reentrant=False) for piece in pieces]
        else:
            found = [scored(*piece) for piece in pieces]
        flat = torch.cat(found)
        return flat.new_zeros(self.labels.shape).masked_scatter(present, flat)

    @cached_property
    def _unit_nll(self) -> Tensor:
        return self.each(lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"))

    def unit_nll(self) -> Tensor:
        """-log p(label), shape (batch, units), in nats; 0 where padded."""
        return self._unit_nll

    def nll(self) -> Tensor:
        """Per-example negative log-likelihood, summed over units, shape (batch,), in nats."""
        return self.unit_nll().sum(1)

    def hits(self) -> Tensor:
        """Whether the argmax is the label, shape (batch, units); False where padded."""
        return self.each(lambda logits, labels: (logits.argmax(-1) == labels).to(logits)).bool()


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


class Task(ABC):
    """One model family.

    Attributes:
        name: as users write it.
        classes: number of outcomes per unit (vocabulary size, number of labels).
    """

    name: ClassVar[str]
    classes: int

    def label_index(self, label: Any) -> int:
        """A label as a class index.

        Raises:
            BadInput: no such class, or a model without classes.
        """
        raise BadInput("--forget-classes is for models with classes: use --forget-ids or --forget")

    @abstractmethod
    def fault(self, row: Row) -> str | None:
        """What is wrong with a raw row, as the end of a sentence, or None."""

    @abstractmethod
    def content(self, row: Row) -> bytes:
        """The bytes that make a record what it is, for overlap checks and fingerprints."""

    def shown(self, row: Row) -> bytes:
        """The bytes of what a model is shown, its label left out: known by a later request."""
        return self.content(row)

    @abstractmethod
    def encode(self, row: Row) -> Encoding:
        """A raw row as the model reads it; has ``units`` and ``length`` among its keys."""

    @abstractmethod
    def collate(self, encodings: Sequence[Encoding]) -> Batch:
        """A padded batch on the CPU."""

    @abstractmethod
    def predictions(self, model: nn.Module, batch: Batch, *, dense: bool = False) -> Predictions:
        """One forward pass; ``dense``: the output layer runs once, on all units of the batch."""

    def packed(self, model: nn.Module, batch: Batch) -> Batch:
        """The same examples without padding; as they are, where nothing is padded."""
        return batch

    def singly(self, batch: Batch) -> list[Batch]:
        """The batch as often as a loss is a mean over draws: one draw of every example each."""
        return [batch]

    @abstractmethod
    def features(self, model: nn.Module, batch: Batch, layer: int | str | None = None) -> Tensor:
        """Hidden representation of each example, shape (batch, dim)."""

    @abstractmethod
    def compact(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the logits are computed from at every unit, shape (batch, units, dim)."""

    @abstractmethod
    def head(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """From :meth:`compact` values to logits, for any leading shape.

        Raises:
            Unsupported: the model does more to its logits than its output layer.
        """

    @abstractmethod
    def frozen_head(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """:meth:`head` as it is now, whatever becomes of ``model`` afterwards."""

    @abstractmethod
    def pooled(self, output: Tensor, batch: Batch) -> Tensor:
        """A layer's output as one vector per example, shape (batch, dim)."""

    def text(self, row: Row) -> str | None:
        """The text whose likelihood is scored; None where there is none."""
        return None

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The blocks a model is stacked from, first to last, by name; not its output layer.

        They are the children of the container (module list or sequence) with the most parameters.
        """
        containers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
        }
        if not containers:
            return {}
        sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in containers.items()}
        outer = max(sizes, key=lambda name: (sizes[name], -len(name)))
        prefix = f"{outer}." if outer else ""
        last = self.output_layer(model)
        return {
            f"{prefix}{name}": child
            for name, child in containers[outer].named_children()
            if child is not last
        }

    @abstractmethod
    def relabel(self, encoding: Encoding, row: Row, draw: torch.Generator) -> Encoding:
        """The same input with a random wrong answer, for random-label methods."""

    @abstractmethod
    def output_layer(self, model: nn.Module) -> nn.Module:
        """The layer that turns hidden states into logits."""

    def nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """Per-example negative log-likelihood, shape (batch,), in nats, summed over units."""
        return self.predictions(model, batch).nll()

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits at every unit, shape (batch, units, classes)."""
        return self.predictions(model, batch).logits

    def units(self, batch: Batch) -> Tensor:
        """Number of units per example, shape (batch,)."""
        return batch["units"]

    def chance(self) -> float:
        """NLL per unit of a uniform guess, in nats."""
        return math.log(self.classes)


class Encoded(Sequence[Encoding]):
    """A set of examples as a model reads them.

    Text is tokenised once, on construction; images and vectors are encoded when read and kept
    while they fit into ``BUDGET`` bytes.

    Raises:
        BadInput: rows the task cannot use; the first few named, all counted.
    """

    BUDGET = 1 << 30

    def __init__(self, examples: Examples, task: Task) -> None:
        self.examples = examples
        self.task = task
        self.name = examples.name
        self._kept: dict[int, Encoding] = {}
        self._free = self.BUDGET
        faults = [
            (i, fault)
            for i in range(len(examples))
            if (fault := task.fault(examples[i])) is not None
        ]
        if faults:
            first, fault = faults[0]
            raise BadInput(
                f"{len(faults)} of the {len(examples)} {self.name} records cannot be used; the "
                f"first is record {examples.ids[first]} of {examples.source}: {fault}"
            )

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        if index not in self._kept:
            encoding = self.task.encode(self.examples[index])
            size = sum(v.nbytes if isinstance(v, Tensor) else 8 for v in encoding.values())
            if size > self._free:
                return encoding
            self._free -= size
            self._kept[index] = encoding
        return self._kept[index]

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """The examples at ``indices`` as one batch; ``batch["index"]`` holds the indices."""
        batch = self.task.collate([self[i] for i in indices])
        batch["index"] = torch.as_tensor(indices)
        return {key: value.to(device) for key, value in batch.items()}

    def by_length(self, size: int) -> Iterator[list[int]]:
        """Indices in batches of ``size``, similar lengths together; covers every example once."""
        order = sorted(range(len(self)), key=lambda i: int(self[i]["length"]))
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def total_units(self, indices: Sequence[int]) -> int:
        """Number of units in these examples."""
        return sum(int(self[i]["units"]) for i in indices)

    def total_tokens(self) -> int:
        """Input positions of the whole set (tokens, or 1 per image or vector)."""
        return sum(int(self[i]["length"]) for i in range(len(self)))

    def sample(self, size: int, seed: int) -> Encoded:
        """At most ``size`` examples, drawn without replacement, in their original order."""
        return self if size >= len(self) else self.select(self.drawn(size, seed))

    def drawn(self, size: int, seed: int) -> list[int]:
        """The positions of :meth:`sample`, ascending."""
        draw = torch.Generator().manual_seed(seed)
        return sorted(torch.randperm(len(self), generator=draw)[:size].tolist())

    def select(self, indices: Sequence[int], name: str | None = None) -> Encoded:
        """The examples at ``indices``, already encoded ones kept."""
        part = object.__new__(Encoded)
        part.examples = self.examples.select(indices, name)
        part.task, part.name = self.task, part.examples.name
        part._kept = {j: self._kept[i] for j, i in enumerate(indices) if i in self._kept}
        part._free = self._free
        return part

    def as_read(self, task: Task | None = None) -> Encoded:
        """The same records as the task reads them, or another one, whatever stood in for that."""
        part = self.select(range(len(self)))
        part.task, part._kept = task or self.task, {}
        return part

    def replaced(self, encodings: Iterable[Encoding]) -> Encoded:
        """The same set read differently: ``encodings`` stand in for what the task would read."""
        part = self.select(range(len(self)))
        part._kept = dict(enumerate(encodings))
        return part


def evaluating(model: nn.Module) -> _Evaluating:
    """Context: eval mode without gradients; the modes of all modules are restored after."""
    return _Evaluating(model)


class _Evaluating:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        self.no_grad = torch.no_grad()
        self.no_grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self.no_grad.__exit__(*error)
        for module, training in self.modes.items():
            module.training = training
