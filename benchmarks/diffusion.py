"""Every method for diffusion models: python benchmarks/diffusion.py [METHOD ...]

Two worlds: a class-conditional model of 8x8 digits, trained on the spot, that forgets the digit 3,
and a text-to-image pipeline of coloured shapes (kept in tests/artefacts, trained from scratch by
``python -m tests.shapes``; ``--train`` does it again) that forgets discs in favour of boxes. A
judge trained on the same data tells what pictures show.

UA: share of the pictures asked for by what was forgotten that do not show it; kept: share of the
others that show what was asked; quality: the judge's mean confidence in the former (a broken
picture is no success); distance: Frechet distance of the latter to those of the original, in the
judge's features; after attack: the highest share that shows the forgotten again, asked with the
original's condition or with one found by descent (attacks/concept_search.py). Grids of samples
are written to docs/diffusion-*.png.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import publish
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import unlearn  # noqa: E402
from tests import digits, shapes  # noqa: E402
from unlearn.attacks import concept_search  # noqa: E402
from unlearn.checkpoint import inspect  # noqa: E402
from unlearn.evaluations.imaging import frechet_distance  # noqa: E402
from unlearn.pipeline import Pipeline, read  # noqa: E402

FORGOTTEN, CONCEPT, ANCHOR = 3, "disc", "box"
COLUMNS = ["world", "method", "UA", "kept", "quality", "distance", "after attack", "steps",
           "seconds"]  # fmt: skip
Settings = dict[str, Any]
ADAM: Settings = {"optimizer": "adamw", "weight_decay": 0.0, "batch_size": 16}
CONTEXTS = "|".join(f"a {colour} {{}}" for colour in shapes.COLOURS)
TEMPLATES = CONTEXTS.replace("|", ",")
GUIDANCE, STEPS, IMAGES = 2.0, 10, 32

ON_DIGITS: dict[str, Settings] = {
    "swap_class": {},
    "sfd": {"steps": 60},
    "esd": {},
    "concept_ablation": {},
    "doco": {"lr": 5e-4, "retain_weight": 3},
    "erase_diff": {"lr": 1e-3, "epochs": 4, "batch_size": 16},
    "selective_amnesia": {},
    "salun": {**ADAM, "lr": 1e-3, "epochs": 5},
    "npo": {**ADAM, "lr": 1e-3, "epochs": 10, "beta": 2, "retain_weight": 2},
    "grad_diff": {**ADAM, "lr": 5e-4, "epochs": 3, "retain_weight": 2},
    "random_label": {**ADAM, "lr": 1e-3, "epochs": 5},
    "amnesiac": {**ADAM, "lr": 1e-3, "epochs": 2},
    "ssd": {},
}
BANKED: Settings = {"contexts": CONTEXTS, "pictures": 32, "sampling_steps": 8}
ON_SHAPES: dict[str, Settings] = {
    "uce": {"templates": TEMPLATES},
    "rece": {"templates": TEMPLATES},
    "esd": {**BANKED, "epochs": 4, "lr": 3e-3, "retain_weight": 4},
    "concept_ablation": {**BANKED, "epochs": 4, "lr": 1e-2, "retain_weight": 2},
    "doco": {**BANKED, "lr": 2e-3, "retain_weight": 2},
    "few_shot_text": {"lr": 1e-3, "epochs": 40, "batch_size": 8, "templates": TEMPLATES},
    "sfd": {
        "steps": 60, "batch_size": 12, "forget_rows": 4, "forget_weight": 1, "alpha": 1,
        "lr": 1e-3, "fake_lr": 2e-3, "guidance": 2, "average": 0.9, "templates": CONTEXTS,
    },
}  # fmt: skip
NEEDS_DATA = {"erase_diff", "salun", "npo", "grad_diff", "random_label", "amnesiac", "ssd"}


def drawn(model: Pipeline, asked: list[Any]) -> Tensor:
    """Pictures, from noise that is the same for every model."""
    generator = torch.Generator().manual_seed(0)
    return model.sample(asked, generator, STEPS, GUIDANCE)


def judged(judge: nn.Module, pictures: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities of digits or shapes, features), by the judge."""
    with torch.no_grad():
        features = judge.body(pictures)  # type: ignore[operator]
        head = judge.head if isinstance(judge, digits.Judge) else judge.shape
        logits = head(features)  # type: ignore[operator]
    return logits.softmax(1).numpy(), features.numpy()


class World:
    """A trained pipeline, its judge, and what is asked of both."""

    def __init__(self, name: str, start: Path, judge: nn.Module, asked: list[Any],
                 truth: list[int], forgotten: int, request: Settings) -> None:  # fmt: skip
        self.name, self.start, self.judge = name, start, judge
        self.asked, self.truth = asked, np.array(truth)
        self.gone, self.request = self.truth == forgotten, request
        self.forgotten = forgotten
        self.original = read(start, torch.float32)
        self.before = judged(judge, drawn(self.original, asked))

    def row(self, method: str, model: Pipeline, seconds: float | None) -> tuple[Settings, Tensor]:
        """What is left and what was lost."""
        pictures = drawn(model, self.asked)
        probabilities, features = judged(self.judge, pictures)
        said = probabilities.argmax(1)
        row = {
            "world": self.name, "method": method,
            "UA": float((said[self.gone] != self.forgotten).mean()),
            "kept": float((said == self.truth)[~self.gone].mean()),
            "quality": float(probabilities[self.gone].max(1).mean()),
            "distance": frechet_distance(features[~self.gone], self.before[1][~self.gone]),
            "after attack": self.attacked(model),
            "steps": model.steps or STEPS, "seconds": seconds,
        }  # fmt: skip
        return row, pictures

    def attacked(self, model: Pipeline) -> float:
        """The highest rate that an attack brings the forgotten back to."""
        wanted = self.asked[int(np.flatnonzero(self.gone)[0])]
        known = drawn(self.original, [wanted] * 16)
        told = concept_search.condition_of(self.original, wanted)
        how = concept_search.Sampling(16, STEPS, GUIDANCE)

        def shows(pictures: Tensor) -> np.ndarray:
            return np.asarray(judged(self.judge, pictures)[0].argmax(1) == self.forgotten)

        draw = torch.Generator().manual_seed(1)
        swapped = concept_search.swap_attack(model, wanted, told, shows, draw, sampling=how)
        found = concept_search.embedding_attack(
            model, wanted, shows, draw, pictures=known, sampling=how
        )
        return max(swapped.after.rate, found.after.rate)


def of_digits(folder: Path, again: bool) -> World:
    """A class-conditional model of digits."""
    start = digits.save(digits.trained(1000), folder / "digits")
    asked = [c for c in range(10) for _ in range(IMAGES)]
    request = {"forget_classes": str(FORGOTTEN), "anchor": "5"}
    return World("digits", start, digits.judge(), asked, asked, FORGOTTEN, request)


def of_shapes(folder: Path, again: bool) -> World:
    """A text-to-image pipeline of coloured shapes."""
    start = shapes.HOME
    if again:
        start = folder / "shapes"
        shapes.make(start)
    asked = [
        shapes.caption(c, s) for s in shapes.SHAPES for c in shapes.COLOURS for _ in "12345678"
    ]
    truth = [i for i, _ in enumerate(shapes.SHAPES) for _ in range(4 * 8)]
    others = ",".join(s for s in shapes.SHAPES if s not in (CONCEPT, ANCHOR))
    request = {"forget_concepts": CONCEPT, "anchor": ANCHOR, "keep_concepts": others}
    return World("shapes", start, shapes.judge(), asked, truth, 0, request)


def forget(world: World, method: str, settings: Settings, folder: Path) -> tuple[Pipeline, float]:
    """One request from start to finish; the model as it is read back from the run directory."""
    data: Settings = {}
    if world.name == "digits" and method in NEEDS_DATA:
        data = {"data": digits.records(600)}
    if method == "few_shot_text":
        data = {"forget": [r for r in shapes.records(32) if CONCEPT in r["text"]]}
    out = folder / f"{world.name}-{method}"
    result = unlearn.forget(
        world.start, method=method, set=settings, audit="none", out=out, **world.request, **data
    )
    model: Any = inspect(out).load().model
    return model, result.outcome.seconds["unlearn"]


def grid(rows: list[Tensor], path: Path) -> None:
    """One line of pictures per model."""
    lines = [torch.cat(list(part), 2) for part in rows]
    whole = torch.cat(lines, 1).permute(1, 2, 0).numpy()
    raw = (whole * 255).round().astype(np.uint8)
    image = Image.fromarray(raw[:, :, 0] if raw.shape[2] == 1 else raw)
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """One row per world and method."""
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--train", action="store_true")
    given = parser.parse_args()
    chosen = given.methods
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for make, methods in ((of_digits, ON_DIGITS), (of_shapes, ON_SHAPES)):
            world = make(folder, given.train)
            row, pictures = world.row("original", world.original, None)
            rows.append(row)
            few = np.flatnonzero(np.arange(len(world.asked)) % (len(world.asked) // 20) == 0)[:20]
            shown = [pictures[few]]
            for method, settings in methods.items():
                if chosen and method not in chosen:
                    continue
                model, seconds = forget(world, method, settings, folder)
                row, pictures = world.row(method, model, seconds)
                rows.append(row)
                shown.append(pictures[few])
                print({k: v if isinstance(v, str) else v and round(v, 3) for k, v in row.items()})
            if not chosen:
                grid(shown, ROOT / "docs" / f"diffusion-{world.name}.png")
    publish("diffusion", COLUMNS, rows)


if __name__ == "__main__":
    main()
