"""Counterfactual memorization: what a text being in the training data changes about the text.

    mem(x) = E_{S with x} M(f_S, x) - E_{S without x} M(f_S, x)

over models f_S trained on random halves S of the texts, with M the share of tokens that is
predicted right (Zhang et al., 2021, arXiv:2112.12938, section 2). What many texts say is predicted
without any one of them, so it counts as no memory, which extraction alone cannot tell.

The models are new ones, trained as the user says the audited one was: the numbers are about texts
under that training, not about the audited weights. Copies of a text are trained on once, or every
half would hold one. Cost: as many trainings as there are models, see :mod:`unlearn.attacks.shadow`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unlearn import registry
from unlearn.attacks.shadow import Pool, pool
from unlearn.checkpoint import Checkpoint, inspect
from unlearn.errors import BadInput
from unlearn.evaluations.extractable import Estimate, mean
from unlearn.evaluations.memorization import memorization_scores
from unlearn.methods.retrain import Retrain
from unlearn.run import Run
from unlearn.tasks.base import Encoded
from unlearn.tasks.causal_lm import CausalLM
from unlearn.tasks.classification import Classification

Array = npt.NDArray[np.float64]

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Counterfactual:
    """How much texts are memorized.

    Attributes:
        models: that were trained.
        memory: mean of mem(x) over the texts; its interval is about other texts, under the same
            models.
        inside: mean share of tokens right in models that had the text.
        outside: the same in models that had it not.
        quantiles: of mem(x), by the share of texts at or below.
    """

    models: int
    memory: Estimate
    inside: float
    outside: float
    quantiles: dict[str, float]


def recipe(training: Mapping[str, Any], checkpoint: Checkpoint) -> Retrain:
    """How new models are trained.

    Args:
        training: hyperparameters of `retrain`.
        checkpoint: the audited model, whose architecture the new ones have.

    Raises:
        BadInput: unknown settings, no way to make new models, or a start of another kind.
    """
    method = registry.build("retrain", dict(training))
    if not isinstance(method, Retrain):
        raise BadInput("another package has replaced the method retrain: uninstall it")
    if method.init is None and checkpoint.fresh is None:
        raise BadInput(
            "counterfactual memorization trains new models, and only the weights of this one are "
            "known: name a checkpoint to start from with --training init=..."
        )
    check_start(method.init, checkpoint)
    return method


def check_start(init: str | None, checkpoint: Checkpoint) -> None:
    """Refuse weights to start new models from that cannot take the audited model's place.

    Args:
        init: the checkpoint that holds them; None: new random ones.
        checkpoint: the audited model.

    Raises:
        BadInput: there is no such checkpoint, or its task, vocabulary or classes are others.
    """
    if init is None:
        return
    start, task = inspect(init, checkpoint.options).task, checkpoint.task
    words = [t.tokenizer.get_vocab() for t in (start, task) if isinstance(t, CausalLM)]
    sizes = [t.classes for t in (start, task) if isinstance(t, Classification)]
    if type(start) is not type(task):
        fault = f"is a checkpoint for {start.name}, and the audited model one for {task.name}"
    elif words and words[0] != words[1]:
        fault = "has another vocabulary than the audited model"
    elif sizes and sizes[0] != sizes[1]:
        fault = f"has {sizes[0]} classes, and the audited model {sizes[1]}"
    else:
        return
    raise BadInput(f"--training init={init} {fault}: name a checkpoint of its kind")


def halves(
    texts: Encoded, rest: Encoded | None, settings: Retrain, run: Run, models: int, cache: Path
) -> Pool:
    """Train models on random halves of the texts, and measure every text in each.

    Args:
        texts: distinct ones, at least 2.
        rest: what every model is trained on besides.
        settings: how.
        run: device, progress, and the seed of everything.
        models: how many, even, at least 4.
        cache: directory where finished models' measurements wait for the others.

    Raises:
        BadInput: too few texts, or an odd or too small number of models.
    """
    return pool(
        lambda: run.initial_model(settings.init), texts, rest, {"texts": texts}, settings, run,
        shadows=models, cache=cache,
    )  # fmt: skip


def memories(correct: Any, member: Any) -> tuple[Array, Counterfactual]:
    """mem(x) of every text, and what there is to say about all of them.

    Args:
        correct: share of tokens that each of s models predicts right, shape (s, n).
        member: whether each model was trained on each text, booleans of shape (s, n).

    Raises:
        BadInput: shapes that do not fit, or a text that all models or none were trained on.
    """
    scores = memorization_scores(correct, member)
    right, had = np.asarray(correct, dtype=np.float64), np.asarray(member)
    return scores, Counterfactual(
        len(right),
        mean(scores, (-1.0, 1.0)),
        float(((right * had).sum(0) / had.sum(0)).mean()),
        float(((right * ~had).sum(0) / (~had).sum(0)).mean()),
        {f"{q:g}": float(np.quantile(scores, q)) for q in QUANTILES},
    )
