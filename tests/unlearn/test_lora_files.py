"""Adapters of pipelines: plain diffusers reads them, and so do we."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import unlearn
from tests import digits, shapes
from unlearn import lora_files
from unlearn.checkpoint import inspect

UCE = {"method": "uce", "forget_concepts": "disc", "anchor": "box"}
TRAINED = {
    "method": "gradient_ascent",
    "forget": shapes.records(4),
    "scope": "lora",
    "set": {"lr": 1e-2, "epochs": 2, "batch_size": 2, "lora_rank": 3, "lora_alpha": 12},
}
PLAIN = """
import sys, torch, diffusers
from safetensors.torch import save_file
base, run, out = sys.argv[1:]
pipe = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
pipe.set_progress_bar_config(disable=True)

def drawn():
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe(["a red disc"], latents=noise, num_inference_steps=3, guidance_scale=3.0,
                output_type="pt").images

before = drawn()
pipe.load_lora_weights(run)
adapted = drawn()
pipe.fuse_lora()
pipe.unload_lora_weights()
assert "unlearn" not in sys.modules
weights = {k: v.contiguous() for k, v in pipe.unet.state_dict().items()}
save_file({**weights, "picture": adapted, "fused": drawn(), "before": before}, out)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes pipeline in float32; do not write into it."""
    directory = tmp_path_factory.mktemp("shapes") / "base"
    shapes.pipeline().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("request_", [UCE, TRAINED], ids=["uce", "lora"])
def test_plain_diffusers_loads_it_in_a_process_of_its_own(
    base: Path, tmp_path: Path, request_: dict[str, object]
) -> None:
    result = unlearn.forget(base, **request_, audit="none", out=tmp_path / "run")
    paths = [str(p) for p in (base, tmp_path / "run/model", tmp_path / "found.safetensors")]
    made = subprocess.run([sys.executable, "-c", PLAIN, *paths], cwd=tmp_path, check=False,
                          capture_output=True, text=True)  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")
    pictures = {key: found.pop(key) for key in ("picture", "fused", "before")}
    ours = {n.removeprefix("unet."): p for n, p in result.subject.model.state_dict().items()}
    assert found.keys() == ours.keys()
    assert max(float((found[n] - ours[n]).abs().max()) for n in found) < 1e-5
    assert torch.allclose(pictures["picture"], pictures["fused"], atol=1e-3)
    assert not torch.allclose(pictures["picture"], pictures["before"], atol=1e-2)


def test_we_read_the_adapter_back_bit_for_bit_and_go_on(base: Path, tmp_path: Path) -> None:
    result = unlearn.forget(base, **TRAINED, audit="none", out=tmp_path / "run")
    assert {path.name for path in (tmp_path / "run/model").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "base.json", lora_files.LORA,
    }  # fmt: skip
    read = inspect(tmp_path / "run").load().model.state_dict()
    assert all(torch.equal(read[n], p) for n, p in result.subject.model.state_dict().items())
    merged = unlearn.forget(base, **TRAINED, merge=True, audit="none", out=tmp_path / "merged")
    assert (tmp_path / "merged/model/model_index.json").exists()
    assert not (tmp_path / "merged/model" / lora_files.LORA).exists()
    assert all(torch.equal(read[n], p) for n, p in merged.subject.model.state_dict().items())
    again = unlearn.forget(tmp_path / "run", **UCE, audit="none", out=tmp_path / "again")
    found = inspect(tmp_path / "again")
    assert [entry["method"] for entry in found.lineage] == ["gradient_ascent", "uce"]
    state = found.load().model.state_dict()
    assert all(torch.equal(state[n], p) for n, p in again.subject.model.state_dict().items())


def test_a_pipeline_without_prompts_keeps_the_peft_adapter_alone(
    digits_pipeline: Path, tmp_path: Path
) -> None:
    """diffusers has nothing to load adapters with into these pipelines."""
    request = {**TRAINED, "forget": digits.records(4)}
    result = unlearn.forget(digits_pipeline, **request, audit="none", out=tmp_path / "run")
    assert not (tmp_path / "run/model" / lora_files.LORA).exists()
    read = inspect(tmp_path / "run").load().model.state_dict()
    assert all(torch.equal(read[n], p) for n, p in result.subject.model.state_dict().items())


def test_the_scale_is_in_b(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, generator=draw), torch.randn(3, 2, generator=draw)
    prefix = "base_model.model.unet.block.to_k"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "r": 2}))
    lora_files.write(tmp_path, tmp_path)
    found = load_file(tmp_path / lora_files.LORA)
    assert found.keys() == {"unet.block.to_k.lora_A.weight", "unet.block.to_k.lora_B.weight"}
    assert torch.equal(found["unet.block.to_k.lora_A.weight"], a)
    assert torch.allclose(found["unet.block.to_k.lora_B.weight"], 3 * b)
