"""Does the memorization audit find what was planted: python benchmarks/duplicates.py

Texts of random words, which nothing but memory can continue, are planted 1, 2, 4, 8, 16 and 32
times among the training data of a small Llama; others of the same kind are held out. The audit,
run as from the command line, must find more extraction with more copies: no group below the one
before it by more than the intervals allow, and a positive slope of the extractable share against
the logarithm of the copies. Also draws docs/duplicates.svg.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import matplotlib as mpl
import torch
from common import publish

from unlearn import demo
from unlearn.evaluations.extractable import Estimate
from unlearn.evaluations.memorization_schema import Memorization
from unlearn.evaluations.memorizing import audit_memorization

FIGURE = Path(__file__).parents[1] / "docs/duplicates.svg"
COPIES = (1, 2, 4, 8, 16, 32)
TEXTS = 40  # of each number of copies, and held out
WORDS, LENGTH = 200, 28
PREFIXES, SUFFIX = (2, 4, 8, 16), 8
EPOCHS = 4


def world(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The training data with its copies, and texts that are held out."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=5)) for _ in range(WORDS)]

    def text() -> dict[str, str]:
        return {"text": " ".join(draw.choices(words, k=LENGTH))}

    planted = [record for copies in COPIES for record in (text() for _ in range(TEXTS))
               for record in [record] * copies]  # fmt: skip
    draw.shuffle(planted)
    return planted, [text() for _ in range(TEXTS)]


def row(share: Estimate, **named: Any) -> dict[str, Any]:
    """A share as a row of the table."""
    span = [round(share.low, 4), round(share.high, 4)]
    return {**named, "texts": share.n, "share": share.value, "from, to": span}


def found(report: Memorization) -> list[dict[str, Any]]:
    """One row for each prefix and number of copies, 0 of them held out, and for each slope."""
    unseen = report.unseen.by_prefix if report.unseen else ()
    groups = [*((r, 0) for r in unseen), *((r, r.most) for r in report.extractable.by_copies)]
    rows = [row(r.share, prefix=r.prefix, copies=n) for r, n in groups if r.share]
    for prefix, slope in report.extractable.slope.items():
        if slope is not None:
            rows.append(row(slope, prefix=prefix, copies="each doubling"))
    return sorted(rows, key=lambda r: r["prefix"])


def lawful(report: Memorization) -> bool:
    """More copies, more extraction, at every prefix."""
    for prefix, slope in report.extractable.slope.items():
        shares = [r.share for r in report.extractable.by_copies if r.prefix == prefix and r.share]
        falls = any(
            later.high < max(before.low for before in shares[:i])
            for i, later in enumerate(shares) if i
        )  # fmt: skip
        if falls or slope is None or slope.low <= 0:
            return False
    return True


def draw(report: Memorization, path: Path) -> None:
    """Extractable share against copies, a line for each prefix."""
    from matplotlib import pyplot as plt

    fixed = {"svg.hashsalt": "duplicates", "svg.fonttype": "none", "font.size": 9}
    with mpl.rc_context(fixed):
        figure, axes = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
        for number, prefix in enumerate(report.extractable.slope):
            rows = [r for r in report.extractable.by_copies if r.prefix == prefix and r.share]
            shares = [r.share for r in rows if r.share]
            x = [float(r.most or 1) * 1.03**number for r in rows]
            spans = [[s.value - s.low for s in shares], [s.high - s.value for s in shares]]
            axes.errorbar(
                x, [s.value for s in shares], yerr=spans, marker="o", markersize=3, linewidth=1.2,
                elinewidth=0.8, color=mpl.colormaps["viridis"](0.15 + 0.22 * number),
                label=f"after {prefix} tokens",
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(COPIES, [str(c) for c in COPIES])
        axes.set(
            ylim=(-0.03, 1.03), xlabel="copies in the training data", ylabel="extractable share"
        )
        axes.grid(color="0.92", linewidth=0.6)
        axes.legend(loc="upper left", fontsize=8)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Plant, train, audit."""
    torch.set_num_threads(1)
    records, unseen = world(seed=0)
    start = perf_counter()
    vocabulary = [{"question": r["text"], "answer": ""} for r in records]
    subject = demo.tiny_llama(vocabulary, seed=0, width=128, depth=2)
    demo.train(subject, records, epochs=EPOCHS, seed=0)
    trained = perf_counter() - start
    with TemporaryDirectory() as folder:
        report = audit_memorization(
            subject, records, holdout=unseen, suffix=SUFFIX,
            prefixes=",".join(map(str, PREFIXES)), match=SUFFIX, generations=100,
            retention_steps=32, out=Path(folder) / "audit",
        )  # fmt: skip
    audited = perf_counter() - start - trained
    rows = found(report)
    now, last = report.recollection, report.retention[-1]
    memory = {
        "recognised among unseen texts": now.foils,
        "recognised beside edits": now.edits,
        "unseen texts beside edits": now.edits_unseen,
        "recalled": now.exact,
        f"recalled after {last.step} steps": last.exact,
        f"recognised beside edits after {last.step} steps": last.edits,
        "generated tokens found": report.verbatim.covered if report.verbatim else None,
    }
    rows += [row(share, measure=name) for name, share in memory.items() if share]
    rows.append({"measure": "law", "holds": lawful(report), "seconds of training": trained,
                 "seconds of the audit": audited})  # fmt: skip
    draw(report, FIGURE)
    columns = ["prefix", "copies", "measure", "texts", "share", "from, to", "holds",
               "seconds of training", "seconds of the audit"]  # fmt: skip
    publish("duplicates", columns, rows)
    if not lawful(report):
        sys.exit("the planted law was not found")


if __name__ == "__main__":
    main()
