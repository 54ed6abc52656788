"""Classifiers of images, texts and feature vectors: one unit per example, its label.

Records are ``image``/``label``, ``text``/``label`` or ``features``/``label``. The model is a
transformers classifier or any ``nn.Module`` that maps a batch of inputs to logits
(batch, classes).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearn.data import Row
from unlearn.errors import BadInput, Unsupported, did_you_mean
from unlearn.interface import Need
from unlearn.tasks.base import IGNORED, Batch, Encoding, Predictions, Task
from unlearn.tasks.pictures import from_channels, image_bytes, image_fault, opened

KINDS = ("image", "text", "features")


class Classification(Task):
    """Scores the label of a record under a classifier.

    Args:
        classes: number of labels.
        names: label names, by index; empty when unknown.
        processor: tokenizer, image processor, or a callable on one raw input; None: images become
            (channels, height, width) tensors in [0, 1], vectors are taken as they are.
        max_length: longest text in tokens.
    """

    name = "classification"
    labels = Need.REQUIRED

    def __init__(
        self, classes: int, names: Sequence[str] = (), processor: Any = None, max_length: int = 512
    ) -> None:
        self.classes = classes
        self.names = tuple(names)
        self.processor = processor
        self.max_length = max_length

    def reading(self, labels: Need) -> Classification:
        """The same task for records whose labels are required, optional, or never looked at.

        An absent label counts for nothing: the loss of its record is 0.
        """
        other = copy.copy(self)
        other.labels = labels
        return other

    def _labelled(self, row: Row) -> bool:
        if self.labels is Need.REQUIRED:
            return True
        return self.labels is Need.OPTIONAL and row.get("label") is not None

    def label_index(self, label: Any) -> int:
        """A label as the model's class index.

        Raises:
            BadInput: no such class.
        """
        text = str(label)
        # a number is an index even where the names are numbers, too
        if text in self.names and not isinstance(label, Integral):
            return self.names.index(text)
        if text.removeprefix("-").isdecimal():
            if 0 <= int(text) < self.classes:
                return int(text)
            raise BadInput(
                f"label {text} is out of range: the model has classes 0 to {self.classes - 1}"
            )
        hint = did_you_mean(text, self.names) if self.names else "the model's classes have no names"
        raise BadInput(f"the model has no class {text!r}: {hint}")

    def fault(self, row: Row) -> str | None:
        """Missing fields, labels out of range, inputs that are not what they claim to be."""
        kind = _kind(row)
        if kind is None or (self.labels is Need.REQUIRED and "label" not in row):
            wanted = ", ".join(f"{kind}/label" for kind in KINDS)
            return f"it has the fields {', '.join(row)}; give {wanted}"
        try:
            if self._labelled(row):
                self.label_index(row["label"])
        except BadInput as error:
            return str(error)
        reads_text = hasattr(self.processor, "pad_token_id")
        if kind == "image":
            if reads_text:
                return "it is an image, and the model reads text"
            return image_fault(row["image"])
        if kind == "features":
            return _features_fault(row["features"])
        if not reads_text:
            return "it is a text, and the model has no tokenizer"
        return None if isinstance(row["text"], str) else "its field 'text' is not a text"

    def content(self, row: Row) -> bytes:
        """The raw input and the label."""
        kind = _kind(row)
        value = row[kind] if kind else b""
        if kind == "image":
            value = image_bytes(value)
        elif kind == "features":
            vector = np.asarray(value, dtype=np.float64)  # the same numbers in any container
            value = repr(vector.shape).encode() + vector.tobytes()
        else:
            value = str(value).encode()
        label = str(self.label_index(row["label"])).encode() if self._labelled(row) else b""
        return bytes(value) + b"\x00" + label

    def shown(self, row: Row) -> bytes:
        """The raw input."""
        return self.reading(Need.NO).content(row)

    def encode(self, row: Row) -> Encoding:
        """Pixels, tokens or a vector, and the label."""
        kind = _kind(row)
        inputs: dict[str, Any]
        if kind == "image":
            inputs = {"pixel_values": self._pixels(row["image"])}
        elif kind == "text":
            ids = self.processor(row["text"], truncation=True, max_length=self.max_length)
            inputs = {key: torch.tensor(value) for key, value in ids.items()}
        else:
            value = torch.as_tensor(row["features"])
            value = value if value.is_floating_point() else value.float()
            inputs = {"features": self.processor(value) if callable(self.processor) else value}
        length = len(inputs["input_ids"]) if "input_ids" in inputs else 1
        label = self.label_index(row["label"]) if self._labelled(row) else IGNORED
        return {**inputs, "label": label, "units": 1, "length": length}

    def _pixels(self, image: Any) -> Tensor:
        if isinstance(image, Tensor | np.ndarray):
            value = torch.as_tensor(image)
            if callable(self.processor) and not hasattr(self.processor, "save_pretrained"):
                return torch.as_tensor(self.processor(value))
            if value.is_floating_point() or not hasattr(self.processor, "save_pretrained"):
                return value if value.is_floating_point() else value.float() / 255
            # whole numbers are a raw picture, which the image processor wants to see
            image = from_channels(value)
        picture = opened(image).convert("RGB")
        if hasattr(self.processor, "save_pretrained"):
            pixels: Tensor = self.processor(picture, return_tensors="pt")["pixel_values"][0]
            return pixels
        if callable(self.processor):
            return torch.as_tensor(self.processor(picture))
        return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)

    def collate(self, encodings: Sequence[Encoding]) -> Batch:
        """Stacked inputs; texts padded on the right."""
        skipped = {"label", "units", "length"}
        keys = [key for key in encodings[0] if key not in skipped]
        if "input_ids" in keys:
            padded = self.processor.pad(
                [{key: e[key].tolist() for key in keys} for e in encodings], return_tensors="pt"
            )
            batch = dict(padded)
        else:
            batch = {key: torch.stack([e[key] for e in encodings]) for key in keys}
        batch["labels"] = torch.tensor([e["label"] for e in encodings])[:, None]
        batch["units"] = torch.ones(len(encodings), dtype=torch.long)
        return batch

    def predictions(self, model: nn.Module, batch: Batch, *, dense: bool = False) -> Predictions:
        """Logits of shape (batch, 1, classes)."""
        logits = _forward(model, batch)
        if logits.ndim != 2 or len(logits) != len(batch["labels"]):
            raise Unsupported(
                f"the model returned logits of shape {tuple(logits.shape)}; a classifier must "
                "return (batch, classes)"
            )
        return Predictions(logits[:, None], batch["labels"])

    def features(self, model: nn.Module, batch: Batch, layer: int | str | None = None) -> Tensor:
        """Input of the output layer, or the output of the module named ``layer``, flattened."""
        kept: list[Tensor] = []
        if layer is None:
            handle = self.output_layer(model).register_forward_pre_hook(
                lambda _, args: kept.append(args[0])
            )
        else:
            handle = model.get_submodule(str(layer)).register_forward_hook(
                lambda _, __, output: kept.append(output)
            )
        try:
            _forward(model, batch)
        finally:
            handle.remove()
        return kept[0].flatten(1)

    def compact(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits themselves: they are small."""
        return self.logits(model, batch)

    def head(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Nothing to do: logits are stored."""
        return lambda logits: logits

    frozen_head = head

    def pooled(self, output: Tensor, batch: Batch) -> Tensor:
        """The mean over positions: of an image (b, c, h, w) or of a sequence (b, t, d)."""
        if output.ndim == 4:
            return output.mean((2, 3))
        if output.ndim == 3 and (mask := batch.get("attention_mask")) is not None:
            weight = mask[..., None].to(output.dtype)  # padding depends on batch mates
            return (output * weight).sum(1) / weight.sum(1)
        return output.mean(1) if output.ndim == 3 else output.flatten(1)

    def relabel(self, encoding: Encoding, row: Row, draw: torch.Generator) -> Encoding:
        """A label drawn uniformly from the others."""
        shift = int(torch.randint(1, self.classes, (1,), generator=draw))
        return {**encoding, "label": (encoding["label"] + shift) % self.classes}

    def output_layer(self, model: nn.Module) -> nn.Module:
        """The last linear layer."""
        linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise Unsupported(f"{type(model).__name__} has no linear output layer")
        return linear[-1]


def continuous(fields: Mapping[str, Any]) -> str:
    """The name of the input that can be moved a little, in an encoding or a batch.

    Raises:
        Unsupported: the model reads tokens.
    """
    for name in ("pixel_values", "features"):
        if name in fields and fields[name].is_floating_point():
            return name
    raise Unsupported(
        "this method moves inputs by small amounts, and tokens cannot be moved so: it works on "
        "classifiers of images or vectors"
    )


def _kind(row: Row) -> str | None:
    return next((kind for kind in KINDS if kind in row), None)


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k not in {"labels", "units", "index"}}
    precision = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    inputs = {k: v.to(precision) if v.is_floating_point() else v for k, v in inputs.items()}
    inner = getattr(model, "get_base_model", lambda: model)()  # beneath adapters
    named = isinstance(inner, PreTrainedModel)  # which take keywords; others take one input
    output = model(**inputs) if named else model(*inputs.values())
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def _features_fault(value: Any) -> str | None:
    try:
        torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"its features are not numbers ({error})"
    return None
