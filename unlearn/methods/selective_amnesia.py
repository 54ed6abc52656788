"""Selective amnesia (Heng & Soh, NeurIPS 2023, arXiv 2305.10120).

    min  l(noise pictures, what must go) + replay_weight * l(replay)
         + stiffness * sum_i F_i (theta_i - theta*_i)^2

Continual learning turned round: what must go is denoised to pictures uniform in [-1, 1] (or, with
an anchor, to pictures of that), while pictures the model drew itself for everything else are
replayed, and weights that mattered stay where they were (elastic weight consolidation, Kirkpatrick
et al. 2017). l is the denoising loss, F the diagonal of the Fisher information at theta*: the mean
over the model's own pictures, of what must go as well, of the squared gradient of a picture's loss.
No data are needed; with a retain set that is replayed instead.

The gradient that is squared is exact, one picture at a time, its loss the mean over ``times``
stratified, antithetic times: the paper's sum is over all 1,000. Losses are means over pixels where
the paper sums, so stiffness is on another scale: a sum over P pixels multiplies l by P and F by
P^2, so its lambda (10 on CIFAR with P = 3,072, 50 for Stable Diffusion) is a stiffness of lambda P.
Cost: drawing ``images`` per class or prompt, one forward and backward over each at every time, then
per replayed example and epoch two forwards and backwards; one copy of the weights, one of F.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from unlearn.data import Examples
from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Classes, Concepts, Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.scope import is_lora
from unlearn.tasks.base import Batch, Encoded, evaluating
from unlearn.training import Term, Training

ROWS = 64  # pictures drawn at once


def elastic(
    weights: Mapping[str, Tensor], start: Mapping[str, Tensor], fisher: Mapping[str, Tensor]
) -> Tensor:
    """sum_i F_i (theta_i - theta*_i)^2, a scalar.

    >>> one = {"w": torch.tensor([1.0, 3.0])}
    >>> elastic(one, {"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([2.0, 0.5])})
    tensor(4.)
    """
    moved = [(fisher[n] * (weights[n] - start[n]).square()).sum() for n in fisher]
    return torch.stack(moved).sum()


@dataclass(frozen=True, kw_only=True)
class SelectiveAmnesia(Training):
    """Denoise what must go to noise, replay the rest, and hold the weights that mattered."""

    replay_weight: Annotated[
        float, Field(ge=0, description="weight of the replay (gamma)"), Range(0.1, 10.0, log=True)
    ] = 1.0
    stiffness: Annotated[
        float,
        Field(ge=0, description="weight of the elastic term (lambda), on means over pixels"),
        Range(10.0, 1e5, log=True),
    ] = 1000.0
    images: Annotated[
        int, Field(ge=1, description="pictures drawn per class or prompt, for replay and Fisher")
    ] = 50
    times: Annotated[
        int, Field(ge=2, multiple_of=2, description="times per picture of the Fisher information")
    ] = 32
    sampling_steps: Annotated[int, Field(ge=1, description="network calls per drawn picture")] = 20
    guidance: Annotated[float, Field(ge=1, description="guidance of the drawn pictures")] = 2.0
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate"), Range(1e-5, 3e-3, log=True)
    ] = 1e-4
    epochs: Annotated[
        float, Field(gt=0, description="passes over the replay"), Range(2.0, 40.0, log=True)
    ] = 20

    needs: ClassVar[Needs] = Needs(
        forget=Need.NO, retain=Need.OPTIONAL, tasks=("diffusion",), targets=("classes", "concepts")
    )

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Draw the pictures and measure what matters to them; the replay defines an epoch.

        Raises:
            BadInput: no class is left to replay.
            Unsupported: adapters, whose weights have no Fisher information yet.
        """
        if is_lora(self.scope):
            raise Unsupported("selective_amnesia holds weights where they were: use another scope")
        model: Any = subject.model
        task: Any = run.task
        gone, kept = _conditions(request, task)
        if not kept:
            raise BadInput("every class of the pipeline is to be forgotten: nothing would be left")
        every, led = self._each([*kept, *gone]), self._each(gone)
        own = _read(self._drawn(model, every, run, "own_pictures"), every, "own", task)
        replay = request.retain or own.select(range(len(kept) * self.images), "replay")
        anchor = getattr(request.target, "anchor", None)
        anchored = anchor not in (None, "")
        aims = torch.zeros(len(led), *task.shape)  # noise takes their place, new in every step
        if anchored:
            aims = self._drawn(model, [anchor] * len(led), run, "anchor_pictures")
        astray = _read(aims, led, "astray", task)
        fisher = self._fisher(model, own, run)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}

        def replayed(net: nn.Module, batch: Batch) -> Tensor:
            found: Tensor = task.nll(net, task.redrawn(batch))
            return found

        def led_astray(net: nn.Module, batch: Batch) -> Tensor:
            if not anchored:
                noise = torch.rand(batch["pixel_values"].shape)
                batch = {**batch, "pixel_values": noise.to(batch["pixel_values"])}
            return replayed(net, batch)

        def stiff(net: nn.Module, batch: Batch) -> Tensor:
            penalty = elastic(dict(net.named_parameters()), start, fisher)
            return penalty.expand(len(batch["index"]))

        def term(name: str, examples: Encoded, weight: float, forward: Any) -> Term:
            return Term(name, examples, lambda losses, _: losses, "example", weight, forward)

        return [
            term("replay", replay, self.replay_weight, replayed),
            term("astray", astray, 1.0, led_astray),
            term("elastic", own.select([0], "elastic"), self.stiffness, stiff),
        ]

    def _each(self, conditions: Sequence[Any]) -> list[Any]:
        """Every condition as often as pictures are drawn for it."""
        return [condition for condition in conditions for _ in range(self.images)]

    def _drawn(self, model: Any, wanted: Sequence[Any], run: Run, name: str) -> Tensor:
        """Pictures the model draws, in [0, 1]."""

        def compute() -> dict[str, Tensor]:
            generator, found = run.generator(name), []
            for at in range(0, len(wanted), ROWS):
                part = wanted[at : at + ROWS]
                drawn = model.sample(part, generator, self.sampling_steps, self.guidance)
                found.append(drawn.cpu().float())
                run.progress.advance("drawing pictures", at + len(part), len(wanted), {})
            return {"pictures": torch.cat(found)}

        with evaluating(model):
            return run.once(name, compute)["pictures"].cpu()

    def _fisher(self, model: nn.Module, own: Encoded, run: Run) -> dict[str, Tensor]:
        """Mean over the pictures of the squared gradient of each one's loss."""
        task: Any = copy(run.task)
        task.draws = self.times
        named = dict(model.named_parameters())

        def compute() -> dict[str, Tensor]:
            sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named.items()}
            for i in range(len(own)):
                loss = task.nll(model, own.batch([i], run.device)).sum()
                found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                for total, g in zip(sums.values(), found, strict=True):
                    if g is not None:
                        total += g.double().square() / len(own)
                run.progress.advance("Fisher information", i + 1, len(own), {})
            return {n: total.to(named[n].dtype) for n, total in sums.items()}

        model.eval()
        return run.once("fisher", compute)

    def trained(self, forget: int, retain: int) -> int:
        """Every epoch is over the replay; as many noise pictures stand beside it."""
        replayed = retain or self.images
        return 2 * self.steps(replayed) * min(self.batch_size, replayed)


def _conditions(request: Request, task: Any) -> tuple[list[Any], list[Any]]:
    """What must go, and what is replayed: classes or prompts."""
    target = request.target
    if isinstance(target, Concepts):
        return list(target.prompts), list(target.keep) or [""]
    gone = list(target.indices) if isinstance(target, Classes) else []
    return gone, [c for c in range(task.classes) if c not in gone]


def _read(pictures: Tensor, told: Sequence[Any], name: str, task: Any) -> Encoded:
    """Pictures with what the network is told about them, as a set of records."""
    key = "text" if task.tokenizer else "label"
    rows = [{"image": x, key: condition} for x, condition in zip(pictures, told, strict=True)]
    return Encoded(Examples(rows, list(map(str, range(len(rows)))), name, "the model"), task)
