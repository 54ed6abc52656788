"""SCRUB: move away from a frozen teacher on the forget set, stay with it elsewhere.

    max pass:  max  mean over forget of  T^2 KL(p_T(teacher) || p_T(student))
    min pass:  min  mean over retain of  gamma * NLL + alpha * T^2 KL(p_T(teacher) || p_T(student))

Kurmanji et al., NeurIPS 2023, arXiv 2302.09880. The teacher is the starting model and p_T
the softmax of logits divided by T. Each of the first ``msteps`` epochs is a max pass over the
forget set and a min pass over the retain set; the others are a min pass. The teacher speaks once,
before training, and is not kept beside the student.

The student trains in train mode, as in the authors' code. Every epoch ends on the retain set, and
so do the batch statistics. In a network without dropout and batch statistics, student and teacher
agree exactly at the start, where their divergence has no gradient: the first max pass then does
next to nothing, and ``msteps=1`` hardly forgets. Here every pass has an optimiser of its own, and
the learning rate is that of its epoch; the authors keep one optimiser, and cut its rate by ten.
The defaults are for classifiers: language models want adamw.

SCRUB+R (``rewind``): forgetting on and on makes forgotten records stand out, so return to the
epoch, 0 being the start, at which the error on the forget set is closest to the error that the
final model makes on comparable records it does not train on; the later of two equally close. The
paper takes validation records with the labels of the forget set. Here a share of the retain set is
left out of training, its errors weighted such that labels count as often as in the forget set.
Records left out may have taught the starting model, which makes their error, the goal, too low.
Whole classes are refused: no retain record is comparable.

Cost: one forward pass over both sets, then a forward and backward per example and pass. Rewinding
adds a forward pass over the forget set per epoch, and a copy of the weights per epoch in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unlearn.distributed import spread
from unlearn.errors import BadInput
from unlearn.interface import Classes, Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.reference import ReferenceLogits
from unlearn.retention import kl_divergence
from unlearn.run import Run
from unlearn.scope import SALIENCY
from unlearn.tasks.base import IGNORED, Batch, Encoded, Predictions, evaluating
from unlearn.training import Term, Training, descend, factor


def distillation(logits: Tensor, labels: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_T(teacher) || p_T(student)) of every unit, in nats.

    Args:
        logits: of the student, shape (n, classes).
        labels: not used.
        teacher: its logits, same shape.
        temperature: T, > 0.

    Returns:
        Shape (n,). The factor T^2 keeps the size of gradients independent of T.
    """
    return temperature**2 * kl_divergence(logits / temperature, labels, teacher / temperature)


def matched_error(labels: Tensor, wrong: Tensor, like: Tensor) -> float:
    """The share of wrong units if their labels occurred as often as in ``like``.

    Labels that one side lacks are left out.

    Args:
        labels: of the units measured, shape (n,).
        wrong: 1 where the model's choice is not the label, shape (n,).
        like: labels that set the frequencies, shape (m,).

    Raises:
        BadInput: no label is in both.

    >>> labels, wrong = torch.tensor([0, 0, 1, 1]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    >>> matched_error(labels, wrong, like=torch.tensor([0, 0, 0, 1]))  # 3/4 of 1/2
    0.375
    """
    size = int(max(labels.max(), like.max())) + 1
    measured, wanted = labels.bincount(minlength=size), like.bincount(minlength=size)
    error = labels.bincount(wrong.double(), size) / measured
    both = (measured > 0) & (wanted > 0)
    if not bool(both.any()):
        raise BadInput(
            "no record held out of the retain set has a label of the forget set, so there is no "
            "error to rewind to: raise rewind_holdout, or leave rewind out"
        )
    return float((error * wanted)[both].sum() / wanted[both].sum())


@dataclass(frozen=True, kw_only=True)
class SCRUB(Training):
    """Disagree with the starting model on the forget set, agree on the retain set."""

    alpha: Annotated[
        float,
        Field(ge=0, description="weight of the divergence on the retain set; the authors use "
              "0.001 at full size and 0.5 on few examples"), Range(1e-4, 1.0, log=True),
    ] = 0.001  # fmt: skip
    gamma: Annotated[
        float, Field(ge=0, description="weight of the NLL on the retain set"), Range(0.1, 2.0)
    ] = 0.99
    temperature: Annotated[float, Field(gt=0, description="logits are divided by it")] = 4.0
    msteps: Annotated[
        int,
        Field(ge=0, description="epochs that begin with a pass over the forget set"),
        Range(1, 10),
    ] = 2
    rewind: Annotated[
        bool,
        Field(description="SCRUB+R: return to the epoch whose forget error is like that of "
              "records not trained on"),
    ] = False  # fmt: skip
    rewind_holdout: Annotated[
        float, Field(gt=0, lt=1, description="share of the retain set not trained on, with rewind")
    ] = 0.1
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate"), Range(1e-5, 1e-2, log=True)
    ] = 5e-4
    epochs: Annotated[int, Field(ge=1, description="passes over the retain set"), Range(1, 10)] = 3
    optimizer: Annotated[
        Literal["adamw", "sgd"],
        Field(description="adamw (betas 0.9, 0.999) or sgd with Nesterov momentum 0.9"),
    ] = "sgd"
    weight_decay: Annotated[float, Field(ge=0, description="decoupled (adamw) or L2 (sgd)")] = 5e-4

    needs: ClassVar[Needs] = Needs(retain=Need.REQUIRED)

    def check(self, request: Request) -> None:
        """Refuse what would fail later.

        Raises:
            BadInput: rewinding where whole classes go, or with a retain set of one record; scope
                saliency.
        """
        if self.rewind and isinstance(request.target, Classes):
            raise BadInput(
                "rewind needs retain records with the labels of the forget set, and there are none "
                "where whole classes go: leave rewind out"
            )
        if self.rewind and len(request.retain_set()) < 2:
            raise BadInput("rewind needs more than one retain record: leave rewind out")
        if self.scope.startswith(SALIENCY):
            raise BadInput(
                f"scope {self.scope} needs a loss on the forget set in every step, and scrub has "
                "passes without: choose another scope, or salun"
            )

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Alternate between the sets; rewind if asked for."""
        forget, retain = request.forget_set(), request.retain_set()
        history = None
        if self.rewind:
            retain, unseen = _divided(retain, self.rewind_holdout, run)
            history = _History(subject.model, forget, unseen, run)
        away = self._away(subject.model, forget, run)
        stay = self._stay(subject.model, retain, run)
        for epoch in range(1, self.epochs + 1):
            rate = self.lr * factor(self, epoch - 1, self.epochs)
            once = replace(self, epochs=1, lr=rate, schedule="constant", warmup=0.0)
            if epoch <= self.msteps:
                subject = descend(subject, [away], once, run, phase=f"max{epoch}", dropout=True)
            subject = descend(subject, [stay], once, run, phase=f"min{epoch}", dropout=True)
            if history:
                history.add()
        if history:
            history.rewind()
        return subject

    def _away(self, model: nn.Module, forget: Encoded, run: Run) -> Term:
        far = self._divergence(model, forget, run)
        return Term("forget", forget, lambda said, batch: far(said, batch).sum(1), "unit", -1.0)

    def _stay(self, model: nn.Module, retain: Encoded, run: Run) -> Term:
        far = self._divergence(model, retain, run) if self.alpha else None

        def loss(predictions: Predictions, batch: Batch) -> Tensor:
            units = self.gamma * predictions.unit_nll()
            return (units + self.alpha * far(predictions, batch) if far else units).sum(1)

        return Term("retain", retain, loss, "unit")

    def _divergence(
        self, model: nn.Module, examples: Encoded, run: Run
    ) -> Callable[[Predictions, Batch], Tensor]:
        """How far a student is from ``model`` as it is now, at every unit of a batch."""
        teacher = ReferenceLogits(model, examples, range(len(examples)), run)

        def score(logits: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
            return distillation(logits, labels, taught, self.temperature)

        return lambda predictions, batch: predictions.each(score, teacher(batch))

    def trained(self, forget: int, retain: int) -> int:
        """A max pass reads the forget set, a min pass the retain set."""
        kept = retain - _held_out(retain, self.rewind_holdout) if self.rewind else retain
        return min(self.msteps, self.epochs) * forget + self.epochs * kept


def _held_out(retain: int, share: float) -> int:
    return min(retain - 1, max(1, round(share * retain)))


def _divided(retain: Encoded, share: float, run: Run) -> tuple[Encoded, Encoded]:
    """What is trained on, and what is held out."""
    order = torch.randperm(len(retain), generator=run.generator("rewind")).tolist()
    cut = _held_out(len(retain), share)
    return retain.select(sorted(order[cut:])), retain.select(sorted(order[:cut]), "held out")


class _History:
    """The weights at the start and after every epoch, and the forget error of each."""

    def __init__(self, model: nn.Module, forget: Encoded, unseen: Encoded, run: Run) -> None:
        self.model, self.forget, self.unseen, self.run = model, forget, unseen, run
        self.weights: list[dict[str, Tensor]] = []
        self.errors: list[float] = []
        self.add()
        self.goal()  # refuses before anything is trained

    def add(self) -> None:
        """Remember the model as it is."""
        state = self.model.state_dict()
        self.weights.append({name: value.to("cpu", copy=True) for name, value in state.items()})
        self.errors.append(float(self._mistakes(self.forget)[1].mean()))

    def goal(self) -> float:
        """The error of the model as it is on records that it does not train on."""
        return matched_error(*self._mistakes(self.unseen), like=self._mistakes(self.forget)[0])

    def rewind(self) -> None:
        """Return to the epoch with the error closest to the final goal."""
        goal, last = self.goal(), len(self.errors) - 1
        best = min(range(last, -1, -1), key=lambda epoch: abs(self.errors[epoch] - goal))
        self.model.load_state_dict(self.weights[best])
        self.run.note(
            f"Rewound to the end of epoch {best} of {last}: its error on the forget set is "
            f"{self.errors[best]:.3f}, and {goal:.3f} on held-out retain records."
        )

    def _mistakes(self, examples: Encoded) -> tuple[Tensor, Tensor]:
        """Label of every unit, and whether the model's choice is another one."""

        def read(indices: list[int]) -> tuple[Tensor, Tensor]:
            batch = examples.batch(indices, self.run.device)
            said = self.run.task.predictions(self.model, batch)
            present = said.labels != IGNORED
            return said.labels[present].cpu(), (~said.hits()[present]).double().cpu()

        with evaluating(self.model):
            found = list(spread(read, self.run.batches(examples, "errors")))
        labels, wrong = zip(*found, strict=True)
        return torch.cat(labels), torch.cat(wrong)
