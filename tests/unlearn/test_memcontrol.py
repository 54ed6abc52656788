"""MemControl: fine-tuning of chosen groups of parameters, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from unlearn import demo
from unlearn.checkpoint import Checkpoint
from unlearn.config import RunConfig, configure
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.interface import Records, Request
from unlearn.methods.finetune import Finetune
from unlearn.methods.memcontrol import MemControl, groups
from unlearn.plan import plan
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.weights import save

WORLD = demo.people(seed=2, forget=1, retain=2, holdout=1)


def subject() -> Any:
    return demo.tiny_llama([*WORLD.forget, *WORLD.retain], width=16, depth=3)


def tuned(method: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after."""
    start = subject()
    before = {k: v.clone() for k, v in start.model.state_dict().items()}
    task = CausalLM(start.processor, start.model.config.vocab_size, 128)
    retain = Encoded(load(WORLD.retain, "retain"), task)
    after = method.unlearn(start, Request(Records(1), None, retain), Run(task))
    assert all(p.requires_grad for p in after.model.parameters())
    return before, after.model.state_dict()


def changed(method: Any) -> set[str]:
    before, after = tuned(method)
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


GENTLE = {"lr": 1e-3, "epochs": 1, "batch_size": 4}


def test_only_the_chosen_groups_move_and_the_rest_is_bit_identical() -> None:
    there = groups(name for name, _ in subject().model.named_parameters())
    found = changed(MemControl(moves="attention.1, norm.3,embedding", **GENTLE))
    wanted = {n for g in ("attention.1", "norm.3", "embedding") for n in there[g]}
    tied = {"lm_head.weight"}  # the same tensor as the embedding's
    assert found - tied == wanted
    assert "model.layers.0.self_attn.q_proj.weight" in found
    assert "model.layers.0.mlp.up_proj.weight" not in found


def test_all_groups_are_finetuning() -> None:
    _, everything = tuned(MemControl(**GENTLE))
    _, plain = tuned(Finetune(**GENTLE))
    assert all(torch.equal(everything[name], plain[name]) for name in plain)


def test_groups_hold_every_parameter_once() -> None:
    names = [name for name, _ in subject().model.named_parameters()]
    found = groups(names)
    assert sorted(n for part in found.values() for n in part) == sorted(names)
    assert set(found) == {
        *(f"{kind}.{i}" for kind in ("attention", "feed_forward", "norm") for i in (1, 2, 3)),
        "embedding", "norm",
    }  # fmt: skip


def test_depth_is_counted_in_numbers_and_stacks_need_more_than_one() -> None:
    names = [f"layers.{i}.attn.w" for i in (0, 1, 2, 9, 10, 11)] + ["classifier.1.weight"]
    found = groups(names)
    assert found["attention.3"] == ["layers.10.attn.w", "layers.11.attn.w"]
    assert found["other"] == ["classifier.1.weight"]


def test_stacks_count_as_they_appear_whatever_they_are_called() -> None:
    found = groups(f"{side}.block.{i}.mlp.w" for side in ("encoder", "decoder") for i in range(3))
    assert found["feed_forward.1"] == ["encoder.block.0.mlp.w", "encoder.block.1.mlp.w"]
    assert found["feed_forward.3"] == ["decoder.block.1.mlp.w", "decoder.block.2.mlp.w"]


def test_a_resnet_has_thirds() -> None:
    names = ["conv1.weight", "bn1.weight", "fc.weight"] + [
        f"layer{stack}.{i}.{part}.weight"
        for stack in (1, 2, 3) for i in (0, 1) for part in ("conv1", "bn1")
    ]  # fmt: skip
    assert groups(names) == {
        "convolution": ["conv1.weight"], "norm": ["bn1.weight"], "feed_forward": ["fc.weight"],
        **{f"convolution.{n}": [f"layer{n}.{i}.conv1.weight" for i in (0, 1)] for n in (1, 2, 3)},
        **{f"norm.{n}": [f"layer{n}.{i}.bn1.weight" for i in (0, 1)] for n in (1, 2, 3)},
    }  # fmt: skip


def test_the_feed_forward_part_of_bert_is_whole() -> None:
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
                   intermediate_size=8)
    )  # fmt: skip
    found = groups(name for name, _ in model.named_parameters())
    assert found["feed_forward.2"] == [
        f"encoder.layer.1.{part}.dense.{kind}"
        for part in ("intermediate", "output") for kind in ("weight", "bias")
    ]  # fmt: skip
    assert len(found["attention.2"]) == 8
    assert not [group for group in found if group.startswith("other.")]


def test_the_middle_of_a_unet_is_between_its_sides() -> None:
    found = groups(
        ["unet.up_blocks.0.resnets.0.conv1.weight", "unet.up_blocks.1.resnets.0.conv1.weight",
         "unet.mid_block.resnets.0.conv1.weight", "unet.mid_block.attentions.0.to_q.weight",
         "unet.down_blocks.0.resnets.0.conv1.weight", "unet.down_blocks.1.resnets.0.norm1.weight",
         "unet.conv_in.weight"]
    )  # fmt: skip
    assert found == {
        "attention.2": ["unet.mid_block.attentions.0.to_q.weight"],
        "convolution": ["unet.conv_in.weight"],
        "convolution.1": ["unet.down_blocks.0.resnets.0.conv1.weight"],
        "convolution.2": ["unet.up_blocks.0.resnets.0.conv1.weight",
                          "unet.mid_block.resnets.0.conv1.weight"],
        "convolution.3": ["unet.up_blocks.1.resnets.0.conv1.weight"],
        "norm.1": ["unet.down_blocks.1.resnets.0.norm1.weight"],
    }  # fmt: skip


def test_what_cannot_move() -> None:
    request = Request(Records(1))
    with pytest.raises(BadInput, match="names no group"):
        MemControl(moves=" , ").check(request)
    with pytest.raises(BadInput, match="leave scope out"):
        MemControl(scope="head").check(request)
    with pytest.raises(BadInput, match=r"no group 'atention\.1': did you mean attention\.1"):
        tuned(MemControl(moves="atention.1", **GENTLE))


def test_an_unknown_group_is_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: Any
) -> None:
    save(subject(), torch.float32, tmp_path / "model")
    monkeypatch.setattr(Checkpoint, "load", None)
    config = configure(
        RunConfig, checkpoint=tmp_path / "model", method="memcontrol", forget=WORLD.forget,
        retain=WORLD.retain, set={"moves": "attention.1,atention.2"},
    )  # fmt: skip
    with pytest.raises(BadInput, match=r"no group 'atention\.2': did you mean attention\.2"):
        plan(config)
