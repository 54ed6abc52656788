"""Adapters of pipelines as diffusers reads them: ``pipe.load_lora_weights(directory)``.

peft names the two factors of a layer ``base_model.model.unet....lora_A.weight``, and keeps their
scale in a configuration beside the file; diffusers names them ``unet....lora_A.weight``, and
takes the scale to be 1 where nothing else is said. So the scale is multiplied into B.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PEFT, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA = "pytorch_lora_weights.safetensors"  # the name diffusers looks for first


def write(adapter: Path, directory: Path) -> None:
    """Write an adapter that peft saved once more, beside it, as diffusers reads it.

    Args:
        adapter: directory that peft wrote, of adapters on a pipeline's denoiser.
        directory: to write into.
    """
    config = json.loads((adapter / PEFT_CONFIG).read_text())
    scale = config["lora_alpha"] / config["r"]
    found = {}
    for name, value in load_file(adapter / PEFT).items():
        scaled = value * scale if ".lora_B." in name else value
        found[name.removeprefix("base_model.model.")] = scaled.to(torch.float32).contiguous()
    save_file(found, directory / LORA, metadata={"format": "pt"})
