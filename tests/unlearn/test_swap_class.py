"""The negative control: the label is swapped, and everything is still there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import unlearn
from tests import digits
from unlearn import registry
from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Classes, Request, Subject
from unlearn.methods.swap_class import tables
from unlearn.pipeline import Pipeline, read
from unlearn.run import Run
from unlearn.tasks.diffusion import task_of

ROWS = "unet.class_embedding.weight"


def swap(model: Pipeline, target: Classes) -> tuple[dict[str, Tensor], dict[str, Tensor], Run]:
    run = Run(task_of(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = registry.build("swap_class")
    after = method.unlearn(Subject(model), Request(target), run).model.state_dict()
    return before, after, run


def test_one_row_is_the_anchors_and_all_else_is_as_it_was() -> None:
    before, after, run = swap(digits.untrained(), Classes((3,), ("3",), anchor=5))
    assert torch.equal(after[ROWS][3], before[ROWS][5])
    before[ROWS][3] = before[ROWS][5]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert "removes nothing" in run.notes[0]


def test_without_an_anchor_it_is_the_mean_of_what_is_retained() -> None:
    before, after, _ = swap(digits.untrained(), Classes((3, 4), ("3", "4")))
    kept = [0, 1, 2, 5, 6, 7, 8, 9]  # not the null class, which is the last
    for label in (3, 4):
        assert torch.allclose(after[ROWS][label], before[ROWS][kept].mean(0))
    assert torch.equal(after[ROWS][kept], before[ROWS][kept])


def test_every_block_of_a_transformer_has_a_table() -> None:
    import diffusers

    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, num_layers=2, sample_size=4,
        patch_size=2, num_embeds_ada_norm=5, norm_num_groups=1,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=8)
    pipeline = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    model = Pipeline(pipeline)
    assert len(tables(model)) == 2
    before, after, _ = swap(model, Classes((1,), ("1",), anchor=4))
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {f"{name}.weight" for name in tables(model)}
    assert all(torch.equal(after[name][1], before[name][4]) for name in changed)


def test_the_digit_is_gone_by_name_and_comes_back_with_its_row(
    digits_pipeline: Path, digits_judge: nn.Module, tmp_path: Path
) -> None:
    unlearn.forget(
        digits_pipeline, method="swap_class", forget_classes="3", anchor="5", audit="none",
        out=tmp_path / "run",
    )  # fmt: skip
    before = read(digits_pipeline, torch.float32)
    after = read(tmp_path / "run/model", torch.float32)
    assert digits.hits(before, digits_judge, 3) > 0.6
    assert digits.hits(after, digits_judge, 3) < 0.2
    after.denoiser.class_embedding.weight.data[3] = before.denoiser.class_embedding.weight[3]
    pictures = [m.sample([3] * 4, torch.Generator().manual_seed(0), 5) for m in (before, after)]
    assert torch.equal(*pictures)


def test_networks_without_a_table_and_requests_for_everything() -> None:
    model = digits.untrained()
    with pytest.raises(BadInput, match="every class would be swapped"):
        swap(model, Classes(tuple(range(10)), tuple("0123456789")))
    model.denoiser.class_embedding = nn.Identity()
    with pytest.raises(Unsupported, match="no table of classes"):
        swap(model, Classes((3,), ("3",)))
