"""EraseDiff: erasing as a constraint on preserving (Wu et al., CVPR 2025, arXiv 2401.05779).

    min_theta L_r(theta)   so that   q(theta) = f(theta) - f(theta_K) <= 0

L_r is the denoising loss of retained pictures; f leads the noise predicted for forgotten ones to
something else: what the network says when told another class or prompt, or uniform noise.
theta_K is where K gradient steps on f lead from theta. Solved to first order (BOME, Liu et al.
2022, arXiv 2209.08709): a step along

    grad L_r + lambda grad f,   lambda = max(0, (eta q - <grad L_r, grad f>) / |grad f|^2)

so that f falls at least as fast as eta q asks, and no faster once it is as low as K steps bring it
(``weighting="barrier"``). The authors' code takes a constant lambda (0.1 and 1 in its runs) or
max(0, eta - cos(grad L_r, grad f)). With either, f(theta_K) adds a constant to the loss and none to
its gradient: the K steps would decide nothing, so they are not taken. Their code also draws the
times of forgotten pictures and then uses those of retained ones; here each picture has its own.

Two losses are in each step, so a batch goes through the model in one piece. Cost: per forget
example and epoch one forward and backward, and another for a retain example; cosine two backwards
more, barrier also K + 1 forwards and K backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unlearn.interface import Need, Needs, Request, Subject
from unlearn.noising import to_eps
from unlearn.pipeline import Pipeline
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import Batch
from unlearn.training import Term, Training, descend

Weighting = Literal["barrier", "cosine", "constant"]


def multiplier(
    weighting: Weighting, eta: float, excess: float, inner: float, keeps: float, erases: float
) -> float:
    """Lambda of one step.

    Args:
        weighting: constant: eta itself; cosine: max(0, eta - cos); barrier: see above.
        eta: the constant, the cosine aimed at, or how fast the excess should fall.
        excess: q, how far f is above where K steps bring it.
        inner: <grad L_r, grad f>.
        keeps: |grad L_r|.
        erases: |grad f|.

    >>> multiplier("barrier", 0.5, 2.0, -1.0, 1.0, 2.0)
    0.5
    """
    if weighting == "constant":
        return eta
    if erases == 0 or (keeps * erases == 0 and weighting == "cosine"):
        return 0.0
    if weighting == "cosine":
        return max(0.0, eta - inner / (keeps * erases))
    return max(0.0, (eta * excess - inner) / erases**2)


@dataclass(frozen=True, kw_only=True)
class EraseDiff(Training):
    """Preserve the retain set, under the constraint that the forget set is led astray."""

    toward: Annotated[
        Literal["label", "noise"],
        Field(
            description="what forgotten pictures are denoised to: what the network says when told "
            "the anchor or, with classes, another one drawn at random (label), or uniform noise"
        ),
    ] = "label"
    weighting: Annotated[
        Weighting, Field(description="how lambda is chosen: barrier, cosine or constant")
    ] = "barrier"
    eta: Annotated[
        float,
        Field(gt=0, description="barrier and cosine: how firmly; constant: lambda itself"),
        Range(0.1, 10.0, log=True),
    ] = 1.0
    inner_steps: Annotated[int, Field(ge=1, description="K, with barrier")] = 2
    inner_lr: Annotated[
        float,
        Field(gt=0, description="learning rate of the K gradient steps, with barrier"),
        Range(0.01, 1.0, log=True),
    ] = 0.1
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate"), Range(1e-5, 1e-2, log=True)
    ] = 1e-4
    epochs: Annotated[
        float, Field(gt=0, description="passes over the forget set"), Range(1.0, 20.0, log=True)
    ] = 4

    needs: ClassVar[Needs] = Needs(retain=Need.REQUIRED, tasks=("diffusion",))

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Descend, every batch in one piece."""
        whole = replace(self, micro_batch_size=self.batch_size)
        return descend(subject, self.terms(subject, request, run), whole, run)

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """One term over both losses: forget examples, and retain examples drawn beside them."""
        forget, retain = request.forget_set(), request.retain_set()
        task: Any = run.task
        pipeline: Any = subject.model
        if self.toward == "label":
            draw = run.generator("other labels")
            forget = forget.replaced(
                task.relabel(forget[i], forget.examples[i], draw) for i in range(len(forget))
            )

        def forward(model: nn.Module, batch: Batch) -> Tensor:
            rows = len(batch["index"])
            kept = retain.batch(torch.randint(len(retain), (rows,)).tolist(), run.device)
            drawn, kept = task.redrawn(batch), task.redrawn(kept)
            if self.toward == "noise":
                drawn["aim"] = torch.rand(rows, task.draws, *pipeline.shape)

            def erased() -> Tensor:
                if self.toward == "noise":
                    return _to_noise(model, pipeline, task, drawn)
                found: Tensor = task.nll(model, drawn)
                return found

            moving = [p for p in model.parameters() if p.requires_grad]
            reached = self._reached(erased, moving) if self.weighting == "barrier" else 0.0
            keeps, erases = task.nll(model, kept), erased()
            scale = self._lambda(keeps.mean(), erases.mean(), reached, moving)
            losses: Tensor = keeps + scale * erases
            return losses

        return [Term("forget", forget, lambda losses, _: losses, "example", forward=forward)]

    def _reached(self, erased: Callable[[], Tensor], moving: Sequence[nn.Parameter]) -> float:
        """f(theta_K); the weights are as before afterwards."""
        start = [p.detach().clone() for p in moving]
        for _ in range(self.inner_steps):
            found = torch.autograd.grad(erased().mean(), moving, allow_unused=True)
            with torch.no_grad():
                for p, g in zip(moving, found, strict=True):
                    if g is not None:
                        p.sub_(self.inner_lr * g)
        with torch.no_grad():
            lowest = float(erased().mean())
            for p, value in zip(moving, start, strict=True):
                p.copy_(value)
        return lowest

    def _lambda(
        self, keeps: Tensor, erases: Tensor, reached: float, moving: Sequence[nn.Parameter]
    ) -> float:
        if self.weighting == "constant":
            return self.eta
        one, other = (
            torch.cat([g.double().flatten() for g in _gradient(loss, moving)])
            for loss in (keeps, erases)
        )
        excess = max(0.0, float(erases.detach()) - reached)
        return multiplier(
            self.weighting, self.eta, excess, float(one @ other), float(one.norm()),
            float(other.norm()),
        )  # fmt: skip


def _to_noise(model: nn.Module, pipeline: Pipeline, task: Any, batch: Batch) -> Tensor:
    """Squared distance of the predicted noise to the batch's uniform noise, shape (batch,)."""
    t, noise = task.drawn(pipeline, batch)
    draws, times, eps = t.shape[1], t.flatten(), noise.flatten(0, 1)
    with torch.no_grad():
        x_0 = pipeline.encode(batch["pixel_values"].to(eps)).repeat_interleave(draws, 0)
        x_t = pipeline.noised(x_0, eps, times)
        told = task.conditions(pipeline, batch)
        told = None if told is None else told.repeat_interleave(draws, 0)
    said = to_eps(model(x_t, times, told), x_t, pipeline.abars[times], pipeline.kind)
    error = (said - batch["aim"].flatten(0, 1).to(said)).square().flatten(1).mean(1)
    return error.view(t.shape).mean(1)


def _gradient(loss: Tensor, moving: Sequence[nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(loss, moving, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(moving, found, strict=True)]
