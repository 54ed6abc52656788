"""Compression of trained and fresh texts, and the cost of a search step: python benchmarks/acr.py

Eight texts of 14 random words are taught to a Llama of about 130,000 parameters, each as what
follows a cue. They and as many fresh ones from the same distribution are compressed with 120
steps each. A ratio of a text for which no prompt was found is an upper bound.

A step of greedy coordinate gradient is timed on an untrained Llama of six layers, 256 wide, with
8,192 rows of embedding (few for a language model): 16 free tokens behind 64, a target of 16. The
plain step multiplies one-hot vectors with the embedding, and reads each candidate from its first
token on, one at a time, with logits at every position; a second one reads all in one batch. All
evaluate the same candidates, in turn.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import publish, ratios
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.attacks.test_gcg import plain_gradient, plain_losses
from unlearn import demo
from unlearn.attacks.extraction.compression import Compression, compressions
from unlearn.attacks.extraction.gcg import Frame, Goal
from unlearn.data import load
from unlearn.interface import Subject
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.training import Term, Training, descend, likelihood

TEXTS, WORDS, FREE = 8, 14, 16
ATTACK = Compression(budget=120, topk=256, batch=64)
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def words(draw: random.Random) -> Callable[[int, int], list[str]]:
    """A function that makes texts of random words."""
    known = ["".join(draw.choices(SYLLABLES, k=2)) for _ in range(300)]
    return lambda count, length: [
        " " + " ".join(draw.choices(known, k=length)) for _ in range(count)
    ]


def subject_of(made: list[str]) -> Subject:
    """An untrained Llama that asks plainly, without a template."""
    subject = demo.tiny_llama(
        [{"question": text, "answer": ""} for text in made], width=64, depth=2
    )
    subject.processor.chat_template = None  # type: ignore[union-attr]
    return subject


def compressed() -> list[dict[str, object]]:
    """Trained and fresh texts."""
    make = words(random.Random(0))
    trained, cues, fresh = make(TEXTS, WORDS), make(TEXTS, 1), make(TEXTS, WORDS)
    subject = subject_of(trained + fresh + make(100, WORDS))
    task = CausalLM(subject.processor, subject.model.config.vocab_size, 128)  # type: ignore[arg-type]
    records = [
        {"prompt": f"{some}{cue}", "completion": text}
        for length in range(6)
        for some, cue, text in zip(make(TEXTS, length), cues, trained, strict=True)
    ]
    settings = Training(lr=3e-3, epochs=40, batch_size=16, micro_batch_size=16)
    terms = [Term("train", Encoded(load(records, "retain"), task), likelihood, "unit")]
    model = descend(subject, terms, settings, Run(task)).model
    rows: list[dict[str, object]] = []
    for name, some in (("trained", trained), ("fresh", fresh)):
        examples = Encoded(load([{"text": text} for text in some], "forget"), task)
        found = compressions(model, examples, Run(task), ATTACK)
        rows.append(
            {
                "what": f"ACR of {name} texts",
                "smallest": float(found.ratio.min()),
                "median": float(sorted(found.ratio)[TEXTS // 2]),
                "largest": float(found.ratio.max()),
                "memorised": f"{found.memorised.sum()} of {TEXTS}",
                "censored": f"{found.censored.sum()} of {TEXTS}",
                "steps": sum(one.steps for one in found.found) / TEXTS,
            }
        )
    return rows


class Plain(Goal):
    """One-hot gradients, and each candidate from its first token on, one at a time."""

    def whole(self, free: Tensor) -> Tensor:
        """Prompts with what stands before the free tokens."""
        return torch.cat((self.first.expand(len(free), -1), free), 1)

    def gradient(self, free: Tensor) -> Tensor:
        """As :meth:`Goal.gradient`."""
        places = slice(len(self.first), len(self.first) + len(free))
        prompt = self.whole(free[None])[0]
        return plain_gradient(self.model, prompt, places, self.target.tolist())

    def losses(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """L(x); whether the target is reached costs nothing here, and is not told."""
        found = plain_losses(self.model, self.whole(free), self.target.tolist())
        return found, torch.zeros(len(free), dtype=torch.bool)


class Batched(Plain):
    """The same with all candidates in one forward pass."""

    def losses(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`Plain.losses`."""
        y = self.target.expand(len(free), -1)
        with torch.no_grad():
            logits = self.model(input_ids=torch.cat((self.whole(free), y), 1)).logits
        said = logits[:, -y.shape[1] - 1 : -1].transpose(1, 2)
        found = F.cross_entropy(said, y, reduction="none").sum(1)
        return found, torch.zeros(len(free), dtype=torch.bool)


def steps() -> list[dict[str, object]]:
    """One step of ours and of plain implementations."""
    make = words(random.Random(1))
    tokenizer = subject_of(make(200, WORDS)).processor
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
        )
        model = LlamaForCausalLM(config).eval()
    task = CausalLM(tokenizer, config.vocab_size, 256)
    ids = task.tokenizer(make(1, 100)[0])["input_ids"]
    frame, target = Frame(task, task.tokenizer.decode(ids[:63])), ids[70:86]
    ours, plain, batched = (
        kind(model, frame, target, Run(task)) for kind in (Goal, Plain, Batched)
    )
    free = ours.start(FREE, torch.Generator().manual_seed(0), torch.zeros(0, dtype=torch.long))

    def step(goal: Goal, batch: int) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        return goal.losses(goal.swaps(free, 256, batch, draw))[0]

    rows: list[dict[str, object]] = []
    for batch in (64, 128):
        for name, other in (("one at a time", plain), ("in batches", batched)):
            difference = float((step(other, batch) - step(ours, batch)).abs().max())
            ratio, theirs, mine = ratios(partial(step, other, batch), partial(step, ours, batch))
            rows.append(
                {
                    "what": f"step of {batch} candidates, plain and {name} / ours",
                    "ratio": ratio,
                    "seconds, plain": theirs,
                    "seconds, ours": mine,
                    "difference of losses, nats": difference,
                }
            )
    return rows


def main() -> None:
    """Both."""
    rows = compressed() + steps()
    publish("acr", list(dict.fromkeys(key for row in rows for key in row)), rows)


if __name__ == "__main__":
    main()
