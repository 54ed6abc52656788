"""Diffusion models: one unit per example, the denoising loss at fixed draws of time and noise.

Records are ``image``/``label`` (class-conditional), ``image``/``text`` (text-to-image) or ``image``
alone. The loss of an example is the mean squared error per pixel of what the network predicts
(noise, v or data), the mean over ``draws`` pairs (t, noise). In eval mode the draws belong to the
record: the same for every model and set, so that losses can be compared example by example. In
train mode they are fresh, like dropout, and a tenth of the conditions is left out where the
network knows what that means.

Times are stratified and antithetic: with t also T - 1 - t.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unlearn.data import Row
from unlearn.errors import BadInput, Unsupported, did_you_mean
from unlearn.noising import target
from unlearn.pipeline import Pipeline
from unlearn.tasks.base import Batch, Encoding, Predictions, Task
from unlearn.tasks.pictures import from_channels, image_bytes, image_fault, opened

INSTEAD = {"instead_labels": "label", "instead_input_ids": "input_ids"}  # and what they stand for
FILLING = {"a", "an", "the", "of", "and", "in", "on", "photo", "picture", "image"}
DROPPED = 0.1  # share of the conditions left out in train mode (Ho & Salimans 2022)


@dataclass(frozen=True)
class Denoised(Predictions):
    """Denoising losses in the place of logits.

    ``compact`` holds the squared error per pixel of each draw, shape (batch, draws); there are no
    logits, so losses that need the probabilities of classes or tokens cannot be had from it.
    """

    @property
    def logits(self) -> Tensor:
        """There are none."""
        raise Unsupported("a diffusion model has no logits: use a method that needs losses only")

    def each(self, score: Callable[..., Tensor], *beside: Predictions) -> Tensor:
        """Not to be had: there are no logits."""
        return self.logits

    def unit_nll(self) -> Tensor:
        """The loss of every example, shape (batch, 1)."""
        return self.compact.mean(1, keepdim=True)

    def nll(self) -> Tensor:
        """The loss of every example, shape (batch,)."""
        return self.compact.mean(1)

    def hits(self) -> Tensor:
        """There is no right or wrong answer."""
        return torch.zeros_like(self.labels, dtype=torch.bool)


class Diffusion(Task):
    """Scores how well a pipeline denoises a record.

    Args:
        shape: of the pictures: (channels, height, width).
        classes: labels a class-conditional network knows, the null class not among them; 0: none.
        tokenizer: of prompts, for text-to-image.
        names: of the classes, by index.
        draws: pairs of time and noise per example, even.
        anchor: prompt or class index that stands in for what is relabelled.
    """

    name = "diffusion"

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int = 0,
        tokenizer: Any = None,
        names: Sequence[str] = (),
        draws: int = 4,
    ) -> None:
        self.shape, self.classes, self.tokenizer = shape, classes, tokenizer
        self.names, self.draws = tuple(names), draws
        self.anchor: str | int | None = None
        self.one_step = False  # made to be drawn from in one step: no denoiser any more
        self.null_class: int | None = None
        self.times = 1000  # of the schedule

    def label_index(self, label: Any) -> int:
        """A label as a class index.

        Raises:
            BadInput: no such class, or a pipeline that knows no classes.
        """
        if not self.classes:
            raise BadInput("this pipeline is not conditioned on classes: name concepts or records")
        text = str(label)
        if text in self.names:
            return self.names.index(text)
        if text.removeprefix("-").isdecimal():
            if 0 <= int(text) < self.classes:
                return int(text)
            raise BadInput(
                f"class {text} is out of range: the pipeline has classes 0 to {self.classes - 1}"
            )
        hint = did_you_mean(text, self.names) if self.names else "its classes have no names"
        raise BadInput(f"the pipeline has no class {text!r}: {hint}")

    def expressible(self, prompt: str) -> str | None:
        """What is wrong with a prompt, as the end of a sentence; None if the tokenizer knows it.

        A word outside its vocabulary may silently become padding, or the unknown token.
        """
        words = prompt.split()
        lost = [word for word in words if self._lost(word)]
        if words and len(lost) == len(words):
            return f"the tokenizer knows no word of {prompt!r}: it would be read as nothing"
        return None

    def lost_words(self, prompt: str) -> list[str]:
        """Words of a prompt that the tokenizer turns into padding or the unknown token."""
        return [word for word in prompt.split() if self._lost(word)]

    def _lost(self, word: str) -> bool:
        if self.tokenizer is None:
            return False
        found = self.tokenizer(word, add_special_tokens=False).input_ids
        nothing = {self.tokenizer.pad_token_id, self.tokenizer.unk_token_id,
                   self.tokenizer.eos_token_id}  # fmt: skip
        return not found or all(i in nothing for i in found)

    def fault(self, row: Row) -> str | None:
        """Missing fields, classes out of range, pictures that cannot be opened."""
        wanted = "label" if self.classes else "text" if self.tokenizer else None
        if "image" not in row or (wanted and wanted not in row):
            fields = f"image/{wanted}" if wanted else "image"
            return f"it has the fields {', '.join(row)}; give {fields}"
        if self.classes:
            try:
                self.label_index(row["label"])
            except BadInput as error:
                return str(error)
        if self.tokenizer and not isinstance(row["text"], str):
            return "its field 'text' is not a text"
        return image_fault(row["image"])

    def content(self, row: Row) -> bytes:
        """The raw picture and its condition."""
        condition = row["label"] if self.classes else row.get("text", "") if self.tokenizer else ""
        return bytes(image_bytes(row["image"])) + b"\x00" + str(condition).encode()

    def encode(self, row: Row) -> Encoding:
        """The picture in [0, 1] at the pipeline's size, its condition, and its own seed."""
        digest = hashlib.blake2b(self.content(row), digest_size=7).digest()
        found: dict[str, Any] = {
            "pixel_values": self._pixels(row["image"]),
            "draw": torch.tensor(int.from_bytes(digest, "big")),
            "label": self.label_index(row["label"]) if self.classes else 0,
            "units": 1,
            "length": 1,
        }
        if self.tokenizer:
            found["input_ids"] = self._ids(row["text"])
        return found

    def _ids(self, text: str) -> Tensor:
        ids = self.tokenizer(
            text, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True
        ).input_ids
        return torch.tensor(ids)

    def _pixels(self, value: Any) -> Tensor:
        channels, height, width = self.shape
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == self.shape:
            return value
        if isinstance(value, Tensor | np.ndarray):
            raw = torch.as_tensor(value)
            whole = raw * 255 if raw.is_floating_point() else raw
            value = from_channels(whole.round() if raw.is_floating_point() else whole)
        picture = opened(value).convert("L" if channels == 1 else "RGB").resize((width, height))
        raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        return raw.view(height, width, channels).permute(2, 0, 1).float() / 255

    def collate(self, encodings: Sequence[Encoding]) -> Batch:
        """Stacked pictures and conditions; ``relabelled``: to be denoised as under another one."""
        skipped = {"label", "units", "length", *INSTEAD}
        keys = [key for key in encodings[0] if key not in skipped]
        batch = {key: torch.stack([torch.as_tensor(e[key]) for e in encodings]) for key in keys}
        for key, own in INSTEAD.items():
            if any(key in e for e in encodings):
                told = [torch.as_tensor(e.get(key, e[own])) for e in encodings]
                batch[key] = torch.stack(told)
                batch["relabelled"] = torch.tensor([key in e for e in encodings])
        batch["labels"] = torch.tensor([e["label"] for e in encodings])[:, None]
        batch["units"] = torch.ones(len(encodings), dtype=torch.long)
        return batch

    def drawn(self, model: Pipeline, batch: Batch) -> tuple[Tensor, Tensor]:
        """Times (batch, draws) and noise (batch, draws, *shape) of every example.

        Where the batch names single draws (``pick``), only those.
        """
        rows, steps = len(batch["draw"]), len(model.abars)
        if self._own(model).training:
            u, pairs = torch.rand(rows, 1), 1
            noise = torch.randn(rows, 2, *model.shape)
        else:
            pairs = self.draws // 2
            made = [torch.Generator().manual_seed(int(seed)) for seed in batch["draw"]]
            u = torch.stack([torch.rand(pairs, generator=g) for g in made])
            noise = torch.stack([torch.randn(self.draws, *model.shape, generator=g) for g in made])
        early = ((torch.arange(pairs) + u) / pairs * steps / 2).long()
        t = torch.cat([early, steps - 1 - early], 1)
        if "pick" in batch:
            pick = int(batch["pick"][0])
            t, noise = t[:, pick : pick + 1], noise[:, pick : pick + 1]
        return t.to(model.device), noise.to(model.device, model.dtype)

    def singly(self, batch: Batch) -> list[Batch]:
        """The batch once for every draw: one loss per example each, for per-example gradients."""
        rows = len(batch["draw"])
        return [{**batch, "pick": torch.full((rows,), i)} for i in range(self.draws)]

    def redrawn(self, batch: Batch) -> Batch:
        """The batch with new times and noise, from torch's own generator, also in eval mode."""
        return {**batch, "draw": torch.randint(2**48, (len(batch["draw"]),))}

    def conditions(self, model: Pipeline, batch: Batch, key: str = "") -> Tensor | None:
        """What the network is told about each example; ``instead``: what stands in for it."""
        if self.tokenizer:
            return model.condition(batch[f"{key}input_ids"])
        return model.condition(batch[f"{key}labels"].flatten()) if self.classes else None

    def predictions(self, model: nn.Module, batch: Batch, *, dense: bool = False) -> Denoised:
        """Squared errors of every draw, shape (batch, draws)."""
        own = self._own(model)
        t, noise = self.drawn(own, batch)
        rows, draws = t.shape
        with torch.no_grad():
            x_0 = own.encode(batch["pixel_values"].to(own.dtype))
        times, eps = t.flatten(), noise.flatten(0, 1)
        x_0 = x_0.repeat_interleave(draws, 0)
        x_t = own.noised(x_0, eps, times)
        told = self.conditions(own, batch)
        told = told if told is None else told.repeat_interleave(draws, 0)
        if own.training and told is not None and (null := own.null(len(told))) is not None:
            keep = torch.rand(len(told)).to(told.device) >= DROPPED
            told = torch.where(keep.view(-1, *[1] * (told.ndim - 1)), told, null)
        aim = target(x_0, eps, own.abars[times], own.kind)
        if "relabelled" in batch:
            with torch.no_grad():  # what it says about these pictures when told something else
                other = self.conditions(own, batch, "instead_")
                other = None if other is None else other.repeat_interleave(draws, 0)
                chosen = batch["relabelled"].repeat_interleave(draws).view(-1, 1, 1, 1)
                aim = torch.where(chosen, model(x_t, times, other), aim)
        error = (model(x_t, times, told) - aim).square().flatten(1).mean(1)
        return Denoised(error.view(rows, draws), batch["labels"])

    def _own(self, model: nn.Module) -> Pipeline:
        inner = getattr(model, "get_base_model", lambda: model)()  # beneath adapters
        if not isinstance(inner, Pipeline):
            raise Unsupported(f"{type(model).__name__} is not a diffusion pipeline")
        return inner

    def features(self, model: nn.Module, batch: Batch, layer: int | str | None = None) -> Tensor:
        """The middle block's output at the first draw, the mean over positions, (batch, dim)."""
        kept: list[Tensor] = []
        own = self._own(model)
        module = own.get_submodule(str(layer)) if layer is not None else self.middle(own)

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        handle = module.register_forward_hook(keep)
        try:
            self.predictions(model, self.singly(batch)[0])
        finally:
            handle.remove()
        return self.pooled(kept[0], batch)

    def middle(self, model: Pipeline) -> nn.Module:
        """The block at the lowest resolution, or the middle one of a stack."""
        found = getattr(model.denoiser, "mid_block", None)
        if isinstance(found, nn.Module):
            return found
        blocks = list(self.layers(model).values())
        if not blocks:
            raise Unsupported(f"{type(model.denoiser).__name__} has no blocks")
        return blocks[len(blocks) // 2]

    def pooled(self, output: Tensor, batch: Batch) -> Tensor:
        """The mean over positions: of a picture (b, c, h, w) or of a sequence (b, t, d)."""
        if output.ndim == 4:
            return output.mean((2, 3))
        return output.mean(1) if output.ndim == 3 else output.flatten(1)

    def compact(self, model: nn.Module, batch: Batch) -> Tensor:
        """Not to be had: there is no output layer to keep inputs of."""
        raise Unsupported("a diffusion model has no logits: use retention nll or none")

    def head(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Not to be had."""
        raise Unsupported("a diffusion model has no logits: use retention nll or none")

    frozen_head = head

    def relabel(self, encoding: Encoding, row: Row, draw: torch.Generator) -> Encoding:
        """The same picture, to be denoised as if it were told something else.

        That is the anchor where there is one, else a class drawn uniformly from the others. The
        network's own prediction under that condition is the target, not the true noise: else the
        pictures would be learned under the other condition.

        Raises:
            BadInput: prompts and no anchor, or a network without conditions.
        """
        if self.tokenizer:
            if not isinstance(self.anchor, str):
                raise BadInput("name what prompts should show instead: pass --anchor")
            return {**encoding, "instead_input_ids": self._ids(self.anchor)}
        if not self.classes:
            raise BadInput("this pipeline has no labels to draw others from: use npo or grad_diff")
        if isinstance(self.anchor, int):
            other = self.anchor
        else:
            shift = int(torch.randint(1, self.classes, (1,), generator=draw))
            other = (int(encoding["label"]) + shift) % self.classes
        return {**encoding, "instead_labels": torch.tensor(other)}

    def output_layer(self, model: nn.Module) -> nn.Module:
        """The last convolution or linear layer of the denoiser."""
        denoiser = self._own(model).denoiser
        found = [m for m in denoiser.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return found[-1]

    def chance(self) -> float:
        """The loss of predicting zero where noise is due."""
        return 1.0

    def text(self, row: Row) -> str | None:
        """The caption."""
        return str(row["text"]) if "text" in row else None


def task_of(model: Pipeline, names: Sequence[str] = ()) -> Diffusion:
    """The task that reads records as this pipeline wants them."""
    known = model.classes or 0
    if model.denoiser_name == "unet" and model.null_class is not None:
        known -= 1
    task = Diffusion(model.picture_shape, known, model.tokenizer, names)
    task.one_step, task.null_class = model.steps is not None, model.null_class
    task.times = len(model.abars)
    return task


def words(text: str) -> frozenset[str]:
    """The words of a prompt or class name that say something.

    >>> sorted(words("a photo of a Red_disc"))
    ['disc', 'red']
    """
    return frozenset(re.findall(r"[^\W_]+", text.lower())) - FILLING
