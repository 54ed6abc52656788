"""Soft tokens: vectors put before every question that make a model say what it was to forget.

Schwinn et al. (2024, arXiv 2402.09063): whoever holds the weights can feed vectors that no word
has. A few of them are put before the questions, the same for all (their universal attack), and
moved by Adam to make the true answers of some forget records likely. The model stays as it is.

Soft tokens are strong enough to elicit texts a model never saw (Chen et al. 2025, arXiv
2502.15836). So only records that the vectors were not trained on are measured, and only the
difference to the same attack on a model that never knew them counts.

The vectors stand behind the beginning-of-sequence token and start as the embeddings of random
tokens. Learning rates are multiples of those embeddings' root mean square, because models differ
in that scale a thousandfold; two are tried on every model, and the one with the most hits counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unlearn.attacks.interface import Array, Ground, Search
from unlearn.attacks.relearning import split
from unlearn.attacks.signals import collect, hit_rates
from unlearn.attacks.weights import strongest
from unlearn.errors import BadInput
from unlearn.interface import Subject
from unlearn.run import Run, Silent
from unlearn.tasks.base import Encoded, Encoding
from unlearn.training import Term, Training, descend, likelihood

TOKENS, STEPS, BATCH = 8, 64, 16
RATES = (0.1, 0.5)  # of the embeddings' root mean square, per step of Adam
NAME = "soft_tokens"


def soft_tokens(model: nn.Module, shown: Encoded, held: Encoded, run: Run) -> Array:
    """Train soft tokens on ``shown`` and count the argmax hits of ``held`` behind them.

    Cost: for each of ``RATES``, ``STEPS`` forward and backward passes over ``BATCH`` records and
    one forward pass over ``held``; one copy of the weights on the CPU.

    Args:
        model: on ``run.device``; bit for bit the same when this returns or raises.
        shown: the forget records the attacker has.
        held: others, which are measured.
        run: task, seed, device and progress; nothing is written to its directory.

    Returns:
        Share of argmax hits of each held record, shape (n,).

    Raises:
        BadInput: not a language model, or records too long for soft tokens before them.
        Collapsed: the losses were not finite at every learning rate.
    """
    if run.task.name != "causal_lm" or not hasattr(model, "get_input_embeddings"):
        raise BadInput("soft tokens are read by language models alone: leave this search out")
    place = _place(shown, held)
    shown, held = (_spaced(part, place) for part in (shown, held))
    start = _start(model, run)

    def trained(rate: float) -> Array:
        with _softened(model, start, place):
            _train(model, shown, run, rate * float(start.float().square().mean().sqrt()))
            return hit_rates(collect(model, held, run, b"", "soft tokens"))

    return strongest(model, [partial(trained, rate) for rate in RATES], np.mean, "soft tokens")


def _train(model: nn.Module, shown: Encoded, run: Run, lr: float) -> None:
    """``STEPS`` steps of Adam on the soft tokens alone."""
    plain = Training(
        lr=lr, epochs=1, batch_size=BATCH, weight_decay=0.0, scope=f"^{NAME}$", max_loss=1e3
    )
    epochs = (STEPS - 0.5) / plain.steps(len(shown))  # the middle of the last step
    quiet = Run(run.task, run.seed_of(NAME), run.device, progress=_Told(run))
    terms = [Term("shown", shown, likelihood, "unit")]
    descend(Subject(model), terms, replace(plain, epochs=epochs), quiet)


def _place(*parts: Encoded) -> int:
    """Where soft tokens stand: behind the token every prompt begins with, if there is one."""
    bos = parts[0].task.tokenizer.bos_token_id  # type: ignore[attr-defined]
    firsts = {int(part[i]["prompt"][0]) for part in parts for i in range(len(part))}
    return int(bos is not None and firsts == {bos})


def _spaced(examples: Encoded, place: int) -> Encoded:
    """The same records with room for the soft tokens; over-long answers lose their end."""

    def spaced(encoding: Encoding) -> Encoding:
        prompt, answer = encoding["prompt"], encoding["answer"]
        room = torch.zeros(TOKENS, dtype=prompt.dtype)  # what is there is never read
        prompt = torch.cat((prompt[:place], room, prompt[place:]))
        answer = answer[: max(0, examples.task.max_length - len(prompt))]  # type: ignore[attr-defined]
        if not len(answer):
            raise BadInput(
                f"a {examples.name} record leaves no room for {TOKENS} soft tokens before its "
                "answer: raise max_length or shorten the prompt"
            )
        length = len(prompt) + len(answer)
        return {"prompt": prompt, "answer": answer, "units": len(answer), "length": length}

    return examples.replaced(spaced(examples[i]) for i in range(len(examples)))


def _start(model: nn.Module, run: Run) -> Tensor:
    """What the input layer says to random tokens, shape (TOKENS, dim)."""
    layer = model.get_input_embeddings()  # type: ignore[operator]
    drawn = torch.randint(layer.num_embeddings, (TOKENS,), generator=run.generator(NAME))
    with torch.no_grad():
        start: Tensor = layer(drawn.to(run.device))
    return start


@contextmanager
def _softened(model: nn.Module, start: Tensor, place: int) -> Iterator[None]:
    """The model with soft tokens of its own, read instead of the tokens from ``place`` on."""
    soft = nn.Parameter(start.clone())

    def read(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        own = soft[: output.shape[1] - place].expand(len(output), -1, -1)
        return torch.cat((output[:, :place], own, output[:, place + TOKENS :]), 1)

    handle = model.get_input_embeddings().register_forward_hook(read)  # type: ignore[operator]
    model.register_parameter(NAME, soft)
    try:
        yield
    finally:
        del model._parameters[NAME]
        handle.remove()


class _Told(Silent):
    """Passes on how far the training of soft tokens is."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def advance(self, phase: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """A step was taken."""
        self.run.progress.advance("train soft tokens", done, total, numbers)


def behind_soft_tokens(model: nn.Module, ground: Ground, run: Run) -> Array:
    """:func:`soft_tokens` trained on one half of the forget records and measured on the other."""
    shown, held = split(len(ground.forget), run.seed)
    return soft_tokens(model, ground.forget.select(shown), ground.forget.select(held), run)


SEARCHES = (
    Search(
        name="soft_tokens",
        title="Soft tokens before the question: what is answered rightly of the other records",
        unit="share of argmax hits",
        source="Schwinn et al. 2024, arXiv 2402.09063; Chen et al. 2025, arXiv 2502.15836",
        score=behind_soft_tokens,
    ),
)
