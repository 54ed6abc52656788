"""SSD on CIFAR-10: python benchmarks/cifar_ssd.py

A ResNet forgets the class cat, and separately its first 5,000 training records, each beside a
model retrained without them. Then ten more records, with the importances the first run kept.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import bench_data, publish

import unlearn

SETS = ("forget", "retain", "holdout_forget", "holdout")


def main() -> None:
    """Three requests, one table of accuracies."""
    root = bench_data()
    models, images = root / "models/cifar10-resnet", root / "data/cifar10"
    rows = []

    def request(name: str, checkpoint: Path, retrained: str | None, out: Path, **what: Any) -> None:
        report = unlearn.forget(
            checkpoint,
            method="ssd",
            holdout=images / "test.parquet",
            retrained=models / retrained if retrained else None,
            out=out,
            **what,
        ).report
        accuracy = {f.subset: f for f in report.findings if f.name == "accuracy"}
        for role in ("original", "unlearned", "retrained"):
            values = {s: getattr(f, role) for s, f in accuracy.items()}
            if any(values.values()):
                cells = {s: v.value for s in SETS if (v := values.get(s))}
                rows.append({"request": name, "model": role, **cells})
        rows[-1]["seconds"] = report.cost.seconds["unlearn"]
        rows[-1]["why"] = " ".join(report.notes)

    train = images / "train.parquet"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        request("cat", models / "full", "without-cat", out / "cat",
                data=train, forget_classes="cat")  # fmt: skip
        request("first 5,000", models / "full", "without-first-5000", out / "records",
                data=train, forget_ids="0:5000")  # fmt: skip
        request("10 more, kept importances", out / "records", None, out / "more",
                data=train, forget_ids="5000:5010")  # fmt: skip
    publish("cifar_ssd", ["request", "model", *SETS, "seconds", "why"], rows)


if __name__ == "__main__":
    main()
