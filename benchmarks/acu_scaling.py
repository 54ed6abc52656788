"""What exact forgetting in the output layer costs: python benchmarks/acu_scaling.py

A request takes ten records back and asks for the new layer; its time is the mean over a hundred,
the factorisations that fall due among them included, in processor seconds (run it with
OMP_NUM_THREADS=1 where cores are shared). Features are Gaussian, but for the last row:
those of CIFAR-10 images in front of the shared ResNet's output layer, where after a hundred
requests (one or more records, or a class) the layer is compared with one fitted to what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import process_time
from typing import Any

import numpy as np
import torch
from common import bench_data, publish
from torch import Tensor

from unlearn.analytic import Ridge
from unlearn.config import RunConfig, configure
from unlearn.methods.acu import Head, labels_of
from unlearn.plan import plan
from unlearn.run import Run

GAMMA, RECORDS, REQUESTS, IMAGES = 0.1, 10, 100, 6000


def gaussian(n: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Rows around a centre per class, and labels."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=draw)
    centres = torch.randn(classes, width, generator=draw, dtype=torch.float64)
    return centres[labels] + torch.randn(n, width, generator=draw, dtype=torch.float64), labels


def request_seconds(n: int, width: int, classes: int) -> tuple[float, Ridge, Tensor, Tensor]:
    """Mean seconds of a request after ``n`` records, and what it leaves."""
    rows, labels = gaussian(n, width, classes)
    ridge = Ridge.empty(width, classes, GAMMA)
    for start in range(0, n, 4096):
        ridge.learn(rows[start : start + 4096], labels[start : start + 4096])
    ridge.weights()
    count = min(REQUESTS, max(3, 60_000 // width))  # at least one factorisation falls due
    start_time = process_time()
    for i in range(count):
        going = slice(i * RECORDS, (i + 1) * RECORDS)
        ridge.forget(rows[going], labels[going])
        ridge.weights()
    spent = (process_time() - start_time) / count
    return spent, ridge, rows[count * RECORDS :], labels[count * RECORDS :]


def refit(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Ridge regression from scratch on cached features: sums, one Cholesky factor, one solve."""
    x = rows.numpy()
    gram = torch.from_numpy(x.T @ x)  # numpy uses that it is symmetric: half the work
    cross = gram.new_zeros(classes, len(gram)).index_add_(0, labels, rows).T
    gram.diagonal().add_(GAMMA)
    return torch.cholesky_solve(cross, torch.linalg.cholesky(gram))


def error(ridge: Ridge, wanted: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((ridge.weights() - wanted).norm() / wanted.norm())


def cifar_features() -> tuple[Tensor, Tensor]:
    """Inputs of the output layer with a constant 1, and labels, of the first training images."""
    root = bench_data()
    planned = plan(
        configure(
            RunConfig,
            checkpoint=root / "models/cifar10-resnet/full",
            method="acu",
            data=root / "data/cifar10/train.parquet",
            forget_ids=f"0:{IMAGES}",
        )
    )
    run, images = Run(planned.checkpoint.task), planned.sets.forget
    head = Head.of(planned.checkpoint.load().model.eval(), run)
    parts = [
        (head.design(features), labels_of(images, indices, run.device))
        for indices, features in head.passes(images, "features")
    ]
    rows, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    return rows, labels


def mixed_requests(labels: Tensor) -> Iterator[Tensor]:
    """Indices of a hundred requests: single records, handfuls, and now and then a class."""
    draw = np.random.default_rng(0)
    left = np.arange(len(labels))
    for number in range(REQUESTS):
        if number % 25 == 24:
            known = labels[torch.from_numpy(left)].numpy()
            chosen = known == draw.choice(np.unique(known))
        else:
            chosen = np.zeros(len(left), bool)
            chosen[draw.choice(len(left), draw.choice([1, 3, 10, 30]), replace=False)] = True
        yield torch.from_numpy(left[chosen])
        left = left[~chosen]


def cifar_row() -> dict[str, Any]:
    rows, labels = cifar_features()
    ridge = Ridge.empty(rows.shape[1], 10, GAMMA)
    ridge.learn(rows, labels)
    ridge.weights()
    left = torch.ones(len(rows), dtype=torch.bool)
    worst, spent = 0.0, 0.0
    for going in mixed_requests(labels):
        left[going] = False
        start = process_time()
        ridge.forget(rows[going], labels[going])
        ridge.weights()
        spent += process_time() - start
        worst = max(worst, error(ridge, refit(rows[left], labels[left], 10)))
    return {
        "what": "CIFAR-10 features, 100 requests, 4 of them classes", "seen": len(rows),
        "width": rows.shape[1], "classes": 10, "request ms": spent / REQUESTS * 1e3,
        "worst error": worst, "left": int(left.sum()),
    }  # fmt: skip


def main() -> None:
    """Flat in records, quadratic in width; against refitting; and exact on real features."""
    request_seconds(1000, 128, 10)  # warm up
    rows: list[dict[str, Any]] = []
    for what, n, width, classes in (
        ("records seen", 5_000, 512, 10),
        ("records seen", 50_000, 512, 10),
        ("width", 10_000, 128, 10),
        ("width", 10_000, 512, 10),
        ("width", 10_000, 2048, 10),
        ("width", 10_000, 128, 100),
        ("width", 10_000, 512, 100),
        ("width", 10_000, 2048, 100),
    ):
        spent, ridge, remaining, labels = request_seconds(n, width, classes)
        row: dict[str, Any] = {
            "what": what, "seen": n, "width": width, "classes": classes, "request ms": spent * 1e3,
        }  # fmt: skip
        if n == 50_000:
            wanted, again = refit(remaining, labels, classes), float("inf")
            for _ in range(3):  # the fastest of three, after one to warm up
                started = process_time()
                refit(remaining, labels, classes)
                again = min(again, process_time() - started)
            row |= {"refit ms": again * 1e3, "refit / request": again / spent}
            row["worst error"] = error(ridge, wanted)
        rows.append(row)
    rows.append(cifar_row())
    columns = ["what", "seen", "width", "classes", "request ms", "refit ms", "refit / request"]
    publish("acu_scaling", [*columns, "worst error", "left"], rows)


if __name__ == "__main__":
    main()
