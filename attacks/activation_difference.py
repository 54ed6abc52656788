"""Activation difference: whose hidden states moved when the model was made to forget?

An attacker with the checkpoints before and after a request shows both of them records. Forgetting
changes what layers say about the records that had to go more than about others, so how far hidden
states moved is a membership score for the request itself: it tells what was forgotten. That two
versions of a model reveal what was deleted between them was shown by Chen et al. (2021, arXiv
2005.02205) with predictions; hidden states need no predictions. Even a retrained model can be told
from its predecessor in this way, so the number to read it against is that of an exact removal.

With h_l(x) the state of record x in layer l before and h'_l(x) after, over the layers l of both:

    score(x) = mean_l  |h'_l(x) - h_l(x)| / (|h'_l(x)| + |h_l(x)|)

Every layer counts the same whatever the length of its states, and every term is between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from unlearn.attacks.interface import Array
from unlearn.attacks.signals import collect
from unlearn.errors import BadInput
from unlearn.run import Run
from unlearn.tasks.base import Encoded


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> Array:
    """How far hidden states moved between two models, relative to their length.

    Args:
        before: by layer, states of n records in one model, shape (n, dim).
        after: the same layers and records in the other.

    Returns:
        Shape (n,), from 0 (nothing moved) to 1 (states point the opposite way, or one of the two
        is zero, in every layer).

    Raises:
        BadInput: no layers, other layers, or shapes that do not fit.

    >>> moved({"a": [[3.0, 4.0], [0.0, 0.0]]}, {"a": [[0.0, 0.0], [0.0, 0.0]]})
    array([1., 0.])
    """
    if not before or before.keys() != after.keys():
        raise BadInput(
            f"hidden states can be compared layer by layer only: one model has "
            f"{', '.join(before) or 'none'}, the other {', '.join(after) or 'none'}"
        )
    shares = []
    for layer, states in before.items():
        first, second = (np.asarray(x, dtype=np.float64) for x in (states, after[layer]))
        if first.shape != second.shape or first.ndim != 2:
            raise BadInput(
                f"the states of layer {layer} must both have the shape (n, dim), got "
                f"{first.shape} and {second.shape}"
            )
        length = np.linalg.norm(first, axis=1) + np.linalg.norm(second, axis=1)
        distance = np.linalg.norm(second - first, axis=1)
        shares.append(np.divide(distance, length, out=np.zeros_like(length), where=length > 0))
    if len({len(share) for share in shares}) > 1:
        raise BadInput("every layer must have a state of every record")
    # rounding can lift a share above 1 by a hair
    return np.asarray(np.minimum(np.mean(shares, axis=0), 1.0))


def states(
    model: nn.Module, examples: Encoded, run: Run, layers: Sequence[str] = ()
) -> dict[str, npt.NDArray[np.float32]]:
    """One vector per record and layer: of texts, the state that has read the prompt alone.

    Cost: one forward pass over ``examples``.

    Args:
        model: on ``run.device``; left as it was.
        examples: texts, images or vectors, encoded by the model's task.
        run: device and progress.
        layers: names of modules; none: every block of the model.

    Returns:
        By layer, shape (n, dim): what the task makes of a layer's output for one record.

    Raises:
        BadInput: the model has no blocks, or no module of that name.
    """
    names = tuple(layers) or tuple(run.task.layers(model))
    known = dict(model.named_modules())
    if not names:
        raise BadInput(f"{type(model).__name__} has no blocks: name the layers to compare")
    if unknown := [name for name in names if name not in known]:
        raise BadInput(f"{type(model).__name__} has no layer {unknown[0]!r}: check its name")
    return collect(model, examples, run, b"", "hidden states", names).features
