"""What an attacker with both checkpoints reads from hidden states and from weights."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import rankdata
from torch import nn

from tests.plain import CLASSES, WIDTH, factory, vectors, with_statistics
from unlearn import demo
from unlearn.attacks.activation_difference import moved, states
from unlearn.attacks.weight_difference import (
    Change,
    OnDisk,
    answer_tokens,
    change,
    differences,
    in_blocks,
    output_name,
    rows_moved,
    rows_named,
    tensors,
)
from unlearn.checkpoint import inspect
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.interface import Subject
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.tasks.classification import Classification
from unlearn.training import Term, Training, ascent, descend, likelihood
from unlearn.weights import save

FORGOTTEN = 1


def auc(members: np.ndarray, others: np.ndarray) -> float:
    ranks = rankdata(np.concatenate([members, others]))[: len(members)]
    size = len(members)
    return float((ranks.sum() - size * (size + 1) / 2) / size / len(others))


# hidden states


def test_moved_by_hand() -> None:
    before = {"a": [[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]], "b": [[1.0], [2.0], [5.0]]}
    after = {"a": [[3.0, 4.0], [-1.0, 0.0], [0.0, 0.0]], "b": [[3.0], [2.0], [0.0]]}
    # a: 0/10, 2/2, 0/0; b: 2/4, 0/4, 5/5
    assert moved(before, after) == pytest.approx([0.25, 0.5, 0.5])


@given(st.integers(1, 5), st.integers(1, 4), st.floats(0.01, 100), st.integers(0, 2**16))
def test_moved_is_a_share_whatever_the_scale_of_a_layer(
    n: int, dim: int, scale: float, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    old, new = draw.normal(size=(2, n, dim))
    found = moved({"x": old}, {"x": new})
    assert ((found >= 0) & (found <= 1)).all()
    assert moved({"x": scale * old}, {"x": scale * new}) == pytest.approx(found)
    assert moved({"x": new}, {"x": old}) == pytest.approx(found)
    assert moved({"x": old}, {"x": old}).tolist() == [0.0] * n
    assert moved({"x": old}, {"x": -old}) == pytest.approx(np.ones(n))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, {}, "layer by layer"),
        ({"a": [[1.0]]}, {"b": [[1.0]]}, "layer by layer"),
        ({"a": [[1.0]]}, {"a": [[1.0, 2.0]]}, r"\(1, 1\) and \(1, 2\)"),
        ({"a": [1.0]}, {"a": [1.0]}, "shape"),
        ({"a": [[1.0]], "b": [[1.0], [2.0]]},) * 2 + ("every record",),
    ],
)
def test_states_that_cannot_be_compared(before: dict, after: dict, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        moved(before, after)


def test_forgotten_records_and_the_forgotten_class_stand_out() -> None:
    draw = torch.Generator().manual_seed(0)
    middle = 2.0 * torch.eye(CLASSES, WIDTH)
    rows = [
        {"features": middle[i % CLASSES] + 0.3 * torch.randn(WIDTH, generator=draw),
         "label": i % CLASSES}
        for i in range(60)
    ]  # fmt: skip
    task = Classification(CLASSES)
    run, everything = Run(task), Encoded(load(rows, "retain"), task)
    gone = [i for i, row in enumerate(rows) if row["label"] == FORGOTTEN]
    forget = everything.select(gone, "forget")
    retain = everything.select([i for i in range(60) if i not in gone], "retain")
    torch.manual_seed(0)
    fit = Training(lr=1e-2, epochs=20, batch_size=20, weight_decay=0.0, max_loss=1e3)
    terms = [Term("train", everything, likelihood, "unit")]
    before = descend(Subject(factory()), terms, fit, run).model

    def trained_on(*terms: Term) -> nn.Module:
        return descend(Subject(copy.deepcopy(before)), terms, fit, run).model

    def told(after: nn.Module) -> float:
        """How well hidden states tell the forgotten records from the others."""
        return auc(
            *(moved(states(before, s, run), states(after, s, run)) for s in (forget, retain))
        )

    held = Term("retain", retain, likelihood, "unit")
    after = trained_on(Term("forget", forget, ascent, "unit"), held)
    assert told(after) > 0.75
    assert told(after) > told(trained_on(Term("more", everything, likelihood, "unit")))
    found = rows_moved(before[2].weight, after[2].weight)
    assert found.argmax() == FORGOTTEN
    assert found.argmax() == FORGOTTEN
    assert rows_named(found, [FORGOTTEN]) == 1.0


def test_states_of_images_and_of_named_layers() -> None:
    forget = Encoded(load(vectors(7), "forget"), Classification(CLASSES))
    model, run = with_statistics().eval(), Run(forget.task)
    found = states(model, forget, run, ["0"])
    batch = forget.batch(range(7))
    assert found.keys() == {"0"}
    assert found["0"] == pytest.approx(model[0](batch["features"]).detach().numpy(), abs=1e-6)
    assert list(states(model, forget, run)) == ["0", "1", "2"]  # not the output layer
    with pytest.raises(BadInput, match="no layer 'z'"):
        states(model, forget, run, ["z"])
    with pytest.raises(BadInput, match="no blocks"):
        states(nn.Linear(WIDTH, CLASSES), forget, run)


def test_states_of_texts_have_read_the_question_alone(lm_world: demo.World) -> None:
    subject = demo.tiny_llama(lm_world.forget, width=32, depth=2)
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    said = Encoded(load(lm_world.forget, "forget"), task)
    other = Encoded(load([r | {"answer": "Nothing."} for r in lm_world.forget], "forget"), task)
    one, two = (states(subject.model, part, Run(task)) for part in (said, other))
    assert len(one) == 2
    assert moved(one, two) == pytest.approx(np.zeros(len(said)), abs=1e-5)


# weights


def test_change_by_hand() -> None:
    before, after = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [3.0, 0.0]])
    retrained = torch.tensor([[3.0, 8.0], [3.0, 0.0]])
    found = change(before, after, retrained)
    assert found == Change(4, 1, 25.0, 9.0, 25.0, 9.0)
    assert found.relative == pytest.approx(3 / 5)
    assert found.share_changed == 0.25
    assert found.cosine == pytest.approx(9 / (3 * 5))
    assert change(before, after).cosine is None
    assert change(before, before) == Change(4, 0, 25.0, 0.0, 0.0, 0.0)
    assert change(before, before).relative == 0.0
    assert change(torch.zeros(2), torch.ones(2)).relative == math.inf
    both = found + Change(6, 2, 0.0, 27.0, 0.0, 0.0)
    assert both == Change(10, 3, 25.0, 36.0, 25.0, 9.0)
    assert found.share_of(both) == 0.25
    assert Change().share_of(Change()) == Change().share_changed == 0.0
    with pytest.raises(BadInput, match=r"head: \(2, 2\), \(2,\)"):
        change(before, before[0], name="head")


def test_models_made_anew_share_half_of_their_change() -> None:
    before, one, other = torch.randn(3, 20000, generator=torch.Generator().manual_seed(0))
    assert change(before, one, other).cosine == pytest.approx(0.5, abs=0.02)


def test_blocks_of_depth_add_up() -> None:
    one = {
        "model.embed.weight": Change(1, 1, 1.0, 1.0),
        "model.layers.0.attn.weight": Change(2, 1, 1.0, 2.0),
        "model.layers.0.mlp.experts.3.weight": Change(3, 0, 1.0, 3.0),
        "model.layers.10.attn.weight": Change(4, 4, 1.0, 4.0),
        "0.weight": Change(5, 0, 0.0, 5.0),
    }
    found = in_blocks(one)
    assert list(found) == ["model.embed.weight", "model.layers.0", "model.layers.10", "0"]
    assert found["model.layers.0"] == Change(5, 1, 2.0, 5.0)
    assert sum(found.values(), Change()) == sum(one.values(), Change())


def test_files_and_models_say_the_same_and_files_are_read_lazily(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = inspect(str(tiny_lm)).load()
    before = copy.deepcopy(subject.model)
    with torch.no_grad():
        subject.model.model.layers[1].mlp.up_proj.weight[0] += 1.0
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    save(Subject(copy.deepcopy(subject.model), subject.processor), torch.float32, run / "model")
    on_disk, in_memory = differences(tiny_lm, run), differences(before, subject.model)
    assert on_disk == in_memory  # tied weights are counted once on both sides
    changed = {name: one for name, one in on_disk.items() if one.squared}
    assert list(changed) == ["model.layers.1.mlp.up_proj.weight"]
    (only,) = changed.values()
    assert only.changed == 32
    assert only.squared == pytest.approx(32.0, rel=1e-5)
    with_retrained = differences(tiny_lm, run, run)
    assert with_retrained["model.layers.1.mlp.up_proj.weight"].cosine == pytest.approx(1.0)
    lazy = tensors(run)
    assert isinstance(lazy, OnDisk)
    assert len(lazy) == len(on_disk)
    read: list[str] = []
    monkeypatch.setattr(OnDisk, "__getitem__", lambda self, name: read.append(name))
    assert set(lazy) == set(on_disk)
    assert not read


def test_shards(tmp_path: Path) -> None:
    a, b = {"a": torch.ones(2)}, {"b": torch.zeros(3), "steps": torch.tensor(4)}
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    save_file(a | b, tmp_path / "one" / "model.safetensors")
    save_file({"a": 2 * a["a"]}, tmp_path / "two" / "1.safetensors")
    save_file(b | {"steps": torch.tensor(5)}, tmp_path / "two" / "2.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "steps": "2.safetensors"}}
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps(index))
    found = differences(tmp_path / "one", str(tmp_path / "two"))
    assert found == {"a": Change(2, 2, 2.0, 2.0), "b": Change(3)}  # counters are no weights
    same = differences(tmp_path / "one" / "model.safetensors", a | b)
    assert not sum(same.values(), Change()).changed


def test_checkpoints_that_cannot_be_compared(tmp_path: Path) -> None:
    one = {"a": torch.ones(2)}
    with pytest.raises(BadInput, match="b is in one"):
        differences(one, one | {"b": torch.ones(1)})
    with pytest.raises(BadInput, match="b is in one"):
        differences(one, one, one | {"b": torch.ones(1)})
    with pytest.raises(BadInput, match="shape of a"):
        differences(one, {"a": torch.ones(3)})
    with pytest.raises(BadInput, match="does not exist"):
        differences(one, tmp_path / "nowhere")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(BadInput, match="pickle"):
        differences(one, tmp_path)


def test_rows_by_hand() -> None:
    before = torch.zeros(4, 2)
    after = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    found = rows_moved(before, after)
    assert found.tolist() == [5.0, 1.0, 0.0, 1.0]
    assert rows_named(found, [0]) == 1.0
    assert rows_named(found, [2]) == 0.0
    assert rows_named(found, [1]) == 0.5  # over 0, level with 1, under 5
    assert rows_named(found, [0, 2], [1, 3]) == 0.5
    assert rows_moved(before.half(), before.half()).tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("named", "others"),
    [
        ([], None),
        ([0, 1, 2], None),
        ([0], [0, 1]),
        ([3], None),
        ([0], [3]),
        ([-1], None),
        ([0], []),
    ],
)
def test_rows_that_cannot_be_compared(named: list[int], others: list[int] | None) -> None:
    with pytest.raises(BadInput, match="row"):
        rows_named([1.0, 2.0, 3.0], named, others)
    with pytest.raises(BadInput, match="cannot be compared"):
        rows_moved(torch.zeros(2, 3), torch.zeros(3, 3))


def test_tokens_of_forgotten_answers_stand_out(lm_world: demo.World) -> None:
    known = [*lm_world.forget, *lm_world.retain]
    subject = demo.train(demo.tiny_llama(known, width=32, depth=2), known, epochs=30)
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)
    parts = (lm_world.forget, "forget"), (lm_world.retain, "retain")
    forget, retain = (Encoded(load(records, name), task) for records, name in parts)
    gone, kept = answer_tokens(forget, retain)
    assert not set(gone) & set(kept)
    said = {int(t) for i in range(len(forget)) for t in forget[i]["answer"]}
    assert said <= set(gone) | set(kept)
    assert task.eos in kept
    before = copy.deepcopy(subject.model)
    terms = [Term("forget", forget, ascent, "unit"), Term("retain", retain, likelihood, "unit")]
    descend(subject, terms, Training(lr=1e-3, epochs=6, weight_decay=0.0, max_loss=1e3), Run(task))
    name = output_name(subject.model, task)
    assert name == "model.embed_tokens.weight"  # tied
    found = rows_moved(tensors(before)[name], tensors(subject.model)[name])
    assert rows_named(found, gone, kept) > 0.6
    with pytest.raises(BadInput, match="language models"):
        answer_tokens(Encoded(load(vectors(3), "forget"), Classification(CLASSES)), retain)


def test_the_output_layer_is_found_without_weights(tiny_lm: Path) -> None:
    checkpoint = inspect(str(tiny_lm))
    with torch.device("meta"):
        model = checkpoint.fresh()
    assert output_name(model, checkpoint.task) in tensors(tiny_lm)
    assert output_name(factory(), Classification(CLASSES)) == "2.weight"
