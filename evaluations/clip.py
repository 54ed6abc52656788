"""How well pictures match the prompts they were drawn for, as a CLIP model sees it.

The CLIP score of Hessel et al. 2021 (arXiv 2104.08718, eq. 1). Prompts are read as they stand: the
words "A photo depicts", which the paper puts before captions, are not added. Scores mean something
beside other scores of the same CLIP model only, so a report names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from unlearn.errors import BadInput
from unlearn.evaluations import imaging
from unlearn.run import Run
from unlearn.tasks.base import evaluating
from unlearn.weights import fingerprint_files, stored, weight_files

Array = npt.NDArray[np.float64]
Colours = tuple[float, float, float]
AT_ONCE = 64


@dataclass(frozen=True)
class Clip:
    """A CLIP model, in float32 on the CPU but while it looks.

    Attributes:
        model: image and text towers with their projections.
        tokenizer: of prompts.
        name: what a report calls it.
        fingerprint: SHA-256 of its weight files.
        side: of the pictures it looks at, in pixels.
        length: of the prompts it reads, in tokens; what follows is cut off.
        mean: of the red, green and blue it learned from, in [0, 1].
        std: their standard deviations.
    """

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str
    side: int
    length: int
    mean: Colours
    std: Colours

    def scores(
        self, prompts: Sequence[str], pictures: Sequence[Tensor], run: Run, phase: str = "look"
    ) -> list[Array]:
        """The CLIP score of every picture with its prompt, in [0, 2.5], by prompt, shape (n,).

        Args:
            prompts: that pictures were drawn for.
            pictures: for each prompt, bytes, shape (n, channels, height, width).
            run: device and progress.
            phase: what progress is told.
        """
        found: list[Array] = []
        with self._on(run.device):
            texts = self.texts(prompts)
            for i, (text, part) in enumerate(zip(texts, pictures, strict=True), 1):
                found.append(imaging.clip_score(self.look(part), np.tile(text, (len(part), 1))))
                run.progress.advance(phase, i, len(prompts), {})
        return found

    def texts(self, prompts: Sequence[str]) -> Array:
        """Embeddings of prompts, shape (n, dim)."""
        found = []
        with evaluating(self.model):
            for i in range(0, len(prompts), AT_ONCE):
                read = self.read(prompts[i : i + AT_ONCE])
                read = {name: ids.to(self.model.device) for name, ids in read.items()}
                pooled = self.model.text_model(**read).pooler_output
                found.append(self.model.text_projection(pooled).double().cpu().numpy())
        return np.concatenate(found)

    def read(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Token ids of prompts, and what is no padding, shape (n, length)."""
        read = self.tokenizer(
            list(prompts), padding="max_length", padding_side="right", truncation=True,
            max_length=self.length, return_tensors="pt",
        )  # fmt: skip
        return {name: read[name] for name in ("input_ids", "attention_mask")}

    def look(self, pictures: Tensor) -> Array:
        """Embeddings of pictures, bytes, shape (n, channels, height, width), as (n, dim)."""
        found = []
        with evaluating(self.model):
            for part in torch.split(pictures, AT_ONCE):
                pixels = prepared(part.to(self.model.device), self.side, self.mean, self.std)
                pooled = self.model.vision_model(pixel_values=pixels).pooler_output
                found.append(self.model.visual_projection(pooled).double().cpu().numpy())
        return np.concatenate(found)

    @contextmanager
    def _on(self, device: torch.device) -> Iterator[None]:
        self.model.to(device)
        try:
            yield
        finally:
            self.model.to("cpu")  # pipelines need the room


def prepared(pictures: Tensor, side: int, mean: Colours, std: Colours) -> Tensor:
    """Pictures as CLIP wants them: the shorter side ``side`` long, cut to the centre, normalised.

    Radford et al. 2021 (arXiv 2103.00020, published code): bicubic and in whole numbers, as Pillow
    does it.

    Args:
        pictures: bytes, shape (n, channels, height, width); grey ones become red, green and blue,
            and of more than three channels the first three are seen.
        side: in pixels.
        mean: of red, green and blue in [0, 1].
        std: of the same.

    Returns:
        Shape (n, 3, side, side).
    """
    colours = pictures[:, :3] if pictures.shape[1] >= 3 else pictures[:, :1].expand(-1, 3, -1, -1)
    height, width = colours.shape[-2:]
    short = min(height, width)
    tall, wide = side * height // short, side * width // short
    sized = colours.float()
    for size in ((height, wide), (tall, wide)):  # as Pillow, which rounds in between
        sized = F.interpolate(sized, size, mode="bicubic", antialias=True).clamp(0, 255).round()
    top, left = (tall - side) // 2, (wide - side) // 2
    seen = sized[..., top : top + side, left : left + side] / 255
    shift, scale = (seen.new_tensor(x)[:, None, None] for x in (mean, std))
    return (seen - shift) / scale


def read(folder: Path, name: str) -> Clip:
    """The CLIP model of a directory, tried on one prompt and one picture.

    Args:
        folder: as ``CLIPModel.save_pretrained`` and its tokenizer leave it; the normalisation is
            that of its image processor, or CLIP's own where there is none.
        name: what a report calls it.

    Raises:
        BadInput: no CLIP model, no safetensors, weights that are damaged or missing, no tokenizer,
            or one of another model.
    """
    import transformers

    what = f"the CLIP model {name}"
    config = _configuration(folder, what)
    files = weight_files(folder)
    stored(files)  # they are whole
    if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
        raise BadInput(f"{what} has no tokenizer: save the one it was trained with beside it")
    mean, std = _normalisation(folder, what)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises no other kind
        raise BadInput(f"the tokenizer of {what} cannot be read: {_line(error)}") from error
    try:
        model, info = transformers.CLIPModel.from_pretrained(
            folder, config=config, dtype=torch.float32, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"{what} cannot be loaded: {_line(error)}") from error
    odd = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if odd:
        raise BadInput(
            f"{what} lacks the weights {', '.join(odd[:3])} in the size that its config.json says: "
            "get it again"
        )
    length = min(tokenizer.model_max_length, config.text_config.max_position_embeddings)
    found = Clip(
        model.eval(), tokenizer, name, fingerprint_files(files), config.vision_config.image_size,
        length, mean, std,
    )  # fmt: skip
    _check(found, what)
    return found


def _configuration(folder: Path, what: str) -> Any:
    import transformers

    file = folder / "config.json"
    if not file.exists():
        raise BadInput(f"{what} is none: the directory has no config.json")
    try:
        raw = json.loads(file.read_text())
        kind, made = raw.get("model_type"), raw.get("architectures") or ["CLIPModel"]
    except (ValueError, AttributeError) as error:
        raise BadInput(f"the config.json of {what} is damaged: get it again") from error
    if kind != "clip" or made != ["CLIPModel"]:
        found = made[0] if kind == "clip" else kind
        raise BadInput(f"{what} is none but {found}: pass what transformers knows as CLIPModel")
    try:
        config = transformers.CLIPConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"the config.json of {what} cannot be used: {_line(error)}") from error
    if not isinstance(config.vision_config.image_size, int):
        raise BadInput(f"{what} does not look at square pictures: pass one that does")
    return config


def _normalisation(folder: Path, what: str) -> tuple[Colours, Colours]:
    """Mean and standard deviation of the image processor; CLIP's own where there is none."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    alone, among = folder / "preprocessor_config.json", folder / "processor_config.json"
    file = alone if alone.exists() else among
    try:
        raw = json.loads(file.read_text()) if file.exists() else {}
        raw = raw.get("image_processor", {}) if file == among else raw
        usual = {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
        if raw.get("do_normalize") is False:
            usual, raw = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}, {}
        mean, std = (np.array(raw.get(key, usual[key]), float) for key in usual)
        colours = mean.shape == std.shape == (3,)
        if not colours or not np.isfinite([mean, std]).all() or (std <= 0).any():
            raise ValueError
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(
            f"the {file.name} of {what} must give image_mean and image_std of three colours"
        ) from error
    return tuple(mean.tolist()), tuple(std.tolist())


def _check(clip: Clip, what: str) -> None:
    """Refuse parts that do not belong together: it would be silent nonsense."""
    config, side = clip.model.config.text_config, clip.side
    try:
        ids = clip.read(["a picture"])["input_ids"][0].tolist()
        tried = clip.texts(["a picture"]), clip.look(torch.zeros(1, 3, side, side).byte())
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise BadInput(
            f"{what} cannot read a prompt and look at a picture: {_line(error)}"
        ) from error
    # its text is what it makes of the token that ends it; older ones say 2, and mean the last one
    end = max(ids) if config.eos_token_id == 2 else config.eos_token_id
    odd = "knows more tokens" if len(clip.tokenizer) > config.vocab_size else ""
    if end not in ids or end != clip.tokenizer.eos_token_id:
        odd = odd or "ends prompts otherwise"
    if odd:
        raise BadInput(f"the tokenizer of {what} {odd} than the model: it belongs to another one")
    if not all(np.isfinite(x).all() for x in tried):
        raise BadInput(f"the weights of {what} are not finite: get it again")


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
