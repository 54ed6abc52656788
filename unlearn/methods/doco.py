"""Domain correction, DoCo (Wu et al., AAAI 2025, arXiv 2405.15304, eq. 5 to 9).

    D:      min  mean BCE(D(f_0(x_t, c_anchor)), 0) + mean BCE(D(f(x_t, c)), 1)
    model:  min  mean BCE(D(f(x_t, c)), 0)

f is the prediction of the clean latent, x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar); f_0 that of
the starting model, computed once for a bank of noised pictures x_t of the anchor. D is a small
PatchGAN: it learns to tell what the model says of them when told concept c from what it said when
told the anchor; the model learns to be mistaken for the anchor. D is trained alone first, for
``warmup_steps`` of its own, and once behind every step of the model.

The gradient of the model's loss loses what conflicts with that of the retain term,
retain_weight mean (eps(x_t, k) - eps_0(x_t, k))^2 (:mod:`unlearn.surgery`). The step is the sum of
what is left and the retain gradient. The published code applies what is left alone
(``descend_retain=false``): enough where keys and values of cross-attention move; on a
class-conditional network, where everything does, other classes are lost. k runs over anchor,
prompts to keep or other classes, and the null condition (in the published code: the anchor alone,
against the noise).

D's layers shrink with the latents, and it normalises groups of channels instead of batches, so
that it does not depend on micro-batches. Prompts need an anchor. Cost: as concept_ablation, two
passes through D and one more of the network, without gradients, per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unlearn.errors import BadInput, Collapsed
from unlearn.interface import Need, Needs, Request, Subject
from unlearn.latents import (
    Bank,
    Moved,
    Renoised,
    anchor_of,
    beneath,
    conditions,
    named,
    need_anchor,
    neighbours,
)
from unlearn.noising import to_x0
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.scope import Moving
from unlearn.surgery import Rule, Surgery
from unlearn.tasks.base import Batch, evaluating
from unlearn.training import Term, collapse, descend, schedule

WIDTH, DEEPEST = 64, 4  # of the published discriminator, for latents of 64 x 64


class PatchGAN(nn.Sequential):
    """Tells real latents from others, patch by patch: (rows, c, h, w) -> logits (rows, 1, h', w').

    As many halvings, up to four, as leave four positions a side (Isola et al. 2017).

    Args:
        channels: of the latents.
        side: height or width of them, the smaller one; at least 4.
        width: of the first layer; every next one has twice as many channels, up to eight times.
    """

    def __init__(self, channels: int, side: int, width: int = WIDTH) -> None:
        depth = max(1, min(DEEPEST, int(math.log2(side / 4))))
        layers, before = list[nn.Module](), channels
        for number in range(depth):
            after = width * 2 ** min(number, 3)
            layers.append(nn.Conv2d(before, after, 4, 2, 1))
            if number:
                layers.append(nn.GroupNorm(math.gcd(after, 32), after))
            layers.append(nn.LeakyReLU(0.2))
            before = after
        super().__init__(*layers, nn.Conv2d(before, 1, 4, 1, 1))


def taken_for(logits: Tensor, label: float) -> Tensor:
    """Mean over patches of the cross-entropy with one label, shape (rows,), in nats.

    Args:
        logits: of the discriminator, shape (rows, 1, h, w); high: not the anchor.
        label: 0: the anchor, 1: the concept.
    """
    aim = torch.full_like(logits, label)
    return F.binary_cross_entropy_with_logits(logits, aim, reduction="none").flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class DoCo(Renoised):
    """Make what a model says about a concept pass for what it says about its anchor."""

    parameters: Moved = "x-strict"
    lr: Annotated[
        float,
        Field(gt=0, description="learning rate; the authors use 4.8e-5 at batch size 8"),
        Range(1e-5, 1e-2, log=True),
    ] = 1e-3
    epochs: Annotated[
        float, Field(gt=0, description="passes over the noisy pictures"), Range(1.0, 10.0, log=True)
    ] = 4
    discriminator_lr: Annotated[
        float,
        Field(gt=0, description="of the discriminator; the authors use 1e-4 or 5e-4"),
        Range(1e-4, 1e-2, log=True),
    ] = 1e-3
    warmup_steps: Annotated[
        int, Field(ge=0, description="of the discriminator alone; the authors take 1000")
    ] = 60
    surgery: Annotated[
        Rule,
        Field(
            description="what becomes of a tensor's gradient where it conflicts with the retain "
            "gradient: nothing (none), the conflict goes (projection), or what the published code "
            "does (as_published)"
        ),
    ] = "projection"
    descend_retain: Annotated[
        bool,
        Field(description="also follow the retain gradient; false: it only guards, as published"),
    ] = True

    needs = Needs(
        forget=Need.NO, retain=Need.NO, tasks=("diffusion",), targets=("classes", "concepts")
    )

    def check(self, request: Request) -> None:
        """Prompts need an anchor, and surgery something to hold."""
        super().check(request)
        need_anchor(request.target)
        if not self.retain_weight and self.surgery != "none":
            raise BadInput("surgery protects the retain term: give it a weight, or surgery=none")

    def joined(self) -> Surgery:
        """The freed gradient alone is applied, unless ``descend_retain`` or without surgery."""
        return Surgery(self.surgery, self.descend_retain or self.surgery == "none")

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Warm the discriminator up, then train both in turn.

        Raises:
            BadInput: no anchor.
            Collapsed: a loss or gradient is not finite.
        """
        settings = self.prepared(subject.model, request, run)
        model, gone = beneath(subject.model), named(request.target)
        shown = self.within([anchor_of(request.target, run.task)] * len(gone))
        table = conditions(model, shown)
        bank = self.bank(model, "concept", shown, self.within(gone), lambda said: said(table), run)
        game = _Game(self, bank, run, subject.model)
        held = self.held(model, neighbours(request.target, run.task), run)
        return descend(
            subject, [game.term(), *held], settings, run, after=game.play, memory=game.memory
        )


class _Game:
    """The discriminator with its optimiser, and the moves of both sides.

    Args:
        settings: of the method.
        bank: of noised pictures of the anchor; ``aim`` is what f_0 says of them.
        run: seed and device.
        model: as it starts.
    """

    def __init__(self, settings: DoCo, bank: Bank, run: Run, model: nn.Module) -> None:
        self.settings, self.bank, self.run = settings, bank, run
        self.plan = schedule(settings, [len(bank)], run)[0]
        channels, *sides = beneath(model).shape
        with torch.random.fork_rng():
            torch.manual_seed(run.seed_of("discriminator"))
            self.net = PatchGAN(channels, min(sides)).to(run.device)
        self.optimizer = torch.optim.Adam(
            self.net.parameters(), settings.discriminator_lr, betas=(0.5, 0.999)
        )
        self.memory: dict[str, Tensor] = {}  # what unfinished training kept is found here
        self.begun = False
        if settings.warmup_steps:
            self.restore(run.once("discriminator", lambda: self.warmed(model)))

    def term(self) -> Term:
        """The model's move: to be taken for the anchor."""

        def loss(found: Tensor, _: Batch) -> Tensor:
            if not self.begun and self.memory:
                self.restore(self.memory)
            self.begun = True
            return taken_for(self.net(found), 0.0)

        return Term(self.bank.name, self.bank, loss, "example", forward=self.clean)

    def clean(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model says x_0 is when told the concept, shape of x_0."""
        return self.x_0(model, batch, self.bank.eps(model, batch))

    def x_0(self, model: nn.Module, batch: Batch, eps: Tensor) -> Tensor:
        """The clean latents that predicted noise stands for."""
        abars = beneath(model).abars[batch["t"]]
        return to_x0(eps, batch["x_t"], abars, "epsilon")

    def play(self, moved: Moving, done: int, memory: dict[str, Tensor]) -> None:
        """The discriminator's move, behind every step of the model."""
        moved.settle()
        loss = self.learn(moved.model, self.plan[done - 1], done - 1)
        self.run.log("discriminator", step=done, loss=loss)
        memory.update(self.tensors())

    def learn(self, model: nn.Module, indices: list[int], step: int) -> float:
        """One step on these rows of the bank; returns the loss before it."""
        batch = self.bank.batch(indices, self.run.device)
        with evaluating(model):
            real = self.x_0(model, batch, batch["aim"])
            size = self.settings.micro_batch_size
            fake = torch.cat(
                [
                    self.clean(model, self.bank.batch(indices[i : i + size], self.run.device))
                    for i in range(0, len(indices), size)
                ]
            )
        loss = (taken_for(self.net(real), 0.0) + taken_for(self.net(fake), 1.0)).mean()
        if not bool(loss.isfinite()):
            raise Collapsed(collapse(step, "the discriminator's loss is not finite"))
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def warmed(self, model: nn.Module) -> dict[str, Tensor]:
        """The discriminator after learning alone."""
        draw, steps = self.run.generator("warm-up"), self.settings.warmup_steps
        for step in range(steps):
            some = torch.randint(len(self.bank), (self.settings.batch_size,), generator=draw)
            loss = self.learn(model, some.tolist(), step)
            self.run.progress.advance("warm-up", step + 1, steps, {"discriminator_loss": loss})
        return self.tensors()

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments."""
        moments = self.optimizer.state_dict()["state"].items()
        return {
            **{f"net.{key}": value.clone() for key, value in self.net.state_dict().items()},
            **{f"{i}.{key}": v.clone() for i, slots in moments for key, v in slots.items()},
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go back to what :meth:`tensors` gave."""
        state: dict[int, dict[str, Any]] = {}
        weights: dict[str, Tensor] = {}
        for name, value in tensors.items():
            owner, key = name.split(".", 1)
            if owner == "net":
                weights[key] = value
            else:
                state.setdefault(int(owner), {})[key] = value.clone()
        self.net.load_state_dict(weights)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
