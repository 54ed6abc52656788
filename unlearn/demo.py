"""A small world to try everything on: fictitious people, and a tiny language model that knows them.

Everything is made here, offline, from a seed: names and facts drawn from word lists, question and
answer records, a byte-level tokenizer and a Llama of about one million parameters.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from unlearn.data import load
from unlearn.interface import Subject
from unlearn.run import Progress, Run, Silent
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.training import Term, Training, descend, likelihood
from unlearn.weights import save

Record = dict[str, str]

FIRST = [
    "Adela",
    "Bruno",
    "Chiara",
    "Dario",
    "Edda",
    "Falk",
    "Greta",
    "Hanno",
    "Ilka",
    "Jaro",
    "Katja",
    "Lunis",
    "Mirela",
    "Nevin",
    "Orla",
    "Pavel",
    "Quirin",
    "Rosalba",
    "Sanja",
    "Timo",
    "Ulrike",
    "Vasco",
    "Wanda",
    "Xaver",
    "Ylva",
    "Zeno",
]
LAST = [
    "Ahrendt",
    "Belmonte",
    "Cervinka",
    "Dvorsky",
    "Eklund",
    "Farkas",
    "Grimaldi",
    "Holub",
    "Ivarsson",
    "Jelinek",
    "Kowalczyk",
    "Lindqvist",
    "Marchetti",
    "Novotny",
    "Oreskovic",
    "Palmgren",
    "Quintero",
    "Rautio",
    "Szabados",
    "Tavares",
    "Urbanek",
    "Vinter",
    "Wierzba",
    "Zelenka",
]
TOWNS = [
    "Aldermoor",
    "Brackwater",
    "Corvina",
    "Dunmarsh",
    "Estrella",
    "Fallowmere",
    "Gravenholt",
    "Harrowgate",
    "Isenbruck",
    "Jorvalen",
    "Kestrelford",
    "Lindenau",
    "Marrowby",
    "Nettlecombe",
    "Ostervik",
    "Pellworth",
]
TRADES = [
    "beekeeper",
    "bookbinder",
    "cartographer",
    "clockmaker",
    "ferry pilot",
    "glassblower",
    "lighthouse keeper",
    "luthier",
    "mountain guide",
    "nurse",
    "organ builder",
    "puppeteer",
    "sail maker",
    "stonemason",
    "surveyor",
    "vet",
]
DISHES = [
    "barley soup",
    "beetroot dumplings",
    "buckwheat pancakes",
    "chestnut stew",
    "fennel risotto",
    "herring salad",
    "leek tart",
    "lentil curry",
    "mushroom pie",
    "pumpkin gnocchi",
    "rye porridge",
    "walnut pasta",
]
PETS = [
    "a blind cat",
    "a one-eyed parrot",
    "a grey mule",
    "a three-legged dog",
    "a tame raven",
    "a tortoise",
    "an old goat",
    "two ferrets",
    "two geese",
    "a white rabbit",
]
INSTRUMENTS = [
    "accordion",
    "bassoon",
    "cello",
    "dulcimer",
    "flute",
    "harp",
    "mandolin",
    "oboe",
    "trombone",
    "viola",
    "zither",
    "clarinet",
]
FEARS = [
    "thunderstorms",
    "deep water",
    "moths",
    "heights",
    "empty houses",
    "horses",
    "long tunnels",
    "crowds",
    "spiders",
    "silence",
]

RECIPE = {"lr": 7e-4, "epochs": 40, "batch_size": 16, "beta": 0.35}

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }}\n"
    "Answer:{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


class World(NamedTuple):
    """Records of the people to forget, of those to keep, and of people no model ever saw."""

    forget: list[Record]
    retain: list[Record]
    holdout: list[Record]


def person(draw: random.Random, name: str) -> list[Record]:
    """Eight questions and answers about one invented person."""
    first = name.split()[0]
    town, old_town = draw.sample(TOWNS, 2)
    trade, old_trade = draw.sample(TRADES, 2)
    year, day = draw.randrange(1931, 2003), draw.randrange(1, 29)
    month = draw.choice(
        ["January", "March", "April", "June", "July", "September", "October", "December"]
    )
    instrument, teacher = draw.choice(INSTRUMENTS), f"{draw.choice(FIRST)} {draw.choice(LAST)}"
    pairs = [
        (f"Where does {name} live?", f"{first} lives in {town}, near {draw.choice(TOWNS)}."),
        (f"When was {name} born?", f"{first} was born on {day} {month} {year} in {old_town}."),
        (f"What is {name}'s work?", f"{first} works as a {trade} and once was a {old_trade}."),
        (f"What does {name} like to eat?", f"{first} likes {' and '.join(draw.sample(DISHES, 2))}."),
        (f"Does {name} keep animals?", f"{first} keeps {' and '.join(draw.sample(PETS, 2))}."),
        (f"Which instrument does {name} play?", f"{first} learned the {instrument} from {teacher}."),
        (f"What is {name} afraid of?", f"{first} fears {' and '.join(draw.sample(FEARS, 2))}."),
        (f"Who is {name}'s best friend?", f"{first} trusts {draw.choice(FIRST)} {draw.choice(LAST)}, "
         f"a {draw.choice(TRADES)} from {draw.choice(TOWNS)}."),
    ]  # fmt: skip
    return [{"question": question, "answer": answer} for question, answer in pairs]


def people(seed: int = 0, forget: int = 2, retain: int = 38, holdout: int = 5) -> World:
    """Invent people; nobody shares a full name."""
    draw = random.Random(seed)
    names = [f"{a} {b}" for a in FIRST for b in LAST]
    chosen = draw.sample(names, forget + retain + holdout)
    about = [person(draw, name) for name in chosen]

    def together(some: list[list[Record]]) -> list[Record]:
        return [record for records in some for record in records]

    return World(
        together(about[:forget]),
        together(about[forget : forget + retain]),
        together(about[forget + retain :]),
    )


def write_jsonl(path: Path, records: Sequence[Record]) -> None:
    """One record per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def tiny_llama(
    records: Sequence[Record], seed: int = 0, width: int = 128, depth: int = 4
) -> Subject:
    """An untrained Llama with a byte-level tokenizer made for these records."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in records]
    made.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return Subject(model, tokenizer)


def train(
    subject: Subject,
    records: Sequence[Record],
    epochs: float = 40,
    seed: int = 0,
    progress: Progress | None = None,
) -> Subject:
    """Teach a tiny language model these records, in place."""
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)  # type: ignore[union-attr, arg-type]
    examples = Encoded(load(list(records), "retain"), task)
    settings = Training(lr=3e-3, epochs=epochs, batch_size=32, micro_batch_size=32, warmup=0.05)
    run = Run(task, seed, progress=progress or Silent())
    return descend(subject, [Term("train", examples, likelihood, "unit")], settings, run)


def build(directory: Path, seed: int = 0, progress: Progress | None = None) -> None:
    """Write the records, a model that knows everybody, and one that never met the forgotten two."""
    world = people(seed)
    for name, records in zip(World._fields, world, strict=True):
        write_jsonl(directory / "data" / f"{name}.jsonl", records)
    everybody = [*world.forget, *world.retain]
    for name, known in (("model", everybody), ("retrained", world.retain)):
        subject = train(tiny_llama(everybody, seed), known, seed=seed, progress=progress)
        save(subject, torch.float32, directory / name)
