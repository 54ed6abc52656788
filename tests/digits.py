"""A class-conditional diffusion model of 8x8 digits, trained in seconds, and a judge of digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unlearn.noising import noised
from unlearn.pipeline import Pipeline

NULL = 10  # the class index that stands for none


def pictures() -> tuple[Tensor, Tensor]:
    """All 1,797 digits in [0, 1], shape (n, 1, 8, 8), and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images / 16, dtype=torch.float32)[:, None], torch.tensor(found.target)


def records(count: int | None = None) -> list[dict[str, Any]]:
    """Image/label records of the training part (the first 1,437)."""
    x, y = pictures()
    return [{"image": x[i].clone(), "label": int(y[i])} for i in range(count or 1437)]


def untrained(null: int | None = NULL) -> Pipeline:
    """The architecture with random weights."""
    import diffusers

    unet: Any = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32),
        layers_per_block=1, down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=8, num_class_embeds=11,
    )  # fmt: skip
    scheduler: Any = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True)
    return Pipeline(diffusers.DDPMPipeline(unet, scheduler), null_class=null)


def trained(steps: int = 400, only: Tensor | None = None) -> Pipeline:
    """Trained on the first 1,437 digits, or on those that ``only`` (a mask) selects."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = untrained()
        x, y = (part[:1437] for part in pictures())
        if only is not None:
            x, y = x[only], y[only]
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
        averaged = {k: v.clone() for k, v in model.state_dict().items()}
        model.train()
        for step in range(steps):
            chosen = torch.randint(len(x), (64,))
            t, eps = torch.randint(1000, (64,)), torch.randn(64, 1, 8, 8)
            told = torch.where(torch.rand(64) < 0.1, NULL, y[chosen])
            x_t = noised(2 * x[chosen] - 1, eps, model.abars[t])
            loss = (model(x_t, t, told) - eps).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            keep = min(0.99, (1 + step) / (10 + step))
            for name, value in model.state_dict().items():
                averaged[name].lerp_(value, 1 - keep)
        model.load_state_dict(averaged)
    return model.eval()


class Judge(nn.Module):
    """A small convolutional classifier of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(32 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of pictures in [0, 1]."""
        found: Tensor = self.head(self.body(x))
        return found


def judge() -> Judge:
    """Trained on the first 1,437 digits; about 0.99 right on the others."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Judge()
        x, y = (part[:1437] for part in pictures())
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(300):
            chosen = torch.randint(len(x), (128,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return model.eval()


def says(judge: nn.Module, drawn: Tensor) -> np.ndarray:
    """The class the judge sees in each picture."""
    with torch.no_grad():
        return judge(drawn).argmax(1).numpy()


def hits(model: Pipeline, judge: nn.Module, label: int, count: int = 40, **sampling: Any) -> float:
    """Share of the pictures drawn for a class that show it."""
    generator = torch.Generator().manual_seed(label)
    settings = {"steps": 10, "guidance": 1.0, **sampling}
    return float(
        (says(judge, model.sample([label] * count, generator, **settings)) == label).mean()
    )


def save(model: Pipeline, directory: Path) -> Path:
    """Write the pipeline, with the note on its null class."""
    model.save_pretrained(directory)
    return directory
