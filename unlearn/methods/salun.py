"""Saliency unlearning (SalUn; Fan et al., ICLR 2024, arXiv 2310.12508).

    m = 1 where |grad of the mean NLL(forget)| is among the largest share of all weights, else 0
    min over m * theta  mean NLL(forget with drawn labels) + retain_weight * R(retain)

The mask (eq. 3) is ``scope=saliency:SHARE``, taken once at the starting model in eval mode from
the true labels; any other gradient method takes that scope, too. Weights outside stay as they are,
bit for bit: neither momentum nor weight decay reaches them. As in the authors' code, the labels
are drawn uniformly from all, the true one included; ``wrong_only`` leaves that out.

Here a label is drawn once per record, epochs are over the forget set, and each step takes a batch
of either set. The authors' code draws again in every epoch, which pulls towards the uniform
distribution, walks both sets in full per epoch, and trains in train mode. The defaults are for
classifiers: language models want adamw, and get random answers as in random_label. Diffusion models
want adamw, too; they learn to denoise forgotten pictures as they would now under another label, or
under the anchor, never under the true one. The mean over pixels weighs the retain set: the 0.001 of
the authors' code, which sums over 3 x 32 x 32 pixels there, is a retain_weight of 3. Cost: one
forward and backward over the forget set, then as random_label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from unlearn.interface import Request, Subject
from unlearn.ranges import Choice, Range
from unlearn.retention import TwoSided
from unlearn.run import Run
from unlearn.tasks.base import Encoding
from unlearn.training import Term, likelihood


@dataclass(frozen=True, kw_only=True)
class SalUn(TwoSided):
    """Train the most salient weights on random labels for the forget set, and retain."""

    wrong_only: Annotated[
        bool, Field(description="draw from the wrong labels only, not from all")
    ] = False
    scope: Annotated[
        str,
        Field(
            description="parameters that may move: saliency:SHARE as in the paper, or all, head, "
            "lora, lora:PATTERN, or patterns"
        ),
        Choice(("saliency:0.1", "saliency:0.3", "saliency:0.5", "saliency:0.7", "all")),
    ] = "saliency:0.5"
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate"), Range(1e-5, 0.1, log=True)
    ] = 0.01
    epochs: Annotated[float, Field(gt=0, description="passes over the forget set")] = 10
    optimizer: Annotated[
        Literal["adamw", "sgd"],
        Field(description="adamw (betas 0.9, 0.999) or sgd with Nesterov momentum 0.9"),
    ] = "sgd"
    weight_decay: Annotated[float, Field(ge=0, description="decoupled (adamw) or L2 (sgd)")] = 5e-4

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Draw the labels, to train on them; the loop takes the mask from the true ones."""
        forget, draw = request.forget_set(), run.generator("random labels")
        # a true label teaches a diffusion model the picture itself
        wrong_only = self.wrong_only or run.task.name == "diffusion"

        def drawn(index: int) -> Encoding:
            encoding: Encoding = forget[index]
            # the true one as often as any other: else a wrong one, all of them alike
            if not wrong_only and not int(torch.randint(run.task.classes, (), generator=draw)):
                return encoding
            return run.task.relabel(encoding, forget.examples[index], draw)

        relabelled = forget.replaced(drawn(i) for i in range(len(forget)))
        term = Term("forget", relabelled, likelihood, "unit")
        return [term, *self.held(subject, request, run)]
