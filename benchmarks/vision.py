"""Every classifier method on CIFAR-10: python benchmarks/vision.py [--setting class] [METHOD ...]

A 6M-parameter ResNet forgets the class cat, or its first 5,000 training records, by every recipe
shipped for it (``unlearn/recipes/*-{class,random}-cifar10-resnet.yaml``) and is held against a
model retrained without them.

Accuracy on the forget set, on 10,000 retain records and on the test images (of the classes that
stay); MIA: share of the forget set that an SVC on the confidence in the true label calls
nonmembers (the "MIA" of Fan et al. 2024); AUC: forget losses against those of test images of the
same kind, one half where they cannot be told apart. Gap: mean of the absolute differences from the
retrained model in the three accuracies and MIA, in points. Time and peak memory are those of the
training alone, in a process of its own (with 50,000 decoded images, 0.6 GiB).

    python benchmarks/vision.py --setting class --try METHOD key=value ...

measures one setting and adds it to ``results/vision_trials.jsonl``: the search behind the recipes.
A setting that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from common import RESULTS, bench_data, publish, setting_of, tried

from unlearn.checkpoint import inspect
from unlearn.evaluations.statistics import auc

RECIPES = Path(__file__).parents[1] / "unlearn/recipes"
TRIALS = RESULTS / "vision_trials.jsonl"
CACHE = Path(os.environ.get("UNLEARN_BENCH_CACHE", tempfile.gettempdir())) / "unlearn-cifar10"
CAT = 3
FORGOTTEN = {"class": {"forget_classes": "cat"}, "random": {"forget_ids": "0:5000"}}
RETRAINED = {"class": "without-cat", "random": "without-first-5000"}
COLUMNS = ["method", "forget", "retain", "test", "MIA", "AUC", "gap", "seconds", "GiB"]
Images = tuple[torch.Tensor, torch.Tensor]
Array = npt.NDArray[np.float64]


def images(name: str) -> Images:
    """Normalised pixels (n, 3, 32, 32) and labels of train or test, decoded once."""
    paths = [CACHE / f"{name}-{part}.npy" for part in ("pixels", "labels")]
    if not all(path.exists() for path in paths):
        import datasets

        rows = datasets.load_dataset(
            "parquet", data_files=str(bench_data() / f"data/cifar10/{name}.parquet"), split="train"
        )
        processor = inspect(bench_data() / "models/cifar10-resnet/full").processor
        pixels = [processor(row["image"], return_tensors="np")["pixel_values"][0] for row in rows]
        CACHE.mkdir(exist_ok=True)
        np.save(paths[0], np.stack(pixels).astype(np.float32))
        np.save(paths[1], np.array(rows["label"]))
    return tuple(torch.from_numpy(np.load(path)) for path in paths)  # type: ignore[return-value]


def train(trial: dict[str, Any], out: Path) -> None:
    """Make the model forget, in this process; prints time and memory of the training."""
    import unlearn

    result = unlearn.forget(
        bench_data() / "models/cifar10-resnet/full",
        method=trial["method"],
        set=trial.get("set", {}),
        data=images("train"),
        audit="none",
        out=out,
        **FORGOTTEN[trial["setting"]],
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    spent = result.outcome.seconds["unlearn"]
    print(json.dumps({"seconds": spent, "GiB": peak, "why": " ".join(result.outcome.notes)}))


@torch.no_grad()
def logits_of(source: Path, pixels: torch.Tensor) -> Array:
    """Logits, shape (n, 10)."""
    task, model = (found := inspect(source)).task, found.load().model
    parts = []
    for part in pixels.split(500):
        batch = {"pixel_values": part, "labels": torch.zeros(len(part), 1, dtype=torch.long)}
        parts.append(task.logits(model, batch)[:, 0].double())
    return np.asarray(torch.cat(parts))


def called_nonmembers(members: Array, nonmembers: Array, forget: Array) -> float:
    """Share of ``forget`` an SVC calls nonmembers by their confidence in the true label.

    Confidences are rounded to 1e-3 and weighted by how often they occur, which changes no decision
    and makes the fit of 20,000 points a matter of a second.
    """
    from sklearn.svm import SVC

    counts = Counter([(round(v, 3), 1) for v in members] + [(round(v, 3), 0) for v in nonmembers])
    values = np.array([value for value, _ in counts])[:, None]
    labels = [label for _, label in counts]
    machine = SVC(C=3, gamma="auto", kernel="rbf")
    machine.fit(values, labels, sample_weight=list(counts.values()))
    return float(1 - machine.predict(forget[:, None]).mean())


def score(name: str, source: Path, setting: str, exact: dict[str, Any] | None) -> dict[str, Any]:
    """The row of one model."""
    pixels, labels = (part.clone() for part in images("train"))
    unseen, truth = images("test")
    gone = labels == CAT if setting == "class" else torch.arange(len(labels)) < 5000
    kept = (~gone).nonzero().flatten()[:10_000]  # stored in random order
    gone_test = truth == CAT if setting == "class" else torch.ones(len(truth), dtype=torch.bool)
    stays = truth != CAT if setting == "class" else gone_test
    sets = {
        "forget": (pixels[gone], labels[gone]),
        "retain": (pixels[kept], labels[kept]),
        "test": (unseen[stays], truth[stays]),
        "like": (unseen[gone_test], truth[gone_test]),
    }
    logits = {key: logits_of(source, x) for key, (x, _) in sets.items()}
    own = {key: z[np.arange(len(z)), sets[key][1].numpy()] for key, z in logits.items()}
    log_p = {key: own[key] - np.logaddexp.reduce(z, 1) for key, z in logits.items()}
    row: dict[str, Any] = {"method": name}
    for key in ("forget", "retain", "test"):
        row[key] = 100 * float((logits[key].argmax(1) == sets[key][1].numpy()).mean())
    p = {key: np.exp(value) for key, value in log_p.items()}
    few = min(len(p["retain"]), len(p["test"]))
    row["MIA"] = 100 * called_nonmembers(p["retain"][:few], p["test"][:few], p["forget"])
    row["AUC"] = auc(log_p["forget"], log_p["like"])
    compared = ("forget", "retain", "test", "MIA")
    row["gap"] = float(np.mean([abs(row[k] - exact[k]) for k in compared])) if exact else 0.0
    return row


def outcome(trial: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    """The row of a setting, measured unless it is known."""

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [sys.executable, __file__, "--train", json.dumps(trial), "--out", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return {"method": trial["method"], "why": done.stderr.strip().splitlines()[-1]}
            found = score(trial["method"], out, trial["setting"], exact)
            return found | json.loads(done.stdout.splitlines()[-1])

    return tried(TRIALS, trial, measure)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--setting", choices=list(FORGOTTEN), default="class")
    parser.add_argument("--try", dest="tried", action="store_true")
    parser.add_argument("--train")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.train:
        train(json.loads(given.train), given.out)
        return
    models, setting = bench_data() / "models/cifar10-resnet", given.setting
    exact = score("retrained", models / RETRAINED[setting], setting, None)
    if given.tried:
        method, values = setting_of(given.methods)
        print(json.dumps(outcome({"method": method, "set": values, "setting": setting}, exact)))
        return
    rows = [score("original", models / "full", setting, exact), exact]
    for recipe in sorted(RECIPES.glob(f"*-{setting}-cifar10-resnet.yaml")):
        chosen = yaml.safe_load(recipe.read_text())
        if not given.methods or chosen["method"] in given.methods:
            trial = {"method": chosen["method"], "set": chosen.get("set", {}), "setting": setting}
            rows.append(outcome(trial, exact))
    publish(f"vision_{setting}", COLUMNS, rows)


if __name__ == "__main__":
    main()
