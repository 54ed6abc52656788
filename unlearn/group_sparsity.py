"""What GS-LoRA and its successor share: adapters in groups, most of which end up exactly zero.

Every block's adapters are one group. The penalty

    alpha * sum_g sqrt(n_g) ||theta_g||_2

over groups of n_g parameters leaves zero those groups that forgetting does not need: their blocks
keep their weights bit by bit. (The papers leave out sqrt(n_g), the same constant for all blocks of
a transformer. With it, as in Yuan and Lin 2006, alpha means the same for groups of every size.)

The papers differentiate the norm, which gives NaN at zero and in practice never arrives there. Here
each optimiser step is followed by the penalty's proximal step (Parikh and Boyd 2014, sec. 6.5.1):
the whole group is scaled down until its root mean square has lost lr * alpha, or to zero. As adamw
moves a parameter by about lr per step at most, little is left where alpha is 1 or more. It takes
about a hundred steps until what is needed and what is not have parted; with few, lower alpha.

A group that is zero stays zero. There the gradient of both its factors vanishes, so that proximal
descent by itself would leave it, too; only an optimiser's momentum from before could carry it away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.scope import Moving, feed_forward, is_lora
from unlearn.tasks.base import Batch, Encoded, Predictions, Task
from unlearn.tasks.classification import Classification
from unlearn.training import Training, descend, factor

Groups = dict[str, dict[str, nn.Parameter]]


def bounded(loss: Tensor, bound: float) -> Tensor:
    """ReLU(bound - loss), elementwise: minimising it raises ``loss``, up to ``bound`` and no more.

    >>> bounded(torch.tensor([1.0, 5.0]), bound=3.0)
    tensor([2., 0.])
    """
    return F.relu(bound - loss)


def group_norm(group: Iterable[Tensor]) -> float:
    """The L2 norm of all entries of some tensors taken as one vector, computed in float64."""
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in group))


def shrink(group: Sequence[Tensor], threshold: float) -> float:
    """The proximal step of ``threshold * norm``: block soft thresholding, in place.

    v becomes max(0, 1 - threshold / |v|) v, the minimiser of |x - v|^2 / 2 + threshold |x|.

    Args:
        group: tensors that count as one vector v.
        threshold: what the norm loses, >= 0.

    Returns:
        The new norm; with 0, every entry is exactly zero.
    """
    norm = group_norm(group)
    left = max(0.0, norm - threshold)
    with torch.no_grad():
        for tensor in group:
            tensor.mul_(left / norm) if left else tensor.zero_()
    return left


def grouped(parameters: Mapping[str, nn.Parameter], blocks: Iterable[str]) -> Groups:
    """Adapters' parameters by group: all those of one block, or of one layer outside all blocks."""
    blocks, groups = list(blocks), Groups()
    for name, parameter in parameters.items():
        layer = name.removeprefix("base_model.model.").split(".lora_")[0]
        group = next((block for block in blocks if f"{layer}.".startswith(f"{block}.")), layer)
        groups.setdefault(group, {})[name] = parameter
    return groups


def few(examples: Encoded, shots: int, task: Task, draw: torch.Generator) -> Encoded:
    """At most ``shots`` records of every class, drawn without replacement, in their old order.

    Raises:
        BadInput: a language model's records have no classes.
    """
    if not isinstance(task, Classification):
        raise BadInput(f"shots are drawn per class, and {task.name} has none: leave shots out")
    by_class: dict[int, list[int]] = {}
    for index in range(len(examples)):
        label = task.label_index(examples.examples[index]["label"])
        by_class.setdefault(label, []).append(index)
    chosen: list[int] = []
    for _, members in sorted(by_class.items()):
        order = torch.randperm(len(members), generator=draw)[:shots].tolist()
        chosen += [members[i] for i in order]
    return examples.select(sorted(chosen))


@dataclass(frozen=True, kw_only=True)
class GroupSparse(Training):
    """Hyperparameters of methods that forget through few groups of adapters."""

    needs: ClassVar[Needs] = Needs(retain=Need.REQUIRED)

    beta: Annotated[
        float, Field(gt=0, description="weight of the forget term"), Range(0.02, 2.0, log=True)
    ] = 0.2
    bound: Annotated[
        float | None,
        Field(
            gt=0,
            description="loss per unit, in nats, up to which a record is forgotten (BND); none: "
            "three times that of guessing. The authors' 110 is for logits scaled by 64",
        ),
    ] = None
    alpha: Annotated[
        float,
        Field(
            ge=0,
            description="weight of the groups' norms: what a group's root mean square loses per "
            "step, in learning rates; adamw moves a parameter by up to one",
        ),
        Range(0.05, 5.0, log=True),
    ] = 0.5
    alpha_from: Annotated[
        float, Field(ge=0, lt=1, description="share of the steps before alpha acts")
    ] = 0.2
    shots: Annotated[
        int | None,
        Field(ge=1, description="retain records drawn of every class (few-shot); none: all"),
    ] = None
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate"), Range(1e-3, 1e-1, log=True)
    ] = 1e-2
    epochs: Annotated[float, Field(gt=0, description="passes over the forget set")] = 10
    batch_size: Annotated[
        int, Field(ge=1, description="examples per step and term, of all processes together")
    ] = 48
    weight_decay: Annotated[
        float, Field(ge=0, description="decoupled (adamw) or L2 (sgd); of the adapters alone")
    ] = 0.05
    schedule: Annotated[
        Literal["linear", "cosine", "constant"],
        Field(description="learning rate after the warm-up"),
    ] = "cosine"
    max_loss: Annotated[
        float,
        Field(
            gt=1,
            description="collapse guard: largest loss per unit, in multiples of guessing; wide, "
            "because momentum carries records past their bound",
        ),
    ] = 30.0
    scope: Annotated[
        str,
        Field(
            description="layers that get adapters: lora:ffn (the feed-forward layers of every "
            "block), lora (every layer but the output) or lora:PATTERN"
        ),
    ] = "lora:ffn"
    lora_alpha: Annotated[
        float, Field(gt=0, description="adapters are scaled by lora_alpha / lora_rank")
    ] = 1

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Descend on the terms, with a proximal step behind every step."""
        blocks = self._blocks(subject.model, run.task)
        if self.shots is not None:
            draw = run.generator("shots")
            retain = few(request.retain_set(), self.shots, run.task, draw)
            request = replace(request, retain=retain)
        terms = self.terms(subject, request, run)
        steps = self.steps(len(terms[0].examples))
        found: dict[str, Tensor] = {}

        def after(moved: Moving, done: int, memory: dict[str, Tensor]) -> None:
            groups = grouped(moved.parameters, blocks)
            self.stepped(groups, done, steps, memory)
            if done == steps:
                norms = [group_norm(group.values()) for group in groups.values()]
                found["norms"] = torch.tensor(norms, dtype=torch.float64)
                run.log("groups", norms=dict(zip(groups, norms, strict=True)))
                run.once("groups", lambda: found)

        subject = descend(subject, terms, self, run, after=after)
        norms = run.once("groups", lambda: found)["norms"]
        run.note(
            f"{int((norms == 0).sum())} of {len(norms)} groups of adapters are exactly zero: "
            "their layers are as they were."
        )
        return subject

    def stepped(self, groups: Groups, done: int, steps: int, memory: dict[str, Tensor]) -> None:
        """Behind every optimiser step: the proximal step of the penalty.

        Args:
            groups: the adapters, by group and name.
            done: steps done.
            steps: of all.
            memory: kept with unfinished training; under ``zero`` which groups are.
        """
        zero = memory.setdefault("zero", torch.zeros(len(groups), dtype=torch.bool))
        if done <= self.alpha_from * steps or not self.alpha:
            return
        pull = self.alpha * self.lr * factor(self, done - 1, steps)
        for i, group in enumerate(groups.values()):
            tensors = list(group.values())
            size = sum(tensor.numel() for tensor in tensors)
            zero[i] = shrink(tensors, math.inf if zero[i] else pull * math.sqrt(size)) == 0

    def forget_loss(self, run: Run) -> Callable[[Predictions, Batch], Tensor]:
        """ReLU(bound - NLL per unit) of every example, shape (batch,), as the loss of a term.

        Raises:
            BadInput: the collapse guard would stop the run on the way to the bound.
        """
        chance = run.task.chance()
        bound = 3 * chance if self.bound is None else self.bound
        if bound >= self.max_loss * chance:
            raise BadInput(
                f"bound {bound:g} is not below {self.max_loss * chance:.3g} nats, where the "
                "collapse guard stops a run: lower bound or raise max_loss"
            )
        return lambda said, batch: bounded(said.nll() / batch["units"], bound)

    def _blocks(self, model: nn.Module, task: Task) -> list[str]:
        if not is_lora(self.scope):
            raise BadInput(
                f"scope {self.scope!r} trains no adapters, and groups are made of adapters: use "
                "lora:ffn, lora or lora:PATTERN"
            )
        blocks = list(task.layers(model))
        if self.scope == "lora:ffn":
            modules = dict(model.named_modules())
            inside = (n for names in feed_forward(model, task).values() for n in names)
            if not any(name in modules for name in inside):  # blocks that are a layer themselves
                raise Unsupported(
                    f"{type(model).__name__} has no blocks with feed-forward layers: use scope "
                    "lora, where every layer is a group"
                )
        return blocks
