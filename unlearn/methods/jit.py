"""JiT, just in time: forgetting by Lipschitz regularisation (Foster et al. 2024, arXiv 2402.01401).

    min  mean_i  1/n sum_s  |f(x_i) - sg f(x_i + e_s)| / |e_s|,      e_s ~ N(0, sigma^2)

The outputs at the perturbed inputs are held fixed (sg), so every forget example is pulled to the
weighted median of what the model says around it: what was memorised gives way to what holds nearby.
Neither labels nor retained data are used. Perturbed inputs are clamped to the range of the forget
set's, and e_s is what is left of the noise then. Where the model is flat or linear around x, the
draws cancel out and nothing but their noise moves it: sigma must reach beyond. A small lr is all
that keeps the rest of the model in place, so expect to tune both.

The authors' code clamps to the range of the batch, adds up over the examples of a batch (their
learning rates, 3e-4 to 1.5 with plain SGD, are for that sum), and resets the gradient only once, so
that it accumulates from batch to batch. Here the loss is a mean and every step has a gradient of
its own.

Cost: one forward and backward and n forward passes over the forget set, per epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import Batch, Encoded
from unlearn.tasks.classification import continuous
from unlearn.training import Term, Training


def steepness(output: Tensor, moved: Tensor, step: Tensor) -> Tensor:
    """|f(x) - sg f(x + e)| / |e| per example, in Euclidean norms: the loss of one draw.

    Args:
        output: f(x), shape (batch, classes).
        moved: f(x + e), same shape; no gradient flows into it.
        step: e, shape (batch, ...); an example with e = 0 counts 0.

    Returns:
        Shape (batch,).

    >>> steepness(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.tensor([[2.0]]))
    tensor([2.5000])
    """
    length = torch.linalg.vector_norm(step.flatten(1), dim=1)
    change = torch.linalg.vector_norm(output - moved.detach(), dim=1)
    slope: Tensor = change / length.clamp_min(torch.finfo(length.dtype).tiny)
    return slope


@dataclass(frozen=True, kw_only=True)
class JiT(Training):
    """Pull every forget example to what the model says around it, without any other data."""

    sigma: Annotated[
        float,
        Field(gt=0, description="standard deviation of the noise, in units of the input"),
        Range(0.05, 2.0, log=True),
    ] = 0.5
    draws: Annotated[int, Field(ge=1, description="perturbed inputs per example and step")] = 25
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate"), Range(1e-4, 0.1, log=True)
    ] = 1e-2
    epochs: Annotated[float, Field(gt=0, description="passes over the forget set")] = 1
    optimizer: Annotated[
        Literal["adamw", "sgd"],
        Field(description="adamw (betas 0.9, 0.999) or sgd with Nesterov momentum 0.9"),
    ] = "sgd"
    weight_decay: Annotated[float, Field(ge=0, description="decoupled (adamw) or L2 (sgd)")] = 0.0

    needs: ClassVar[Needs] = Needs(retain=Need.NO, labels=Need.NO, tasks=("classification",))

    def check(self, request: Request) -> None:
        """Refuse tokens before the weights are loaded."""
        continuous(request.forget_set()[0])

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Noise comes from the random state that a killed run restores."""
        forget = request.forget_set()
        name = continuous(forget[0])
        low, high = _range(forget, name)

        def slopes(model: nn.Module, batch: Batch) -> Tensor:
            start = batch[name].to(torch.promote_types(batch[name].dtype, torch.float32))

            def output(inputs: Tensor) -> Tensor:
                return run.task.logits(model, {**batch, name: inputs})[:, 0].to(start.dtype)

            here, total = output(start), start.new_zeros(len(start))
            for _ in range(self.draws):
                with torch.no_grad():
                    noisy = (start + self.sigma * torch.randn_like(start)).clamp(low, high)
                    there = output(noisy)
                total = total + steepness(here, there, noisy - start)
            return total / self.draws

        return [Term("forget", forget, lambda found, batch: found, "example", forward=slopes)]

    def trained(self, forget: int, retain: int) -> int:
        """A forward pass alone counts as a third of a training step."""
        examples = self.steps(forget) * min(self.batch_size, forget)
        return examples + -(-self.draws * examples // 3)


def _range(examples: Encoded, name: str) -> tuple[float, float]:
    """The smallest and the largest entry of any input."""
    ends = [(float(e[name].min()), float(e[name].max())) for e in examples]
    return min(low for low, _ in ends), max(high for _, high in ends)
