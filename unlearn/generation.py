"""What a language model answers when it is asked, in batches: greedily, or by sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from unlearn.distributed import spread
from unlearn.run import Run
from unlearn.tasks.base import Encoded, evaluating
from unlearn.tasks.causal_lm import CausalLM

LONGEST = 200  # new tokens, as in TOFU


class Opening(NamedTuple):
    """Where a sampled answer begins.

    Attributes:
        example: which one is asked.
        told: None: with the prompt alone. A number: after so many tokens of the true answer, and
            the next token may be neither the true one nor the end.
    """

    example: int
    told: int | None = None


def greedy_answers(
    model: nn.Module,
    examples: Encoded,
    run: Run,
    phase: str,
    size: int = 64,
    *,
    longest: int | None = None,
) -> list[str]:
    """The greedy continuation of every prompt, special tokens removed.

    Args:
        model: the language model; asked in eval mode, its own generation settings set aside.
        examples: prompts and true answers.
        run: device and progress.
        phase: names the progress.
        size: answers generated together.
        longest: new tokens at most, whatever stands in the same batch; prompt and answer also stay
            within the task's max_length. None: twice as many as the longest true answer of the
            batch, and at most 200.

    Returns:
        Texts in the order of ``examples``.
    """
    task = language_model(examples)
    answers = [""] * len(examples)
    batches = list(_with_room(examples, task.max_length, size, longest))

    def ask(indices: list[int]) -> list[list[int]]:
        prompts = [examples[i]["prompt"] for i in indices]
        most = longest or min(LONGEST, 2 * max(int(examples[i]["units"]) for i in indices))
        return continued(model, task, prompts, most, run, do_sample=False)

    done = 0
    with evaluating(model):
        for indices, new in zip(batches, spread(ask, batches), strict=True):
            for index, tokens in zip(indices, new, strict=True):
                answers[index] = _decoded(task, tokens)
            done += len(indices)
            run.progress.advance(phase, done, len(examples), {})
    return answers


def sampled_answers(
    model: nn.Module,
    examples: Encoded,
    openings: Sequence[Opening],
    run: Run,
    phase: str,
    *,
    temperature: float = 1.0,
    longest: int = LONGEST,
    size: int = 64,
) -> list[str]:
    """One answer per opening, drawn from the model's whole distribution.

    Args:
        model: the language model; asked in eval mode, its own generation settings set aside.
        examples: the prompts and true answers that ``openings`` point to.
        openings: what is asked, in any order and as often as wanted.
        run: its seed and ``phase`` decide every draw; global random state is left as it was.
        phase: names the draws, and the progress.
        temperature: logits are divided by it.
        longest: new tokens at most; prompt and answer also stay within the task's max_length.
        size: answers drawn together.

    Returns:
        Texts in the order of ``openings``, told tokens included, special tokens removed.
    """
    task = language_model(examples)
    starts = [
        torch.cat((examples[opening.example]["prompt"], _told(examples, opening)))
        for opening in openings
    ]
    order = sorted(range(len(openings)), key=lambda i: len(starts[i]))
    answers = [""] * len(openings)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(run.seed_of(phase))
        for first in range(0, len(order), size):
            places = order[first : first + size]
            prompts = [starts[i] for i in places]
            diverge = _Diverge(examples, [openings[i] for i in places], max(map(len, prompts)))
            new = continued(model, task, prompts, longest, run, logits_processor=[diverge], **how)
            for place, tokens in zip(places, new, strict=True):
                index, told = openings[place]
                answers[place] = _decoded(
                    task, examples[index]["answer"][: told or 0].tolist() + tokens
                )
            run.progress.advance(phase, first + len(places), len(order), {})
    return answers


def true_answers(examples: Encoded) -> list[str]:
    """The answers of the records, as the tokenizer gives them back."""
    task = language_model(examples)
    return [_decoded(task, examples[i]["answer"].tolist()) for i in range(len(examples))]


def language_model(examples: Encoded) -> CausalLM:
    """The task of examples that can be answered in words.

    Raises:
        TypeError: they are not those of a language model.
    """
    if not isinstance(examples.task, CausalLM):
        raise TypeError("only language models answer")
    return examples.task


def _with_room(
    examples: Encoded, limit: int, size: int, longest: int | None
) -> Iterator[list[int]]:
    """Batches by length of prompt, in which every true answer fits beside the longest prompt.

    With ``longest``, so does every answer of so many tokens that fits beside its own prompt.
    """

    def room(index: int) -> int:
        encoding = examples[index]
        own = limit - len(encoding["prompt"])
        return int(encoding["units"]) if longest is None else min(longest, own)

    batch: list[int] = []
    for index in sorted(range(len(examples)), key=lambda i: len(examples[i]["prompt"])):
        most = max(map(room, [*batch, index]))
        if len(batch) == size or (batch and len(examples[index]["prompt"]) + most > limit):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _told(examples: Encoded, opening: Opening) -> Tensor:
    told: Tensor = examples[opening.example]["answer"][: opening.told or 0]
    return told


class _Diverge(LogitsProcessor):  # type: ignore[misc]
    """Forbids, as the first new token, the true one and the end where an answer was begun."""

    def __init__(self, examples: Encoded, openings: Sequence[Opening], width: int) -> None:
        task = language_model(examples)
        self.width = width
        forbidden = [
            (row, int(token))
            for row, (example, told) in enumerate(openings)
            if told is not None
            for token in (examples[example]["answer"][told], task.eos)
            if token is not None
        ]
        self.rows, self.tokens = [row for row, _ in forbidden], [token for _, token in forbidden]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self.width and self.rows:
            scores = scores.clone()
            scores[self.rows, self.tokens] = -torch.inf
        return scores


def continued(
    model: nn.Module,
    task: CausalLM,
    prompts: Sequence[Tensor],
    longest: int,
    run: Run,
    **how: Any,
) -> list[list[int]]:
    """The new tokens after each prompt, what follows an end of sequence among them.

    Args:
        model: the language model, in eval mode; its own generation settings are set aside.
        task: its.
        prompts: tokens, at least one.
        longest: new tokens at most; the longest prompt and they stay within ``task.max_length``.
        run: the device.
        how: settings of ``model.generate``.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), task.pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # decoding continues at the right edge
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    shipped: Any = model.generation_config
    model.generation_config = GenerationConfig()
    try:  # what the checkpoint recommends for chatting would bend the distribution
        output = model.generate(  # type: ignore[operator]
            input_ids=ids.to(run.device),
            attention_mask=mask.to(run.device),
            max_new_tokens=max(1, min(longest, task.max_length - width)),
            eos_token_id=task.eos,
            pad_token_id=task.pad,
            **how,
        )
    finally:
        model.generation_config = shipped
    new: list[list[int]] = output[:, width:].tolist()
    return new


def _decoded(task: CausalLM, tokens: list[int]) -> str:
    if task.eos in tokens:
        tokens = tokens[: tokens.index(task.eos)]
    text: str = task.tokenizer.decode(tokens, skip_special_tokens=True)
    return text.strip()
