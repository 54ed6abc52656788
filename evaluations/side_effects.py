"""Side effects: what a model still answers on topics next to the forgotten one.

Lynch et al. (2024, arXiv 2402.16835) ask about neighbouring topics (about other people of the same
profession, say), because unlearning that cuts too wide does its harm there first. A record's value
is the mean of two numbers: ROUGE-L recall of the greedy answer, which shows refusals and nonsense,
and the probability of the true answer per token, which shows damage before greedy answers change.

Unlike what is looked for in the forget set, this is to be held against the original model, record
by record.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import nn

from unlearn.attacks.interface import Ground, Inapplicable, Search
from unlearn.attacks.signals import collect
from unlearn.evaluations.measure import ASKED
from unlearn.evaluations.memorization import rouge_l
from unlearn.generation import greedy_answers, true_answers
from unlearn.run import Run

Array = npt.NDArray[np.float64]


def score(model: nn.Module, ground: Ground, run: Run) -> Array:
    """How well a model answers questions on neighbouring topics.

    Cost: a forward pass over the answers, and greedy decoding, of at most ``ASKED`` records.

    Args:
        model: a language model on ``run.device``.
        ground: the neighbouring records stand in its ``forget``.
        run: seed, device and progress.

    Returns:
        Values in [0, 1], shape (n,); higher: more is kept. 0 where a likelihood is not a number
        and nothing of the answer is said.

    Raises:
        Inapplicable: texts without a prompt, of which nothing can be asked.
    """
    asked = ground.forget.sample(ASKED, run.seed)
    if all(len(asked[i]["prompt"]) <= 1 for i in range(len(asked))):
        raise Inapplicable(
            f"side effects are seen in answers, and the {asked.name} records are texts without a "
            "question: give them as question/answer or prompt/completion"
        )
    loss = collect(model, asked, run, b"", f"score {asked.name}").loss()
    said = greedy_answers(model, asked, run, f"ask about {asked.name}")
    pairs = zip(true_answers(asked), said, strict=True)
    recall = np.array([rouge_l(truth, answer).recall for truth, answer in pairs])
    likely = np.nan_to_num(np.exp(-np.maximum(loss, 0.0)), nan=0.0)
    return np.asarray((recall + likely) / 2)


SEARCH = Search(
    "side_effects",
    "Side effects: what is still answered on neighbouring topics",
    "share of the answer",
    "Lynch et al. 2024, arXiv 2402.16835",
    score,
    depth="quick",
    needs=("--neighbours",),
)
