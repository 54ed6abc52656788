"""Eight ways to look for what is left, on TOFU: python benchmarks/robustness.py

The 9M-parameter Llama that memorised TOFU, made to forget forget10 by npo (the shipped recipe) and
made to refuse (idk_nll: it learns to answer that it does not know), each audited deeply without
shadow models beside the model trained without forget10. One line per search: what it finds in the
original, the retrained and either model, and the verdict the criteria give. Questions are put into
Spanish, word by word, by ``glossary.py``; neighbouring topics are other fictitious authors.

A search discriminates if the lower bound of original less retrained lies above zero.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import yaml
from common import bench_data, publish
from glossary import translate

import unlearn
from unlearn.evaluations import audit

RECIPES = Path(__file__).parents[1] / "unlearn/recipes"
MADE = {"npo": "npo", "refusing": "idk_nll"}
GROUPS = ("robustness", "durability")
COLUMNS = ["search", "n", "original", "retrained", "discriminates", "npo", "refusing",
           "npo verdict", "refusing verdict"]  # fmt: skip


def forgetful(name: str, folder: Path) -> Path:
    """The model made to forget by this method's recipe; made once per folder."""
    root, out = bench_data(), folder / f"tofu-{name}"
    if not out.exists():
        recipe = yaml.safe_load((RECIPES / f"{MADE[name]}-tofu-llama-9m.yaml").read_text())
        unlearn.forget(
            root / "models/tofu-llama-9m/full", method=recipe["method"], set=recipe["set"],
            forget=root / "data/tofu/forget10.json", retain=root / "data/tofu/retain90.json",
            audit="none", out=out,
        )  # fmt: skip
    return out


def json_lines(file: Path) -> list[dict[str, Any]]:
    """The records of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def examined(unlearned: Path, folder: Path) -> Any:
    """The report of a deep audit without shadow models."""
    root = bench_data()
    models, texts = root / "models/tofu-llama-9m", root / "data/tofu"
    return audit(
        models / "full", unlearned, retrained=models / "retain90",
        forget=texts / "forget10_perturbed.json", retain=texts / "retain_perturbed.json",
        neighbours=json_lines(texts / "retain90.json")[:200], translator=translate,
        audit="deep", shadows=0, out=folder / f"{unlearned.name}-audit",
    )  # fmt: skip


def main() -> None:
    """Make, audit, print."""
    kept = os.environ.get("UNLEARN_BENCH_CACHE") or (sys.argv[1] if sys.argv[1:] else mkdtemp())
    folder = Path(kept)
    reports = {name: examined(forgetful(name, folder), Path(mkdtemp())) for name in MADE}
    rows: dict[str, dict[str, Any]] = {}
    for name, report in reports.items():
        for finding in report.findings:
            if finding.group not in GROUPS and finding.name != "side_effects":
                continue
            row = rows.setdefault(finding.name, {"search": finding.name, "n": finding.n})
            for role in ("original", "retrained"):
                value = getattr(finding, role)
                row[role] = value.value if value else None
            row[name] = finding.unlearned.value if finding.unlearned else None
            row[f"{name} verdict"] = finding.verdict
            if finding.original and finding.retrained and finding.original.interval:
                low, high = finding.original.interval.low, finding.retrained.interval.high
                row["discriminates"] = low > high
    publish("robustness", COLUMNS, list(rows.values()))


if __name__ == "__main__":
    main()
