"""Reliable and efficient concept erasure (Gong et al., ECCV 2024, arXiv 2407.12383).

Concept editing (``uce``) moves the states c that prompts produce, and leaves others that the
edited layers W' read as W read c. The best of them has a closed form (eq. 8 with regularisation
towards zero),

    c' = argmin sum_l |W'_l c' - W_l c|^2 + revive_lamb |c'|^2
       = (revive_lamb I + sum_l W'_l^T W'_l)^-1 (sum_l W'_l^T W_l) c

over all keys and values. It is erased in turn, and the next one is looked for, ``epochs`` times.
As W' = W M, all that is needed of the layers is G = sum_l W_l^T W_l:

    c' = (revive_lamb I + M^T G M)^-1 M^T G c

Every erasure starts from the original W and holds all that was erased before. The authors' code
edits W' again for c' alone; what was erased first then comes back with the epochs, and what is
kept drifts. Cost: as uce, and a few products of square matrices per epoch. Prompts, templates and
what the run keeps: see uce.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from unlearn.cross_attention import (
    ClosedForm,
    Embeddings,
    embeddings,
    erasure,
    multiplied,
    projections,
)
from unlearn.interface import Request, Subject
from unlearn.pipeline import Pipeline
from unlearn.ranges import Range
from unlearn.run import Run


def gram(layers: Mapping[str, nn.Linear]) -> Tensor:
    """G = sum of W^T W, shape (dim, dim), float64 on the CPU."""
    weights = [layer.weight.detach().cpu().double() for layer in layers.values()]
    return torch.stack([w.T @ w for w in weights]).sum(0)


def revived(c: Tensor, m: Tensor, g: Tensor, lamb: float) -> Tensor:
    """What the edited layers read most nearly as the original ones read ``c``.

    Args:
        c: states, shape (count, dim).
        m: the edit so far, W' = W M, shape (dim, dim).
        g: from :func:`gram`, of the original layers.
        lamb: weight of short embeddings, > 0.

    Returns:
        Shape (count, dim).
    """
    read = m.T @ g
    stiff = lamb * torch.eye(len(m), dtype=m.dtype) + read @ m
    found: Tensor = torch.linalg.solve(stiff, read @ c.T)
    return found.T


@dataclass(frozen=True, kw_only=True)
class RECE(ClosedForm):
    """Erase the concept, and again what would bring it back."""

    epochs: Annotated[
        int,
        Field(ge=1, description="how often reviving states are found and erased; 1 to 3 usually"),
        Range(1, 5),
    ] = 2
    revive_lamb: Annotated[
        float,
        Field(
            gt=0,
            description="weight of short reviving states: 0.1 is gentle, 1e-3 reaches further",
        ),
        Range(1e-3, 1.0, log=True),
    ] = 0.1

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Alternate."""
        model = cast(Pipeline, subject.model)
        at = embeddings(model, request, self.templates, run)
        g = gram(projections(model))
        weights = self.lamb, self.erase_weight, self.keep_weight
        m, gone = erasure(at, *weights), at
        for epoch in range(self.epochs):
            c = revived(at.erased, m, g, self.revive_lamb)
            both = torch.cat([gone.erased, c]), torch.cat([gone.anchors, at.anchors])
            gone = Embeddings(*both, at.kept)
            m = erasure(gone, *weights)
            distance = float((c - at.erased).norm(dim=1).mean())
            run.log("revived", epoch=epoch + 1, distance=distance)
            run.progress.advance("unlearn", epoch + 1, self.epochs, {"distance": distance})
        return multiplied(subject, m, run)
