"""Unlearning one expert (UOE, also SEUF; Zhuang et al. 2024, arXiv 2411.18797).

A mixture of experts that forgets as a whole stops sending its tokens to where they are known, and
others' tokens go astray with them. So only the expert that the forget set engages most may move,
with the router of its layer, which is anchored so that the tokens stay:

    s_e = mean over sequences of mean over tokens of g_e        expert = argmax over all layers
    L = objective + anchor_weight * mean over sequences of mean over tokens of ||g - a||^2

g are the softmax scores of the layer's router, kept for a token's top-K experts and 0 elsewhere, a
is 1 at the expert and 0 elsewhere. Shared experts are no candidates. The paper does not say whether
g in the anchor is masked, or how tokens are averaged; masked scores and the affinity's own averages
are the default, over every token the model reads. With masked scores, a token that does not reach
the expert is pulled towards it only through the others' share.

The objective is any method that states its terms and has no loop of its own. Cost: one forward pass
over 100,000 forget tokens at most, then the objective's, and one forward pass up to the layer per
step. Optimiser state is kept for one expert and one router.

One expert is a coarse tool. In benchmarks/moe.py, at equal forgetting, other facts of the same
topic suffer more than when the whole model moves, in both architectures; facts of another topic
suffer less in Mixtral, but not in Qwen2-MoE.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
import yaml
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from unlearn import registry
from unlearn.distributed import spread
from unlearn.errors import BadInput, Unsupported
from unlearn.experts import Mixture, Routing, mixtures, routing, watched
from unlearn.interface import Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.scope import matching
from unlearn.tasks.base import Batch, Encoded, evaluating
from unlearn.training import Term, Training, descend

ENOUGH = 100_000  # tokens: two such samples agree on the experts nearly as well as the whole set


def affinity(masked: Tensor, real: Tensor) -> Tensor:
    """How much each sequence engages each expert, shape (batch, experts): a mean over its tokens.

    Args:
        masked: scores of the chosen experts, 0 elsewhere, shape (batch, tokens, experts).
        real: 1 at tokens, 0 at padding, shape (batch, tokens).
    """
    present = real[..., None].to(masked)
    return (masked * present).sum(1) / present.sum(1)


def anchor_loss(scores: Tensor, expert: int, real: Tensor) -> Tensor:
    """Squared distance from routing everything to one expert, shape (batch,): a mean over tokens.

    Args:
        scores: of the router, masked or not, shape (batch, tokens, experts).
        expert: index of the one that should be chosen.
        real: 1 at tokens, 0 at padding, shape (batch, tokens).

    >>> scores = torch.tensor([[[0.5, 0.3, 0.0]]])  # (0.5 - 1)^2 + 0.3^2
    >>> round(float(anchor_loss(scores, 0, torch.ones(1, 1))), 2)
    0.34
    """
    wanted = torch.zeros_like(scores)
    wanted[..., expert] = 1
    present = real.to(scores)
    return ((scores - wanted).square().sum(-1) * present).sum(1) / present.sum(1)


class Engaged(NamedTuple):
    """An expert, and how much the forget set engages it."""

    affinity: float
    layer: Mixture
    expert: int

    def __str__(self) -> str:
        return f"expert {self.expert} of {self.layer.name} (affinity {self.affinity:.3g})"


def _read(given: Any) -> Any:
    """Settings written as YAML on a command line."""
    try:
        return yaml.safe_load(given) if isinstance(given, str) else given
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from error


@dataclass(frozen=True, kw_only=True)
class UOE(Training):
    """Make one expert of a mixture forget, and anchor its router."""

    objective: Annotated[
        str, Field(description="the method whose objective the expert descends on")
    ] = "npo"
    objective_settings: Annotated[
        dict[str, Any] | None,
        BeforeValidator(_read),
        Field(description="its own hyperparameters, such as '{beta: 0.5, retention: kl}'"),
    ] = None
    anchor_weight: Annotated[
        float,
        Field(ge=0, description="weight of the anchor; the paper finds 0 to 1000 much alike"),
        Range(0.1, 1000.0, log=True),
    ] = 1.0
    anchor: Annotated[
        Literal["masked", "softmax"],
        Field(description="scores the anchor sees: those of the chosen experts, or all"),
    ] = "masked"
    scope: Annotated[
        str,
        Field(
            description="the experts to choose from: all, or patterns such as 'layers.[0-9].mlp'"
        ),
    ] = "experts"

    @property
    def needs(self) -> Needs:
        """What the objective needs, of a language model.

        Raises:
            BadInput: an objective that cannot be wrapped, or settings it does not have.
        """
        needs: Needs = self.wrapped().needs
        return replace(needs, tasks=("causal_lm",))

    def check(self, request: Request) -> None:
        """What the objective refuses before anything expensive starts."""
        if callable(check := getattr(self.wrapped(), "check", None)):
            check(request)

    def wrapped(self) -> Any:
        """The objective: a method that trains as this one does, but for its scope."""
        if self.scope in ("head", "lora") or "@" in self.scope:
            raise BadInput(
                f"uoe moves one expert and finds it itself, so scope {self.scope} is not for it: "
                "name layers to search instead"
            )
        shared = {f.name: getattr(self, f.name) for f in fields(Training) if f.name != "scope"}
        own = self.objective_settings or {}
        if both := [name for name in own if name in {*shared, "scope"}]:
            raise BadInput(
                f"{both[0]} is a hyperparameter of uoe, not of its objective: set it there"
            )
        cls = registry.method_class(self.objective)
        if not issubclass(cls, Training) or cls.unlearn is not Training.unlearn:
            raise BadInput(
                f"uoe cannot wrap {self.objective}, which does more than descend on its terms: "
                "choose npo, grad_diff, gradient_ascent or the like"
            )
        return registry.build(self.objective, {**shared, **own})

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Choose the expert, and descend on the objective and the anchor.

        Raises:
            Unsupported: a model without experts, or with a router that cannot be read.
        """
        layers = self._candidates(subject.model)
        forget = request.forget_set()
        target, *others = most_engaged(subject.model, layers, forget, run)
        run.note(
            f"Only {target} and its router may move."
            + "".join(f" The runner-up is {other}." for other in others)
        )
        terms = [*self.wrapped().terms(subject, request, run), self._anchored(target, forget, run)]
        settings = replace(self, scope=target.layer.scope(target.expert))
        return descend(subject, terms, settings, run)

    def _candidates(self, model: nn.Module) -> list[Mixture]:
        layers = mixtures(model)
        if not layers:
            raise Unsupported(
                f"{type(model).__name__} is not a mixture of experts: uoe moves one expert, so use "
                f"{self.objective} itself"
            )
        named = matching(self.scope, [name for layer in layers for name in layer.tensors])
        return [layer for layer in layers if set(named) & set(layer.tensors)]

    def _anchored(self, target: Engaged, forget: Encoded, run: Run) -> Term:
        def forward(model: nn.Module, batch: Batch) -> Routing:
            return routing(target.layer, run.task, model, batch)

        def loss(found: Routing, batch: Batch) -> Tensor:
            scores = found.masked() if self.anchor == "masked" else found.scores
            return anchor_loss(scores, target.expert, found.real)

        return Term("anchor", forget, loss, "example", self.anchor_weight, forward)

    def trained(self, forget: int, retain: int) -> int:
        """The objective's examples; the anchor's go forward only, and not to the end."""
        examples: int = self.wrapped().trained(forget, retain)
        return examples


def most_engaged(
    model: nn.Module, layers: list[Mixture], forget: Encoded, run: Run, count: int = 2
) -> list[Engaged]:
    """The experts that the forget set engages most, first of all; ties: first layer, lowest index.

    One forward pass over the forget set, or over random sequences of it with 100,000 tokens.
    """
    part = _sample(forget, run)

    def read(indices: list[int]) -> dict[str, Tensor]:
        batch = part.batch(indices, run.device)
        with watched(layers, batch) as seen:
            run.task.compact(model, batch)
        return {name: affinity(r.masked(), r.real).sum(0).cpu() for name, r in seen.items()}

    def compute() -> dict[str, Tensor]:
        sums = {layer.name: torch.zeros(layer.size, dtype=torch.float64) for layer in layers}
        for found in spread(read, run.batches(part, "affinity")):
            for name, total in found.items():
                sums[name] += total
        return {name: total / len(part) for name, total in sums.items()}

    with evaluating(model):
        found = run.once("router_affinity", compute)
    everyone = [
        Engaged(value, layer, expert)
        for layer in layers
        for expert, value in enumerate(found[layer.name].tolist())
    ]
    return heapq.nlargest(count, everyone, key=lambda one: one.affinity)


def _sample(forget: Encoded, run: Run) -> Encoded:
    order = torch.randperm(len(forget), generator=run.generator("affinity")).tolist()
    taken, tokens = [], 0
    for index in order:
        if tokens >= ENOUGH:
            break
        taken.append(index)
        tokens += int(forget[index]["length"])
    return forget.select(sorted(taken))
