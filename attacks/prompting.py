"""Talking a language model into saying what it forgot: what the ways of doing so share.

A try is a prompt beside the true answer it is after. It is read the way the task reads a record,
through the chat template where there is one, and answered greedily, in ``PREAMBLE`` tokens
more than twice the longest true answer, and at most ``LONGEST``. A try counts only if prompt
and true answer fit into the task's ``max_length`` together; the others are left out, the same ones
for every model that reads with the same tokenizer, and their number is noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from unlearn.attacks.interface import Elicited
from unlearn.errors import BadInput
from unlearn.generation import LONGEST, greedy_answers, language_model, true_answers
from unlearn.run import Run
from unlearn.tasks.base import Encoded, Encoding
from unlearn.tasks.causal_lm import FIELDS, fields

PREAMBLE = 64  # tokens that may come before an answer ("Sure, here is what I know: ...")


class Try(NamedTuple):
    """One prompt.

    Attributes:
        record: which forget record it is after.
        asked: prompt and true answer; None where they do not fit together.
    """

    record: int
    asked: Encoding | None


def asked(examples: Encoded, record: int, question: str, opening: str = "") -> Encoding | None:
    """A record asked otherwise; None where question and true answer do not fit together.

    Args:
        examples: records of a language model.
        record: one of them that has a question.
        question: what stands in its question's place.
        opening: words put into the model's mouth: its answer goes on after them.
    """
    task, row = language_model(examples), examples.examples[record]
    ask, reply = fields(row) or FIELDS[0]
    if opening and (ask, reply) == FIELDS[1]:  # nothing stands between prompt and completion
        question, opening = f"{question} {opening}", ""
    prompt = task.encode({**row, ask: question})["prompt"]
    if opening:
        before, _, _ = task.texts({**row, reply: opening})[1].partition(opening)
        told = task.tokenizer(before + opening, add_special_tokens=False)["input_ids"]
        prompt = torch.cat((prompt, torch.tensor(told, dtype=torch.long)))
    length = len(prompt) + examples[record]["units"]
    if length > task.max_length:
        return None
    return {**examples[record], "prompt": prompt, "length": length}


def begun(examples: Encoded, record: int) -> Encoding | None:
    """A record with the first half of its answer told, the rest its true answer.

    Half of the ordinary tokens, rounded down; None where there are fewer than two.
    """
    encoding = examples[record]
    special = set(language_model(examples).tokenizer.all_special_ids)
    told = sum(int(token) not in special for token in encoding["answer"]) // 2
    if not told:
        return None
    return {
        "prompt": torch.cat((encoding["prompt"], encoding["answer"][:told])),
        "answer": encoding["answer"][told:],
        "units": encoding["units"] - told,
        "length": encoding["length"],
    }


def elicited(
    model: nn.Module, forget: Encoded, tries: Sequence[Try], run: Run, phase: str
) -> Elicited:
    """Ask, and put the tries of a record together.

    Args:
        model: on ``run.device``.
        forget: the records the tries are after.
        tries: in any order. Those of a record that are after different truths (its answer in
            several languages) are entries of their own.
        run: device and progress; told once how many tries do not fit.
        phase: names the progress.

    Raises:
        BadInput: no try at all, or none that fits.
    """
    if not tries:
        raise BadInput(f"{phase}: there is nothing to ask")
    fitting = [(record, encoding) for record, encoding in tries if encoding is not None]
    limit = language_model(forget).max_length
    if not fitting:
        raise BadInput(
            f"{phase}: none of the {len(tries)} prompts fits into max_length {limit} together "
            "with its true answer; raise max_length or shorten the prompts"
        )
    if len(fitting) < len(tries):
        left_out = (
            f"{phase}: {len(tries) - len(fitting)} of {len(tries)} prompts were left out because "
            f"they do not fit into max_length {limit} together with their true answers."
        )
        if left_out not in run.notes:  # it is the same for every model
            run.note(left_out)
    asking = forget.select([r for r, _ in fitting]).replaced(e for _, e in fitting)
    said: dict[tuple[int, str], list[str]] = {}
    most = min(LONGEST, 2 * max(int(e["units"]) for _, e in fitting) + PREAMBLE)
    answers = greedy_answers(model, asking, run, phase, longest=most)
    for (record, _), truth, answer in zip(fitting, true_answers(asking), answers, strict=True):
        said.setdefault((record, truth), []).append(answer)
    return Elicited([r for r, _ in said], [truth for _, truth in said], list(said.values()))
