"""Loading and saving: precision and names kept, nothing unsafe or damaged trusted."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import nn

from tests import plain
from unlearn.checkpoint import Options, inspect
from unlearn.errors import BadInput, Collapsed, UnlearnError, Unsupported
from unlearn.interface import Subject
from unlearn.tasks.causal_lm import CausalLM
from unlearn.tasks.classification import Classification
from unlearn.weights import (
    fingerprint_files,
    header,
    master,
    read_state,
    save,
    weight_files,
    write_state,
)

FACTORY = "tests.plain:factory"
PRECISIONS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in weight_files(directory) for k, v in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def wrong(source, options: Options | None = None, kind: type[UnlearnError] = BadInput) -> str:
    """What looking at a checkpoint says is wrong with it."""
    with pytest.raises(kind) as caught:
        inspect(source, options)
    return str(caught.value)


@pytest.fixture
def copied(tiny_lm: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_lm, tmp_path / "model")


def edit(file: Path, **changes) -> None:
    content = json.loads(file.read_text())
    content.update(changes)
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def converted(directory: Path, dtype: torch.dtype) -> Path:
    file = directory / "model.safetensors"
    values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in load_file(file).items()}
    save_file(values, file, metadata={"format": "pt"})
    edit(directory / "config.json", dtype=str(dtype).removeprefix("torch."))
    return directory


# Hugging Face directories


def test_a_language_model_is_recognised(tiny_lm):
    found = inspect(tiny_lm)
    assert isinstance(found.task, CausalLM)
    assert (found.task.max_length, found.task.chat) == (128, True)
    assert found.stored.dtype is torch.float32
    assert found.stored.parameters == sum(v.numel() for v in tensors(tiny_lm).values())
    assert found.fingerprint == fingerprint_files([tiny_lm / "model.safetensors"])
    assert (found.lineage, found.state_file, found.notes) == ((), None, ())


def test_an_image_classifier_is_recognised(tiny_images):
    found = inspect(str(tiny_images[0]))
    assert isinstance(found.task, Classification)
    assert found.task.names == ("ant", "bee", "cat", "dog")
    assert found.task.classes == 4


def test_options_reach_the_task(tiny_lm):
    task = inspect(tiny_lm, Options(max_length=50, chat_template=False)).task
    assert (task.max_length, task.chat) == (50, False)
    assert "max_length 129 exceeds" in wrong(tiny_lm, Options(max_length=129))
    assert "leave --task classification out" in wrong(tiny_lm, Options(task="classification"))


def test_a_user_may_go_beyond_our_default_length_but_not_the_models(copied):
    edit(copied / "config.json", max_position_embeddings=8192)
    assert inspect(copied).task.max_length == 2048
    assert inspect(copied, Options(max_length=4096)).task.max_length == 4096
    assert "at most 8192" in wrong(copied, Options(max_length=10000))


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_round_trip_keeps_names_values_and_precision(copied, tmp_path, dtype):
    found = inspect(converted(copied, dtype))
    assert found.stored.dtype is dtype
    subject = found.load()
    wanted = torch.float64 if dtype is torch.float64 else torch.float32
    assert {p.dtype for p in subject.model.parameters()} == {wanted} == {master(dtype)}
    assert not subject.model.training
    fingerprint = save(subject, found.stored.dtype, tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tensors(copied))
    again = inspect(tmp_path / "again")
    assert (again.stored.dtype, again.fingerprint) == (dtype, fingerprint)
    assert again.processor.chat_template == found.processor.chat_template
    model = again.load().model
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied, and stored once
    assert "lm_head.weight" not in tensors(tmp_path / "again")


def test_round_trip_of_batch_statistics(tiny_images, tmp_path):
    found = inspect(tiny_images[0])
    subject = found.load()
    counters = [b for n, b in subject.model.named_buffers() if n.endswith("num_batches_tracked")]
    for counter in counters:
        counter.fill_(7)
    save(subject, torch.bfloat16, tmp_path / "again")
    stored = tensors(tmp_path / "again")
    assert {str(v.dtype) for v in stored.values()} == {"torch.bfloat16", "torch.int64"}
    assert all(v == 7 for k, v in stored.items() if k.endswith("num_batches_tracked"))
    assert inspect(tmp_path / "again").task.names == found.task.names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_saved_is_what_is_held(copied, tmp_path, dtype):
    """After saving, the model in memory and the one read back say the same, to the bit."""
    found = inspect(converted(copied, dtype))
    subject = found.load()
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.mul_(1.001)
    save(subject, dtype, tmp_path / "again")
    held = subject.model.to(torch.float32)
    read = inspect(tmp_path / "again").load().model
    ids = torch.arange(100)[None]
    with torch.no_grad():
        assert torch.equal(held(input_ids=ids).logits, read(input_ids=ids).logits)


def test_an_overflow_on_the_way_to_half_precision_is_a_collapse(copied, tmp_path):
    subject = inspect(copied).load()
    with torch.no_grad():
        subject.model.model.embed_tokens.weight[0, 0] = 1e6
    with pytest.raises(Collapsed, match=r"embed_tokens\.weight.* not finite in torch\.float16"):
        save(subject, torch.float16, tmp_path / "again")


def test_a_fresh_model_has_the_shape_and_other_weights(tiny_lm):
    found = inspect(tiny_lm)
    old, new = found.load().model.state_dict(), found.fresh().state_dict()
    assert {k: v.shape for k, v in old.items()} == {k: v.shape for k, v in new.items()}
    assert not torch.equal(old["lm_head.weight"], new["lm_head.weight"])


def test_sharded_weights(copied, tmp_path):
    model = inspect(copied).load().model
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(copied / file, tmp_path / "shards")
    found = inspect(tmp_path / "shards")
    assert len(weight_files(tmp_path / "shards")) > 1
    assert found.stored.parameters == inspect(copied).stored.parameters
    assert all(
        torch.equal(p, q)
        for p, q in zip(found.load().model.parameters(), model.parameters(), strict=True)
    )
    weight_files(tmp_path / "shards")[1].unlink()
    assert "lacks the weight file model-00002-of" in wrong(tmp_path / "shards")


# damage


def test_truncated_weights(copied):
    file = copied / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    assert "is truncated or padded" in wrong(copied)
    os.truncate(file, 5)
    assert "is not a safetensors file, or is truncated" in wrong(copied)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not weights at all, but long enough to have a header",
        (20).to_bytes(8, "little") + b"\xff" * 20,
        (2).to_bytes(8, "little") + b"[]",
        (9).to_bytes(8, "little") + b'{"a": []}',
        (9).to_bytes(8, "little") + b'{"a": {}}',
    ],
)
def test_files_that_only_claim_to_be_safetensors(tmp_path, content):
    (tmp_path / "net.safetensors").write_bytes(content)
    assert "not a safetensors file" in wrong(tmp_path / "net.safetensors", Options(FACTORY))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_header_is_named_or_harmless(tiny_vectors, tmp_path, position, value):
    whole = bytearray(tiny_vectors.read_bytes())
    size = 8 + int.from_bytes(whole[:8], "little")
    whole[position % size] = value
    (tmp_path / "net.safetensors").write_bytes(whole)
    try:
        subject = inspect(tmp_path / "net.safetensors", Options(FACTORY)).load()
    except UnlearnError:
        return
    assert isinstance(subject.model, nn.Module)


def test_missing_weights(copied):
    file = copied / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.1" not in k}, file)
    with pytest.raises(BadInput, match=r"lacks the weights model\.layers\.1"):
        inspect(copied).load()


def test_weights_of_another_shape(copied):
    edit(copied / "config.json", intermediate_size=64)
    with pytest.raises(BadInput, match=r"mlp\.\w+\.weight of .* have the shape"):
        inspect(copied).load()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(copied, value):
    values = load_file(copied / "model.safetensors")
    values["model.norm.weight"][3] = value
    save_file(values, copied / "model.safetensors")
    with pytest.raises(BadInput, match=r"the weights model\.norm\.weight are not finite"):
        inspect(copied).load()


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", "is not a JSON object"),
        ("config.json", None, "has no config.json"),
        ("model.safetensors", None, "holds no safetensors weights"),
        ("tokenizer.json", "{", "tokenizer or image processor"),
        ("tokenizer.json", "{}", "tokenizer or image processor"),
        ("model.safetensors.index.json", "{", "is damaged"),
        ("model.safetensors.index.json", "{}", "is damaged"),
    ],
)
def test_damaged_directories(copied, file, content, sentence):
    if content is None:
        (copied / file).unlink()
    else:
        (copied / file).write_text(content)
    assert sentence in wrong(copied)


# what is refused


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_a_directory_with_pickles_only(copied, name):
    (copied / "model.safetensors").rename(copied / name)
    assert "is a pickle, which can run code when it is read: convert it" in wrong(copied)


def test_a_pickle_beside_safetensors_of_another_name_is_not_read(copied):
    values = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").rename(copied / "other.safetensors")
    torch.save(values, copied / "pytorch_model.bin")
    with pytest.raises(BadInput, match="cannot be loaded"):
        inspect(copied).load()


def test_a_pickle(tmp_path):
    torch.save(plain.factory().state_dict(), tmp_path / "net.pt")
    for options in (Options(FACTORY), None):
        assert "is a pickle" in wrong(tmp_path / "net.pt", options)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_checkpoint_is_not_run(copied, file, tmp_path):
    witness = tmp_path / "it_ran"
    code = f"from pathlib import Path\nPath({str(witness)!r}).touch()\n"
    for module in ("modeling_own.py", "configuration_own.py", "tokenization_own.py"):
        (copied / module).write_text(code)
    classes = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        "AutoTokenizer": ["tokenization_own.Own", None],
    }
    if file == "config.json":
        edit(copied / file, auto_map=classes, model_type="own")
        assert "read it, then pass --trust-remote-code" in wrong(copied)
    else:
        edit(copied / file, auto_map=classes, tokenizer_class="Own")
        try:
            inspect(copied).load()  # the code is not needed, or its absence is a clear fault
        except BadInput as error:
            assert "tokenizer" in str(error)  # noqa: PT017
    assert not witness.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["LlamaModel"]}, "is a LlamaModel: supported are causal language"),
        ({"architectures": None}, "is a model of unknown architecture"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "supported are"),
        ({"quantization_config": {"bits": 4}}, "is quantised: unlearn the checkpoint it was made"),
    ],
)
def test_unsupported_models(copied, changes, sentence):
    edit(copied / "config.json", **changes)
    assert sentence in wrong(copied, kind=Unsupported)


def test_a_model_type_nobody_knows(copied):
    edit(copied / "config.json", architectures=["OwnForCausalLM"], model_type="own")
    assert "own" in wrong(copied, kind=Unsupported)


def test_weights_that_are_whole_numbers_cannot_learn(copied):
    file = copied / "model.safetensors"
    save_file({k: v.to(torch.int8) for k, v in load_file(file).items()}, file)
    assert "holds no floating-point weights" in wrong(copied, kind=Unsupported)


@pytest.mark.parametrize("source", ["nowhere", "./no/where", "/no/where/at/all"])
def test_a_checkpoint_that_does_not_exist(source):
    assert "does not exist: check the path" in wrong(source)


def test_a_hub_name_without_a_network():
    assert "getting it from the hub failed" in wrong("someone/nothing")


# tokenizers


def test_a_language_model_without_pad_token_gets_a_note(copied):
    edit(copied / "tokenizer_config.json", pad_token=None)
    found = inspect(copied)
    assert found.processor.pad_token_id is None
    assert found.notes == (
        "The tokenizer has no pad token; padding is masked by position instead.",
    )


@pytest.fixture
def text_classifier(tiny_lm: Path, tmp_path: Path) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = inspect(tiny_lm).processor
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=64, num_labels=2, pad_token_id=2,
    )  # fmt: skip
    save(Subject(BertForSequenceClassification(config), tokenizer), torch.float32, tmp_path / "tc")
    return tmp_path / "tc"


def test_a_text_classifier_is_recognised(text_classifier):
    found = inspect(text_classifier)
    assert isinstance(found.task, Classification)
    assert (found.task.classes, found.task.max_length) == (2, 64)


def test_a_text_classifier_without_pad_token(text_classifier):
    edit(text_classifier / "tokenizer_config.json", pad_token=None)
    assert "the tokenizer of" in (sentence := wrong(text_classifier))
    assert "has no pad token: set one and save it there" in sentence


def test_a_text_classifier_that_does_something_else(text_classifier):
    edit(text_classifier / "config.json", problem_type="multi_label_classification")
    assert "only single-label classifiers" in wrong(text_classifier, kind=Unsupported)


# plain modules


def test_a_factory_and_its_state_dict(tiny_vectors, tmp_path):
    found = inspect(tiny_vectors, Options(FACTORY))
    assert (found.task.classes, found.stored.dtype, found.stored.parameters) == (
        3,
        torch.float32,
        75,
    )
    subject = found.load()
    assert same(dict(subject.model.state_dict()), load_file(tiny_vectors))
    save(subject, found.stored.dtype, tmp_path / "again")
    assert same(load_file(tmp_path / "again" / "model.safetensors"), load_file(tiny_vectors))
    fresh = found.fresh()
    assert not torch.equal(fresh[0].weight, subject.model[0].weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_state_dict_of_another_precision(tmp_path, dtype):
    model = plain.with_statistics().to(dtype)
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    found = inspect(tmp_path / "net.safetensors", Options("tests.plain:with_statistics"))
    assert found.stored.dtype is dtype
    subject = found.load()
    assert subject.model[0].weight.dtype is master(dtype)
    save(subject, dtype, tmp_path / "again")
    assert same(tensors(tmp_path / "again"), load_file(tmp_path / "net.safetensors"))


@pytest.mark.parametrize(
    ("factory", "sentence"),
    [
        (None, "is a bare state dict: name its network with --model module:factory"),
        ("tests.plain", "is not of the form package.module:factory"),
        ("tests.nowhere:factory", "cannot be imported"),
        ("tests.plain:nothing", "cannot be imported"),
        ("tests.plain:WIDTH", "is not callable"),
        ("tests.plain:not_a_module", "returned str, not a module"),
        ("tests.plain:NeedsArguments", "cannot be called without arguments"),
    ],
)
def test_factories_that_do_not_work(tiny_vectors, factory, sentence):
    assert sentence in wrong(tiny_vectors, Options(factory))


@pytest.mark.parametrize(
    "changed",
    [
        lambda values: {**values, "0.weight": torch.zeros(8, 6)},
        lambda values: {k: v for k, v in values.items() if k != "2.bias"},
        lambda values: {**values, "9.weight": torch.zeros(1)},
    ],
    ids=["wrong shape", "missing", "unexpected"],
)
def test_a_state_dict_that_does_not_fit(tiny_vectors, tmp_path, changed):
    save_file(changed(load_file(tiny_vectors)), tmp_path / "net.safetensors")
    with pytest.raises(BadInput, match=r"does not fit tests\.plain:factory"):
        inspect(tmp_path / "net.safetensors", Options(FACTORY)).load()


def test_a_factory_without_its_weights(tmp_path):
    assert "do not exist" in wrong(tmp_path / "net.safetensors", Options(FACTORY))


def test_plain_modules_are_classifiers(tiny_vectors):
    options = Options(FACTORY, task="causal_lm")
    assert "--model supports classification" in wrong(tiny_vectors, options, Unsupported)


# models in memory


def test_a_module_in_memory():
    model = plain.factory()
    found = inspect(model)
    assert (found.task.classes, found.source, found.fresh) == (3, "memory", None)
    assert found.load().model is model
    assert found.fingerprint == inspect(model).fingerprint != inspect(plain.factory()).fingerprint


def test_transformers_in_memory(tiny_lm, tiny_images):
    language = inspect(tiny_lm, Options(max_length=40)).load()
    found = inspect(language, Options(max_length=40))
    assert isinstance(found.task, CausalLM)
    assert found.task.max_length == 40
    assert "needs its tokenizer" in wrong(language.model)
    pictures = inspect(inspect(tiny_images[0]).load())
    assert isinstance(pictures.task, Classification)
    assert pictures.task.names == ("ant", "bee", "cat", "dog")


def test_half_precision_in_memory():
    found = inspect(plain.factory().half())
    assert found.stored.dtype is torch.float16
    assert next(found.load().model.parameters()).dtype is torch.float32


def test_modules_that_cannot_be_understood():
    assert "no linear output layer" in wrong(nn.Conv2d(1, 1, 1), kind=Unsupported)
    assert "there is no task 'diffusion'" in wrong(plain.factory(), Options(task="diffusion"))
    model = plain.factory()
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    with pytest.raises(BadInput, match=r"memory: the weights 2\.bias are not finite"):
        inspect(model).load()


# state and headers


def test_state_comes_back_as_it_was(tmp_path):
    state = {"a": torch.rand(3, 4).t(), "b": torch.tensor([1, 2]), "c": torch.tensor(0.5)}
    write_state(tmp_path / "state.safetensors", state, {"count": "7"})
    back, note = read_state(tmp_path / "state.safetensors")
    assert same(back, {name: value.contiguous() for name, value in state.items()})
    assert note == {"count": "7"}
    os.truncate(tmp_path / "state.safetensors", 60)
    with pytest.raises(BadInput, match="truncated"):
        read_state(tmp_path / "state.safetensors")


def test_the_header_declares_every_tensor(tiny_vectors):
    declared = header(tiny_vectors)
    with safe_open(tiny_vectors, "pt") as file:
        assert declared.keys() == set(file.keys())
    assert declared["0.weight"]["shape"] == [8, 5]


def test_parameter_names_are_those_of_the_model_not_of_its_files(tmp_path: Path) -> None:
    """GPT-2 files from the hub carry no ``transformer.`` prefix."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=50, n_positions=16)
    GPT2LMHeadModel(config).transformer.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "architectures": ["GPT2LMHeadModel"]}))
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(48)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert "h.0.ln_1.weight" in found.stored.names
    assert "transformer.h.0.ln_1.weight" in found.parameter_names()
    assert {n for n, _ in found.load().model.named_parameters()} == set(found.parameter_names())
