"""Boundary unlearning (Chen et al., CVPR 2023, arXiv 2303.11570): move the decision boundary.

    min  mean NLL(forget with other labels) + retain_weight * R(retain)

``shrink`` (section 4.1): every forget example gets the class that lies nearest to it across the
boundary of the starting model f, found by one step against its own label y:

    x' = x + eps sign(grad_x NLL(y | x)),      label = argmax over k != y of f_k(x')

``expand`` (section 4.2): the output layer gets one more neuron, a shadow class that the forget set
is trained to; afterwards that neuron is cut off again, and the model has the shape it came in.

The paper forgets classes. Shrinking also works on single records, which then count as their
neighbours; expanding would teach the model to know its records apart, so it takes classes only.
Inputs are not clipped after the step: eps is in units of what the model reads, that is, after the
image processor's normalisation. The authors' argmax may return y itself, here it cannot.

Cost: with shrink, one forward and backward, and one forward more, over the forget set; then as
grad_diff, without a retain term unless ``retention`` asks for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unlearn.distributed import spread
from unlearn.errors import Unsupported
from unlearn.interface import ALL_TARGETS, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.retention import OneSided
from unlearn.run import Run
from unlearn.tasks.base import Batch, Encoded, Task
from unlearn.tasks.classification import continuous
from unlearn.training import Term, likelihood


def nearest_labels(task: Task, model: nn.Module, batch: Batch, eps: float) -> Tensor:
    """The likeliest wrong class of every example after one step away from its label.

    Args:
        task: classification of images or vectors.
        model: the network, in eval mode.
        batch: from :meth:`Encoded.batch`.
        eps: size of the step per pixel or entry, in the units of the input.

    Returns:
        Shape (batch,), class indices, never the labels of the batch.
    """
    name = continuous(batch)
    with torch.enable_grad():
        start = batch[name].detach().requires_grad_()
        (slope,) = torch.autograd.grad(task.nll(model, {**batch, name: start}).sum(), start)
    with torch.no_grad():
        moved = task.logits(model, {**batch, name: start + eps * slope.sign()})[:, 0]
        return moved.scatter(1, batch["labels"], -torch.inf).argmax(1)


@contextmanager
def shadow_class(head: nn.Linear, draw: torch.Generator) -> Iterator[int]:
    """One more output while this lasts, initialised as linear layers are; yields its index.

    Args:
        head: the output layer, widened and narrowed in place.
        draw: a CPU generator for the new weights.
    """
    index, bound = head.out_features, head.in_features**-0.5

    def resize(change: dict[str, Tensor]) -> None:
        for name, old in list(head.named_parameters()):
            setattr(head, name, nn.Parameter(change[name], requires_grad=old.requires_grad))
        head.out_features = len(head.weight)

    with torch.no_grad():
        rows = {n: torch.rand(p[:1].shape, generator=draw) for n, p in head.named_parameters()}
        resize(
            {
                n: torch.cat((p, ((2 * rows[n] - 1) * bound).to(p)))
                for n, p in head.named_parameters()
            }
        )
    try:
        yield index
    finally:
        with torch.no_grad():
            resize({n: p[:index].clone() for n, p in head.named_parameters()})


@dataclass(frozen=True, kw_only=True)
class Boundary(OneSided):
    """Give the forget set to the nearest other classes, or to one that is then removed."""

    mode: Annotated[
        Literal["shrink", "expand"],
        Field(
            description="shrink: each example is relabelled as the nearest other class; expand: "
            "all move into a new class, which is cut off afterwards (class requests only)"
        ),
    ] = "shrink"
    eps: Annotated[
        float,
        Field(gt=0, description="with shrink: step that looks for the nearest class, per entry"),
        Range(0.01, 1.0, log=True),
    ] = 0.1

    @property
    def needs(self) -> Needs:
        """Classifiers; single records with shrink alone."""
        targets = ALL_TARGETS if self.mode == "shrink" else ("classes",)
        return replace(super().needs, tasks=("classification",), targets=targets)

    def check(self, request: Request) -> None:
        """Refuse tokens before the weights are loaded."""
        if self.mode == "shrink":
            continuous(request.forget_set()[0])

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Train towards the other labels; with expand, in a model widened meanwhile."""
        if self.mode == "shrink":
            return super().unlearn(subject, request, run)
        head = run.task.output_layer(subject.model)
        if not isinstance(head, nn.Linear) or head.out_features != run.task.classes:
            raise Unsupported(
                f"{type(subject.model).__name__} does not end in a linear layer with one output "
                "per class, so no class can be added to it: use mode shrink"
            )
        with shadow_class(head, run.generator("shadow class")):
            return super().unlearn(subject, request, run)

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Find the other labels, to train on them."""
        forget = request.forget_set()
        if self.mode == "shrink":
            labels = self._nearest(subject.model, forget, run).tolist()
        else:
            labels = [run.task.classes] * len(forget)  # the class after the last one
        relabelled = forget.replaced(
            {**forget[i], "label": label} for i, label in enumerate(labels)
        )
        term = Term("forget", relabelled, likelihood, "unit")
        return [term, *self.held(subject, request, run)]

    def _nearest(self, model: nn.Module, forget: Encoded, run: Run) -> Tensor:
        """The nearest label of every example under the starting model, shape (examples,)."""

        def find(indices: list[int]) -> tuple[list[int], Tensor]:
            batch = forget.batch(indices, run.device)
            return indices, nearest_labels(run.task, model, batch, self.eps).cpu()

        def compute() -> dict[str, Tensor]:
            labels = torch.zeros(len(forget), dtype=torch.long)
            for indices, found in spread(find, run.batches(forget, "nearest labels")):
                labels[indices] = found
            return {"labels": labels}

        model.eval()
        return run.once("nearest_labels", compute)["labels"]
