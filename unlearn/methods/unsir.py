"""UNSIR: unlearning by impairing and repairing (Tarun et al. 2021, arXiv 2111.08947).

    1. noise      N_k = argmin_N  -mean_i NLL(k | N_i) + penalty * mean_i |N_i|^2,  per class k
    2. impair     min  mean NLL(k | N_k) + mean NLL(retain)
    3. repair     min  mean NLL(retain)

The noise is what the model takes for class k the least (eq. 2); learning to call it k overwrites
what k meant. Both phases see the same sample of the retain set, and no forgotten example is read
at any time: the classes are named, and shapes are those of the retain set.

The authors mix noise and retained images in one shuffled set, 20 or more copies of the noise in it,
and train with batch statistics. Here a step takes a batch of each, an epoch is one pass over the
retained sample, and statistics stay those of the starting model: noise would be averaged into them.

Cost: ``noise_steps`` forward and backward passes over ``noise_size`` inputs per class, then two
passes over the retained sample and one as large over the noise, per epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unlearn.errors import BadInput
from unlearn.interface import Classes, Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import Batch, Encoded, Task, evaluating
from unlearn.tasks.classification import continuous
from unlearn.training import Term, Training, descend, likelihood


def noise_loss(task: Task, model: nn.Module, batch: Batch, penalty: float) -> Tensor:
    """What the noise minimises (eq. 2), a scalar in nats.

    Args:
        task: classification of images or vectors.
        model: the network, in eval mode.
        batch: noise as input, the forgotten class as label.
        penalty: weight of the mean squared length of an input.
    """
    lengths = batch[continuous(batch)].flatten(1).square().sum(1)
    loss: Tensor = -task.nll(model, batch).mean() + penalty * lengths.mean()
    return loss


@dataclass(frozen=True, kw_only=True)
class UNSIR(Training):
    """Overwrite whole classes with noise learnt for them, then repair the rest."""

    lr: Annotated[
        float,
        Field(gt=0, description="learning rate of the impair phase"),
        Range(1e-5, 1e-2, log=True),
    ] = 1e-4
    repair_lr: Annotated[
        float,
        Field(gt=0, description="learning rate of the repair phase"),
        Range(1e-5, 1e-2, log=True),
    ] = 1e-4
    epochs: Annotated[
        float, Field(gt=0, description="passes over the retained sample in each phase")
    ] = 1
    retain_size: Annotated[
        int,
        Field(
            ge=1, description="retained examples drawn for both phases; the authors: 500 a class"
        ),
    ] = 5000
    noise_size: Annotated[int, Field(ge=1, description="noise inputs per forgotten class")] = 32
    noise_steps: Annotated[int, Field(ge=1, description="steps of Adam on the noise")] = 25
    noise_lr: Annotated[
        float,
        Field(gt=0, description="learning rate of Adam on the noise"),
        Range(0.01, 0.5, log=True),
    ] = 0.1
    penalty: Annotated[
        float,
        Field(ge=0, description="weight of the noise's mean squared length"),
        Range(0.01, 1.0, log=True),
    ] = 0.1

    needs: ClassVar[Needs] = Needs(
        forget=Need.NO, retain=Need.REQUIRED, tasks=("classification",), targets=("classes",)
    )

    def check(self, request: Request) -> None:
        """Refuse tokens before the weights are loaded."""
        continuous(request.retain_set()[0])

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Learn the noise, impair, repair."""
        if not isinstance(request.target, Classes):
            raise BadInput("unsir forgets whole classes: pass --forget-classes")
        retain = request.retain_set().sample(self.retain_size, run.seed_of("retained sample"))
        noise = self._noise(subject.model, retain, request.target.indices, run)
        held = Term("retain", retain, likelihood, "unit")
        impairing = [held, Term("noise", noise, likelihood, "unit")]
        subject = descend(subject, impairing, self, run, phase="impair")
        return descend(subject, [held], replace(self, lr=self.repair_lr), run, phase="repair")

    def trained(self, forget: int, retain: int) -> int:
        """Two batches a step while impairing, one while repairing."""
        size = min(self.retain_size, retain)
        return 3 * self.steps(size) * min(self.batch_size, size)

    def _noise(
        self, model: nn.Module, retain: Encoded, classes: tuple[int, ...], run: Run
    ) -> Encoded:
        """The learnt noise of all classes as a set of examples; nothing of ``retain`` is in it."""
        name = continuous(retain[0])
        blank, draw = retain.select([0] * self.noise_size, "noise"), run.generator("noise")

        def learn(index: int) -> Tensor:
            start = torch.randn((self.noise_size, *retain[0][name].shape), generator=draw)
            noise = start.to(run.device, retain[0][name].dtype).requires_grad_()
            batch = blank.batch(range(self.noise_size), run.device)
            batch["labels"] = torch.full_like(batch["labels"], index)
            optimizer = torch.optim.Adam([noise], self.noise_lr)
            for step in range(self.noise_steps):
                loss = noise_loss(run.task, model, {**batch, name: noise}, self.penalty)
                (noise.grad,) = torch.autograd.grad(loss, noise)
                optimizer.step()
                numbers = {"loss": float(loss.detach())}
                run.progress.advance(f"noise of {index}", step + 1, self.noise_steps, numbers)
            return noise.detach()

        with evaluating(model), torch.enable_grad():
            learnt = run.once("noise", lambda: {str(k): learn(k) for k in classes})
        encodings = [
            {**retain[0], name: row, "label": k} for k in classes for row in learnt[str(k)].cpu()
        ]
        return retain.select([0] * len(encodings), "noise").replaced(encodings)
