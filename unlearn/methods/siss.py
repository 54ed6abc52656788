"""Subtracted importance sampled scores, SISS (Alberti et al., ICLR 2025, arXiv 2503.01034).

Unlearns single pictures of a diffusion model. A kept picture x and one to forget a share one noisy
picture, drawn from a mixture of both, and one forward pass:

    x_t ~ (1 - m) q(.|x) + m q(.|a)                                            (m = mixture)
    L   = w_x |eps - eps_x|^2 - s w_a |eps - eps_a|^2
    w_x = 1 / ((1 - m) + m r),   w_a = 1 / ((1 - m) / r + m),   r = q(x_t|a) / q(x_t|x)

where eps_x = (x_t - sqrt(abar) x) / sqrt(1 - abar) is the noise that would lead from x to x_t. In
expectation that is the loss on x minus s times the loss on a, and both weights are bounded, by
1 / (1 - m) and 1 / m. The means are over pixels.

s is chosen at every step: the gradient of the second part has the norm ``scaling_norm``, as in the
authors' experiments on faces, or a tenth of the first part's. The paper's x is any training
picture; here it is one that stays. Pictures are noised together with what the network is told
about them, so where that differs x_t can only come from one of the two, and r is 0 or infinite.
Cost: one forward and two backwards (three without ``scaling_norm``) per retain example and epoch;
a batch goes through the model in one piece, as the norm of its gradient is not a mean over pieces
(several processes: one s for the share of each).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

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

TENTH = 0.1  # of the retain gradient: about what the authors' scaling norms come to


def mixture_weights(log_ratio: Tensor, mixture: float) -> tuple[Tensor, Tensor]:
    """Importance weights w_x and w_a of a sample of the mixture (defensive: both are bounded).

    Args:
        log_ratio: log q(x_t|a) - log q(x_t|x), any shape; may be infinite.
        mixture: probability m that x_t was drawn from a, between 0 and 1.

    Returns:
        Both in the shape of ``log_ratio``.

    >>> mixture_weights(torch.tensor([0.0, -torch.inf, torch.inf]), 0.5)
    (tensor([1., 2., 0.]), tensor([1., 0., 2.]))
    """
    stays = log_ratio.new_tensor(math.log1p(-mixture))
    goes = log_ratio.new_tensor(math.log(mixture))
    return (
        (-torch.logaddexp(stays, goes + log_ratio)).exp(),
        (-torch.logaddexp(stays - log_ratio, goes)).exp(),
    )


def parts(
    predicted: Tensor, x_t: Tensor, x: Tensor, a: Tensor, abar: Tensor, log_ratio: Tensor,
    mixture: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What keeps x and what keeps a: both weighted losses of every row, shape (rows,).

    Args:
        predicted: the network's noise at ``x_t``, shape (rows, ...).
        x_t: drawn from the mixture, same shape.
        x: pictures that stay, as they are denoised, same shape.
        a: pictures to forget.
        abar: cumulative variances at each row's time, shape (rows,).
        log_ratio: as for :func:`mixture_weights`, shape (rows,).
        mixture: the same.
    """
    keeping, keeping_a = mixture_weights(log_ratio, mixture)
    return keeping * _missed(predicted, x_t, x, abar), keeping_a * _missed(predicted, x_t, a, abar)


def log_density_ratio(x_t: Tensor, x: Tensor, a: Tensor, abar: Tensor) -> Tensor:
    """Log q(x_t|a) - log q(x_t|x) of two Gaussians of the same width, shape (rows,)."""
    scale, width = abar.double().sqrt(), 1 - abar.double()
    far, near = (
        (x_t.double() - scale.view(-1, *[1] * (x_t.ndim - 1)) * one).square().flatten(1).sum(1)
        for one in (x, a)
    )
    return (far - near) / (2 * width)


def _missed(predicted: Tensor, x_t: Tensor, origin: Tensor, abar: Tensor) -> Tensor:
    """Mean squared distance to the noise that leads from ``origin`` to ``x_t``."""
    eps = to_eps(origin, x_t, abar, "sample")
    return (predicted - eps).square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class SISS(Training):
    """Unlearn single pictures, holding on to the others in the same forward pass."""

    mixture: Annotated[
        float,
        Field(gt=0, lt=1, description="share of noisy pictures drawn from those to forget"),
        Range(0.1, 0.9),
    ] = 0.5
    scaling_norm: Annotated[
        float | None,
        Field(
            gt=0,
            description="norm of the gradient that forgets; none: a tenth of the other's, "
            "at every step",
        ),
    ] = None
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate"), Range(1e-6, 1e-3, log=True)
    ] = 1e-4
    epochs: Annotated[
        float, Field(gt=0, description="passes over the retain set"), Range(0.5, 10.0, log=True)
    ] = 2

    needs: ClassVar[Needs] = Needs(retain=Need.REQUIRED, tasks=("diffusion",), targets=("records",))

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Descend, every batch in one piece."""
        whole = replace(self, micro_batch_size=self.batch_size)
        return descend(subject, self.terms(subject, request, run), whole, run)

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """One term over pairs: a kept picture, and one to forget drawn beside it."""
        forget = request.forget_set()
        pipeline: Any = subject.model

        def forward(model: nn.Module, batch: Batch) -> Tensor:
            drawn = torch.randint(len(forget), (len(batch["index"]),)).tolist()
            keeps, goes = self._parts(
                model, pipeline, run.task, batch, forget.batch(drawn, run.device)
            )
            return keeps - self._strength(model, keeps, goes) * goes

        retain = request.retain_set()
        return [Term("pairs", retain, lambda losses, _: losses, "example", forward=forward)]

    def _parts(
        self, model: nn.Module, pipeline: Pipeline, task: Any, batch: Batch, other: Batch
    ) -> tuple[Tensor, Tensor]:
        rows = len(batch["index"])
        with torch.no_grad():
            x, a = (pipeline.encode(b["pixel_values"].to(pipeline.dtype)) for b in (batch, other))
            t = torch.randint(len(pipeline.abars), (rows,)).to(pipeline.device)
            eps = torch.randn(rows, *pipeline.shape).to(x)
            chosen = (torch.rand(rows) < self.mixture).to(pipeline.device)
            x_t = pipeline.noised(_where(chosen, a, x), eps, t)
            told, told_a = (task.conditions(pipeline, b) for b in (batch, other))
            told = None if told is None else _where(chosen, told_a, told)
            abar = pipeline.abars[t]
            sure = torch.where(chosen, torch.inf, -torch.inf).double()
            ratio = torch.where(
                _told_alike(task, batch, other), log_density_ratio(x_t, x, a, abar), sure
            )
        predicted = to_eps(model(x_t, t, told), x_t, abar, pipeline.kind)
        return parts(predicted, x_t, x, a, abar, ratio.to(x), self.mixture)

    def _strength(self, model: nn.Module, keeps: Tensor, goes: Tensor) -> float:
        """s: what brings the gradient that forgets to its norm."""
        moving = [p for p in model.parameters() if p.requires_grad]
        size = _norm(goes.mean(), moving)
        if size < 1e-12:  # every noisy picture came from far away
            return 0.0
        return (self.scaling_norm or TENTH * _norm(keeps.mean(), moving)) / size

    def trained(self, forget: int, retain: int) -> int:
        """Every epoch is over the retain set."""
        return self.steps(retain) * min(self.batch_size, retain)


def _norm(loss: Tensor, moving: list[nn.Parameter]) -> float:
    found = torch.autograd.grad(loss, moving, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float(g.double().square().sum()) for g in found if g is not None))


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, *[1] * (other.ndim - 1)), one, other)


def _told_alike(task: Any, batch: Batch, other: Batch) -> Tensor:
    """Where the network is told the same about both pictures of a pair, shape (rows,)."""
    key = "input_ids" if task.tokenizer else "labels"  # which are 0 where it is told nothing
    return (batch[key] == other[key]).flatten(1).all(1)
