"""Pruning of memorised subspaces (Chavhan et al. 2024, arXiv 2406.18566; ConceptPrune's recipe).

While memorised prompts are sampled, some inputs of the feed-forward output layers (``ff.net.2``)
are larger than while ordinary prompts are. In each of the first tau denoising steps and each
transformer block, with every token's row of inputs scaled to length 1 and N rows in all:

    a_j = sqrt(sum_rows x_j^2 / N)            S_ij = |W_ij| a_j         (Wanda, Sun et al. 2024)

Of each output's weights, the ``rho`` share with the largest memorised score goes, where that
exceeds the ordinary score; what is chosen in any of the tau steps is set to zero, once, in the
checkpoint. No data, no training, nothing left to do when it is sampled. Only the first rows differ
from the paper: it sums where this takes the mean, so that both sides may have any number of
prompts; and only rows that are told the prompt count, not those guidance adds.

It works where memory sits in these layers, which is not everywhere: of a small model whose every
weight was fine-tuned on a picture, even all of them at zero leave the picture. Later work finds
that slight changes of the prompt's embedding bring pictures back ("Finding Dori", arXiv
2507.16880). Cost: tau network calls per prompt, seed and side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from unlearn.errors import Unsupported
from unlearn.interface import Classes, Concepts, Need, Needs, Request, Subject
from unlearn.pipeline import Pipeline
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import evaluating

LAYER = ".ff.net.2"
ROWS = 32  # pictures sampled at once
Sizes = dict[str, Tensor]


def chosen(weight: Tensor, memorised: Tensor, ordinary: Tensor, rho: float) -> Tensor:
    """Which weights of one layer go after one step, a boolean mask of its shape.

    Args:
        weight: (outputs, inputs).
        memorised: root mean square of the inputs under memorised prompts, shape (inputs,).
        ordinary: the same under ordinary ones.
        rho: share of each output's weights; at least one is looked at.

    >>> w = torch.tensor([[1.0, -3.0, 2.0]])
    >>> chosen(w, torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.5, 0.5, 2.0]), 0.67)
    tensor([[False,  True, False]])
    """
    count = max(1, int(rho * weight.shape[1]))
    score = weight.abs() * memorised
    top = torch.zeros_like(weight, dtype=torch.bool)
    top.scatter_(1, score.topk(count, 1).indices, True)
    return top & (score > weight.abs() * ordinary)


@dataclass(frozen=True, kw_only=True)
class SubspacePruning:
    """Set feed-forward weights to zero that memorised prompts use more than others do."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    rho: Annotated[
        float,
        Field(gt=0, le=1, description="share of every output's weights, per step; small models "
              "need more (0.05)"), Range(0.002, 0.2, log=True),
    ] = 0.01  # fmt: skip
    tau: Annotated[
        int, Field(ge=1, description="denoising steps looked at, from the first one"), Range(2, 20)
    ] = 10
    steps: Annotated[int, Field(ge=1, description="denoising steps of a whole sampling")] = 50
    guidance: Annotated[
        float, Field(ge=1, description="guidance of the sampling; 1: none")
    ] = 7.5  # fmt: skip
    seeds: Annotated[int, Field(ge=1, description="starting noises per prompt")] = 4

    needs: ClassVar[Needs] = Needs(
        forget=Need.NO, retain=Need.NO, tasks=("diffusion",), targets=("classes", "concepts")
    )

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Sample both sides, choose, and set to zero.

        Raises:
            Unsupported: a denoiser without transformer blocks.
        """
        model: Any = subject.model
        layers: dict[str, nn.Linear] = {
            name: module
            for name, module in model.named_modules()
            if name.endswith(LAYER) and isinstance(module, nn.Linear)
        }
        if not layers:
            raise Unsupported(
                f"{type(model.denoiser).__name__} has no transformer blocks, so there are no "
                "feed-forward weights to prune: use another method"
            )
        with evaluating(model):
            gone, rest = self._conditions(model, request, run)
            memorised = self._sizes(model, layers, gone, run, "memorised")
            ordinary = self._sizes(model, layers, rest, run, "ordinary")
        pruned = total = 0
        with torch.no_grad():
            for name, layer in layers.items():
                sides = zip(memorised[name], ordinary[name], strict=True)
                masks = [chosen(layer.weight, a, b, self.rho) for a, b in sides]
                mask = torch.stack(masks).any(0)
                layer.weight[mask] = 0
                pruned, total = pruned + int(mask.sum()), total + mask.numel()
        run.note(
            f"{pruned:,} of {total:,} feed-forward output weights ({pruned / total:.2%}) in "
            f"{len(layers)} layers were set to zero."
        )
        model.eval()
        return subject

    def _conditions(self, model: Any, request: Request, run: Run) -> tuple[Tensor, Tensor]:
        """What the denoiser is told of either side: classes, or states of prompts."""
        target = request.target
        if isinstance(target, Concepts):
            return model.condition(target.prompts), model.condition(target.keep or [""])
        classes = target.indices if isinstance(target, Classes) else ()
        others = [c for c in range(run.task.classes) if c not in classes]
        nothing = model.null(1)
        rest = model.condition(others) if nothing is None else nothing
        return model.condition(classes), rest

    def _sizes(
        self, model: Pipeline, layers: dict[str, nn.Linear], told: Tensor, run: Run, name: str
    ) -> Sizes:
        """Root mean squares of every layer's inputs, by name, shape (tau, inputs)."""
        kept = {name: _Inputs(min(self.tau, self.steps)) for name in layers}
        every = told.repeat_interleave(self.seeds, 0)
        generator = run.generator("starting noise")  # the same on both sides
        for start in range(0, len(every), ROWS):
            part = every[start : start + ROWS]
            for inputs in kept.values():
                inputs.begin(len(part))
            handles = [layer.register_forward_pre_hook(kept[key]) for key, layer in layers.items()]
            try:
                self._sample(model, part, generator)
            finally:
                for handle in handles:
                    handle.remove()
            run.progress.advance(f"{name} prompts", start + len(part), len(every), {})
        return {key: inputs.sizes() for key, inputs in kept.items()}

    def _sample(self, model: Pipeline, told: Tensor, generator: torch.Generator) -> None:
        """The first tau network calls of a sampling."""
        calls = [0]

        def count(*_: Any) -> None:
            calls[0] += 1
            if calls[0] > self.tau:
                raise _Enough

        handle = model.denoiser.register_forward_pre_hook(count)
        try:
            model.sample(told, generator, self.steps, self.guidance, decode=False)
        except _Enough:
            pass
        finally:
            handle.remove()

    def trained(self, forget: int, retain: int) -> int:
        """Nothing is trained."""
        return 0


class _Enough(Exception):
    """As many denoising steps as are wanted were taken."""


class _Inputs:
    """A hook that adds up squared inputs of a layer, by denoising step."""

    def __init__(self, steps: int) -> None:
        self.sums: list[Tensor | None] = [None] * steps
        self.seen = [0] * steps

    def begin(self, rows: int) -> None:
        """A new batch of samples, of which ``rows`` are told something."""
        self.rows, self.step = rows, 0

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        told = args[0].detach()[-self.rows :].double()  # guidance puts its own rows first
        told = nn.functional.normalize(told.flatten(0, -2), dim=-1)
        sums = told.square().sum(0)
        before = self.sums[self.step]
        self.sums[self.step] = sums if before is None else before + sums
        self.seen[self.step] += len(told)
        self.step += 1

    def sizes(self) -> Tensor:
        """Root mean squares of all steps, shape (steps, inputs)."""
        both = zip(self.sums, self.seen, strict=True)
        return torch.stack([(sums / n).sqrt() for sums, n in both if sums is not None])
