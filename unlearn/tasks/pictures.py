"""Pictures as records bring them: opened, checked, and as bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def image_fault(value: Any) -> str | None:
    """What is wrong with a picture, as the end of a sentence, or None."""
    if isinstance(value, Tensor | np.ndarray):
        return (
            None if value.ndim == 3 else f"its image has shape {tuple(value.shape)}, not (c, h, w)"
        )
    try:
        opened(value)
    except (OSError, ValueError, TypeError) as error:
        return f"its image cannot be opened ({error})"
    return None


def opened(value: Any) -> Any:
    """A PIL picture from a file, bytes, a column of ``datasets``, or an array (c, h, w)."""
    from PIL import Image

    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping):
        value = value["bytes"] or value["path"]
    return Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)


def from_channels(value: Tensor) -> Any:
    """A PIL picture from raw whole numbers, shape (c, h, w)."""
    from PIL import Image

    pixels = value.to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def image_bytes(value: Any) -> bytes:
    """The bytes that make a picture what it is."""
    if isinstance(value, Mapping):
        value = value["bytes"] or value["path"]
    if isinstance(value, bytes):
        return value
    if isinstance(value, str | Path):
        return Path(value).read_bytes()
    return np.asarray(value).tobytes()
