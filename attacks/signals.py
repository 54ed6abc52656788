"""Per-example signals: one forward pass over a set, everything that is computed from it on disk.

Attacks and metrics read these tables and never run the model again. Records are named by keyed
hashes, so a table can be passed on without saying who is in it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from unlearn.data import record_hashes
from unlearn.distributed import spread
from unlearn.run import Run
from unlearn.tasks.base import CHUNK, IGNORED, Encoded, evaluating
from unlearn.workplace import written_whole

Array = npt.NDArray[np.float64]

UNITS = ("logprob", "mean", "variance", "hit")
FEATURE = "feature:"


@dataclass(frozen=True)
class Signals:
    """One row per example, in the order of the set.

    Per unit (an answer token, or the one label of a classifier) there are four numbers, held for
    all examples one after the other in flat arrays of ``units.sum()`` entries; :meth:`rows` cuts
    them apart. With p the distribution over the vocabulary or the classes:

    Attributes:
        record: keyed hash of each record, hex.
        units: number of units of each example, shape (n,).
        logprob: log p(label), in nats.
        mean: E_p[log p], in nats: the negative entropy.
        variance: Var_p[log p], in nats squared.
        hit: whether the argmax is the label.
        ended: whether the last unit is the end-of-sequence token, shape (n,).
        compressed: bytes of the scored text after zlib at its default level, shape (n,); 0 where
            there is no text.
        label: the class of each example, shape (n,); -1 where units are tokens.
        logits: of a classifier, shape (n, classes), float32; None where units are tokens.
        features: by layer, shape (n, dim), float32.
    """

    record: list[str]
    units: npt.NDArray[np.int64]
    logprob: Array
    mean: Array
    variance: Array
    hit: npt.NDArray[np.bool_]
    ended: npt.NDArray[np.bool_]
    compressed: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32] | None = None
    features: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.record)

    def rows(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """A flat array as one array per example."""
        return np.split(values, np.cumsum(self.units)[:-1]) if len(self) else []

    def nll(self) -> Array:
        """Negative log-likelihood summed over the units, shape (n,), in nats."""
        return np.array([-float(row.sum()) for row in self.rows(self.logprob)])

    def loss(self) -> Array:
        """Mean NLL per unit, shape (n,), in nats."""
        return self.nll() / self.units

    def hits(self) -> list[npt.NDArray[np.bool_]]:
        """Argmax hits without a closing end-of-sequence token, which every fluent model predicts.

        It stays where it is the only unit.
        """
        cut = self.ended & (self.units > 1)
        return [row[:-1] if c else row for row, c in zip(self.rows(self.hit), cut, strict=True)]

    def probabilities(self) -> Array:
        """Softmax of the logits of a classifier, shape (n, classes)."""
        if self.logits is None:
            raise TypeError("only classifiers have class probabilities")
        shifted = np.exp(self.logits.astype(np.float64) - self.logits.max(1, keepdims=True))
        return np.asarray(shifted / shifted.sum(1, keepdims=True))

    def select(self, rows: npt.ArrayLike) -> Signals:
        """The examples at these positions."""
        index = np.arange(len(self))[np.asarray(rows) if np.size(rows) else slice(0)]
        ends = np.cumsum(self.units)
        spans = [np.arange(ends[i] - self.units[i], ends[i]) for i in index]
        flat = np.concatenate(spans) if spans else np.zeros(0, int)
        return Signals(
            [self.record[i] for i in index],
            self.units[index],
            self.logprob[flat],
            self.mean[flat],
            self.variance[flat],
            self.hit[flat],
            self.ended[index],
            self.compressed[index],
            self.label[index],
            None if self.logits is None else self.logits[index],
            {name: values[index] for name, values in self.features.items()},
        )

    def write(self, path: Path) -> None:
        """Write a parquet table, atomically."""
        offsets = np.concatenate([[0], np.cumsum(self.units)]).astype(np.int32)
        columns: dict[str, Any] = {"record": self.record, "units": self.units}
        for name in UNITS:
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(getattr(self, name)))
        columns |= {n: getattr(self, n) for n in ("ended", "compressed", "label")}
        matrices = {FEATURE + name: values for name, values in self.features.items()}
        if self.logits is not None:
            matrices["logits"] = self.logits
        for name, matrix in matrices.items():
            flat = pa.array(np.ascontiguousarray(matrix).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, matrix.shape[1])
        with written_whole(path) as new:
            pq.write_table(pa.table(columns), new)

    @staticmethod
    def read(path: Path) -> Signals:
        """Read one back."""
        table = pq.read_table(path).combine_chunks()

        def matrix(name: str) -> npt.NDArray[np.float32]:
            flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            return np.asarray(flat, dtype=np.float32).reshape(len(table), -1)

        def flat(name: str) -> npt.NDArray[Any]:
            values = table[name].combine_chunks().flatten()
            return np.asarray(values.to_numpy(zero_copy_only=False))

        return Signals(
            table["record"].to_pylist(),
            table["units"].to_numpy(),
            flat("logprob"),
            flat("mean"),
            flat("variance"),
            flat("hit"),
            table["ended"].to_numpy(),
            table["compressed"].to_numpy(),
            table["label"].to_numpy(),
            matrix("logits") if "logits" in table.column_names else None,
            {
                name.removeprefix(FEATURE): matrix(name)
                for name in table.column_names
                if name.startswith(FEATURE)
            },
        )


def hit_rates(found: Signals) -> Array:
    """Share of argmax hits of each record, without a closing end-of-sequence token, shape (n,)."""
    return np.array([float(row.mean()) for row in found.hits()])


def collect(
    model: nn.Module,
    examples: Encoded,
    run: Run,
    key: bytes,
    phase: str,
    layers: Sequence[str] = (),
) -> Signals:
    """Run ``model`` over ``examples`` once, in eval mode, similar lengths together.

    Several processes share the batches, and all get the whole.

    Logits are computed where they are scored and ``CHUNK`` at a time, so memory does not grow with
    vocabulary times length.

    Args:
        model: on ``run.device``.
        examples: encoded by the task the model belongs to.
        run: device and progress.
        key: of the record hashes.
        phase: what progress is called.
        layers: names of modules whose outputs are kept as features.
    """
    n, task = len(examples), examples.task
    units = np.array([int(examples[i]["units"]) for i in range(n)], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(units)])
    total = int(starts[-1])
    columns: dict[str, npt.NDArray[Any]] = {name: np.zeros(total) for name in UNITS[:3]}
    columns["hit"] = np.zeros(total, dtype=np.bool_)
    ended, label = np.zeros(n, dtype=np.bool_), np.full(n, -1, dtype=np.int64)
    logits: npt.NDArray[np.float32] | None = None
    features: dict[str, npt.NDArray[np.float32]] = {}
    end = getattr(task, "eos", None)
    end = -1 if end is None else end  # no label is negative
    single = bool((units == 1).all()) and task.text(examples.examples[0]) is None

    def measured(indices: list[int]) -> _Measured:
        batch = examples.batch(indices, run.device)
        said = task.predictions(model, batch)
        hidden, head = said.compact, said.head or _itself
        labels = said.labels
        scored = labels != IGNORED
        found = _unit_signals(hidden[scored], labels[scored], head, task.classes)
        last = labels.gather(1, batch["units"].view(-1, 1) - 1)[:, 0]
        rows = {name: task.pooled(output, batch) for name, output in outputs.items()}
        outputs.clear()
        return _Measured(
            indices,
            [values.cpu().numpy() for values in found],
            last.cpu().numpy(),
            head(hidden[:, 0]).float().cpu().numpy() if single else None,
            {name: pooled.float().cpu().numpy() for name, pooled in rows.items()},
        )

    with evaluating(model), _outputs(model, layers) as outputs:
        for found in spread(measured, run.batches(examples, phase)):
            indices = found.indices
            places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in indices])
            for name, values in zip(UNITS, found.units, strict=True):
                columns[name][places] = values
            ended[indices] = found.last == end
            if found.logits is not None:
                label[indices] = found.last
                if logits is None:
                    logits = np.zeros((n, found.logits.shape[1]), np.float32)
                logits[indices] = found.logits
            for name, pooled in found.features.items():
                features.setdefault(name, np.zeros((n, pooled.shape[1]), np.float32))
                features[name][indices] = pooled
    texts = (task.text(examples.examples[i]) for i in range(n))
    compressed = [len(zlib.compress(text.encode())) if text else 0 for text in texts]
    return Signals(
        [h.hex() for h in record_hashes(examples.examples, task.content, key)],
        units,
        columns["logprob"],
        columns["mean"],
        columns["variance"],
        columns["hit"],
        ended,
        np.array(compressed, dtype=np.int64),
        label,
        logits,
        features,
    )


@dataclass(frozen=True)
class _Measured:
    """One batch: numbers per unit in the order of ``UNITS``, and rows per example."""

    indices: list[int]
    units: list[npt.NDArray[Any]]
    last: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32] | None
    features: dict[str, npt.NDArray[np.float32]]


Head = Callable[[Tensor], Tensor]


def _itself(logits: Tensor) -> Tensor:
    return logits


def _unit_signals(
    hidden: Tensor, labels: Tensor, head: Head, classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log p(label), E_p[log p], Var_p[log p], hit) at every scored unit, each of shape (units,).

    The variance is clamped at 0: for a flat distribution rounding can take it below.
    """
    parts = []
    size = max(1, CHUNK // classes)
    for start in range(0, len(labels), size):
        chunk, truth = head(hidden[start : start + size]), labels[start : start + size]
        logs = chunk.to(torch.promote_types(chunk.dtype, torch.float32)).log_softmax(-1)
        hit = logs.argmax(-1) == truth
        logprob = logs.gather(-1, truth[:, None])[:, 0]
        # p log p is 0 where p underflows to 0, also where log p is -inf
        logs.clamp_min_(torch.finfo(logs.dtype).min)
        weighted = logs.exp().mul_(logs)  # in place: memory traffic is what this loop costs
        mean = weighted.sum(-1)
        square = weighted.mul_(logs).sum(-1)
        parts.append((logprob, mean, (square - mean.square()).clamp_min(0), hit))
    a, b, c, d = (torch.cat(column) for column in zip(*parts, strict=True))
    return a.double(), b.double(), c.double(), d


@contextmanager
def _outputs(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The latest output of every named layer, by name, while the block lasts."""
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            kept[name] = output if isinstance(output, Tensor) else output[0]

        return keep

    handles = [model.get_submodule(n).register_forward_hook(keeper(n)) for n in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
