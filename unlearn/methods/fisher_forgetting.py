"""Fisher forgetting (Golatkar et al., CVPR 2020, arXiv 1911.04933): noise on idle weights.

    F = mean over retained i of  sum_y p(y | x_i) (d NLL(y | x_i) / d theta)^2
    theta <- mu + sqrt(v) xi,      v = alpha min(1 / (F + 1e-8), 1e3),      xi ~ N(0, 1)

A weight that says little about the retained data gets much noise, and what it knew is gone. F is
exact: examples are never mixed, y runs over all classes (or over ``samples`` draws from p), and
labels are not used. The rest is the authors' code (section 6 of the paper derives noise that
grows with F^(-1/2) in variance; theirs goes with 1/F):

- of a matrix or convolution, v is its mean along the inputs (dimension 1);
- in the output layer 1/F is cut at 1e2 instead; v of it and of vectors is multiplied by 10;
- class requests: rows of the output layer that belong to forgotten classes start from mu = 0 with
  v = 1e-4, before that factor of 10. Everywhere else mu = theta.

Cost: one forward and backward over the retain set per class (per draw, with ``samples``). The
authors take C backward passes per example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from unlearn.importance import squared_gradients
from unlearn.interface import Classes, Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import Batch, Encoded


def noise_variance(
    fisher: Tensor, alpha: float, *, output: bool = False, forgotten: tuple[int, ...] = ()
) -> Tensor:
    """The variance of the noise on one parameter.

    Args:
        fisher: F of the parameter, in its shape.
        alpha: scale of the noise.
        output: whether it belongs to the output layer.
        forgotten: with ``output``, rows of classes that are forgotten.

    Returns:
        In the parameter's shape.

    >>> noise_variance(torch.tensor([[0.0, 1.0]]), alpha=1e-3)[0].tolist()  # (1 + 0.001) / 2
    [0.5005..., 0.5005...]
    """
    variance = alpha * (1 / (fisher + 1e-8)).clamp_max(1e2 if output else 1e3)
    if fisher.ndim > 1:
        variance = variance.mean(1, keepdim=True).expand_as(fisher).clone()
    if output:
        variance[list(forgotten)] = 1e-4
    return variance * 10 if output or fisher.ndim == 1 else variance


@dataclass(frozen=True, kw_only=True)
class FisherForgetting:
    """Drown in noise what the retained data do not need."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    alpha: Annotated[
        float, Field(gt=0, description="scale of the noise's variance"), Range(1e-9, 1e-4, log=True)
    ] = 1e-6
    samples: Annotated[
        int | None,
        Field(
            ge=1,
            description="labels drawn per example, instead of weighing all classes, where these "
            "are many; none: all classes",
        ),
    ] = None
    batch_size: Annotated[
        int, Field(ge=1, description="examples per pass; does not change the result")
    ] = 256

    needs: ClassVar[Needs] = Needs(
        forget=Need.NO, retain=Need.REQUIRED, labels=Need.NO, tasks=("classification",)
    )

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Measure the information, add the noise."""
        model, retain = subject.model.eval(), request.retain_set()
        parameters = dict(model.named_parameters())
        fisher = run.once(
            "fisher", lambda: fisher_information(model, retain, run, self.samples, self.batch_size)
        )
        head = {id(p) for p in run.task.output_layer(model).parameters()}
        forgotten = request.target.indices if isinstance(request.target, Classes) else ()
        draw = run.generator("fisher noise")
        with torch.no_grad():
            for name, p in parameters.items():
                variance = noise_variance(
                    fisher[name], self.alpha, output=id(p) in head, forgotten=forgotten
                )
                noise = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.device)
                if id(p) in head:
                    p[list(forgotten)] = 0
                p.add_((variance.sqrt() * noise).to(p.dtype))
        return subject


def fisher_information(
    model: nn.Module, examples: Encoded, run: Run, samples: int | None, batch_size: int
) -> dict[str, Tensor]:
    """The diagonal of F, per parameter, float64.

    Args:
        model: a classifier, in eval mode.
        examples: what F is the mean over; labels are not looked at.
        run: the task, device, progress, and the seed of drawn labels.
        samples: labels drawn per example; None: all classes, weighed exactly.
        batch_size: examples per pass; does not change the result without ``samples``.
    """
    parameters = dict(model.named_parameters())
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    draw = run.generator("fisher labels")

    def log_probabilities(batch: Batch) -> Tensor:
        return run.task.logits(model, batch)[:, 0].log_softmax(-1)

    def of_class(batch: Batch, y: int) -> Tensor:
        """Whose squared gradient is that of NLL(y), times p(y)."""
        column = log_probabilities(batch)[:, y]
        return -column * (column.detach() / 2).exp()

    def of_draw(batch: Batch) -> Tensor:
        found = log_probabilities(batch)
        drawn = torch.multinomial(found.detach().double().exp().cpu(), 1, generator=draw)
        return -found.gather(1, drawn.to(found.device))[:, 0]

    for indices in run.batches(examples, "Fisher information", batch_size):
        batch = examples.batch(indices, run.device)
        losses: list[Callable[[], Tensor]] = (
            [partial(of_class, batch, y) for y in range(run.task.classes)]
            if samples is None
            else [partial(of_draw, batch)] * samples
        )
        for loss in losses:
            _add(sums, squared_gradients(model, loss, parameters))
    return {name: total / len(examples) / (samples or 1) for name, total in sums.items()}


def _add(sums: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    for name, value in found.items():
        sums[name] += value
