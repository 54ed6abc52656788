"""Who says what a generated picture shows: the user's classifier, or a small one trained here.

Every number about classes or concepts depends on the judge, so a report names it and its accuracy.
Where there is none, nothing is said in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn.case import Case
from unlearn.data import Row
from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Concepts, Need
from unlearn.tasks.base import evaluating
from unlearn.tasks.classification import Classification
from unlearn.tasks.diffusion import Diffusion, words

Array = npt.NDArray[np.float64]

STEPS, BATCH, RATE = 300, 128, 2e-3  # of a judge that is trained here
LARGEST = 64  # side of the pictures it looks at
LEAST, AMPLE = 5, 50  # records of a class it can learn, and of one that it can learn well
MOST = 5000  # records it learns from
CAPTIONS = 100  # different ones that can be classes
AT_ONCE = 64


@dataclass(frozen=True)
class Judge:
    """A classifier of pictures.

    Attributes:
        model: maps pictures to logits.
        task: how it reads them.
        title: what a report calls it.
        names: of its classes; empty where they are only numbered.
        right: of real pictures that it did not learn from and whose class is known, whether it
            told it; empty where there are none.
    """

    model: nn.Module
    task: Classification
    title: str
    names: tuple[str, ...] = ()
    right: tuple[bool, ...] = ()

    def look(self, pictures: Tensor, device: torch.device) -> tuple[Array, Array]:
        """Probabilities (n, classes) and features (n, dim) of pictures, shape (n, c, h, w), bytes.

        Features are what its output layer reads.
        """
        model = self.model.to(device)
        task = self.task.reading(Need.NO)
        # an image processor wants whole numbers, a plain network a picture in [0, 1]
        raw = hasattr(self.task.processor, "save_pretrained")
        said, felt = [], []
        with evaluating(model):
            for part in torch.split(pictures, AT_ONCE):
                seen = part if raw else part.float() / 255
                batch = task.collate([task.encode({"image": x}) for x in seen])
                batch = {key: value.to(device) for key, value in batch.items()}
                said.append(task.logits(model, batch)[:, 0].double().softmax(-1).cpu().numpy())
                felt.append(task.features(model, batch).double().cpu().numpy())
        return np.concatenate(said), np.concatenate(felt)


def judge(case: Case) -> tuple[Judge | None, str]:
    """The judge of a case, and why there is none, as a sentence.

    Raises:
        BadInput: the user's classifier cannot be read, or not look at the pipeline's pictures.
    """
    if case.config.classifier is not None:
        return _given(case), ""
    return _trained(case)


def _given(case: Case) -> Judge:
    found = case.classifier
    if not isinstance(found.task, Classification):
        raise BadInput(f"the classifier {found.source} is no classifier: pass one of images")
    made = Judge(
        found.load().model, found.task, "the classifier that was given", tuple(found.task.names)
    )
    task = case.checkpoint.task
    assert isinstance(task, Diffusion)  # noqa: S101 pipelines alone are drawn from
    try:
        made.look(torch.zeros(1, *task.shape, dtype=torch.uint8), torch.device("cpu"))
    except (RuntimeError, ValueError, AttributeError, Unsupported) as error:
        raise BadInput(
            f"the classifier {found.source} cannot look at pictures of shape {task.shape}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return made


def _trained(case: Case) -> tuple[Judge | None, str]:
    """A small convolutional network, trained on four fifths of the labelled records at hand."""
    task = case.checkpoint.task
    assert isinstance(task, Diffusion)  # noqa: S101
    sets = [part for part in (case.sets.forget, case.sets.retain) if part is not None]
    rows = [part.examples[i] for part in sets for i in range(len(part))]
    labels, names = _labels(rows, task, case.target)
    counts = np.bincount([label for label in labels if label >= 0], minlength=1)
    if (counts >= LEAST).sum() < 2:
        return None, (
            "No classifier judges the pictures: pass --classifier, or labelled records of two "
            "classes or more with --data."
        )
    seed = case.config.seed
    draw = np.random.default_rng(seed)
    able = [i for i, label in enumerate(labels) if label >= 0 and counts[label] >= LEAST]
    able = draw.permutation(able)[:MOST].tolist()
    pixels = torch.stack([task.encode(rows[i])["pixel_values"].float() for i in able])
    truth = torch.tensor([labels[i] for i in able])
    held = max(1, len(able) // 5)
    net = _learned(pixels[held:], truth[held:], max(len(counts), len(names)), seed)
    reading = Classification(max(len(counts), len(names)), names)
    made = Judge(net, reading, "a small network trained for this audit", tuple(names))
    said, _ = made.look((pixels[:held] * 255).round().to(torch.uint8), torch.device("cpu"))
    right = tuple(bool(x) for x in said.argmax(1) == truth[:held].numpy())
    return Judge(net, reading, made.title, made.names, right), ""


def _labels(rows: Sequence[Row], task: Diffusion, target: Any) -> tuple[list[int], list[str]]:
    """A class for every record, -1 for none, and the names of the classes.

    Of captions, each different one is a class; where there are too many of them, or too few
    records of each, each concept is that was named, and a record has it if it names it alone.
    """
    if task.classes:
        return [task.label_index(row["label"]) for row in rows], list(task.names)
    texts = [str(row["text"]) for row in rows] if task.tokenizer else []
    captions = sorted(set(texts))
    named = concepts(target)
    enough = AMPLE if len(named) > 1 else LEAST
    if len(captions) <= CAPTIONS and len(rows) >= enough * max(1, len(captions)):
        return [captions.index(text) for text in texts], captions
    shown = [[i for i, name in enumerate(named) if words(name) <= words(text)] for text in texts]
    return [found[0] if len(found) == 1 else -1 for found in shown], named


def concepts(target: Any) -> list[str]:
    """Every concept that a request names, each once."""
    if not isinstance(target, Concepts):
        return []
    return list(dict.fromkeys(filter(None, [*target.prompts, target.anchor, *target.keep])))


class _Net(nn.Module):
    """Convolutions and maxima down to four by four, and one linear layer."""

    def __init__(self, channels: int, side: int, classes: int) -> None:
        super().__init__()
        self.side = side
        layers: list[nn.Module] = []
        width = channels
        while side > 4:
            layers += [nn.Conv2d(width, 16 if not layers else 32, 3, padding=1), nn.ReLU(),
                       nn.MaxPool2d(2)]  # fmt: skip
            width, side = 16 if len(layers) == 3 else 32, side // 2
        self.body = nn.Sequential(*layers, nn.Conv2d(width, 32, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(32 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        seen = F.adaptive_avg_pool2d(x, self.side) if x.shape[-1] != self.side else x
        found: Tensor = self.head(self.body(seen).flatten(1))
        return found


def _learned(pixels: Tensor, truth: Tensor, classes: int, seed: int) -> nn.Module:
    smaller = min(pixels.shape[-2:])
    side = max(4, min(LARGEST, 1 << int(np.log2(smaller))))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = _Net(pixels.shape[1], side, classes)
        optimizer = torch.optim.Adam(net.parameters(), RATE)
        for _ in range(STEPS):
            chosen = torch.randint(len(pixels), (BATCH,))
            loss = F.cross_entropy(net(pixels[chosen]), truth[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net.eval()


def shown_by(prompt: str, names: Sequence[str]) -> frozenset[int]:
    """The classes that a picture for this prompt may show.

    Those whose name says all that the prompt says and, where there are none, those whose name is a
    part of the prompt: "disc" is shown by "red disc" and "blue disc", and "a red disc" by "disc".

    >>> shown_by("disc", ["a red disc", "a blue disc", "a red box"])
    frozenset({0, 1})
    >>> shown_by("a red disc", ["disc", "box"])
    frozenset({0})
    """
    asked = words(prompt)
    if not asked:
        return frozenset()
    named = [words(name) for name in names]
    whole = frozenset(i for i, name in enumerate(named) if asked <= name)
    return whole or frozenset(i for i, name in enumerate(named) if name and name <= asked)
