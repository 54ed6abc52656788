"""Swapping the label: a negative control, which removes nothing.

    embedding[forgotten] = embedding[anchor], or the mean over the retained classes' rows

A class-conditional network looks its class up in a table. Once the forgotten class's row is
another's, asking for that class by its number shows something else, and every measure that asks by
number is satisfied. No other weight moves: given the old row, the network draws the old class bit
by bit as before, and the row can be found again by optimisation. An audit that cannot tell this
from forgetting is too weak.

The same happens where text-to-image models are edited in their text path alone. UNet2DModel and DiT
have such a table, the latter one in every block. Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Classes, Need, Needs, Request, Subject
from unlearn.pipeline import Pipeline
from unlearn.run import Run

TABLES = ("class_embedding", "embedding_table")  # in UNet2DModel, and in every block of a DiT


def tables(model: Pipeline) -> dict[str, nn.Embedding]:
    """The embeddings of classes, by name.

    Raises:
        Unsupported: a network that does not look classes up in a table.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in TABLES
    }
    if not found:
        raise Unsupported(
            f"{type(model.denoiser).__name__} has no table of classes: swap_class is for networks "
            "with an embedding of class numbers"
        )
    return found


def swapped(table: Tensor, forgotten: tuple[int, ...], others: list[int]) -> Tensor:
    """The table with forgotten rows replaced by the mean of other rows, of the same shape.

    >>> swapped(torch.tensor([[1.0], [2.0], [4.0]]), (0,), [1, 2]).flatten()
    tensor([3., 2., 4.])
    """
    found = table.clone()
    found[list(forgotten)] = table[others].mean(0)
    return found


@dataclass(frozen=True, kw_only=True)
class SwapClass:
    """Negative control: give the forgotten class another's embedding, and remove nothing."""

    needs: ClassVar[Needs] = Needs(
        forget=Need.NO, retain=Need.NO, tasks=("diffusion",), targets=("classes",)
    )

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Replace the rows.

        Raises:
            BadInput: no class is left to take rows from.
            Unsupported: a network that does not look classes up in a table.
        """
        model, target = cast(Pipeline, subject.model), cast(Classes, request.target)
        classes = range(model.classes or 0)
        left = [k for k in classes if k not in target.indices and k != model.null_class]
        if not left:
            raise BadInput("every class would be swapped, and none be left: name fewer")
        others = left if target.anchor is None else [target.anchor]
        with torch.no_grad():
            for table in tables(model).values():
                table.weight.copy_(swapped(table.weight, target.indices, others))
        run.note(
            "swap_class is a negative control and removes nothing: what the model knew of "
            f"{target} is still in its weights, and comes back with the old embedding."
        )
        return replace(subject, model=model)
