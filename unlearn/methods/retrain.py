"""Retraining on the retain set: exact, and the reference every other method is held against.

    theta_0 = fresh or given weights;  min  mean NLL(retain)

Every module starts again, not only the last layer. ``init`` names a checkpoint to start from
(a pre-trained model that never saw the forget set); without it the weights are drawn anew from
the configuration and the run's seed. Cost: ordinary training.

``gradient_restriction`` trains a model that is easier to unlearn later, by small gradients (IAU;
Liu et al. 2025, arXiv 2507.23257, the loss l_GR; the paper uses alpha = 0.005):

    min  mean NLL(batch) + alpha * sum_l |d mean NLL(batch) / d theta_l|_2

with one norm per parameter tensor. It is differentiated through the gradient, which costs about
twice the time and memory; a batch then goes through the model in one piece, as the norm of its
gradient is not a mean over pieces (several processes: one norm for the share of each).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from unlearn.errors import BadInput, Unsupported
from unlearn.interface import ALL_TASKS, Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import Batch, Encoded
from unlearn.training import Term, Training, descend, likelihood


def gradient_norms(loss: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """sum_l |d loss / d theta_l|_2 over the tensors, a scalar that can be differentiated again.

    A gradient that is zero adds nothing, neither here nor to the derivative.

    >>> w = nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> gradient_norms(0.5 * w.square().sum(), [w])
    tensor(5., grad_fn=<AddBackward0>)
    """
    found = torch.autograd.grad(loss, list(parameters), create_graph=True, allow_unused=True)
    norms = (torch.linalg.vector_norm(g) for g in found if g is not None)
    return sum(norms, loss.new_zeros(()))


@dataclass(frozen=True, kw_only=True)
class Retrain(Training):
    """Train again without the forgotten data."""

    init: Annotated[
        str | None, Field(description="checkpoint to start from; none: new random weights")
    ] = None
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate"), Range(1e-4, 0.1, log=True)
    ] = 1e-3
    epochs: Annotated[
        float, Field(gt=0, description="passes over the retain set"), Range(5.0, 60.0, log=True)
    ] = 20
    gradient_restriction: Annotated[
        float,
        Field(
            ge=0, description="weight of the gradient's norms, for a model easier to unlearn (iau)"
        ),
    ] = 0.0

    needs: ClassVar[Needs] = Needs(forget=Need.NO, retain=Need.REQUIRED, tasks=ALL_TASKS)

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Replace the weights, then train on the retain set in train mode."""
        with torch.random.fork_rng():
            torch.manual_seed(run.seed_of("initial weights"))
            start = run.initial_model(self.init)
        _same_shape(subject, start)
        subject.model.load_state_dict(start.state_dict())
        if self.gradient_restriction:
            term = self._restricted(request.retain_set(), run)
            whole = replace(self, micro_batch_size=self.batch_size + 1)
            return descend(subject, [term], whole, run, dropout=True)
        term = Term("retain", request.retain_set(), likelihood, "unit")
        return descend(subject, [term], self, run, dropout=True)

    def _restricted(self, retain: Encoded, run: Run) -> Term:
        """The likelihood and the norms of its gradient, both of the same batch."""
        if run.sharded or self.compile:
            raise Unsupported("gradient_restriction differentiates twice: not with FSDP or compile")

        def forward(model: nn.Module, batch: Batch) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
                nll = run.task.predictions(model, batch, dense=True).nll()
            moving = (p for p in model.parameters() if p.requires_grad)
            norms = gradient_norms(nll.sum() / batch["units"].sum(), moving)
            return nll + self.gradient_restriction * norms * batch["units"]

        return Term("retain", retain, lambda losses, _: losses, "unit", forward=forward)

    def trained(self, forget: int, retain: int) -> int:
        """Every epoch is over the retain set."""
        return self.steps(retain) * min(self.batch_size, retain)


def _same_shape(subject: Subject, start: torch.nn.Module) -> None:
    ours = {name: p.shape for name, p in subject.model.named_parameters()}
    if ours != {name: p.shape for name, p in start.named_parameters()}:
        raise BadInput("init is a checkpoint of another architecture: pass one of the same shape")
