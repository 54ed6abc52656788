"""Every language-model method on TOFU: python benchmarks/tofu.py [--split forget10] [METHOD ...]

The 9M-parameter Llama that memorised TOFU forgets a split by every recipe shipped for it
(``unlearn/recipes/*-tofu-llama-9m.yaml``) and is held against a model trained without forget10.
That model never saw forget01 and forget05 either, so it is the reference for all three splits; it
also lacks the rest of forget10, which no set measured here contains.

Forget quality: p of the exact KS test on truth ratios. Utility: harmonic mean of nine numbers.
Privacy: AUC of the forget answers' Min-20% scores over the retrained model's; one half is the value
to reach. Extraction strength on the forget set and on retain records, and once more after the
weights went through 8 and 4 bits. Relearning: mean area under the curve of argmax hits on 64 forget
records while 64 others are trained on for 16 steps, the better of two learning rates. Time and
peak memory are those of the training alone, in a process of its own. Retain numbers are from 100
records, ROUGE from 40 answers a set.

    python benchmarks/tofu.py --try METHOD key=value ...

measures one setting and adds it to ``results/tofu_trials.jsonl``: the search behind the recipes.
A setting that is there is not measured again. The plot shows all of them. ``--known`` trains
nothing: the table is of what was measured so far, with gaps where a column is newer than a row.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import yaml
from common import RESULTS, bench_data, publish, setting_of, trials, tried
from tofu_audit import against_retrained, extraction, measured, sets_of, utility

from unlearn.attacks import relearning
from unlearn.attacks.quantization import quantize
from unlearn.attacks.signals import collect
from unlearn.checkpoint import inspect
from unlearn.evaluations.findings import truth_ratios
from unlearn.evaluations.measure import Measured
from unlearn.evaluations.memorization import forget_quality, model_utility
from unlearn.run import Run
from unlearn.tasks.base import Encoded

RECIPES = Path(__file__).parents[1] / "unlearn/recipes"
TRIALS = RESULTS / "tofu_trials.jsonl"
PLOT = Path(__file__).parents[1] / "docs/tofu-pareto.svg"
RETAINED = 100  # of the 400 retain records TOFU measures by
HELD, STEPS = 64, (0, 1, 2, 4, 8, 16)  # of relearning: records, and when they are measured
ASKED = 40  # prompts per set whose answers are generated, for ROUGE
COLUMNS = [
    "method", "forget quality", "utility", "of original", "extraction", "8 bit", "4 bit",
    "relearning", "retain extraction", "retain, 4 bit", "privacy", "seconds", "GiB",
]  # fmt: skip


def settings_of(recipe: Path) -> dict[str, Any]:
    """Method, scope and hyperparameters of a shipped recipe."""
    return dict(yaml.safe_load(recipe.read_text()))


def train(trial: dict[str, Any], out: Path) -> None:
    """Make the model forget, in this process; prints time and memory of the training."""
    import unlearn

    root = bench_data()
    start = perf_counter()
    result = unlearn.forget(
        root / "models/tofu-llama-9m/full",
        method=trial["method"],
        set=trial.get("set", {}),
        forget=root / f"data/tofu/{trial['split']}.json",
        retain=root / f"data/tofu/retain{100 - int(trial['split'][-2:])}.json",
        audit="none",
        out=out,
    )  # fmt: skip
    spent = result.outcome.seconds.get("unlearn", perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": spent, "GiB": peak}))


def score(name: str, source: Path, split: str, exact: Any) -> tuple[dict[str, Any], Any]:
    """The row of one model, and what was measured on it."""
    task = inspect(str(source)).task
    sets = sets_of(split, task)
    sets["retain"] = sets["retain"].sample(RETAINED, seed=0)
    shown = measured(source, sets, Run(task), ASKED)
    exact = exact or shown
    quality = forget_quality(truth_ratios(shown, "forget"), truth_ratios(exact, "forget"))
    forget, retain = sets["forget"], sets["retain"]
    return {
        "method": name,
        "forget quality": quality,
        "utility": model_utility(list(utility(shown).values())),
        "extraction": extraction(shown).value,
        "retain extraction": extraction(shown, "retain").value,
        "privacy": against_retrained(shown, exact, 0.2).value,
        "8 bit": after_rounding(source, forget, 8),
        "4 bit": after_rounding(source, forget, 4),
        "retain, 4 bit": after_rounding(source, retain, 4),
        "relearning": after_relearning(source, forget, retain),
        "forget loss": float(shown.signals["forget"].loss().mean()),
        "nine": utility(shown),
    }, shown


def after_rounding(source: Path, part: Encoded, bits: int) -> float:
    """Extraction strength once the weights have been through few bits: what comes back."""
    model = inspect(str(source)).load().model
    quantize(model, part.task, bits)
    seen = {"forget": collect(model, part, Run(part.task), b"", "rounded")}
    return extraction(Measured(seen)).value


def after_relearning(source: Path, forget: Encoded, retain: Encoded) -> float:
    """How much of the other forget records comes back when some are trained on."""
    shown, held = relearning.split(len(forget), seed=0)
    parts = forget.select(shown), forget.select(held[:HELD])
    model = inspect(str(source)).load().model
    curve = relearning.relearn(model, *parts, retain, Run(forget.task), steps=STEPS)
    return float(relearning.recovered(curve.hits, curve.steps).mean())


def outcome(trial: dict[str, Any], exact: Any) -> dict[str, Any]:
    """The row of a setting, measured unless it is known."""

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [sys.executable, __file__, "--train", json.dumps(trial), "--out", str(out)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                return {"method": trial["method"], "failed": done.returncode}
            row, _ = score(trial["method"], out, trial["split"], exact)
            return row | json.loads(done.stdout.splitlines()[-1])

    return tried(TRIALS, trial, measure, "relearning")


def plot(rows: list[dict[str, Any]], marked: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    """Forget quality against utility, every setting a dot, the recipes named."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tofu"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    floor = 1e-30
    for row in rows:
        axes.plot(row["utility"], max(row["forget quality"], floor), ".", color="#bbbbbb")
    for number, row in enumerate(sorted(marked, key=lambda row: row["forget quality"])):
        at = (row["utility"], max(row["forget quality"], floor))
        axes.plot(*at, "o")
        to_left = number % 2 == 0  # neighbours in quality are named on different sides
        axes.annotate(
            row["method"], at, fontsize=7, xytext=(-5 if to_left else 5, 3),
            textcoords="offset points", ha="right" if to_left else "left",
        )  # fmt: skip
    axes.axhline(0.05, lw=0.6, color="k", ls=":")
    axes.axvline(0.95 * whole["utility"], lw=0.6, color="k", ls=":")
    axes.set(xlabel="model utility", ylabel="forget quality (p)", yscale="log")
    figure.savefig(PLOT, metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--split", default="forget10")
    parser.add_argument("--try", dest="tried", action="store_true")
    parser.add_argument("--known", action="store_true")
    parser.add_argument("--train")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.train:
        train(json.loads(given.train), given.out)
        return
    models = bench_data() / "models/tofu-llama-9m"
    retrained, exact = score("retrained", models / "retain90", given.split, None)
    if given.tried:
        method, values = setting_of(given.methods)
        row = outcome({"method": method, "set": values, "split": given.split}, exact)
        print(json.dumps({k: v for k, v in row.items() if k != "nine"}))
        return
    original, _ = score("original", models / "full", given.split, exact)
    rows = [original, retrained]
    for recipe in sorted(RECIPES.glob("*-tofu-llama-9m.yaml")):
        chosen = settings_of(recipe)
        name = recipe.name.removesuffix("-tofu-llama-9m.yaml")
        if not given.methods or name in given.methods:
            trial = {"method": chosen["method"], "set": chosen["set"], "split": given.split}
            known = [row for row in trials(TRIALS) if row["trial"] == trial]
            if known or not given.known:
                row = known[-1] if given.known else outcome(trial, exact)
                rows.append({**row, "method": name})
    for row in rows:
        row["of original"] = row["utility"] / original["utility"] if "utility" in row else None
    publish(f"tofu_{given.split}", COLUMNS, rows)
    if given.split == "forget10":
        every = [r for r in trials(TRIALS) if r["trial"]["split"] == "forget10" and "utility" in r]
        plot(every, rows, original)


if __name__ == "__main__":
    main()
