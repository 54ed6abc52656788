"""Influence Approximation Unlearning, IAU (Liu et al. 2025, arXiv 2507.23257).

Removing a record does to the optimum what learning one with the opposite gradient would do. So no
Hessian is inverted; a record is unlearnt as another would be learnt:

    incremental approximation:  theta <- theta + lr * mean_forget grad NLL
    gradient correction:        g = correction * mean_retain grad NLL - mean_forget grad NLL
                                theta <- theta - lr * g
    gradient restriction:       trained beforehand with  NLL + alpha * sum_l |grad_l NLL|_2

The third part is a matter of training: ``retrain`` does it with ``gradient_restriction`` (the
paper's alpha is 0.005), and models so trained are unlearnt in smaller, safer steps. The paper sums
over the forget set where this takes the mean; lr absorbs its size.

The paper's formulas are steps along the gradient (``step="gradient"``, the default). The authors'
code takes one step of a new Adam optimiser, which is -lr * sign(g): every weight moves by lr,
however little it has to do with the forget set. ``step="sign"`` with lr 0.001 reproduces it. Both
gradients are of whole sets, in eval mode. At an optimum of training they cancel up to their sizes:
mean_retain = -(n_forget / n_retain) mean_forget, so correction matters off it, and from the second
step on.

Cost: one forward and backward over forget and retain set per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from unlearn.errors import Collapsed
from unlearn.gradients import mean_gradient
from unlearn.interface import ALL_TASKS, Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.scope import in_scope


def corrected_gradient(
    forget: Mapping[str, Tensor], retain: Mapping[str, Tensor] | None, correction: float = 1.0
) -> dict[str, Tensor]:
    """What is descended on: ``correction * retain - forget``, by parameter name.

    Args:
        forget: the gradient of the forget set's mean NLL.
        retain: that of the retain set's; None: no correction.
        correction: its weight.

    >>> corrected_gradient({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 1.0])}, 0.5)
    {'w': tensor([ 0.5000, -1.5000])}
    """
    if retain is None:
        return {name: -gradient for name, gradient in forget.items()}
    return {name: correction * retain[name] - gradient for name, gradient in forget.items()}


@dataclass(frozen=True, kw_only=True)
class IAU:
    """Learn the forget set backwards, corrected by what the retain set asks for."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    lr: Annotated[
        float,
        Field(gt=0, description="length of a step, in gradients or (sign) per weight"),
        Range(1e-3, 10.0, log=True),
    ] = 0.1
    step: Annotated[
        Literal["gradient", "sign"],
        Field(description="gradient: the paper's formula; sign: the authors' code (lr 0.001)"),
    ] = "gradient"
    steps: Annotated[
        int, Field(ge=1, description="steps, each with gradients of its own; the paper takes one")
    ] = 1
    correction: Annotated[
        float,
        Field(ge=0, description="weight of the retain gradient; 0: no retain set is used"),
        Range(0.1, 4.0, log=True),
    ] = 1.0
    batch_size: Annotated[
        int, Field(ge=1, description="examples per pass; does not change the result")
    ] = 64
    scope: Annotated[
        str, Field(description="parameters that may move: all, head, experts, or patterns")
    ] = "all"

    @property
    def needs(self) -> Needs:
        """The retain set, unless nothing is corrected."""
        return Needs(retain=Need.REQUIRED if self.correction else Need.NO, tasks=ALL_TASKS)

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Take the steps.

        Raises:
            Collapsed: a gradient or weight is not finite.
        """
        model, parameters = subject.model, in_scope(subject.model, run.task, self.scope)
        for number in range(self.steps):
            gradient = self._gradient(model, parameters, request, run)
            norm = sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5
            run.log("step", step=number + 1, of=self.steps, lr=self.lr, grad_norm=norm)
            with torch.no_grad():
                for name, p in parameters.items():
                    along = gradient[name]
                    p.sub_(self.lr * (along.sign() if self.step == "sign" else along))
            if not all(bool(p.isfinite().all()) for p in parameters.values()):
                raise Collapsed(
                    f"the weights are not finite after step {number + 1}. Nothing was written; use "
                    "a smaller lr or fewer steps"
                )
        model.eval()
        return subject

    def _gradient(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], request: Request, run: Run
    ) -> dict[str, Tensor]:
        forget = mean_gradient(model, request.forget_set(), parameters, run, self.batch_size)
        if not self.correction:
            return corrected_gradient(forget, None)
        retain = mean_gradient(model, request.retain_set(), parameters, run, self.batch_size)
        return corrected_gradient(forget, retain, self.correction)

    def trained(self, forget: int, retain: int) -> int:
        """Every step goes over both sets, or over the forget set alone."""
        return self.steps * (forget + (retain if self.correction else 0))
