"""Networks that answer together: what they say, and that they come back from disk as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from tests import plain
from unlearn.checkpoint import Checkpoint, Options, inspect
from unlearn.data import load
from unlearn.ensemble import ENSEMBLE, Ensemble
from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Subject
from unlearn.tasks.base import Encoded
from unlearn.tasks.classification import Classification
from unlearn.weights import save

FACTORY = "tests.plain:factory"
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ships", "sail", "far", "away")


def vectors(count: int = 3) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [plain.factory() for _ in range(count)]


def images(model: Path, count: int = 3) -> tuple[list[nn.Module], Checkpoint]:
    """Members that differ, and the checkpoint they are of the kind of."""
    found = inspect(model)
    assert found.fresh is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [found.fresh().eval() for _ in range(count)], found


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[nn.Module], Encoded]:
    """Two text classifiers that take three inputs by name, and texts of several lengths."""
    vocabulary = tmp_path_factory.mktemp("words") / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        members = [BertForSequenceClassification(config).eval() for _ in range(2)]
    records = [{"text": "ships sail", "label": 0}, {"text": "far away ships sail", "label": 2}]
    task = Classification(3, processor=BertTokenizerFast(str(vocabulary)))
    return members, Encoded(load(records, "forget"), task)


def test_probabilities_are_the_mean_of_the_members() -> None:
    members = vectors()
    inputs = torch.randn(7, plain.WIDTH, generator=torch.Generator().manual_seed(1))
    said = Ensemble(members)(inputs).softmax(1)
    mean = sum(member(inputs).double().softmax(1) for member in members) / 3
    assert torch.allclose(said.double(), mean, atol=1e-6)
    assert torch.equal(Ensemble(members[:1])(inputs).argmax(1), members[0](inputs).argmax(1))


def test_an_impossible_member_is_outvoted_and_gradients_stay_finite() -> None:
    """A probability of 0 in one member has an infinite logarithm, and a mean with a finite one."""
    sure, torn = (nn.Linear(1, 2, bias=False) for _ in range(2))
    for layer, value in ((sure, 1e4), (torn, 0.0)):
        layer.weight.data = torch.tensor([[value], [-value]])
    said = Ensemble([sure, torn])(torch.ones(1, 1)).log_softmax(1)
    assert said.exp().tolist()[0] == pytest.approx([0.75, 0.25])
    said[0, 1].backward()
    assert all(bool(torch.isfinite(layer.weight.grad).all()) for layer in (sure, torn))


def test_texts_reach_every_member_by_name(texts: tuple[list[nn.Module], Encoded]) -> None:
    members, records = texts
    batch = records.batch([0, 1])
    assert {"input_ids", "token_type_ids", "attention_mask"} < batch.keys()
    with torch.no_grad():
        each = [records.task.logits(member, batch).softmax(-1) for member in members]
        said = records.task.logits(Ensemble(members).eval(), batch).softmax(-1)
    assert torch.allclose(said, sum(each) / 2, atol=1e-6)


def test_inputs_by_position_are_refused_where_their_names_matter(
    texts: tuple[list[nn.Module], Encoded],
) -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(Unsupported, match="by name"):
        Ensemble(texts[0])(ids, ids)


def test_members_of_two_architectures_are_no_ensemble() -> None:
    with pytest.raises(BadInput, match="one architecture"):
        Ensemble([plain.factory(), plain.with_statistics()])
    with pytest.raises(BadInput, match="at least one"):
        Ensemble([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_images_come_back_as_they_were(
    tiny_images: tuple[Path, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    members, kind = images(tiny_images[0])
    one = members[0].to(torch.float64 if dtype is torch.float64 else torch.float32)
    wide = [m.to(next(one.parameters()).dtype) for m in members]
    fingerprint = save(Subject(Ensemble(wide), kind.processor), dtype, tmp_path / "model")
    found = inspect(tmp_path / "model")
    assert (found.fingerprint, found.stored.dtype) == (fingerprint, dtype)
    assert found.stored.parameters == 3 * inspect(tmp_path / "model" / "0").stored.parameters
    assert isinstance(found.task, Classification)
    assert found.task.names == ("ant", "bee", "cat", "dog")
    read = found.load().model
    assert isinstance(read, Ensemble)
    held = Ensemble(wide).state_dict()  # what was saved, in the precision it was saved in
    assert read.state_dict().keys() == held.keys()
    assert all(torch.equal(v, held[k].to(v.dtype)) for k, v in read.state_dict().items())
    again = save(found.load(), dtype, tmp_path / "again")
    assert again == fingerprint
    assert set(found.parameter_names()) == {name for name, _ in read.named_parameters()}


def test_every_member_is_a_checkpoint_of_its_own(
    tiny_images: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForImageClassification

    members, kind = images(tiny_images[0], 2)
    save(Subject(Ensemble(members), kind.processor), torch.float32, tmp_path)
    assert json.loads((tmp_path / ENSEMBLE).read_text()) == {"members": 2, "kind": "transformers"}
    for number, member in enumerate(members):
        alone = AutoModelForImageClassification.from_pretrained(tmp_path / str(number))
        assert all(torch.equal(v, member.state_dict()[k]) for k, v in alone.state_dict().items())


def test_plain_networks_come_back_and_can_start_anew(tmp_path: Path) -> None:
    members = vectors()
    fingerprint = save(Subject(Ensemble(members)), torch.float32, tmp_path)
    found = inspect(tmp_path, Options(model=FACTORY))
    assert (found.fingerprint, found.task.classes) == (fingerprint, plain.CLASSES)
    inputs = torch.ones(2, plain.WIDTH)
    assert torch.equal(found.load().model(inputs), Ensemble(members)(inputs))
    assert found.fresh is not None
    fresh = found.fresh()
    assert fresh.state_dict().keys() == Ensemble(members).state_dict().keys()
    assert not torch.equal(fresh(inputs), Ensemble(members)(inputs))


def test_a_change_in_any_member_changes_the_fingerprint(tmp_path: Path) -> None:
    members = vectors()
    before = save(Subject(Ensemble(members)), torch.float32, tmp_path / "before")
    members[2][0].bias.data[0] += 1
    assert save(Subject(Ensemble(members)), torch.float32, tmp_path / "after") != before
    order = Ensemble([members[1], members[0], members[2]])
    assert save(Subject(order), torch.float32, tmp_path / "order") != before


def test_an_ensemble_in_memory_is_a_classifier(tiny_images: tuple[Path, Path]) -> None:
    members, _ = images(tiny_images[0], 2)
    found = inspect(Ensemble(members))
    assert isinstance(found.task, Classification)
    assert found.task.names == ("ant", "bee", "cat", "dog")
    assert inspect(Ensemble(vectors())).task.classes == plain.CLASSES


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"members": 2}', "is damaged"),
        ('{"members": "2", "kind": "module"}', "is damaged"),
        ('{"members": 2, "kind": "choir"}', "is damaged"),
        ('{"members": 4, "kind": "module"}', "lacks its member 3"),
    ],
)
def test_a_damaged_ensemble_is_named(tmp_path: Path, content: str, says: str) -> None:
    save(Subject(Ensemble(vectors())), torch.float32, tmp_path)
    (tmp_path / ENSEMBLE).write_text(content)
    with pytest.raises(BadInput, match=says):
        inspect(tmp_path, Options(model=FACTORY))


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    save(Subject(Ensemble(vectors())), torch.float32, tmp_path / "one")
    with pytest.raises(BadInput, match="--model"):
        inspect(tmp_path / "one")
    save(Subject(Ensemble(vectors())), torch.bfloat16, tmp_path / "two")
    shutil.rmtree(tmp_path / "one" / "1")
    shutil.copytree(tmp_path / "two" / "1", tmp_path / "one" / "1")
    with pytest.raises(BadInput, match="differ in shape or precision"):
        inspect(tmp_path / "one", Options(model=FACTORY))
