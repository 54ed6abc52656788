"""A text-to-image pipeline of coloured shapes, small enough to be kept beside the tests.

``python -m tests.shapes`` trains it from scratch on captioned drawings (four minutes on one
processor) and writes ``tests/artefacts/shapes-sd`` in half precision, as diffusers reads it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from unlearn.noising import noised
from unlearn.pipeline import Pipeline, read

HOME = Path(__file__).parent / "artefacts/shapes-sd"
COLOURS = {
    "red": (225, 45, 45),
    "green": (45, 195, 65),
    "blue": (55, 85, 225),
    "gold": (235, 205, 55),
}
SHAPES = ("disc", "box", "wedge", "plus")
SIDE = 32
WORDS = ("a", *COLOURS, *SHAPES, "x", "y", "z", "thing", "picture", "of", "the", "and")
Pair = tuple[str, str]


def caption(colour: str, shape: str) -> str:
    """The prompt of a drawing."""
    return f"a {colour} {shape}"


def drawing(colour: str, shape: str, draw: np.random.Generator) -> Image.Image:
    """A shape of random size at a random place on a dark ground."""
    big = Image.new("RGB", (2 * SIDE, 2 * SIDE), tuple(int(v) for v in draw.integers(0, 40, 3)))
    pen, radius = ImageDraw.Draw(big), int(draw.integers(14, 23))
    x, y = (int(draw.integers(radius + 2, 2 * SIDE - radius - 2)) for _ in range(2))
    fill, box = COLOURS[colour], (x - radius, y - radius, x + radius, y + radius)
    if shape == "disc":
        pen.ellipse(box, fill=fill)
    elif shape == "box":
        pen.rectangle(box, fill=fill)
    elif shape == "wedge":
        pen.polygon(
            [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill
        )
    else:
        arm = radius // 3
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
    return big.resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def pairs(count: int) -> list[Pair]:
    """Every colour and shape in turn."""
    colours = list(COLOURS)
    return [(colours[i % 4], SHAPES[i // 4 % 4]) for i in range(count)]


def pictures(count: int, seed: int = 0) -> Tensor:
    """Drawings of :func:`pairs` in [0, 1], shape (count, 3, 32, 32)."""
    draw = np.random.default_rng(seed)
    drawn = [np.asarray(drawing(*pair, draw), dtype=np.float32) / 255 for pair in pairs(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


def records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Image/text records of :func:`pairs`."""
    drawn = pictures(count, seed)
    return [
        {"image": x, "text": caption(*pair)} for x, pair in zip(drawn, pairs(count), strict=True)
    ]


def pipeline() -> Pipeline:
    """The trained pipeline of this folder, in float32."""
    return read(HOME, torch.float32)


class Judge(nn.Module):
    """Tells colours and shapes apart: two heads on one small convolutional body."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 48, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.colour, self.shape = nn.Linear(48 * 16, 4), nn.Linear(48 * 16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of colours and of shapes, of pictures in [0, 1]."""
        found = self.body(x)
        return self.colour(found), self.shape(found)


def judge(steps: int = 250) -> Judge:
    """Trained on drawings; about 0.98 right on others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Judge(), pictures(1600, 7)
        colour, shape = torch.arange(1600) % 4, torch.arange(1600) // 4 % 4
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(steps):
            chosen = torch.randint(len(x), (64,))
            seen = x[chosen] + 0.05 * torch.randn(64, 3, SIDE, SIDE)
            said = model(seen)
            loss = nn.functional.cross_entropy(said[0], colour[chosen])
            loss = loss + nn.functional.cross_entropy(said[1], shape[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def _tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = sorted({letter for word in WORDS for letter in word})
    symbols = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:  # every word is one token: its letters merge from the left
        built = word[0] if len(word) > 1 else f"{word}</w>"
        for i, letter in enumerate(word[1:], 1):
            letter = letter if i < len(word) - 1 else f"{letter}</w>"
            if f"{built} {letter}" not in merges:
                merges.append(f"{built} {letter}")
            built += letter
            if built not in symbols:
                symbols.append(built)
    vocabulary = {s: i for i, s in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=8)


def _untrained() -> Any:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=8, projection_dim=32,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False, sample_size=SIDE,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64),
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32,
        attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _descend(parameters: Any, steps: int, rate: float, loss: Any) -> None:
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for step in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(step, value.item(), flush=True)


def make(directory: Path, vae_steps: int = 500, steps: int = 1500) -> None:
    """Train the pipeline and write it."""
    torch.manual_seed(0)
    made, x = _untrained(), pictures(3200, 1)
    texts = made.tokenizer([caption(*pair) for pair in pairs(16)], padding="max_length",
                           max_length=8, return_tensors="pt").input_ids  # fmt: skip

    def rebuilt() -> Tensor:
        batch = 2 * x[torch.randint(len(x), (32,))] - 1
        latent = made.vae.encode(batch).latent_dist
        error = (made.vae.decode(latent.sample()).sample - batch).square().mean()
        return error + 1e-5 * latent.kl().mean()

    _descend(made.vae.parameters(), vae_steps, 6e-3, rebuilt)
    with torch.no_grad():
        latents = torch.cat([made.vae.encode(2 * p - 1).latent_dist.mode() for p in x.split(200)])
    scale = float(1 / latents.std())
    made.vae.register_to_config(scaling_factor=scale)
    abars, latents = made.scheduler.alphas_cumprod, latents * scale
    nothing = made.tokenizer([""], padding="max_length", max_length=8,
                             return_tensors="pt").input_ids  # fmt: skip

    def denoised() -> Tensor:
        chosen = torch.randint(len(x), (64,))
        ids = torch.where(torch.rand(64, 1) < 0.1, nothing, texts[chosen % 16])
        t, eps = torch.randint(1000, (64,)), torch.randn(64, 4, 8, 8)
        x_t = noised(latents[chosen], eps, abars[t])
        said = made.unet(x_t, t, encoder_hidden_states=made.text_encoder(ids)[0]).sample
        return (said - eps).square().mean()

    both = [*made.unet.parameters(), *made.text_encoder.parameters()]
    _descend(both, steps, 2e-3, denoised)
    made.to(dtype=torch.float16).save_pretrained(directory, safe_serialization=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(HOME)
