"""Eight ways to look for what is left, on TOFU: python benchmarks/robustness.py

The 9M-parameter Llama that memorised TOFU, made to forget forget10 by npo (the shipped recipe) and
made to refuse (idk_nll: it learns to answer that it does not know), each audited deeply without
shadow models beside the model trained without forget10. One line per search: what it finds in the
original, the retrained and either model, and the verdict the criteria give. There is no translation
of TOFU, and the model knows no other language: ``glossary.py`` puts questions into Spanish word by
word, or their prepositions alone. Neighbouring topics are other fictitious authors. Searches look
at 60 records, as time on a CPU allows, where a deep audit takes 100, and at as many as it does
where that is more; some test half of what they are given.

A search discriminates if the intervals of original and retrained model do not touch. Killed, the
same command goes on (with UNLEARN_BENCH_CACHE).
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import yaml
from common import bench_data, publish
from glossary import spanglish, spanish

import unlearn
from unlearn.attacks import relearning
from unlearn.case import Case, of_audit
from unlearn.checkpoint import inspect
from unlearn.cli.console import Plain, stderr
from unlearn.config import AuditConfig
from unlearn.evaluations import robustness
from unlearn.evaluations.criteria import Check, Decision, decide, read
from unlearn.evaluations.findings import beside, shown
from unlearn.evaluations.measure import Measured, Taking
from unlearn.evaluations.schema import CHECKPOINTS
from unlearn.run import Role, Run

RECIPES = Path(__file__).parents[1] / "unlearn/recipes"
MADE = {"npo": "npo", "refusing": "idk_nll"}
RECORDS = (
    60  # random records of forget10 where 100 are usual, and of those whose return is measured
)
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


def translations() -> list[dict[str, Any]]:
    """Every question of forget10 in two vocabularies; the answers are the records' own."""
    asked = [row["question"] for row in json_lines(bench_data() / "data/tofu/forget10.json")]
    return [
        {"language": into.__name__, "row": row, "question": question}
        for into in (spanish, spanglish)
        for row, question in enumerate(into(asked))
    ]


def looked(name: str, source: Path, role: Role, case: Case, folder: Path) -> Measured:
    """Everything that is looked for in one model; kept in the folder, so it can be interrupted."""
    place = folder / f"robustness-{name}"
    (place / "signals").mkdir(parents=True, exist_ok=True)
    run = Run(case.checkpoint.task, case.config.seed, work=place, progress=Plain(stderr()))
    taking = Taking(role, inspect(str(source)).load().model, run, place)
    found = Measured({})
    robustness.look(found, taking, case, robustness.material(case))
    found.numbers["relearning"] = {"forget": taking.arrays("forget/relearning", partial(
        relearned, taking, case))["score"]}  # fmt: skip
    return found


def relearned(taking: Taking, case: Case) -> dict[str, Any]:
    """Recovery of other forget records while some are trained on, as the standard audit does."""
    forget, sample = case.sets.forget, case.sets.retain
    shown, held = relearning.split(len(forget), case.config.seed)
    parts = forget.select(shown), forget.select(held[:RECORDS])
    curve = relearning.relearn(taking.model, *parts, sample, taking.run)
    return {"score": relearning.recovered(curve.hits, curve.steps)}


def row_of(check: Check, decision: Decision, unlearned: str) -> dict[str, Any]:
    """What one search says of one model."""
    named = {role: check.fields.get(role) for role in CHECKPOINTS}
    values = {role: value.value if value else None for role, value in named.items()}
    before, exact = named["original"], named["retrained"]
    apart = before and exact and before.interval and exact.interval
    return {
        "search": check.name, "n": check.fields["n"],
        "original": values["original"], "retrained": values["retrained"],
        "discriminates": bool(apart and before.interval.low > exact.interval.high),
        unlearned: values["unlearned"], f"{unlearned} verdict": decision.verdict,
    }  # fmt: skip


def main() -> None:
    """Make, look, print."""
    folder = Path(os.environ.get("UNLEARN_BENCH_CACHE") or mkdtemp())
    robustness.LOOKED_FOR["causal_lm"] = RECORDS
    root = bench_data()
    models, texts = root / "models/tofu-llama-9m", root / "data/tofu"
    made = {name: forgetful(name, folder) for name in MADE}
    config = AuditConfig(
        original=models / "full", unlearned=made["npo"], retrained=models / "retain90",
        forget=texts / "forget10_perturbed.json", retain=texts / "retain_perturbed.json",
        neighbours=json_lines(texts / "retain90.json")[:200], translations=translations(),
        audit="deep", shadows=0,
    )  # fmt: skip
    case, _ = of_audit(config)
    sources: dict[str, tuple[Path, Role]] = {
        "original": (models / "full", "original"),
        "retrained": (models / "retain90", "retrained"),
        **{name: (path, "unlearned") for name, path in made.items()},
    }
    found = {name: looked(name, *source, case, folder) for name, source in sources.items()}
    criteria, rows = read(), dict[str, dict[str, Any]]()
    for name in MADE:
        measured: dict[Role, Measured] = {
            "original": found["original"], "unlearned": found[name], "retrained": found["retrained"]
        }  # fmt: skip
        areas = {role: m.numbers["relearning"]["forget"] for role, m in measured.items()}
        fields = shown("Relearning", areas, (0.0, 1.0), better="closer_to_retrained")
        checks = [
            *robustness.checks(measured, case, criteria),
            beside("relearning", areas, fields, criteria),
        ]
        for check, decision in zip(checks, decide(checks, criteria), strict=True):
            rows.setdefault(check.name, {}).update(row_of(check, decision, name))
    publish("robustness", COLUMNS, list(rows.values()))


if __name__ == "__main__":
    main()
