"""Per-example signals: one forward pass over a set, everything that is computed from it on disk.

Attacks and metrics read these tables and never run the model again. Records are named by keyed
hashes, so a table can be passed on without saying who is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from unlearn.data import record_hashes
from unlearn.run import Run, written_whole
from unlearn.tasks.base import Encoded, evaluating


@dataclass(frozen=True)
class Signals:
    """One row per example, in the order of the set.

    Attributes:
        record: keyed hash of each record, hex.
        nll: negative log-likelihood summed over the example's units, shape (n,), in nats.
        units: number of units, shape (n,).
        hits: per example, whether the argmax was right at each unit; a final end-of-sequence
            token is left out, because every fluent model gets it right.
    """

    record: list[str]
    nll: npt.NDArray[np.float64]
    units: npt.NDArray[np.int64]
    hits: list[list[bool]]

    def __len__(self) -> int:
        return len(self.record)

    def loss(self) -> npt.NDArray[np.float64]:
        """Mean NLL per unit, shape (n,), in nats."""
        return self.nll / self.units

    def write(self, path: Path) -> None:
        """Write a parquet table, atomically."""
        table = pa.table(
            {"record": self.record, "nll": self.nll, "units": self.units, "hits": self.hits}
        )
        with written_whole(path) as new:
            pq.write_table(table, new)

    @staticmethod
    def read(path: Path) -> Signals:
        """Read one back."""
        table = pq.read_table(path)
        return Signals(
            table["record"].to_pylist(),
            table["nll"].to_numpy(),
            table["units"].to_numpy(),
            table["hits"].to_pylist(),
        )


def collect(model: nn.Module, examples: Encoded, run: Run, key: bytes, phase: str) -> Signals:
    """Run ``model`` over ``examples`` once, in eval mode.

    Args:
        model: on ``run.device``.
        examples: encoded by the task the model belongs to.
        run: device and progress.
        key: of the record hashes.
        phase: what progress is called.
    """
    n = len(examples)
    nll = np.zeros(n)
    units = np.zeros(n, dtype=np.int64)
    hits: list[list[bool]] = [[]] * n
    task = examples.task
    end = getattr(task, "eos", None)
    with evaluating(model):
        for indices in run.batches(examples, phase):
            batch = examples.batch(indices, run.device)
            predictions = task.predictions(model, batch)
            nll[indices] = predictions.nll().double().cpu().numpy()
            counts = batch["units"].cpu()
            units[indices] = counts.numpy()
            right, labels = predictions.hits().cpu(), predictions.labels.cpu()
            for row, index in enumerate(indices):
                count = int(counts[row])
                if count > 1 and end is not None and int(labels[row, count - 1]) == end:
                    count -= 1
                hits[index] = right[row, :count].tolist()
    names = [h.hex() for h in record_hashes(examples.examples, task.content, key)]
    return Signals(names, nll, units, hits)
