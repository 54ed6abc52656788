"""One step against twenty: python benchmarks/sfd_speed.py

A class-conditional diffusion model of digits forgets a class and becomes a one-step generator. The
same pictures are drawn by the original in its usual number of steps, with and without guidance. The
distance is that of Frechet, between 900 pictures of the other classes and the real ones, in the
features of the judge who also tells what is seen; that of other real pictures stands beside it.
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from time import process_time

import torch
from common import publish, ratios

sys.path.insert(0, str(Path(__file__).parent.parent))

import unlearn
from tests import digits
from unlearn.evaluations.imaging import frechet_distance
from unlearn.pipeline import Pipeline

FORGOTTEN, COUNT = 3, 100


def draw(model: Pipeline, steps: int, guidance: float, count: int = COUNT) -> torch.Tensor:
    """Pictures of every digit in turn."""
    labels = [label for label in range(10) for _ in range(count // 10)]
    return model.sample(labels, torch.Generator().manual_seed(0), steps, guidance)


def features(judge: digits.Judge, pictures: torch.Tensor) -> torch.Tensor:
    """What the judge sees, before it decides."""
    with torch.no_grad():
        return judge.body(pictures)


def main() -> None:
    """Train, forget, draw; one row per way to draw."""
    torch.set_num_threads(1)
    judge, before = digits.judge(), digits.trained()
    original = copy.deepcopy(before)
    (x, y), kept_labels = digits.pictures(), [k for k in range(10) if k != FORGOTTEN]
    real, held = (features(judge, part[y_ != FORGOTTEN]) for part, y_ in
                  ((x[:1437], y[:1437]), (x[1437:], y[1437:])))  # fmt: skip
    start = process_time()
    after = unlearn.forget(
        original, method="sfd", forget_classes=str(FORGOTTEN), audit="none",
        sampling={"null_class": digits.NULL},
    ).subject.model  # fmt: skip
    spent = process_time() - start
    rows = []
    for name, model, steps, guidance in (
        ("one step", after, 1, 1.0),
        ("original, 10 steps", before, 10, 1.0),
        ("original, 20 steps", before, 20, 1.0),
        ("original, 20 steps, guidance 2", before, 20, 2.0),
    ):
        way = partial(draw, model, steps, guidance)
        ratio, seconds, _ = ratios(way, partial(draw, after, 1, 1.0), 5)
        hits = [
            digits.hits(model, judge, k, COUNT, steps=steps, guidance=guidance) for k in range(10)
        ]
        kept = [hits[k] for k in kept_labels]
        shown = torch.cat(
            [model.sample([k] * COUNT, torch.Generator().manual_seed(k), steps, guidance)
             for k in kept_labels]
        )  # fmt: skip
        rows.append(
            {
                "drawn by": name,
                "times one step": ratio,
                "pictures per second": COUNT / seconds,
                "forgotten class seen": hits[FORGOTTEN],
                "other classes seen": sum(kept) / len(kept),
                "least of them": min(kept),
                "distance": frechet_distance(features(judge, shown), real),
            }
        )
    rows.append({"drawn by": "nobody: held-out digits", "distance": frechet_distance(held, real)})
    rows[0]["CPU seconds to forget"] = spent
    publish("sfd_speed", list(rows[0]), rows)


if __name__ == "__main__":
    main()
