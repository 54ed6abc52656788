"""Continual forgetting on MNIST: OMP_NUM_THREADS=1 python benchmarks/gs_lora.py

A small vision transformer (four blocks of width 64), trained on the first 10,000 digits, forgets
two classes at once, and from the same start one class after another in four requests, each on the
run directory of the last. Then two classes at once with only 4 retain records of every class.
Accuracies are on the 10,000 test images, in percent: of the classes that stay (Acc_r), of those
that this request names (Acc_f) and of those that earlier ones did (Acc_o); Drop = Acc_f before less
Acc_f; H = harmonic mean of Drop and Acc_r. A group of adapters counts as zero if the weights of its
block are bit for bit those before.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from common import bench_data, publish
from PIL import Image
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import unlearn
from unlearn.data import load
from unlearn.evaluations.continual import h_mean
from unlearn.interface import Subject
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification
from unlearn.training import Term, Training, descend, likelihood

TRAINED = 10_000
TASK = Classification(10)
TRAINING = Training(
    lr=2e-3, epochs=12, batch_size=100, micro_batch_size=100, schedule="cosine", warmup=0.1
)
SETTINGS: dict[str, Any] = {"epochs": 6, "micro_batch_size": 48}
METHODS = ("gs_lora", "gs_lora_pp")
COLUMNS = [
    "request", "method", "forgets", "acc_r before", "acc_r", "acc_f before", "acc_f", "acc_o",
    "drop", "h_mean", "zero groups", "seconds",
]  # fmt: skip
Digits = tuple[Tensor, Tensor]


def digits(split: str, count: int | None = None) -> Digits:
    """The first images in [0, 1], shape (n, 1, 28, 28), and their labels."""
    table = pq.read_table(bench_data() / "data/mnist" / f"{split}.parquet").slice(0, count)
    pictures = (Image.open(io.BytesIO(row["bytes"])) for row in table["image"].to_pylist())
    images = np.stack([np.asarray(picture.convert("L")) for picture in pictures])
    return torch.from_numpy(images)[:, None] / 255, torch.tensor(table["label"].to_pylist())


def without(data: Digits, classes: list[int]) -> Digits:
    """All records but those of these classes."""
    kept = ~torch.isin(data[1], torch.tensor(classes))
    return data[0][kept], data[1][kept]


def trained(data: Digits, folder: Path) -> Path:
    """A checkpoint of the transformer, trained from scratch."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=28, patch_size=7, num_channels=1, hidden_size=64, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=256, num_labels=10,
    )  # fmt: skip
    term = Term("train", Encoded(load(data, "train"), TASK), likelihood, "example")
    subject = Subject(ViTForImageClassification(config))
    model = descend(subject, [term], TRAINING, Run(TASK), dropout=True).model
    model.save_pretrained(folder)  # type: ignore[operator]
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def accuracies(model: nn.Module, test: Digits) -> Tensor:
    """Percent of every class's test images that the model knows, shape (10,)."""
    with torch.no_grad():
        parts = [model(pixel_values=part).logits.argmax(1) for part in test[0].split(1000)]
    right = (torch.cat(parts) == test[1]).double()
    return torch.stack([100 * right[test[1] == c].mean() for c in range(10)])


def zero_groups(before: dict[str, Tensor], after: dict[str, Tensor], run: Path) -> str:
    """How many blocks are as they were; asserts that nothing but feed-forward layers moved."""
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name for name in before if ".mlp." in name and name.endswith(".weight")}
    assert moved <= adapted, "a parameter without adapters moved"
    blocks = {name.split(".mlp.")[0] for name in adapted}
    still = blocks - {name.split(".mlp.")[0] for name in moved}
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (norms,) = (event["norms"] for event in events if event["event"] == "groups")
    assert still == {block for block, norm in norms.items() if norm == 0}, "zero is not zero"
    return f"{len(still)} / {len(blocks)}"


def series(
    name: str, method: str, start: Path, steps: list[list[int]], train: Digits, test: Digits,
    folder: Path, **settings: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per request; each goes on from the run directory of the one before."""
    rows: list[dict[str, Any]] = []
    model = ViTForImageClassification.from_pretrained(start).eval()
    known, weights = accuracies(model, test), model.state_dict()
    checkpoint, gone = start, []
    for number, forgets in enumerate(steps):
        out = folder / f"{name}-{method}-{number}"
        result = unlearn.forget(
            checkpoint, method=method, data=without(train, gone),
            forget_classes=",".join(map(str, forgets)), set={**SETTINGS, **settings},
            audit="none", out=out,
        )  # fmt: skip
        now, after = accuracies(result.subject.model, test), result.subject.model.state_dict()
        stays = [c for c in range(10) if c not in (*gone, *forgets)]
        drop = float((known - now)[forgets].mean())
        rows.append({
            "request": f"{name} {number + 1}", "method": method,
            "forgets": ",".join(map(str, forgets)),
            "acc_r before": float(known[stays].mean()), "acc_r": float(now[stays].mean()),
            "acc_f before": float(known[forgets].mean()), "acc_f": float(now[forgets].mean()),
            "acc_o": float(now[gone].mean()) if gone else "", "drop": drop,
            "h_mean": h_mean(drop, float(now[stays].mean())),
            "zero groups": zero_groups(weights, after, out),
            "seconds": result.outcome.seconds["unlearn"],
        })  # fmt: skip
        known, weights = now, {key: value.clone() for key, value in after.items()}
        checkpoint, gone = out, [*gone, *forgets]
    return rows


def main() -> None:
    """One row per request."""
    train, test = digits("train", TRAINED), digits("test")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = perf_counter()
        start = trained(train, folder / "start")
        print(f"trained in {perf_counter() - began:.0f} s")
        rows = []
        for method in METHODS:
            common = (method, start)
            rows += series("single", *common, [[3, 8]], train, test, folder)
            rows += series("series", *common, [[3], [8], [0], [5]], train, test, folder)
            rows += series("4 shots", *common, [[3, 8]], train, test, folder, shots=4)
    publish("gs_lora", COLUMNS, rows)


if __name__ == "__main__":
    main()
