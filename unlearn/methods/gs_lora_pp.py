"""GS-LoRA++: prototypes beside labels (Zhao et al. 2025, T-PAMI, arXiv 2501.09705).

    L = L_GS-LoRA + w_f * mean ReLU(bound_p - KL_i)(forget) + w_r * mean KL_i(retain)
    KL_i = KL(softmax(p_y) || softmax(e_i))

where e_i is the embedding of record i of class y (what the output layer reads), and the prototype
p_y the mean embedding of the class's records under the starting model. Forgotten records are led
away from where their class used to be, not only across the output layer's boundaries, and retained
ones may be held where theirs is: supervision that a handful of records per class can carry
(``shots``). Classes without records have no prototype, and need none.

From ``average_from`` of the steps on, the adapters' weights are averaged exponentially over the
steps, and the average is what is returned (the authors average once per epoch). Groups that are
zero at the end are zero in the average.

Everything else is as in gs_lora: groups, the proximal step, the bound of each record's own loss.
Cost: as grad_diff, and one forward pass over forget and retain set for the prototypes. The
prototypes' terms share the forward passes of the others. Classifiers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unlearn.distributed import spread
from unlearn.group_sparsity import Groups, GroupSparse, bounded
from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.retention import kl_divergence
from unlearn.run import Run
from unlearn.tasks.base import Batch, Encoded, Predictions, Task, evaluating
from unlearn.training import Term, likelihood


class Seen(NamedTuple):
    """What one forward pass yields: predictions, and embeddings of shape (batch, dim)."""

    predictions: Predictions
    embeddings: Tensor


def seen(task: Task, model: nn.Module, batch: Batch) -> Seen:
    """Predictions of a batch and what the output layer read to make them."""
    kept: list[Tensor] = []
    handle = task.output_layer(model).register_forward_pre_hook(
        lambda _, inputs: kept.append(inputs[0])
    )
    try:
        predictions = task.predictions(model, batch)
    finally:
        handle.remove()
    return Seen(predictions, kept[0].flatten(1))


def prototypes(model: nn.Module, sets: list[Encoded], run: Run) -> Tensor:
    """The mean embedding of every class over all ``sets``, shape (classes, dim).

    One pass, in eval mode, without gradients; a resumed run reads the values back. Classes without
    records have zeros.
    """

    def compute() -> dict[str, Tensor]:
        total = torch.zeros(run.task.classes, 1, dtype=torch.float64)
        count = torch.zeros(run.task.classes, 1, dtype=torch.float64)
        for examples in sets:

            def embed(indices: list[int], examples: Encoded = examples) -> tuple[Tensor, Tensor]:
                batch = examples.batch(indices, run.device)
                return batch["labels"][:, 0].cpu(), run.task.features(model, batch).cpu()

            for labels, found in spread(embed, run.batches(examples, "prototypes")):
                of_class = F.one_hot(labels, len(count)).T.double()
                total = total + of_class @ found.double()  # grows to the embeddings' width at first
                count += of_class.sum(1, keepdim=True)
        return {"prototypes": total / count.clamp(min=1)}

    with evaluating(model):
        found = run.once("prototypes", compute)["prototypes"]
    return found.to(run.device, next(model.parameters()).dtype)


def prototype_divergence(embeddings: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """KL(softmax(prototype of the label) || softmax(embedding)), in nats.

    Args:
        embeddings: shape (batch, dim).
        prototypes: shape (classes, dim).
        labels: shape (batch,).

    Returns:
        Shape (batch,).
    """
    return kl_divergence(embeddings.to(prototypes), labels, prototypes[labels])


@dataclass(frozen=True, kw_only=True)
class GSLoRAPP(GroupSparse):
    """GS-LoRA led by the classes' prototypes, its weights averaged over the last steps."""

    needs: ClassVar[Needs] = Needs(retain=Need.REQUIRED, tasks=("classification",))

    prototype_weight: Annotated[
        float,
        Field(ge=0, description="w_f, of the forget records' way from their prototypes"),
        Range(1e-3, 1.0, log=True),
    ] = 0.01
    prototype_bound: Annotated[
        float,
        Field(gt=0, description="divergence in nats up to which they are led away; authors: 18"),
        Range(2.0, 50.0, log=True),
    ] = 18.0
    prototype_retain_weight: Annotated[
        float, Field(ge=0, description="w_r, of the retain records' distance; the authors' is 0")
    ] = 0.0
    average_decay: Annotated[
        float, Field(ge=0, lt=1, description="of the moving average of weights per step; 0: none")
    ] = 0.9
    average_from: Annotated[
        float, Field(ge=0, lt=1, description="share of the steps before averaging begins")
    ] = 0.3

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Compute the prototypes once; each term has one forward pass."""
        forget, retain = request.forget_set(), request.retain_set()
        centres = prototypes(subject.model, [forget, retain], run)
        raised = self.forget_loss(run)

        def forward(model: nn.Module, batch: Batch) -> Seen:
            return seen(run.task, model, batch)

        def away(found: Seen, batch: Batch) -> Tensor:
            apart = prototype_divergence(found.embeddings, centres, batch["labels"][:, 0])
            pushed = bounded(apart, self.prototype_bound)
            return self.beta * raised(found.predictions, batch) + self.prototype_weight * pushed

        def held(found: Seen, batch: Batch) -> Tensor:
            apart = prototype_divergence(found.embeddings, centres, batch["labels"][:, 0])
            return found.predictions.nll() + self.prototype_retain_weight * apart

        terms = [Term("forget", forget, away, "example", forward=forward)]
        if self.prototype_retain_weight:
            return [*terms, Term("retain", retain, held, "example", forward=forward)]
        return [*terms, Term("retain", retain, likelihood, "example")]

    def stepped(self, groups: Groups, done: int, steps: int, memory: dict[str, Tensor]) -> None:
        """The proximal step, then the average; behind the last step, the average is taken over."""
        super().stepped(groups, done, steps, memory)
        if not self.average_decay or done <= self.average_from * steps:
            return
        with torch.no_grad():
            for group, zero in zip(groups.values(), memory["zero"].tolist(), strict=True):
                for name, now in group.items():
                    before = memory.get(f"average.{name}", now).to(now)
                    mean = now.lerp(before, 0.0 if zero else self.average_decay)
                    memory[f"average.{name}"] = mean
                    if done == steps:
                        now.copy_(mean)
