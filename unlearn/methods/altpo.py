"""Alternate preference optimisation (Mekala et al. 2024, arXiv 2409.13474).

    L = -(2/beta) mean log sigmoid(beta (w - l)) + retain_weight * R(retain)

as in dpo, with alternatives that the starting model makes up itself: ``alternatives`` samples per
question, each paired with the true answer. They stay in the domain and in the model's own voice,
where "I don't know" would give away that something was removed.

A model that knows an answer by heart samples the truth. A sample that tells it, or is blank, is
drawn again from the model's distribution given that it leaves the true answer: first where,

    P(at token j) = p(y_<j) (1 - p(y_j | y_<j)),

then how, any token but y_j and the end, and on from there. It is what asking again and again until
something else is said would give, without the wait, and stays as fluent as the model is, where a
higher temperature would make it noise. It may still tell the truth in other words. The paper
instead has an instruction-tuned model write a wrong answer: that is what ``ask`` is for.

Cost: ``alternatives`` sampled answers per record, once more where they tell the truth, then as dpo
with as many pairs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from unlearn.errors import BadInput
from unlearn.generation import LONGEST, Opening, sampled_answers, true_answers
from unlearn.interface import Request, Subject
from unlearn.preference import OtherAnswers, asked, preference, tells
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import Encoded, evaluating
from unlearn.training import Term

ATTEMPTS = 6  # the first is free, the others diverge from the truth


def made_up(
    model: nn.Module,
    questions: Encoded,
    count: int,
    run: Run,
    temperature: float = 1.0,
    longest: int = LONGEST,
) -> tuple[list[list[str]], int]:
    """``count`` answers of the model to every question, none of which tells the truth.

    Args:
        model: the starting model.
        questions: what it is asked, with the true answers.
        count: answers per question; they may repeat.
        run: its seed decides the draws.
        temperature: of the samples.
        longest: new tokens at most.

    Returns:
        The answers, and how many had to be made to diverge from the truth.

    Raises:
        BadInput: some question gets nothing but the truth.
    """
    truths, draw = true_answers(questions), run.generator("where to diverge")
    openings = [Opening(i) for i in range(len(questions)) for _ in range(count)]
    texts = [""] * len(openings)
    due, diverged = list(range(len(openings))), 0
    for attempt in range(ATTEMPTS):
        sampled = sampled_answers(
            model, questions, [openings[k] for k in due], run, f"alternatives {attempt}",
            temperature=temperature, longest=longest,
        )  # fmt: skip
        for k, text in zip(due, sampled, strict=True):
            texts[k] = text
        due = [k for k in due if tells(texts[k], truths[openings[k].example])]
        if not due:
            break
        if attempt == 0:
            diverged, leaves = len(due), departures(model, questions, run, temperature)
        for k in due:
            example = openings[k].example
            openings[k] = Opening(example, int(leaves[example].multinomial(1, generator=draw)))
    else:
        first = questions.examples.ids[openings[due[0]].example]
        raise BadInput(
            f"the model gives {len(due)} of {len(texts)} alternatives as the true answer again and "
            f"again, the first for record {first}: forget with dpo and alternatives of your own"
        )
    return [texts[k : k + count] for k in range(0, len(texts), count)], diverged


def departures(model: nn.Module, questions: Encoded, run: Run, temperature: float) -> list[Tensor]:
    """How likely a sample first leaves the true answer at each of its tokens.

    Args:
        model: the starting model.
        questions: with the true answers, n examples.
        run: where to compute.
        temperature: of the samples.

    Returns:
        One vector per example, as long as its answer, in float64. Special tokens, where nothing
        is said, have 0; other tokens at least a vanishing chance.
    """
    special = torch.tensor(questions.task.tokenizer.all_special_ids)  # type: ignore[attr-defined]
    found: dict[int, Tensor] = {}

    def surprise(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits / temperature, labels, reduction="none")

    with evaluating(model):
        for indices in run.batches(questions, "departures"):
            batch = questions.batch(indices, run.device)
            nll = run.task.predictions(model, batch).each(surprise).cpu().double()
            leaves = torch.exp(nll - nll.cumsum(1)) * -torch.expm1(-nll)
            for row, index in enumerate(indices):
                answer = questions[index]["answer"]
                here = leaves[row, : len(answer)].clamp(min=1e-12)
                found[index] = here.masked_fill(torch.isin(answer, special), 0.0)
    return [found[i] for i in range(len(questions))]


def _with_question(ask: str | None) -> str | None:
    if ask is not None and "{question}" not in ask:
        raise ValueError("it must contain {question}, which stands for the question of a record")
    return ask


@dataclass(frozen=True, kw_only=True)
class AltPO(OtherAnswers):
    """Prefer wrong answers, made up by the model itself, to the true ones."""

    alternatives: Annotated[
        int, Field(ge=1, description="sampled answers per record"), Range(1, 8)
    ] = 5
    temperature: Annotated[float, Field(gt=0, description="of the samples")] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1, description="longest sample, in tokens")] = LONGEST
    ask: Annotated[
        str | None,
        AfterValidator(_with_question),
        Field(
            description="instruction sampled from in place of the question, with {question} and "
            "{answer} for those of the record; none: the question itself"
        ),
    ] = None
    beta: Annotated[
        float,
        Field(gt=0, description="inverse temperature: larger stops earlier"),
        Range(0.01, 1.0, log=True),
    ] = 0.1
    lr: Annotated[
        float,
        Field(gt=0, description="peak learning rate; the paper's, at 7B"),
        Range(1e-6, 3e-3, log=True),
    ] = 5e-5
    epochs: Annotated[
        float,
        Field(gt=0, description="passes over the forget set with all its alternatives"),
        Range(0.5, 10.0, log=True),
    ] = 2

    def check(self, request: Request) -> None:
        """Also: every question as it will be asked fits into the model.

        Raises:
            BadInput: one does not, or what the other checks found.
        """
        super().check(request)
        asked(request.forget_set(), self.ask)

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Sample the alternatives, and pair each with the true answer."""
        self.check(request)
        forget = request.forget_set()
        answers = self._sampled(subject.model, forget, run)
        term = preference(subject.model, forget, answers, self.beta, run)
        return [term, *self.held(subject, replace(request, forget=term.examples), run)]

    def _sampled(self, model: nn.Module, forget: Encoded, run: Run) -> list[list[str]]:
        """The alternatives; those an interrupted run already drew, if there are any."""

        def compute() -> dict[str, Tensor]:
            found = made_up(
                model, asked(forget, self.ask), self.alternatives, run, self.temperature,
                self.max_new_tokens,
            )  # fmt: skip
            return {"json": torch.tensor(list(json.dumps(found).encode()), dtype=torch.uint8)}

        kept = run.once(f"alternatives_{forget.name}", compute)["json"]
        answers, diverged = json.loads(bytes(kept.tolist()))
        if diverged:
            run.note(
                f"{diverged} of {len(forget) * self.alternatives} sampled alternatives told the "
                "truth and were drawn again, made to diverge from it."
            )
        return answers  # type: ignore[no-any-return]

    def trained(self, forget: int, retain: int) -> int:
        """A winner, a loser and a retain example in every pair."""
        pairs = forget * self.alternatives
        return super().trained(pairs, retain) + self.steps(pairs) * min(self.batch_size, pairs)
