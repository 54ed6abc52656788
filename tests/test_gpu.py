"""The same request on a GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import unlearn
from unlearn import demo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("npo", {"epochs": 2, "retention": "kl"}),
        ("npo", {"epochs": 2, "precision": "bf16"}),
        ("ssd", {}),
        ("grad_diff", {"epochs": 2, "scope": "lora"}),
    ],
)
def test_a_gpu_gives_what_the_cpu_gives(
    tiny_lm: Path, lm_world: demo.World, method: str, settings: dict[str, object]
) -> None:
    reports = [
        unlearn.forget(
            tiny_lm,
            method=method,
            forget=lm_world.forget,
            retain=lm_world.retain,
            set=settings,
            device=device,
        ).report
        for device in ("cpu", "cuda")
    ]
    for one, other in zip(reports[0].findings, reports[1].findings, strict=True):
        if one.name == "loss":
            assert other.unlearned.value == pytest.approx(one.unlearned.value, rel=0.05)
