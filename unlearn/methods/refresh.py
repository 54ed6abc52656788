"""Refresh learning around fine-tuning (Wang et al., ICLR 2024, arXiv 2403.13249).

Before every step of fine-tuning on the retain set, ``unlearning_steps`` times on that step's batch

    theta <- theta + gamma F^-1 grad L + noise N(0, 2 gamma F^-1)

and then the ordinary step, which learns the batch again. L is the mean NLL of the batch and F the
diagonal of the empirical Fisher information: the mean over the retain set of every example's
squared gradient, measured once at the starting model. ``damping`` is added to F because many of
its entries are next to zero. To first order, the gradient that the ordinary step then sees is
that of L + gamma/2 grad L^T F^-1 grad L, so flat minima are preferred.

The paper proposes this for continual learning, as an addition to any method. Like finetune, which
it is without unlearning steps, it never reads the forget set. The authors' code unlearns after the
step instead of before, divides by 1 + 0.001 F of earlier tasks, moves every tensor by 1e-5 of its
norm, and adds noise of standard deviation 1e-8 only.

Cost: finetune times 1 + ``unlearning_steps``, and one forward and backward over the retain set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unlearn.errors import BadInput
from unlearn.importance import squared_gradients
from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.scope import Moving, moving
from unlearn.tasks.base import Batch, Encoded
from unlearn.training import Numbers, Term, Training, descend, likelihood


def unlearning_step(
    gradient: Tensor, fisher: Tensor, draw: Tensor, gamma: float, damping: float, noise: float
) -> Tensor:
    """What is added to a parameter by one step of unlearning; all tensors in its shape.

    Args:
        gradient: of the batch's mean loss.
        fisher: diagonal of the Fisher information, >= 0.
        draw: standard normal numbers.
        gamma: unlearning rate, > 0.
        damping: added to ``fisher``, > 0.
        noise: factor on the noise's standard deviation; 1 is the paper's.

    >>> one = torch.tensor(1.0)
    >>> unlearning_step(one, 3 * one, one, gamma=2.0, damping=1.0, noise=1.0)  # 2/4 + sqrt(4/4)
    tensor(1.5000)
    """
    rate = gamma / (fisher + damping)
    return rate * gradient + noise * (2 * rate).sqrt() * draw


@dataclass(frozen=True, kw_only=True)
class Refresh(Training):
    """Continue training on the retain set alone, unlearning every batch before it is learnt."""

    unlearning_steps: Annotated[
        int, Field(ge=0, description="unlearning steps per step; the authors' code takes 1")
    ] = 1
    unlearning_rate: Annotated[
        float, Field(gt=0, description="gamma"), Range(1e-3, 1.0, log=True)
    ] = 0.01
    damping: Annotated[
        float,
        Field(gt=0, description="added to the Fisher information"),
        Range(0.1, 10.0, log=True),
    ] = 1.0
    noise: Annotated[
        float,
        Field(
            ge=0,
            description="factor on the noise: 1 is the paper's equation, too much for small models",
        ),
        Range(1e-4, 1.0, log=True),
    ] = 0.001

    needs: ClassVar[Needs] = Needs(forget=Need.NO, retain=Need.REQUIRED)

    def check(self, request: Request) -> None:
        """Refuse a scope whose Fisher information no module owns.

        Raises:
            BadInput: an entry of a tensor in the scope.
        """
        if "@" in self.scope:
            raise BadInput("refresh cannot move one entry of a tensor: leave @ out of the scope")

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Unlearn and learn each batch, in train mode, without the forget set."""
        retain = request.retain_set()
        fisher = self._fisher(subject, retain, run) if self.unlearning_steps else {}

        def forget_first(moved: Moving, gradients: Callable[[], Numbers]) -> None:
            for _ in range(self.unlearning_steps):
                gradients()
                for name, p in moved.parameters.items():
                    if p.grad is not None:
                        # the loop keeps the state of this generator with unfinished training
                        draw = torch.randn_like(p)
                        step = unlearning_step(
                            p.grad, fisher[name], draw,
                            self.unlearning_rate, self.damping, self.noise,
                        )  # fmt: skip
                        p.data.add_(step)

        term = Term("retain", retain, likelihood, "unit")
        return descend(subject, [term], self, run, dropout=True, before=forget_first)

    def _fisher(self, subject: Subject, retain: Encoded, run: Run) -> dict[str, Tensor]:
        """Mean over the examples of the squared gradient, of every parameter that may move."""

        def compute() -> dict[str, Tensor]:
            subject.model.eval()
            with moving(
                subject, run.task, self.scope, self.lora_rank, self.lora_alpha,
                run.seed_of("adapters"),
            ) as moved:  # fmt: skip

                def nll(batch: Batch) -> Tensor:
                    found = run.task.predictions(moved.model, batch, dense=True).nll()
                    return found / batch["units"]

                named = moved.parameters
                sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named.items()}
                for indices in run.batches(retain, "importances", self.micro_batch_size):
                    batch = retain.batch(indices, run.device)
                    found = squared_gradients(moved.model, partial(nll, batch), named)
                    for name, value in found.items():
                        sums[name] += value
                return {n: (value / len(retain)).to(named[n].dtype) for n, value in sums.items()}

        return run.once("refresh_fisher", compute)

    def trained(self, forget: int, retain: int) -> int:
        """Every epoch is over the retain set, once per step of either kind."""
        taken = self.steps(retain) * min(self.batch_size, retain)
        return (1 + self.unlearning_steps) * taken + (retain if self.unlearning_steps else 0)
