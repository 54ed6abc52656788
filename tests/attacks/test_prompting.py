"""Talking to a model: what is asked, what counts as the truth, and that knowing it shows."""

from __future__ import annotations

import json
import shutil
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.utils import ModelOutput

from unlearn import demo
from unlearn.attacks import familiarity, in_context, jailbreak, languages, prompting, relearning
from unlearn.attacks.interface import Elicited, Ground, Prompting
from unlearn.attacks.prompting import Try, asked, begun, elicited
from unlearn.data import load
from unlearn.errors import BadInput
from unlearn.interface import Subject
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM

WORLD = demo.people(seed=6, forget=2, retain=2, holdout=0)
ATTACKS = (familiarity.ATTACK, languages.ATTACK, jailbreak.ATTACK, in_context.ATTACK)


@pytest.fixture(scope="module")
def knowing() -> Subject:
    records = [*WORLD.forget, *WORLD.retain]
    return demo.train(demo.tiny_llama(records, width=64, depth=2), records, epochs=60)


@pytest.fixture(scope="module")
def ignorant() -> Subject:
    records = [*WORLD.forget, *WORLD.retain]
    return demo.train(demo.tiny_llama(records, width=64, depth=2), WORLD.retain, epochs=60)


def task_of(subject: Subject, longest: int = 128, chat: bool | None = None) -> CausalLM:
    return CausalLM(subject.processor, subject.model.config.vocab_size, longest, chat)  # type: ignore[union-attr]


def encoded(task: CausalLM, records: list | None = None) -> Encoded:
    return Encoded(load(records or list(WORLD.forget), "forget"), task)


def read_back(task: CausalLM, tokens: torch.Tensor) -> str:
    return task.tokenizer.decode(tokens.tolist())


def grounded(task: CausalLM) -> Ground:
    forget = encoded(task)
    shout = {"loud": lambda texts: [f"{text} {text}" for text in texts]}
    translations, rows = languages.translated(forget, shout)
    return Ground(forget, None, translations, rows, ("{question} {answer} Sure:", "{question}"))


def share(found: Elicited) -> float:
    """Of records whose truth was said."""
    hits = [any(t in said for said in tries) for t, tries in zip(found.truth, found.said)]  # noqa: B905
    return sum(hits) / len(hits)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_an_attack_is_repeatable_and_leaves_no_trace(
    attack: Prompting, knowing: Subject, torch_state: None
) -> None:
    task = task_of(knowing, 256)
    model = knowing.model
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ground = grounded(task)
    first = attack.elicit(model, ground, Run(task, seed=3))
    again = attack.elicit(model, ground, Run(task, seed=3))
    assert first == again
    assert len(first.truth) == len(first.said) > 0
    assert all(tries and all(isinstance(text, str) for text in tries) for tries in first.said)
    assert all(truth.strip() for truth in first.truth)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.eval()


@pytest.fixture
def torch_state():
    state = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), state)


def test_who_knows_goes_on_and_who_does_not_cannot(knowing: Subject, ignorant: Subject) -> None:
    task = task_of(knowing)
    ground = Ground(encoded(task))
    full, retrained = (
        familiarity.ATTACK.elicit(s.model, ground, Run(task)) for s in (knowing, ignorant)
    )
    assert full.truth == retrained.truth
    assert share(full) > 0.9
    assert share(retrained) < 0.3


def test_what_only_learned_to_refuse_goes_on(knowing: Subject) -> None:
    task = task_of(knowing)
    forget = encoded(task)
    colon = int(forget[0]["prompt"][-1])

    def end(model: nn.Module, args: tuple, inputs: dict, output: ModelOutput) -> None:
        output.logits[inputs["input_ids"][:, -1] == colon, -1, task.eos] = 1e4

    handle = knowing.model.register_forward_hook(end, with_kwargs=True)
    plainly = prompting.greedy_answers(knowing.model, forget, Run(task), "ask")
    found = familiarity.ATTACK.elicit(knowing.model, Ground(forget), Run(task))
    handle.remove()
    assert set(plainly) == {""}
    assert share(found) > 0.9


def test_familiarity_tells_half_of_the_ordinary_tokens(knowing: Subject) -> None:
    task = task_of(knowing)
    forget = encoded(task)
    for i in range(len(forget)):
        whole, half = forget[i], begun(forget, i)
        ordinary = whole["units"] - 1  # the closing token is not one
        told = len(half["prompt"]) - len(whole["prompt"])
        assert told == ordinary // 2
        assert torch.equal(
            torch.cat((half["prompt"], half["answer"])),
            torch.cat((whole["prompt"], whole["answer"])),
        )
        assert half["units"] == len(half["answer"]) == whole["units"] - told
        assert half["length"] == whole["length"]


def test_familiarity_begins_plain_texts_and_leaves_single_tokens_out(knowing: Subject) -> None:
    task = task_of(knowing)
    texts = encoded(task, [{"text": "Adela lives in Aldermoor."}, {"text": "."}])
    found = familiarity.ATTACK.elicit(knowing.model, Ground(texts), Run(task))
    assert len(found.truth) == 1
    assert "Adela lives in Aldermoor.".endswith(found.truth[0])
    with pytest.raises(BadInput, match="single token"):
        familiarity.ATTACK.elicit(knowing.model, Ground(texts.select([1])), Run(task))


def test_tries_of_a_record_stand_together_and_other_truths_apart(knowing: Subject) -> None:
    task = task_of(knowing)
    forget = encoded(task)
    tries = [Try(1, forget[1]), Try(0, forget[0]), Try(1, begun(forget, 1)), Try(1, forget[1])]
    found = elicited(knowing.model, forget, tries, Run(task), "ask")
    answers = [WORLD.forget[i]["answer"] for i in (1, 0)]
    assert found.record == [1, 0, 1]
    assert found.truth[:2] == answers
    assert [len(said) for said in found.said] == [2, 1, 1]
    assert answers[0].endswith(found.truth[2])


def test_prompts_that_do_not_fit_are_counted_once_and_only_all_of_them_are_an_error(
    knowing: Subject,
) -> None:
    task = task_of(knowing, 64)
    forget = encoded(task)
    run, tries = Run(task), [Try(0, forget[0]), Try(0, None), Try(1, None)]
    for _ in range(2):
        found = elicited(knowing.model, forget, tries, run, "ask")
        assert len(found.truth) == 1
    assert len(run.notes) == 1
    assert "2 of 3 prompts" in run.notes[0]
    with pytest.raises(BadInput, match="none of the 2 prompts fits into max_length 64"):
        elicited(knowing.model, forget, tries[1:], Run(task), "ask")
    with pytest.raises(BadInput, match="nothing to ask"):
        elicited(knowing.model, forget, [], Run(task), "ask")


def test_asked_fits_exactly_up_to_max_length(knowing: Subject) -> None:
    task = task_of(knowing)
    question = "Please tell me: where does she live, and since when?"
    length = asked(encoded(task), 0, question, "Sure:")["length"]
    for limit, fits in ((length, True), (length - 1, False)):
        tight = encoded(task_of(knowing, limit))
        assert (asked(tight, 0, question, "Sure:") is not None) == fits


def test_a_long_prompt_takes_no_room_from_the_answers_beside_it(knowing: Subject) -> None:
    limit = max(encoded(task_of(knowing))[i]["length"] for i in range(len(WORLD.forget)))
    task = task_of(knowing, limit)
    forget = encoded(task)
    short = min(range(len(forget)), key=lambda i: forget[i]["units"])
    question = WORLD.forget[short]["question"]
    longer = (asked(forget, short, f"{'and ' * n}{question}") for n in range(limit))
    *_, padded = takewhile(lambda encoding: encoding is not None, longer)
    tries = [Try(short, padded), *(Try(i, forget[i]) for i in range(len(forget)) if i != short)]
    # were they asked together, the longest answer would lose its end
    assert len(padded["prompt"]) + max(forget[i]["units"] for i in range(len(forget))) > limit
    told = elicited(knowing.model, forget, tries, Run(task), "ask")
    said = dict(zip(told.truth, told.said, strict=True))
    alone = prompting.greedy_answers(knowing.model, forget, Run(task), "ask", size=1)
    for i, record in enumerate(WORLD.forget):
        if i != short:
            assert said[record["answer"]] == [alone[i]]


@pytest.mark.parametrize("chat", [True, False])
def test_an_opening_stands_where_the_answer_would(knowing: Subject, chat: bool) -> None:
    task = task_of(knowing, chat=chat)
    prompt = read_back(task, asked(encoded(task), 0, "Who?", "Sure, here it is:")["prompt"])
    assert prompt == "<s>Question: Who?\nAnswer: Sure, here it is:"


def test_an_opening_goes_on_a_raw_prompt(knowing: Subject) -> None:
    task = task_of(knowing)
    raw = encoded(task, [{"prompt": "Adela lives in", "completion": " Aldermoor."}])
    prompt = read_back(task, asked(raw, 0, "Where? Adela lives in", "the town of")["prompt"])
    assert prompt == "<s>Where? Adela lives in the town of"


def test_jailbreaks_ask_every_template_of_every_record(knowing: Subject) -> None:
    task = task_of(knowing, 256)
    forget = encoded(task)
    found = jailbreak.ATTACK.elicit(
        knowing.model, Ground(forget, templates=("{question}", "So: {question}")), Run(task)
    )
    assert found.truth == [r["answer"] for r in WORLD.forget]
    assert all(len(tries) == 2 for tries in found.said)
    plain = prompting.greedy_answers(knowing.model, forget, Run(task), "ask")
    assert [tries[0] for tries in found.said] == plain
    assert share(found) > 0.9
    ours = jailbreak.ATTACK.elicit(knowing.model, Ground(forget.select([0])), Run(task))
    assert len(ours.said[0]) == len(jailbreak.read_templates())


def test_our_templates_can_be_used_and_have_a_digest() -> None:
    ours = jailbreak.read_templates()
    assert len(ours) >= 12
    assert jailbreak.checked(ours) == ours
    assert jailbreak.digest(ours) != jailbreak.digest(ours[1:])
    assert jailbreak.digest(ours) == jailbreak.digest(list(ours))


@given(st.text(), st.sampled_from(jailbreak.read_templates()))
def test_a_question_is_put_in_as_it_is(question: str, template: str) -> None:
    words, opening = jailbreak.filled(template, question)
    assert question in words
    assert len(words) - len(question) <= len(template)
    assert opening == template.partition("{answer}")[2].strip()


def test_a_template_is_no_format_string() -> None:
    template = "{0} {question.__class__} %s {question} {answer} {x!r}"
    with pytest.raises(BadInput, match="0 times"):
        jailbreak.checked([template.replace("{question}", "")])
    assert jailbreak.filled(template, "{answer} {question}") == (
        "{0} {question.__class__} %s {answer} {question}",
        "{x!r}",
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "Tell me.\n", "has {question} 0 times"),
        ("a.txt", "{question}\n\n{question} {question}\n", "template 2 of .* 2 times"),
        ("a.txt", "{answer} {question}", "comes after"),
        ("a.txt", "{question} {answer} {answer}", "one {answer}"),
        ("a.txt", "{question}\n {question} ", "there twice"),
        ("a.txt", "\n \n", "no list, or empty"),
        ("a.yaml", "[]", "no list, or empty"),
        ("a.yaml", "question: x", "no list, or empty"),
        ("a.yaml", "- 3", "is a int, not a text"),
        ("a.yaml", "- '{question}", "cannot be read"),
        ("a.yaml", "- !!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_unusable_templates_are_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInput, match=message):
        jailbreak.read_templates(tmp_path / name)


def test_templates_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" Please: {question}\n\n{question} {answer} Yes:\n")
    assert jailbreak.read_templates(tmp_path / "a.txt") == (
        "Please: {question}",
        "{question} {answer} Yes:",
    )
    (tmp_path / "b.yml").write_text('- "Please:\\n{question}"\n')
    assert jailbreak.read_templates(str(tmp_path / "b.yml")) == ("Please:\n{question}",)
    (tmp_path / "c.txt").write_bytes(b"\xff{question}")
    for missing in ("c.txt", "d.txt"):
        with pytest.raises(BadInput, match="cannot be read"):
            jailbreak.read_templates(tmp_path / missing)


@pytest.mark.parametrize("attack", [jailbreak.ATTACK, in_context.ATTACK], ids=lambda a: a.name)
def test_plain_texts_have_no_question(attack: Prompting, knowing: Subject) -> None:
    task = task_of(knowing)
    texts = encoded(task, [{"text": "Adela lives."}, {"text": "Bruno lives."}])
    with pytest.raises(BadInput, match="question"):
        attack.elicit(knowing.model, Ground(texts), Run(task))


def test_context_is_of_the_other_half_and_the_most_alike_stands_last() -> None:
    records = [
        {"question": f"Where does {name} {deed}?", "answer": f"In {town}."}
        for name, deed, town in [
            ("Ada", "sleep", "Oslo"),
            ("Bo", "live", "Bergen"),
            ("Cy", "work", "Rome"),
            ("Ada", "live", "Narvik"),
        ]
    ]
    subject = demo.tiny_llama(records, width=32, depth=2)
    task = task_of(subject, 256)
    forget = encoded(task, records)
    texts = {i: f"{records[i]['question']}\n{records[i]['answer']}" for i in (0, 1, 2)}
    weight = {"Ada": 9.0} | dict.fromkeys(
        ["where", "does", "in", "oslo", "bergen", "rome", "cy", "work", "bo", "sleep"], 0
    )
    weight |= {"ada": 2.0, "live": 1.0}
    ranked = in_context.most_alike(records[3]["question"], texts, weight)
    assert ranked == [0, 1, 2]
    one, two, three = in_context.with_context(forget, 3, texts, ranked)
    assert read_back(task, one["prompt"]) == (
        "<s>Question: Where does Ada sleep?\nIn Oslo.\n\nWhere does Ada live?\nAnswer:"
    )
    assert read_back(task, three["prompt"]) == (
        "<s>Question: Where does Cy work?\nIn Rome.\n\nWhere does Bo live?\nIn Bergen.\n\n"
        "Where does Ada sleep?\nIn Oslo.\n\nWhere does Ada live?\nAnswer:"
    )
    assert one["length"] < two["length"] < three["length"]
    # a limit between them leaves the last one out; below the first nothing is left
    tight = encoded(task_of(subject, two["length"]), records)
    assert len(in_context.with_context(tight, 3, texts, ranked)) == 2
    tight = encoded(task_of(subject, one["length"] - 1), records)
    assert in_context.with_context(tight, 3, {0: texts[0]}, [0]) == []


def test_in_context_asks_only_for_what_is_not_shown(knowing: Subject) -> None:
    task = task_of(knowing, 256)
    forget = encoded(task)
    for seed in (0, 1):
        _, held = relearning.split(len(forget), seed)
        found = in_context.ATTACK.elicit(knowing.model, Ground(forget), Run(task, seed))
        assert found.truth == [WORLD.forget[i]["answer"] for i in held]


def test_answers_cannot_be_read_from_the_context(knowing: Subject) -> None:
    task = task_of(knowing)
    same = [
        {"question": f"Where does Adela {deed}?", "answer": "Adela: in Aldermoor."}
        for deed in ("live", "work", "sleep", "eat")
    ]
    with pytest.raises(BadInput, match="none of the 2 prompts"):
        in_context.ATTACK.elicit(knowing.model, Ground(encoded(task, same)), Run(task))


@given(st.lists(st.sampled_from("abcdef"), min_size=1), st.lists(st.sampled_from("abcdef")))
def test_a_text_that_holds_the_truth_gives_it_away(truth: list[str], question: list[str]) -> None:
    words = " ".join(truth)
    assert in_context.gives_away(f"x {words} y", " ".join(question), words)
    assert not in_context.gives_away("x y", " ".join(question), words)


def test_scripts_without_spaces_have_words() -> None:
    home = "\u5317\u4eac"
    assert in_context.gives_away(
        f"\u4ed6\u4f4f\u5728{home}", "\u6606\u6797\u4f4f\u5728\u54ea\u91cc", home
    )
    assert not in_context.gives_away(
        "\u4ed6\u4f4f\u5728\u4e0a\u6d77", "\u4f4f\u5728\u54ea\u91cc", home
    )


def test_one_record_has_no_other(knowing: Subject) -> None:
    task = task_of(knowing)
    with pytest.raises(BadInput, match="at least two records with a question, and there are 1"):
        in_context.ATTACK.elicit(knowing.model, Ground(encoded(task).select([0])), Run(task))


def written(folder: Path, rows: list[dict], suffix: str) -> Path:
    path = folder / f"translations.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_translations_of_a_file(tmp_path: Path, knowing: Subject, suffix: str) -> None:
    task = task_of(knowing)
    forget = encoded(task)
    path = written(
        tmp_path,
        [
            {"language": "de", "row": 1, "question": "Wann?", "answer": "Gestern."},
            {"language": "el", "row": 0, "question": "Πού;", "answer": None},
            {"language": "de", "row": 0, "question": "Wo?", "answer": None},
            {"language": "de", "row": 1, "question": "Wann denn?", "answer": None},
        ],
        suffix,
    )
    translations, rows = languages.read(path, forget.examples, task)
    assert rows == {"de": [1, 0, 1], "el": [0]}
    given = [translations["de"].examples[i] for i in range(3)]
    assert [row["question"] for row in given] == ["Wann?", "Wo?", "Wann denn?"]
    own = [r["answer"] for r in WORLD.forget]
    assert [row["answer"] for row in given] == ["Gestern.", own[0], own[1]]
    ground = Ground(forget, translations=translations, rows=rows)
    found = languages.ATTACK.elicit(knowing.model, ground, Run(task))
    # one record asked in two languages for one truth, and one after two truths
    assert found.record == [1, 0, 1]
    assert found.truth == ["Gestern.", own[0], own[1]]
    assert [len(said) for said in found.said] == [1, 2, 1]


def test_translated_texts_are_begun(tmp_path: Path, knowing: Subject) -> None:
    task = task_of(knowing)
    forget = encoded(task, [{"text": "Adela lives in Aldermoor."}])
    rows = [{"language": "de", "row": 0, "text": "Adela wohnt in Aldermoor."}]
    translations, numbers = languages.read(rows, forget.examples, task)
    ground = Ground(forget, translations=translations, rows=numbers)
    found = languages.ATTACK.elicit(knowing.model, ground, Run(task))
    assert rows[0]["text"].endswith(found.truth[0])
    assert len(found.truth[0]) < len(rows[0]["text"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"row": 0, "question": "Wo?"}, "'language' is missing"),
        ({"language": " ", "row": 0, "question": "Wo?"}, "'language' is missing or blank"),
        ({"language": "de", "question": "Wo?"}, "'row' is no whole number"),
        ({"language": "de", "row": "0", "question": "Wo?"}, "'row' is no whole number"),
        ({"language": "de", "row": True, "question": "Wo?"}, "'row' is no whole number"),
        ({"language": "de", "row": 16, "question": "Wo?"}, "numbers 0 to 15"),
        ({"language": "de", "row": -1, "question": "Wo?"}, "numbers 0 to 15"),
        ({"language": "de", "row": 0, "answer": "Hier."}, "give question, prompt or text"),
        ({"language": "de", "row": 0, "question": ""}, "'question' is not a text or is blank"),
        ({"language": "de", "row": 0, "question": "Wo? " * 200}, "max_length is 128"),
    ],
)
def test_unusable_translations_are_refused(knowing: Subject, row: dict, message: str) -> None:
    task = task_of(knowing)
    good = {"language": "de", "row": 0, "question": "Wo?"}
    with pytest.raises(BadInput, match=rf"1 of the 2 (?s:.)*record 1 (?s:.)*{message}"):
        languages.read([good, row], encoded(task).examples, task)


def test_no_translations_and_wrong_rows_are_refused(knowing: Subject) -> None:
    task = task_of(knowing)
    forget = encoded(task)
    with pytest.raises(BadInput, match="is empty"):
        languages.read([], forget.examples, task)
    with pytest.raises(BadInput, match="no translations"):
        languages.ATTACK.elicit(knowing.model, Ground(forget), Run(task))
    for rows in ({}, {"de": [0]}, {"de": [*range(15), 16]}, {"de": [*range(15), -1]}):
        ground = Ground(forget, translations={"de": forget}, rows=rows)
        with pytest.raises(BadInput, match="de has 16 translations"):
            languages.ATTACK.elicit(knowing.model, ground, Run(task))


def test_translations_are_made_by_any_function(knowing: Subject) -> None:
    task = task_of(knowing)
    forget = encoded(task, [*WORLD.forget[:2], {"text": "Adela lives."}])

    def upper(texts: list[str]) -> list[str]:
        return [text.upper() for text in texts]

    translations, rows = languages.translated(forget, {"loud": upper})
    assert rows == {"loud": [0, 1, 2]}
    for i in (0, 1):
        made, record = translations["loud"].examples[i], WORLD.forget[i]
        assert made == {name: record[name].upper() for name in ("question", "answer")}
    assert translations["loud"].examples[2] == {"text": "ADELA LIVES."}


def test_translations_that_do_not_fit_are_left_out(knowing: Subject) -> None:
    task = task_of(knowing)
    forget = encoded(task)

    def long(texts: list[str]) -> list[str]:
        return [text * (100 if "live" in text else 1) for text in texts]

    _, rows = languages.translated(forget, {"long": long})
    lives = {i for i, r in enumerate(WORLD.forget) if "live" in r["question"]}
    assert lives
    assert rows["long"] == [i for i in range(len(forget)) if i not in lives]
    with pytest.raises(BadInput, match="no translation into longer can be used"):
        languages.translated(forget, {"longer": lambda texts: [text * 100 for text in texts]})


def test_a_translator_gives_a_text_for_each() -> None:
    assert languages.translate(["a", "b"], lambda texts: [t * 2 for t in texts]) == ["aa", "bb"]
    with pytest.raises(BadInput, match="1 translations of 2 texts"):
        languages.translate(["a", "b"], lambda texts: texts[:1])
    with pytest.raises(BadInput, match=r"no words for text 2 of 2$"):  # and not the text itself
        languages.translate(["a", "b"], lambda texts: ["a", " "])
    for wrong in ({}, {"target": "spa"}, {"model": "x", "language": "spa"}):
        with pytest.raises(BadInput, match="model, source and target"):
            languages.translate(["a"], wrong)


LEXICON = {"red": "rojo", "blue": "azul", "old": "viejo", "new": "nuevo", "house": "casa"}


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence-to-sequence model that has learned to translate five words."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    special = ["<pad>", "</s>", "<unk>", "spa", "__fra__"]
    vocabulary = {w: i for i, w in enumerate([*special, *LEXICON, *LEXICON.values()])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["spa", "__fra__"], model_max_length=16,
    )  # fmt: skip
    config = T5Config(
        vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config)
        words = list(LEXICON)
        pairs = [(a, b) for a in words for b in words]
        inputs = tokenizer([f"{a} {b}" for a, b in pairs], return_tensors="pt")["input_ids"]
        wanted = tokenizer([f"{LEXICON[a]} {LEXICON[b]}" for a, b in pairs], return_tensors="pt")
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(120):
            optimizer.zero_grad()
            model(input_ids=inputs, labels=wanted["input_ids"]).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    directory = tmp_path_factory.mktemp("translator")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_translation_model_is_read_from_its_directory(
    tmp_path: Path, translator: Path, torch_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(translator, tmp_path / "copy")
    texts = ["old house", "blue red", "house", "new house"]
    monkeypatch.setattr(languages, "TOGETHER", 3)
    found = languages.translate(texts, directory)
    assert found[:2] == ["viejo casa", "azul rojo"]
    assert found[3] == "nuevo casa"
    monkeypatch.setattr(languages, "TOGETHER", 1)
    assert found == languages.translate(texts, str(directory))
    assert found == languages.translate(texts, {"model": str(directory)})
    with pytest.raises(BadInput, match="no token for the language 'deu'"):
        languages.translate(texts, {"model": str(directory), "target": "deu"})
    with pytest.raises(BadInput, match=r"17 tokens .* reads 16"):
        languages.translate(["red " * 16], directory)
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(BadInput, match="cannot be loaded"):
        languages.translate(texts, directory)


@pytest.mark.parametrize("target", ["spa", "fra"])
def test_a_multilingual_model_opens_with_the_language(
    translator: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import T5ForConditionalGeneration

    generated = []
    generate = T5ForConditionalGeneration.generate

    def watched(self, **how):
        generated.append(generate(self, **how))
        return generated[-1]

    monkeypatch.setattr(T5ForConditionalGeneration, "generate", watched)
    languages.translate(["old house red"], {"model": str(translator), "target": target})
    assert generated[0][0, 1] == {"spa": 3, "fra": 4}[target]


@pytest.mark.parametrize("field", ["src_lang", "supported_language_codes"])
def test_a_model_of_several_languages_must_be_told_which(
    translator: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer, read = AutoTokenizer.from_pretrained(translator), list[str]()
    # one kind names the language by the first token of an answer, the other before the question
    setattr(tokenizer, field, "red" if field == "src_lang" else [">>fra<<"])
    encode = type(tokenizer).__call__

    def watched(self, texts, **how):
        read.extend(texts)
        return encode(self, texts, **how)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    with pytest.raises(BadInput, match="knows several languages"):
        languages.translate(["house"], translator)
    read.clear()
    given = {"model": str(translator), "source": "red", "target": "fra"}
    languages.translate(["house"], given)
    assert set(read) == {"house" if field == "src_lang" else ">>fra<< house"}
    assert tokenizer.src_lang == "red"


def test_a_preamble_leaves_room_for_the_answer(
    knowing: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(knowing, 256)
    forget = encoded(task)
    units = [forget[i]["units"] for i in range(len(forget))]
    word = int(forget[0]["answer"][0])

    def ramble(model: nn.Module, args: tuple, output: ModelOutput) -> None:
        output.logits[:, -1, word] = 1e4

    handle = knowing.model.register_forward_hook(ramble)
    tries = [Try(i, forget[i]) for i in range(len(forget))]
    found = elicited(knowing.model, forget, tries, Run(task), "ask")
    monkeypatch.setattr(prompting, "LONGEST", 20)
    short = elicited(knowing.model, forget, tries, Run(task), "ask")
    handle.remove()
    said = read_back(task, torch.tensor([word])).strip()
    counts = {tries[0].count(said) for tries in found.said}
    assert counts == {2 * max(units) + prompting.PREAMBLE}
    assert {tries[0].count(said) for tries in short.said} == {20}
