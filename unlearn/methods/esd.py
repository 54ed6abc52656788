"""Erased Stable Diffusion (Gandikota et al., ICCV 2023, arXiv 2303.07345, eq. 5 to 7).

    y = eps_0(x_t, c_from) - eta (eps_0(x_t, c) - eps_0(x_t, null))
    min  mean (eps(x_t, c_from) - y)^2  +  retain_weight mean (eps(x_t, k) - eps_0(x_t, k))^2

The model is led away from concept c by its own knowledge of it: what it says when told c becomes
what it used to say under negative guidance. c_from is c itself, or a wider prompt that keeps its
meaning apart from c (``erase_from``). eps_0 is the starting model. The paper samples a trajectory
up to x_t for every step; here pictures are generated once, noised again, and all of eps_0 computed
before training, so a step costs one forward and backward.

The second term is not in the paper: on class-conditional models other classes suffer without it.
k runs over the other classes, or over the prompts to keep and the anchor (towards which esd does
not lead), and the null condition. Where a network of classes has no null class, the mean over the
classes that stay stands for it.

A bare word generalises only partly to captions that contain it: pass such captions, or
``contexts``. With a forget set its pictures and captions are used in place of generated ones.
Cost: per picture ``sampling_steps`` guided network calls and ``draws`` times three, then
``epochs`` passes over both banks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from unlearn.errors import BadInput
from unlearn.interface import Concepts, Need, Needs, Request, Subject
from unlearn.latents import Renoised, beneath, conditions, matched, named, neighbours
from unlearn.pipeline import Pipeline
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.training import Term


def esd_target(source: Tensor, concept: Tensor, null: Tensor, eta: float) -> Tensor:
    """What the model shall say: source - eta (concept - null), all predicted noise of one shape.

    Args:
        source: told what the concept is erased from.
        concept: told the concept.
        null: told nothing.
        eta: strength of the negative guidance, > 0.

    >>> esd_target(torch.tensor([2.0]), torch.tensor([2.0]), torch.tensor([1.0]), 1.0)
    tensor([1.])
    """
    return source - eta * (concept - null)


@dataclass(frozen=True, kw_only=True)
class ESD(Renoised):
    """Turn what a model says about a concept into its own negative guidance."""

    eta: Annotated[
        float, Field(gt=0, description="strength; the authors use 1 to 3"), Range(0.5, 5.0)
    ] = 2.0
    erase_from: Annotated[
        str | None,
        Field(description="prompt that loses the concept and keeps the rest; none: the concept's"),
    ] = None
    lr: Annotated[
        float,
        Field(gt=0, description="learning rate; 1e-5 to 5e-5 for Stable Diffusion"),
        Range(1e-5, 1e-2, log=True),
    ] = 5e-4

    needs = Needs(
        forget=Need.OPTIONAL, retain=Need.NO, tasks=("diffusion",), targets=("classes", "concepts")
    )

    def check(self, request: Request) -> None:
        """Prompts lose a part of their meaning, classes do not."""
        super().check(request)
        if self.erase_from and not isinstance(request.target, Concepts):
            raise BadInput("erase_from is a prompt: leave it out where classes are forgotten")

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Generate the pictures and compute what the starting model says about them."""
        model, kept = beneath(subject.model), neighbours(request.target, run.task)
        gone = named(request.target)
        shown, x_0 = self.within(gone), None
        told: Sequence[Any] | Tensor = shown
        if request.forget:
            some = request.forget.sample(self.pictures, run.seed_of("pictures"))
            batch = some.batch(range(len(some)), run.device)
            with torch.no_grad():
                x_0 = model.encode(batch["pixel_values"].to(model.dtype)).cpu()
            told = batch["input_ids"] if "input_ids" in batch else batch["labels"].flatten()
        concept = conditions(model, told)
        source = concept
        if self.erase_from:
            instead = [self.erase_from]
            told = self.within(instead * len(gone)) if x_0 is None else instead * len(concept)
            source = conditions(model, told)
        if model.null(1) is None:
            run.note("The network has no null class: the mean over the classes that stay is used.")

        def aim(said: Callable[[Tensor], Tensor]) -> Tensor:
            about = said(concept)
            null = unconditional(model, kept, len(concept), said)
            return esd_target(said(source) if self.erase_from else about, about, null, self.eta)

        bank = self.bank(model, "concept", shown, told, aim, run, x_0)
        return [matched(bank), *self.held(model, kept, run)]


def unconditional(
    model: Pipeline, kept: Sequence[Any], rows: int, said: Callable[[Tensor], Tensor]
) -> Tensor:
    """What ``said`` makes of no condition, or its mean over the classes that stay."""
    null = model.null(rows)
    if null is not None:
        return said(null)
    return torch.stack([said(conditions(model, [one] * rows)) for one in kept]).mean(0)
