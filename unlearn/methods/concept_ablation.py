"""Concept Ablation (Kumari et al., ICCV 2023, arXiv 2303.13516, eq. 5 and 6).

    min  mean (eps(x_t, c) - a)^2  +  retain_weight mean (eps(x_t, k) - eps_0(x_t, k))^2

on noised pictures x_t of the anchor: told concept c, the model shall say of them what it says when
told the anchor, a = eps_0(x_t, c_anchor). eps_0 is the starting model, whose values are computed
once. The published code uses the present one without
its gradient, which may drift; and for the second term, on the anchor alone, the noise in place of
its expectation eps_0. k runs over anchor, prompts to keep or other classes, and the null condition.

Prompts need an anchor: the kind of thing the concept is one of. Classes turn into the next one that
stays, unless an anchor is named. A bare word generalises only partly to captions that contain it:
pass such captions, or ``contexts``. Cost: per picture ``sampling_steps`` guided network calls and
``draws``, then ``epochs`` passes over both banks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from unlearn.interface import Need, Needs, Request, Subject
from unlearn.latents import (
    Moved,
    Renoised,
    anchor_of,
    beneath,
    conditions,
    matched,
    named,
    need_anchor,
    neighbours,
)
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.training import Term


@dataclass(frozen=True, kw_only=True)
class ConceptAblation(Renoised):
    """Make a model say about a concept what it says about its anchor."""

    parameters: Moved = "x-strict"
    lr: Annotated[
        float,
        Field(gt=0, description="learning rate; the authors use 1.6e-5 at batch size 8"),
        Range(1e-5, 3e-2, log=True),
    ] = 2e-3

    needs = Needs(
        forget=Need.NO, retain=Need.NO, tasks=("diffusion",), targets=("classes", "concepts")
    )

    def check(self, request: Request) -> None:
        """Prompts need an anchor."""
        super().check(request)
        need_anchor(request.target)

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Generate pictures of the anchor and compute what the starting model says about them."""
        model, gone = beneath(subject.model), named(request.target)
        anchor = anchor_of(request.target, run.task)
        shown = self.within([anchor] * len(gone))
        table = conditions(model, shown)
        bank = self.bank(model, "concept", shown, self.within(gone), lambda said: said(table), run)
        return [matched(bank), *self.held(model, neighbours(request.target, run.task), run)]
