"""The round trip through few bits: what it may change and by how much."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.plain import factory, vectors, with_statistics
from unlearn import demo
from unlearn.attacks.interface import Ground, Inapplicable
from unlearn.attacks.quantization import (
    SEARCHES,
    backend,
    by_bitsandbytes,
    matrices,
    quantize,
    rounded,
)
from unlearn.attacks.signals import collect, hit_rates
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.run import Run, Silent
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.tasks.classification import Classification


def test_by_hand() -> None:
    weight = torch.tensor([[7.0, 3.4, -0.4, -7.0], [0.0, 0.0, 0.0, 0.0], [0.7, 0.26, 14.0, 5.1]])
    wanted = torch.tensor([[7.0, 3.0, 0.0, -7.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 14.0, 6.0]])
    assert torch.allclose(rounded(weight, bits=4), wanted)
    pairs = torch.tensor([[7.0, 3.0, 0.0, -7.0], [0.0] * 4, [0.7, 0.3, 14.0, 6.0]])
    assert torch.allclose(rounded(weight, bits=4, group=2), pairs)


@given(st.integers(2, 8), st.integers(1, 9), st.integers(0, 2**16))
def test_no_weight_moves_by_more_than_half_a_step_and_a_second_trip_moves_none(
    bits: int, group: int, seed: int
) -> None:
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed))
    once = rounded(weight, bits, group)
    for start in range(0, 7, group):
        part = slice(start, start + group)
        step = weight[:, part].abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((once - weight)[:, part].abs() <= step * 0.50001).all()
    assert torch.allclose(rounded(once, bits, group), once, atol=1e-6)


def test_output_layer_and_embeddings_keep_their_weights() -> None:
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    task = object.__new__(CausalLM)
    count = quantize(model, task, bits=3)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    block = "transformer.h.0."
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"{block}{name}.weight" for name in names}
    assert count == sum(before[name].numel() for name in changed)
    transposed = before[f"{block}mlp.c_fc.weight"].T
    found = model.get_parameter(f"{block}mlp.c_fc.weight").T
    assert torch.equal(found, rounded(transposed, bits=3))


def test_bits_out_of_range() -> None:
    with pytest.raises(BadInput, match="2 to 8"):
        rounded(nn.Linear(2, 2).weight, bits=1)


EIGHT, FOUR = SEARCHES


def vectors_to_forget(size: int = 12) -> Encoded:
    return Encoded(load(vectors(size), "forget"), Classification(3))


def test_eight_bits_share_a_scale_per_row_and_four_per_group() -> None:
    """The scores are those of a model that was rounded by hand."""
    torch.manual_seed(3)
    forget = vectors_to_forget(30)
    model, run = with_statistics(), Run(forget.task)
    batch = forget.batch(range(30))
    for search, bits in ((EIGHT, 8), (FOUR, 4)):
        found = search.score(model, Ground(forget), run)
        weight = model[0].weight.detach()
        step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        by_hand = with_statistics()
        by_hand.load_state_dict(model.state_dict())
        with torch.no_grad():
            by_hand[0].weight.copy_((weight / step).round() * step)
            hits = by_hand.eval()(batch["features"]).argmax(1) == batch["labels"][:, 0]
        assert found.tolist() == hits.double().tolist()


def test_what_small_updates_hid_comes_back() -> None:
    """Updates below half a step flip answers; rounding undoes every one of them."""
    draw = torch.Generator().manual_seed(0)
    knows = torch.randint(-1, 2, (3, 5), generator=draw).float()
    knows[:, 0] = 7.0  # the largest weight of each row: steps are 1
    model = nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 3, bias=False))
    rows = vectors(60)
    for row in rows:
        row["label"] = int((knows @ torch.tensor(row["features"])).argmax())
    forget = Encoded(load(rows, "forget"), Classification(3))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3))
        model[0].weight.copy_(knows)
        model[0].weight[:, 1:] += 0.45 * torch.randn(3, 4, generator=draw).sign()
    run = Run(forget.task)
    hidden = hit_rates(collect(model, forget, run, b"", "hidden"))
    assert 0.5 < hidden.mean() < 0.95
    assert FOUR.score(model, Ground(forget), run).tolist() == [1.0] * 60
    assert hit_rates(collect(model, forget, run, b"", "again")).tolist() == hidden.tolist()


def test_a_language_model_is_scored_by_its_answer_tokens(lm_world: demo.World) -> None:
    subject = demo.tiny_llama(lm_world.forget, width=32, depth=2)
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    forget, run = Encoded(load(lm_world.forget, "forget"), task), Run(task)
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    found = FOUR.score(subject.model, Ground(forget), run)
    assert all(torch.equal(before[n], v) for n, v in subject.model.state_dict().items())
    quantize(subject.model, task, bits=4)
    wanted = [float(row.mean()) for row in collect(subject.model, forget, run, b"", "x").hits()]
    assert found.tolist() == wanted


class Impatient(Silent):
    """Interrupts the forward pass."""

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("search", SEARCHES)
def test_weights_and_modes_are_back_after_an_interruption(search) -> None:
    model = with_statistics().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = Run(Classification(3), progress=Impatient())
    with pytest.raises(KeyboardInterrupt):
        search.score(model, Ground(vectors_to_forget()), run)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_of_one_layer_cannot_be_rounded() -> None:
    with pytest.raises(Inapplicable, match="no layer to round"):
        FOUR.score(
            nn.Sequential(nn.Linear(5, 3)), Ground(vectors_to_forget()), Run(Classification(3))
        )


def test_what_is_written_into_the_matrices_is_in_the_model() -> None:
    model = factory()
    (rows,) = matrices(model, Classification(3))
    rows.fill_(2.0)
    assert (model[0].weight == 2).all()
    assert not (model[2].weight == 2).any()


def test_without_a_gpu_torch_rounds() -> None:
    assert backend(torch.device("cpu")) == "torch"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bitsandbytes_on_a_gpu() -> None:
    pytest.importorskip("bitsandbytes")
    device = torch.device("cuda")
    assert backend(device) == "bitsandbytes"
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(device)
    eight, four = by_bitsandbytes(weight, 8), by_bitsandbytes(weight, 4)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((eight - weight).abs() <= 0.51 * step + 1e-3 * weight.abs()).all()  # fp16 on the way
    whole = four.flatten().view(-1, 64) / weight.flatten().view(-1, 64).abs().amax(1, keepdim=True)
    assert len(whole.mul(1e4).round().unique()) <= 16
    assert 0 < float((four - weight).abs().max()) < float(weight.abs().max())
    model, forget = with_statistics().to(device), vectors_to_forget()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for search in SEARCHES:
        assert search.score(model, Ground(forget), Run(forget.task, device=device)).shape == (12,)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
