"""What a model family scores and how, against full forward passes done by hand in float64."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from tests import plain
from unlearn.checkpoint import inspect
from unlearn.data import load
from unlearn.errors import BadInput, Unsupported
from unlearn.tasks.base import Encoded, evaluating
from unlearn.tasks.causal_lm import CausalLM
from unlearn.tasks.classification import Classification

ROWS = [
    {"question": "Who is it?", "answer": "Nobody we know, as far as anybody can tell."},
    {"question": "When was Adela born, and where did it happen?", "answer": "Then"},
    {"prompt": "Once upon a time", "completion": ", there was a king."},
    {"text": "A text without a question."},
]
OTHER_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]"
    "{% else %}{{ m.content }}{{ eos_token }}\n{% endif %}{% endfor %}"
)
QUESTION_LOST = "{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def language(tiny_lm):
    """A model with lively weights in float64, and its tokenizer."""
    subject = inspect(tiny_lm).load()
    return lively(subject.model), subject.processor


def lively(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(0)
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3, generator=draw)
    return model


def causal(tokenizer, **settings) -> CausalLM:
    return CausalLM(tokenizer, len(tokenizer), settings.pop("max_length", 128), **settings)


def nll_by_hand(model, prompt: list[int], answer: list[int]) -> float:
    """The answer's tokens under one unpadded pass, every logit computed."""
    ids = [*prompt, *answer]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(log_p[t - 1, ids[t]]) for t in range(len(prompt), len(ids)))


def nll(task, model, rows) -> torch.Tensor:
    with torch.no_grad():
        return task.nll(model, task.collate([task.encode(row) for row in rows]))


def plain_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# causal language models


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"question": "Who?", "answer": "Adela."}, "Question: Who?\nAnswer:", " Adela."),
        ({"prompt": "Once upon", "completion": " a time"}, "Once upon", " a time"),
        ({"text": "No question here."}, "", "No question here."),
    ],
    ids=["question/answer", "prompt/completion", "text"],
)
def test_loss_is_on_the_answer_and_its_end_alone(language, row, prompt, answer):
    model, tokenizer = language
    task = causal(tokenizer, chat=False)
    answer_ids = [*plain_ids(tokenizer, answer), tokenizer.eos_token_id]
    prompt_ids = [tokenizer.bos_token_id, *plain_ids(tokenizer, prompt)]
    found = task.collate([task.encode(row)])
    assert found["units"].tolist() == [len(answer_ids)]
    assert float(nll(task, model, [row])) == pytest.approx(
        nll_by_hand(model, prompt_ids, answer_ids), abs=1e-9
    )


def test_loss_through_a_chat_template(language, monkeypatch):
    model, tokenizer = language
    monkeypatch.setattr(tokenizer, "chat_template", OTHER_TEMPLATE)
    row = ROWS[0]
    prompt = [tokenizer.bos_token_id, *plain_ids(tokenizer, f"[{row['question']}]")]
    answer = [*plain_ids(tokenizer, row["answer"]), tokenizer.eos_token_id]
    for task in (causal(tokenizer), causal(tokenizer, chat=True)):
        found = task.encode(row)
        assert (found["prompt"].tolist(), found["answer"].tolist()) == (prompt, answer)
        assert float(nll(task, model, [row])) == pytest.approx(
            nll_by_hand(model, prompt, answer), abs=1e-9
        )
    assert causal(tokenizer, chat=False).texts(row) == (
        "Question: Who is it?\nAnswer:",
        f" {row['answer']}",
    )


def test_only_questions_go_through_the_chat_template(language):
    task = causal(language[1], chat=True)
    assert task.texts(ROWS[2]) == ("Once upon a time", ", there was a king.")
    assert task.texts(ROWS[3]) == ("", "A text without a question.")


def test_chat_templates_that_cannot_be_used(language, monkeypatch):
    _, tokenizer = language
    monkeypatch.setattr(tokenizer, "chat_template", QUESTION_LOST)
    with pytest.raises(Unsupported, match="set chat_template to false"):
        causal(tokenizer).texts(ROWS[0])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert not causal(tokenizer).chat
    with pytest.raises(BadInput, match="no chat template"):
        causal(tokenizer, chat=True)


SMALL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
FAMILIES = {
    "gpt2": lambda size: GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=128, **SMALL)
    ),
    "gpt_neox": lambda size: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=128, **SMALL,
        )
    ),
}  # fmt: skip


@pytest.fixture(params=["llama", *FAMILIES])
def family(request, language):
    model, tokenizer = language
    if request.param != "llama":
        model = lively(FAMILIES[request.param](len(tokenizer)))
    return model, tokenizer


def test_a_padded_batch_equals_one_by_one(family):
    model, tokenizer = family
    task = causal(tokenizer)
    together = nll(task, model, ROWS)
    alone = torch.cat([nll(task, model, [row]) for row in ROWS])
    assert len({task.encode(row)["length"] for row in ROWS}) > 1
    assert torch.allclose(together, alone, rtol=0, atol=1e-10)


def test_gathered_logits_are_the_full_ones_at_their_positions(family):
    model, tokenizer = family
    task = causal(tokenizer)
    batch = task.collate([task.encode(row) for row in ROWS])
    with torch.no_grad():
        full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        found = task.predictions(model, batch)
    assert found.logits.shape == (*batch["labels"].shape, len(tokenizer))
    for i, units in enumerate(batch["units"]):
        wanted = full[i, batch["positions"][i, :units]]
        assert torch.allclose(found.logits[i, :units], wanted, rtol=0, atol=1e-12)
        assert torch.equal(found.hits()[i, :units], wanted.argmax(-1) == found.labels[i, :units])
    padded = found.labels == -100
    assert padded.any()
    assert not found.unit_nll()[padded].any()
    assert not found.hits()[padded].any()


def test_compact_values_and_a_frozen_head_give_the_logits_back(family):
    model, tokenizer = family
    task = causal(tokenizer)
    batch = task.collate([task.encode(row) for row in ROWS])
    with torch.no_grad():
        before = task.logits(model, batch)
        stored, head = task.compact(model, batch), task.frozen_head(model)
        kept = {name: p.clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.add_(1.0)
        try:
            assert torch.allclose(head(stored), before, rtol=0, atol=1e-10)
            assert not torch.allclose(task.logits(model, batch), before)
        finally:
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])


def test_a_model_that_bends_its_logits_has_no_frozen_head(language):
    _, tokenizer = language
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=1.0,
        **SMALL,
    )  # fmt: skip
    with pytest.raises(Unsupported, match="changes its logits after the output layer"):
        causal(tokenizer).frozen_head(lively(Gemma2ForCausalLM(config)))


@pytest.mark.parametrize("layer", [None, 0, 1, "1"])
def test_features_are_the_hidden_states_that_predict_the_last_token(language, layer):
    model, tokenizer = language
    task = causal(tokenizer)
    encodings = [task.encode(row) for row in ROWS]
    with torch.no_grad():
        found = task.features(model, task.collate(encodings), layer)
        for i, e in enumerate(encodings):
            ids = torch.cat((e["prompt"], e["answer"]))[None, :-1]
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
            wanted = states[-1 if layer is None else int(layer)][0, -1]
            assert torch.allclose(found[i], wanted, rtol=0, atol=1e-10)
    assert found.shape == (len(ROWS), 32)


def test_text_without_a_start_token_begins_with_context(language):
    model, tokenizer = language[0], deepcopy(language[1])
    tokenizer.bos_token = None
    task = causal(tokenizer)
    ids = plain_ids(tokenizer, ROWS[3]["text"])
    found = task.encode(ROWS[3])
    assert found["prompt"].tolist() == ids[:1]
    assert found["answer"].tolist() == [*ids[1:], tokenizer.eos_token_id]
    wanted = nll_by_hand(model, ids[:1], [*ids[1:], tokenizer.eos_token_id])
    assert float(nll(task, model, [ROWS[3]])) == pytest.approx(wanted, abs=1e-9)


def test_padding_does_not_need_a_pad_token(language):
    model, tokenizer = language[0], deepcopy(language[1])
    wanted = nll(causal(tokenizer), model, ROWS)
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    assert torch.equal(nll(causal(tokenizer), model, ROWS), wanted)


def test_an_end_token_inside_an_answer_is_an_ordinary_unit(language):
    model, tokenizer = language
    task = causal(tokenizer, chat=False)
    row = {"prompt": "a", "completion": "b</s>c"}
    answer = task.encode(row)["answer"].tolist()
    assert answer.count(tokenizer.eos_token_id) == 2
    prompt = [tokenizer.bos_token_id, *plain_ids(tokenizer, "a")]
    other = {"prompt": "a", "completion": "a much longer answer, to pad the first one"}
    assert float(nll(task, model, [row, other])[0]) == pytest.approx(
        nll_by_hand(model, prompt, answer), abs=1e-9
    )


def test_long_answers_lose_their_end(language):
    _, tokenizer = language
    whole = causal(tokenizer).encode(ROWS[0])
    limit = len(whole["prompt"]) + 3
    cut = causal(tokenizer, max_length=limit).encode(ROWS[0])
    assert (cut["length"], cut["units"]) == (limit, 3)
    assert cut["prompt"].tolist() == whole["prompt"].tolist()
    assert cut["answer"].tolist() == whole["answer"][:3].tolist()


def test_a_prompt_that_leaves_no_room_is_a_fault(language):
    _, tokenizer = language
    length = len(causal(tokenizer).encode(ROWS[0])["prompt"])
    assert causal(tokenizer, max_length=length + 1).fault(ROWS[0]) is None
    assert f"its prompt alone has {length} tokens and max_length is {length}" in (
        causal(tokenizer, max_length=length).fault(ROWS[0]) or ""
    )


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"q": "a", "a": "b"}, "it has the fields q, a; give question/answer, prompt/completion"),
        ({"question": "a"}, "it has the fields question"),
        ({"question": "a", "answer": 3}, "its field 'answer' is not a text or is blank"),
        ({"question": "a", "answer": None}, "its field 'answer' is not a text"),
        ({"question": " ", "answer": "b"}, "its field 'question' is not a text or is blank"),
        ({"text": "\n"}, "its field 'text' is not a text or is blank"),
    ],
)
def test_records_a_language_model_cannot_use(language, row, sentence):
    assert sentence in (causal(language[1]).fault(row) or "")


def test_record_content_is_its_text(language):
    task = causal(language[1])
    content = task.content({"id": 1, "question": "ab", "answer": "c"})
    assert content == task.content({"answer": "c", "question": "ab", "note": "x"})
    assert content != task.content({"question": "a", "answer": "bc"})


def test_relabel_draws_ordinary_tokens_and_keeps_special_ones(language):
    _, tokenizer = language
    task = causal(tokenizer)
    row = ROWS[0]
    encoding = task.encode(row)
    before = encoding["answer"].clone()
    found = task.relabel(encoding, row, torch.Generator().manual_seed(0))
    again = task.relabel(encoding, row, torch.Generator().manual_seed(0))
    assert torch.equal(found["answer"], again["answer"])
    assert torch.equal(encoding["answer"], before)
    assert torch.equal(found["prompt"], encoding["prompt"])
    assert found["units"] == encoding["units"] == len(found["answer"])
    assert found["answer"][-1] == tokenizer.eos_token_id
    assert not set(found["answer"][:-1].tolist()) & set(tokenizer.all_special_ids)
    assert not torch.equal(found["answer"], before)


@pytest.mark.parametrize("key", ["options", "choices"])
def test_relabel_draws_from_the_options_of_a_record(language, key):
    _, tokenizer = language
    task = causal(tokenizer)
    row = {"question": "Who?", "answer": "Adela", key: ["Adela", "Bruno", "Chiara"]}
    allowed = {
        tuple(task.encode({**row, "answer": name})["answer"].tolist()): name for name in row[key]
    }
    draw = torch.Generator().manual_seed(0)
    drawn = [task.relabel(task.encode(row), row, draw)["answer"].tolist() for _ in range(300)]
    counts = [[allowed[tuple(a)] for a in drawn].count(name) for name in row[key]]
    assert sum(counts) == 300
    assert min(counts) > 60  # the true answer among them


def test_chance_is_a_uniform_guess(language):
    assert causal(language[1]).chance() == pytest.approx(math.log(len(language[1])))
    assert Classification(4).chance() == pytest.approx(math.log(4))


# classification


@pytest.fixture(scope="module")
def pictures(tiny_images, image_folder):
    subject = inspect(tiny_images[0]).load()
    return subject.model, inspect(tiny_images[0]).task, load(image_folder, "data")


def test_images_are_read_the_same_from_everywhere(pictures, tiny_images):
    _, task, folder = pictures
    path = folder[7]["image"]
    wanted = task.processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"][0]
    table = load(tiny_images[1], "data")
    raw = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    sources = (path, Image.open(path), table[7]["image"], table[7]["image"]["bytes"])
    for image in (*sources, raw, raw.numpy(), wanted):  # numbers with a point are ready-made
        assert torch.equal(task.encode({"image": image, "label": 1})["pixel_values"], wanted)
    grey = task.encode({"image": raw[:1], "label": 1})["pixel_values"]
    assert torch.equal(grey[0], wanted[0])
    assert torch.equal(grey[1], wanted[0])


def test_images_without_a_processor_become_numbers_from_zero_to_one(image_folder):
    path = image_folder / "cat" / "0.png"
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    task = Classification(4)
    for image in (str(path), pixels, pixels.numpy(), pixels.float() / 255):
        found = task.encode({"image": image, "label": 0})["pixel_values"]
        assert torch.allclose(found, pixels.float() / 255)
    doubled = Classification(4, processor=lambda picture: np.full(2, picture.size[0]))
    assert doubled.encode({"image": str(path), "label": 0})["pixel_values"].tolist() == [8, 8]


def test_image_loss_is_the_cross_entropy(pictures):
    model, task, examples = pictures
    encoded = Encoded(examples, task)
    batch = encoded.batch([0, 7, 13, 20])
    with evaluating(model):
        logits = model(pixel_values=batch["pixel_values"]).logits
        wanted = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3]), reduction="none")
        assert torch.allclose(task.nll(model, batch), wanted)
        assert task.logits(model, batch).shape == (4, 1, 4)
        hidden = task.features(model, batch)
        assert hidden.shape == (4, 16)
        assert torch.allclose(task.output_layer(model)(hidden), logits, atol=1e-6)
        assert task.features(model, batch, "resnet.embedder").shape == (4, 8 * 2 * 2)
        stored, head = task.compact(model, batch), task.frozen_head(model)
        assert torch.equal(head(stored)[:, 0], logits)
    assert task.units(batch).tolist() == [1, 1, 1, 1]


@pytest.fixture(scope="module")
def texts(language):
    _, tokenizer = language
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64, num_labels=3, pad_token_id=2,
    )  # fmt: skip
    model = lively(BertForSequenceClassification(config))
    return model, Classification(3, (), tokenizer, 32)


def test_text_batches_equal_one_by_one(texts):
    model, task = texts
    rows = [{"text": "a" * n, "label": n % 3} for n in (1, 5, 40, 90)]
    alone = torch.cat([nll(task, model, [row]) for row in rows])
    assert torch.allclose(nll(task, model, rows), alone, rtol=0, atol=1e-10)
    assert max(task.encode(row)["length"] for row in rows) <= 32
    batch = task.collate([task.encode(row) for row in rows])
    assert task.features(model, batch).shape == (4, 16)


@pytest.mark.parametrize(
    "convert",
    [list, torch.tensor, np.array, lambda v: torch.tensor(v).half(), lambda v: [int(x) for x in v]],
    ids=["list", "float32", "float64", "float16", "integers"],
)
def test_vectors_of_any_kind_meet_the_models_precision(convert):
    values = [1.0, 0.0, -2.0, 3.0, 5.0]
    for dtype in (torch.float32, torch.float64):
        model, task = plain.factory().to(dtype), Classification(plain.CLASSES)
        row = {"features": convert(values), "label": 2}
        with torch.no_grad():
            wanted = -model(torch.tensor(values, dtype=dtype)).log_softmax(-1)[2]
        assert float(nll(task, model, [row])) == pytest.approx(float(wanted), abs=1e-6)
    batch = task.collate([task.encode(row)] * 4)
    assert task.features(model, batch).shape == (4, 8)
    assert task.features(model, batch, "0").shape == (4, 8)


@pytest.mark.parametrize(
    ("label", "index"),
    [("cat", 2), (2, 2), ("2", 2), (np.int64(3), 3), (0, 0)],
)
def test_labels_by_name_and_number(label, index):
    assert Classification(4, ("ant", "bee", "cat", "dog")).label_index(label) == index


def test_a_number_is_an_index_even_where_names_look_like_numbers():
    stars = Classification(5, ("1", "2", "3", "4", "5"))
    assert stars.label_index(1) == 1
    assert stars.label_index(np.int64(1)) == 1
    assert stars.label_index("1") == 0


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        (4, "label 4 is out of range: the model has classes 0 to 3"),
        (-1, "label -1 is out of range"),
        ("17", "label 17 is out of range"),
        ("cta", "the model has no class 'cta': did you mean cat?"),
        ("zebra", "known are: ant, bee, cat, dog"),
        (None, "no class 'None'"),
        (1.5, "no class '1.5'"),
        ("²", "no class '²'"),
    ],
)
def test_labels_the_model_does_not_have(label, sentence):
    task = Classification(4, ("ant", "bee", "cat", "dog"))
    with pytest.raises(BadInput) as caught:
        task.label_index(label)
    assert sentence in str(caught.value)
    assert sentence in (task.fault({"features": [1.0], "label": label}) or "")


def test_names_are_missing_when_they_are():
    with pytest.raises(BadInput, match="the model's classes have no names"):
        Classification(4).label_index("cat")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"label": 1}, "it has the fields label; give image/label, text/label, features/label"),
        ({"features": [1.0]}, "it has the fields features"),
        ({"image": "nowhere.png", "label": 1}, "its image cannot be opened"),
        ({"image": b"not a picture", "label": 1}, "its image cannot be opened"),
        ({"image": torch.rand(2, 2), "label": 1}, "its image has shape (2, 2), not (c, h, w)"),
        ({"features": "abc", "label": 1}, "its features are not numbers"),
        ({"features": [1.0, None], "label": 1}, "its features are not numbers"),
        ({"text": "a", "label": 1}, "it is a text, and the model has no tokenizer"),
    ],
)
def test_records_a_classifier_cannot_use(row, sentence):
    assert sentence in (Classification(3).fault(row) or "")


def test_texts_and_pictures_need_their_own_processors(pictures, texts):
    assert "has no tokenizer" in (pictures[1].fault({"text": "a", "label": 1}) or "")
    row = {"image": pictures[2][0]["image"], "label": 1}
    assert "it is an image, and the model reads text" in (texts[1].fault(row) or "")
    assert "'text' is not a text" in (texts[1].fault({"text": 3, "label": 1}) or "")


def test_record_content_is_input_and_label(pictures, tiny_images):
    _, task, folder = pictures
    table = load(tiny_images[1], "data")
    assert task.content(folder[13]) == task.content(table[13])  # "cat" and 2
    assert task.content(folder[13]) != task.content(folder[14])
    assert task.content({**folder[13], "label": 1}) != task.content(folder[13])


def test_relabel_draws_every_other_label(pictures):
    task = Classification(4)
    row = {"features": [1.0], "label": 2}
    encoding = task.encode(row)
    draw = torch.Generator().manual_seed(0)
    drawn = [task.relabel(encoding, row, draw)["label"] for _ in range(300)]
    assert min(drawn.count(label) for label in (0, 1, 3)) > 60
    assert 2 not in drawn
    assert encoding["label"] == 2


def test_a_network_that_is_no_classifier():
    task = Classification(3)
    batch = task.collate([task.encode({"features": [1.0, 2.0], "label": 1})])
    with pytest.raises(Unsupported, match="a classifier must return"):
        task.predictions(nn.Unflatten(1, (2, 1)), batch)
    with pytest.raises(Unsupported, match="no linear output layer"):
        task.output_layer(nn.Conv2d(1, 1, 1))


# sets as a model reads them


def test_unusable_records_are_counted_and_the_first_is_named(language):
    rows = [ROWS[0], {"question": "a"}, ROWS[1], {"text": " "}]
    with pytest.raises(BadInput) as caught:
        Encoded(load(rows, "retain"), causal(language[1]))
    assert "2 of the 4 retain records cannot be used" in str(caught.value)
    assert "the first is record 1 of memory: it has the fields question" in str(caught.value)


def test_sets_in_batches(language):
    encoded = Encoded(load(ROWS * 3, "forget"), causal(language[1]))
    batches = list(encoded.by_length(5))
    assert sorted(i for batch in batches for i in batch) == list(range(12))
    lengths = [encoded[i]["length"] for batch in batches for i in batch]
    assert lengths == sorted(lengths)
    assert encoded.batch([7, 2])["index"].tolist() == [7, 2]
    assert encoded.total_units([0, 1]) == encoded[0]["units"] + encoded[1]["units"]
    assert encoded.total_tokens() == sum(lengths)


def test_samples_follow_the_seed(language):
    encoded = Encoded(load(ROWS * 10, "retain"), causal(language[1]))
    sample = encoded.sample(12, seed=3)
    assert sample.examples.ids == encoded.sample(12, seed=3).examples.ids
    assert sample.examples.ids != encoded.sample(12, seed=4).examples.ids
    assert [int(i) for i in sample.examples.ids] == sorted(int(i) for i in sample.examples.ids)
    assert torch.equal(sample[0]["answer"], encoded[int(sample.examples.ids[0])]["answer"])
    assert encoded.sample(40, seed=0) is encoded


def test_encodings_too_big_to_keep_are_made_again(language, monkeypatch):
    monkeypatch.setattr(Encoded, "BUDGET", 0)
    encoded = Encoded(load(ROWS, "forget"), causal(language[1]))
    assert torch.equal(encoded[0]["answer"], encoded[0]["answer"])
    assert encoded[0] is not encoded[0]


def test_evaluating_restores_every_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()
