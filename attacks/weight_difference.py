"""Weight difference: what the step from one checkpoint to the next says about what was forgotten.

An attacker with the checkpoints before and after a request needs no record to learn from them.

Where the change sits: of every tensor, how much of the whole squared change is in it, how long the
change is beside the tensor, how many entries moved at all, and how far it points where the change
of a retrained model points. A change that sits in a few places hides rather than removes.

What it is about: rows of the output layer stand for classes or tokens. Rows that moved furthest
name the class that was forgotten, or the words of the forgotten answers (:func:`rows_named`). Gao
et al. (2022, arXiv 2202.03460) call it deletion inference to learn from two models what was deleted
between them; an exact retrain is open to it, too, and is the value to compare with.

Tensors are read one name at a time, so memory holds one tensor of each checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from scipy.stats import rankdata
from torch import Tensor, nn

from unlearn.attacks.interface import Array
from unlearn.errors import BadInput
from unlearn.tasks.base import CHUNK, Encoded, Task
from unlearn.weights import header, weight_files

Source = nn.Module | Mapping[str, Tensor] | str | Path


@dataclass(frozen=True)
class Change:
    """How much of a checkpoint changed; changes of several tensors add up.

    Attributes:
        entries: numbers in it.
        changed: those that are not what they were.
        before: squared Frobenius norm before.
        squared: squared Frobenius norm of the change.
        retrained: squared Frobenius norm of the change to a retrained model; 0 without one.
        product: inner product of both changes.
    """

    entries: int = 0
    changed: int = 0
    before: float = 0.0
    squared: float = 0.0
    retrained: float = 0.0
    product: float = 0.0

    def __add__(self, other: Change) -> Change:
        """Of both together."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Change(*(a + b for a, b in pairs))

    @property
    def relative(self) -> float:
        """||dW||_F / ||W||_F; infinite where all was zero and is no longer."""
        if self.squared == 0:
            return 0.0
        return math.sqrt(self.squared / self.before) if self.before else math.inf

    @property
    def share_changed(self) -> float:
        """Share of the entries that changed."""
        return self.changed / self.entries if self.entries else 0.0

    @property
    def cosine(self) -> float | None:
        """Of the change and that to the retrained model; None where one of them is zero."""
        length = math.sqrt(self.squared) * math.sqrt(self.retrained)
        return self.product / length if length else None

    def share_of(self, whole: Change) -> float:
        """Share of the squared change of the whole that sits here."""
        return self.squared / whole.squared if whole.squared else 0.0


def differences(
    before: Source, after: Source, retrained: Source | None = None
) -> dict[str, Change]:
    """What changed in every floating-point tensor, running statistics among them, by name.

    Args:
        before: a checkpoint directory, a safetensors file, the directory of a run, a model, or
            tensors by name.
        after: the same of the audited model.
        retrained: the same of a model that learnt without the forget set. Its cosine says something
            only if it started from ``before``: two models made anew each differ from ``before`` by
            its whole weights, which alone gives one half.

    Raises:
        BadInput: not the same names and shapes in all of them, or files that cannot be read.
    """
    first, second = tensors(before), tensors(after)
    exact = None if retrained is None else tensors(retrained)
    for other in filter(None, (second, exact)):
        if odd := first.keys() ^ other.keys():
            raise BadInput(f"the checkpoints differ in their tensors: {min(odd)} is in one of them")
    found = {}
    for name in first:
        old, new = first[name], second[name]
        if old.is_floating_point():
            found[name] = change(old, new, None if exact is None else exact[name], name)
    return found


def change(
    before: Tensor, after: Tensor, retrained: Tensor | None = None, name: str = "a tensor"
) -> Change:
    """What changed in one tensor, summed in float64 a piece at a time.

    Raises:
        BadInput: shapes that differ; the message says ``name``.
    """
    given = [before, after] if retrained is None else [before, after, retrained]
    if len({tensor.shape for tensor in given}) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in given)
        raise BadInput(f"the checkpoints differ in the shape of {name}: {shapes}")
    total = Change()
    for pieces in zip(*(torch.split(t.detach().flatten(), CHUNK) for t in given), strict=True):
        old, new, *exact = (piece.cpu().double() for piece in pieces)
        step, other = new - old, exact[0] - old if exact else torch.zeros_like(old)
        total += Change(
            len(old), int(step.count_nonzero()), float(old @ old), float(step @ step),
            float(other @ other), float(step @ other),
        )  # fmt: skip
    return total


def in_blocks(found: Mapping[str, Change]) -> dict[str, Change]:
    """Changes added up by block of depth: by names up to and with the first number in them.

    >>> in_blocks({"h.0.a.weight": Change(2, 1), "h.0.b": Change(3, 3), "head": Change(1, 0)})
    {'h.0': Change(entries=5, changed=4, ...), 'head': Change(entries=1, changed=0, ...)}
    """
    blocks: dict[str, Change] = {}
    for name, one in found.items():
        numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", name)
        block = numbered.group() if numbered else name
        blocks[block] = blocks.get(block, Change()) + one
    return blocks


def rows_moved(before: Any, after: Any) -> Array:
    """How far every row moved: Euclidean norm of its difference.

    Args:
        before: weights of the output layer, shape (rows, dim), or any tensor of several rows.
        after: of the same shape.

    Returns:
        Shape (rows,).

    Raises:
        BadInput: shapes that differ.
    """
    old, new = torch.as_tensor(before).detach().cpu(), torch.as_tensor(after).detach().cpu()
    if old.shape != new.shape or not old.ndim:
        raise BadInput(f"rows of {tuple(old.shape)} and {tuple(new.shape)} cannot be compared")
    size = max(1, CHUNK // max(1, old[:1].numel()))
    parts = [
        (b.double() - a.double()).flatten(1).norm(dim=1)
        for a, b in zip(torch.split(old, size), torch.split(new, size), strict=True)
    ]
    return np.asarray(torch.cat(parts).numpy())


def rows_named(moved: Any, named: Iterable[int], others: Iterable[int] | None = None) -> float:
    """Whether the rows of what was forgotten moved further than others.

    Args:
        moved: from :func:`rows_moved`, shape (rows,).
        named: rows of the forgotten classes, or of the tokens of forgotten answers.
        others: rows to compare with; None: all that are not named.

    Returns:
        The chance that a named row moved further than one of the others (AUC, ties count half):
        1 where the step names what was forgotten, 0.5 where it says nothing. For one class of k it
        is 1 - (rank - 1) / (k - 1).

    Raises:
        BadInput: no row on one side, rows on both, or rows there are not.
    """
    values = np.asarray(moved, dtype=np.float64)
    wanted = sorted(set(named))
    rest = sorted(set(range(len(values))) - set(wanted) if others is None else set(others))
    if not wanted or not rest or set(wanted) & set(rest):
        raise BadInput("rows are compared with other rows: name some, not all, and none twice")
    if wanted[0] < 0 or rest[0] < 0 or max(wanted[-1], rest[-1]) >= len(values):
        raise BadInput(f"there are {len(values)} rows, and one of those named is not among them")
    ranks = rankdata(np.concatenate([values[wanted], values[rest]]))[: len(wanted)]
    size = len(wanted)
    return float((ranks.sum() - size * (size + 1) / 2) / (size * len(rest)))


def answer_tokens(forget: Encoded, retain: Encoded) -> tuple[list[int], list[int]]:
    """Tokens that only answers of the forget set have, and those of retain answers, ascending.

    The two lists are what :func:`rows_named` compares in a language model.

    Raises:
        BadInput: not texts.
    """
    if forget.task.name != "causal_lm":
        raise BadInput("only answers of language models have tokens: name the forgotten classes")
    gone, kept = ({int(t) for i in range(len(s)) for t in s[i]["answer"]} for s in (forget, retain))
    return sorted(gone - kept), sorted(kept)


def output_name(model: nn.Module, task: Task) -> str:
    """Name of the output layer's weights among a model's tensors, the first of several.

    The model may have no weights (built on the meta device).
    """
    weight = task.output_layer(model).get_parameter("weight")
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def tensors(source: Source) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint by name, each read when it is asked for.

    Of tensors a model in memory has under several names the first counts, as in its files.

    Raises:
        BadInput: files that are missing, damaged or pickled.
    """
    if isinstance(source, nn.Module):
        found: dict[str, Tensor] = {}
        seen: set[tuple[int, torch.Size]] = set()
        for name, tensor in source.state_dict().items():
            place = tensor.data_ptr(), tensor.shape
            if place not in seen or not tensor.numel():
                found[name] = tensor
            seen.add(place)
        return found
    if isinstance(source, Mapping):
        return source
    return OnDisk(Path(source).expanduser())


class OnDisk(Mapping[str, Tensor]):
    """Tensors in safetensors files, read one at a time.

    Args:
        path: a checkpoint directory, the directory of a run, or a file.

    Raises:
        BadInput: missing, damaged or pickled files.
    """

    def __init__(self, path: Path) -> None:
        if (path / "run.json").exists():
            path = path / "model"
        if not path.exists():
            raise BadInput(f"the checkpoint {path} does not exist: check the path")
        files = weight_files(path) if path.is_dir() else [path]
        self.files = {name: file for file in files for name in header(file)}

    def __getitem__(self, name: str) -> Tensor:
        """Read one."""
        with safe_open(self.files[name], "pt") as file:
            found: Tensor = file.get_tensor(name)
            return found

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the files."""
        return iter(self.files)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.files)
