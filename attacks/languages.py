"""Other languages: ask for what was forgotten in a language it was not forgotten in.

One of the eight methods of Lynch et al. (2024, arXiv 2402.16835). Every translated question is
asked and held against the answer that comes with it: a translation of the answer, or the answer
itself. Translated plain texts are begun, as in ``familiarity``. In however many languages it is one
record that is to come out, so the best of its translations counts.

Translations are read from a file (``read``), or made (``translated``) by a translation model or by
any function from texts to texts.

Cost: one greedy answer per translation; making them, one pass of the translation model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unlearn.attacks.interface import Elicited, Ground, Prompting
from unlearn.attacks.prompting import Try, begun, elicited
from unlearn.data import Examples, Row, load
from unlearn.errors import BadInput
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import FIELDS, CausalLM, fields

Translator = str | Path | Mapping[str, str] | Callable[[list[str]], Sequence[str]]
Translations = tuple[dict[str, Encoded], dict[str, list[int]]]  # as in Ground
TOGETHER = 32  # texts a model translates at a time


def elicit(model: nn.Module, ground: Ground, run: Run) -> Elicited:
    """What the model answers in other languages.

    Raises:
        BadInput: no translations, or translations that do not belong to the forget records.
    """
    if not ground.translations:
        raise BadInput("other languages: there are no translations of the forget records")
    tries = []
    for language, part in ground.translations.items():
        rows = list(ground.rows.get(language, ()))
        if len(rows) != len(part) or not all(0 <= row < len(ground.forget) for row in rows):
            raise BadInput(
                f"other languages: {language} has {len(part)} translations, and rows must say for "
                f"each of them which of the {len(ground.forget)} forget records it is of"
            )
        for place, row in enumerate(rows):
            question = fields(part.examples[place])
            tries.append(Try(row, part[place] if question else begun(part, place)))
    return elicited(model, ground.forget, tries, run, "other languages")


def read(source: Any, forget: Examples, task: CausalLM) -> Translations:
    """Translations of forget records that somebody made.

    Args:
        source: a ``.jsonl``, ``.json`` or ``.parquet`` file, or whatever else a set is read from.
            Every row has a ``language``, the ``row`` of the forget record it translates (from 0),
            and question and answer, prompt and completion, or text. Without an answer, the forget
            record's own is the truth. Several rows may translate the same record.
        forget: the records.
        task: reads the translations.

    Returns:
        By language, the translated records, and which forget record each is of.

    Raises:
        BadInput: a row without language, number or question, a number no record has, or a
            translation the task cannot use.
    """
    given = load(source, "translations")
    rows = [{k: v for k, v in given[i].items() if v is not None} for i in range(len(given))]
    faults = [(i, f) for i, row in enumerate(rows) if (f := _fault(row, len(forget)))]
    if faults:
        first, fault = faults[0]
        raise BadInput(
            f"{len(faults)} of the {len(rows)} translations cannot be used; the first is record "
            f"{given.ids[first]} of {given.source}: {fault}"
        )
    whole = [_answered(row, forget[row["row"]]) for row in rows]
    return _by_language(
        [row["language"].strip() for row in rows],
        replace(given, rows=whole),
        [row["row"] for row in rows],
        task,
    )


def translated(
    forget: Encoded, translators: Mapping[str, Translator], device: torch.device | str = "cpu"
) -> Translations:
    """Translations of forget records that are made now.

    Args:
        forget: records of a language model.
        translators: by language; see :func:`translate`.
        device: where translation models compute.

    Returns:
        By language, the translated records, and which forget record each is of. A record whose
        translation does not fit into the task's ``max_length`` is left out.

    Raises:
        BadInput: see :func:`translate`; or no record that fits.
    """
    raw, task = forget.examples, forget.task
    rows = [raw[i] for i in range(len(raw))]
    flat = [(i, name) for i, row in enumerate(rows) for name in fields(row) or ("text",)]
    languages, made, numbers = [], [], []
    for language, translator in translators.items():
        texts = translate([rows[i][name] for i, name in flat], translator, device)
        fresh: list[dict[str, Any]] = [{} for _ in rows]
        for (i, name), text in zip(flat, texts, strict=True):
            fresh[i][name] = text
        fitting = [i for i, row in enumerate(fresh) if task.fault(row) is None]
        if not fitting:
            raise BadInput(
                f"no translation into {language} can be used; of the first, {task.fault(fresh[0])}"
            )
        languages += [language] * len(fitting)
        made += [fresh[i] for i in fitting]
        numbers += fitting
    return _by_language(languages, load(made, "translations"), numbers, task)


def translate(
    texts: Sequence[str], translator: Translator, device: torch.device | str = "cpu"
) -> list[str]:
    """Texts in another language, greedily.

    Args:
        texts: what is translated.
        translator: a function from a list of texts to one translation of each, or the directory
            or hub name of a sequence-to-sequence checkpoint. It is loaded from safetensors and
            runs no code of its own. One that knows several languages is given as a mapping:
            ``model``; ``source``, the language of the texts as its tokenizer names it (eng_Latn);
            and ``target``, the language wanted, likewise (spa_Latn).
        device: where the model computes.

    Raises:
        BadInput: a model that cannot be loaded, a language it does not know or that is not said, a
            text longer than it reads, or a translation that is blank or missing.
    """
    asked = list(texts)
    if callable(translator):
        found = list(translator(asked))
    else:
        how = translator if isinstance(translator, Mapping) else {"model": str(translator)}
        if "model" not in how or set(how) - {"model", "source", "target"}:
            raise BadInput(
                "a translation model is given by its path or name, or as model, source and target; "
                f"this one has {', '.join(how) or 'nothing'}"
            )
        found = _by_model(
            asked, str(how["model"]), how.get("source", ""), how.get("target", ""), device
        )
    if len(found) != len(asked):
        raise BadInput(f"the translator gave {len(found)} translations of {len(asked)} texts")
    for number, translation in enumerate(found, start=1):
        if not isinstance(translation, str) or not translation.strip():
            raise BadInput(f"the translator has no words for text {number} of {len(asked)}")
    return found


def _by_model(
    texts: list[str], name: str, source: str, target: str, device: torch.device | str
) -> list[str]:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    with torch.random.fork_rng():  # new layers are drawn before weights are read
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = AutoModelForSeq2SeqLM.from_pretrained(
                name, use_safetensors=True, trust_remote_code=False
            )
        except Exception as error:  # transformers, its hub client and tokenizers raise any kind
            raise BadInput(
                f"the translation model {name} cannot be loaded as a sequence-to-sequence "
                f"checkpoint in safetensors: {(str(error).splitlines() or [''])[0]}"
            ) from error
    opened = getattr(tokenizer, "supported_language_codes", ())  # Marian: a word opens the text
    if not target and (opened or hasattr(tokenizer, "src_lang")):
        raise BadInput(
            f"the translation model {name} knows several languages: give it as model, source and "
            "target"
        )
    if f">>{target}<<" in opened:
        texts, target = [f">>{target}<< {text}" for text in texts], ""
    if source:
        _token(tokenizer, source, name)
        tokenizer.src_lang = source
    how = {"forced_bos_token_id": _token(tokenizer, target, name)} if target else {}
    longest = min(
        tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 30)
    )
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    if max(lengths, default=0) > longest:
        raise BadInput(
            f"a text has {max(lengths)} tokens and the translation model {name} reads {longest}: "
            "give shorter texts or translations of your own"
        )
    model.to(device).eval()
    found = [""] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: lengths[i])
    for start in range(0, len(order), TOGETHER):
        places = order[start : start + TOGETHER]
        inputs = tokenizer([texts[i] for i in places], return_tensors="pt", padding=True)
        room = min(2 * lengths[places[-1]] + 16, longest - 1)  # an end, should the model find none
        said = model.generate(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=inputs["attention_mask"].to(device),
            do_sample=False, num_beams=1, max_new_tokens=max(1, room), **how,
        )  # fmt: skip
        for place, text in zip(
            places, tokenizer.batch_decode(said, skip_special_tokens=True), strict=True
        ):
            found[place] = text.strip()
    return found


def _token(tokenizer: Any, language: str, name: str) -> int:
    """The token of a language, written plainly (NLLB, mBART) or between underscores (M2M100)."""
    known = tokenizer.get_vocab()
    for written in (language, f"__{language}__"):
        if written in known:
            return int(known[written])
    raise BadInput(f"the translation model {name} has no token for the language {language!r}")


def _fault(row: Row, records: int) -> str | None:
    language, number = row.get("language"), row.get("row")
    if not isinstance(language, str) or not language.strip():
        return "its field 'language' is missing or blank; name the language"
    if isinstance(number, bool) or not isinstance(number, int):
        return "its field 'row' is no whole number; give the number of the forget record, from 0"
    if not 0 <= number < records:
        return f"its row is {number}, and the forget records have the numbers 0 to {records - 1}"
    if not any(name in row for name in (*(pair[0] for pair in FIELDS), "text")):
        return f"it has the fields {', '.join(row)}; give question, prompt or text"
    return None


def _answered(row: Row, record: Row) -> dict[str, Any]:
    """The translated fields; the record's own answer where none is translated."""
    for ask, reply in FIELDS:
        if ask in row:
            own = record[(fields(record) or ("text",))[-1]]
            return {ask: row[ask], reply: row.get(reply, own)}
    return {"text": row["text"]}


def _by_language(
    languages: Sequence[str], examples: Examples, rows: Sequence[int], task: Any
) -> Translations:
    places: dict[str, list[int]] = {}
    for place, language in enumerate(languages):
        places.setdefault(language, []).append(place)
    return (
        {name: Encoded(examples.select(at), task) for name, at in places.items()},
        {name: [rows[i] for i in at] for name, at in places.items()},
    )


ATTACK = Prompting(
    "languages",
    "The same questions in other languages",
    "Lynch et al. 2024, arXiv 2402.16835",
    elicit,
    needs=("--translations or --translator",),
)
