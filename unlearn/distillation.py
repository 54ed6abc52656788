"""Distilling a diffusion model into a generator that draws a picture in one step.

Score identity distillation (SiD; Zhou et al. 2024, arXiv 2404.04057) keeps three sets of weights of
one architecture. The teacher p is frozen. The generator G turns unit noise z into a picture, as the
model itself would in one step from time t_init:

    x_g = x0-prediction of G at (z, t_init)

The fake score S learns to denoise what G draws. Where S and p agree about noised drawings, the
drawings are distributed as the teacher's, so G descends on their disagreement. No data is read.

The paper starts from sqrt(1 - abar) z. Pipelines of diffusers hand z itself to their network, so G
learns to start there; the two differ by a factor of 1.08 at sigma 2.5.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from unlearn import distributed
from unlearn.noising import to_eps, to_x0
from unlearn.pipeline import Pipeline, library
from unlearn.workplace import written_whole

if TYPE_CHECKING:
    from unlearn.run import Run

FLOOR = 1e-5  # of the generator loss's scale, per pixel
Weights = Mapping[str, Tensor]


def fake_loss(said: Tensor, noise: Tensor) -> Tensor:
    """Squared error of the fake score, summed over pixels, shape (rows,).

    Args:
        said: the noise it sees in drawings that were noised, shape (rows, channels, height, width).
        noise: what was added, of the same shape.
    """
    return (said - noise).square().flatten(1).sum(1)


def generator_loss(real: Tensor, fake: Tensor, drawn: Tensor, alpha: float) -> Tensor:
    """What the generator descends on (SiD), summed over pixels, shape (rows,).

        <phi - psi, (phi - x_g) - alpha (phi - psi)> / omega,    omega = mean |phi - x_g|

    omega is a constant of each row, at least 1e-5. All pictures have one shape.

    Args:
        real: phi, what the teacher sees behind the noised drawings.
        fake: psi, what the fake score sees there.
        drawn: x_g, the drawings.
        alpha: 1 or a little more; the square |phi - psi|^2 has the weight 1 - alpha.

    >>> one = torch.ones(1, 1, 1, 2)  # 2 pixels, each 2 (1 - 2 alpha), over omega 1
    >>> generator_loss(3 * one, one, 2 * one, 1.2)
    tensor([-5.6000])
    """
    apart, error = real - fake, real - drawn
    omega = error.detach().abs().flatten(1).mean(1).clamp_min(FLOOR)
    return (apart * (error - alpha * apart)).flatten(1).sum(1) / omega


def one_step_scheduler(scheduler: Any, t_init: int) -> Any:
    """A scheduler of diffusers with which one inference step goes from ``t_init`` to the picture.

    DDIM over the first t_init + 1 times of the given schedule alone: its last time is t_init, and
    what lies before its first is the picture.
    """
    return library().DDIMScheduler(
        num_train_timesteps=t_init + 1, trained_betas=scheduler.betas[: t_init + 1].tolist(),
        prediction_type=scheduler.config.prediction_type, timestep_spacing="trailing",
        set_alpha_to_one=True, clip_sample=False, steps_offset=1,
    )  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """What half a step is computed on, row by row.

    Attributes:
        start: unit noise that becomes a drawing, shape (rows, channels, height, width).
        noise: what is added to the drawing, of the same shape.
        t: times to which it is noised, shape (rows,).
        told: the condition of generator and fake score.
        instead: the condition of the teacher; it differs where something must be forgotten.
        weight: of each row in the sum of the losses, shape (rows,).
    """

    start: Tensor
    noise: Tensor
    t: Tensor
    told: Tensor
    instead: Tensor
    weight: Tensor

    def pieces(self, size: int) -> Iterator[Rows]:
        """The same rows, ``size`` at a time."""
        parts = [getattr(self, field.name).split(size) for field in fields(self)]
        yield from (Rows(*part) for part in zip(*parts, strict=True))


@dataclass(frozen=True)
class Distillation:
    """The losses of every row, given the weights of all three networks.

    Weights that must not learn are handed over detached.

    Attributes:
        model: the architecture, the schedule, and the teacher's weights.
        t_init: the time at which the generator believes to be.
        alpha: see :func:`generator_loss`.
        guidance: weight of the condition in the teacher; 1: none.
        null: the condition that says nothing, for guidance, shape (1, ...).
        bf16: run the networks under autocast.
    """

    model: Pipeline
    t_init: int
    alpha: float = 1.0
    guidance: float = 1.0
    null: Tensor | None = None
    bf16: bool = False

    def drawn(self, generator: Weights, start: Tensor, told: Tensor) -> Tensor:
        """x_g, what the generator makes of unit noise."""
        t = torch.full((len(start),), self.t_init, device=start.device)
        return self._x0(self._said(generator, start, t, told), start, t)

    def fake(self, generator: Weights, fake: Weights, rows: Rows) -> Tensor:
        """The fake score's loss, shape (rows,); with its gradient, 4 forward passes of each row."""
        with torch.no_grad():
            drawn = self.drawn(generator, rows.start, rows.told)
        x_t = self.model.noised(drawn, rows.noise, rows.t)
        said = self._said(fake, x_t, rows.t, rows.told)
        return fake_loss(to_eps(said, x_t, self.model.abars[rows.t], self.model.kind), rows.noise)

    def generator(self, generator: Weights, fake: Weights, teacher: Weights, rows: Rows) -> Tensor:
        """The generator's loss, shape (rows,); with its gradient, 7 forward passes of each row.

        Guidance adds two.
        """
        drawn = self.drawn(generator, rows.start, rows.told)
        x_t = self.model.noised(drawn, rows.noise, rows.t)
        real = self._x0(self._guided(teacher, x_t, rows.t, rows.instead), x_t, rows.t)
        seen = self._x0(self._said(fake, x_t, rows.t, rows.told), x_t, rows.t)
        return generator_loss(real, seen, drawn, self.alpha)

    def _x0(self, said: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return to_x0(said, x_t, self.model.abars[t], self.model.kind)

    def _guided(self, weights: Weights, x_t: Tensor, t: Tensor, told: Tensor) -> Tensor:
        if self.null is None or self.guidance == 1.0:
            return self._said(weights, x_t, t, told)
        conditions = torch.cat([self.null.expand_as(told), told])
        both = self._said(weights, torch.cat([x_t, x_t]), torch.cat([t, t]), conditions)
        bare, said = both.chunk(2)
        return bare + self.guidance * (said - bare)  # of noise or not: each is affine in the others

    def _said(self, weights: Weights, x_t: Tensor, t: Tensor, told: Tensor) -> Tensor:
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.bf16):
            said: Tensor = functional_call(self.model, dict(weights), (x_t, t, told))
        return said.to(x_t.dtype)


class Learner:
    """Weights of one network that learn by Adam, as SiD has it: betas 0 and 0.999, clipped values.

    Args:
        start: the weights to copy, by name.
        lr: learning rate.
    """

    def __init__(self, start: Weights, lr: float) -> None:
        self.weights = {name: nn.Parameter(value.detach().clone()) for name, value in start.items()}
        self.optimizer = torch.optim.Adam(self.weights.values(), lr, betas=(0.0, 0.999), eps=1e-8)

    @property
    def still(self) -> Weights:
        """The weights as constants."""
        return {name: value.detach() for name, value in self.weights.items()}

    def step(self, losses: Callable[[Rows], Tensor], rows: Rows, size: int) -> float:
        """Descend once on the weighted sum of the rows' losses, ``size`` rows at a time.

        Returns:
            The sum before the step; not finite where the losses or their gradients were not.
        """
        self.optimizer.zero_grad()
        total = 0.0
        for piece in rows.pieces(size):
            value = (losses(piece) * piece.weight).sum()
            value.backward()  # type: ignore[no-untyped-call]
            total += float(value.detach())
        gradients = [p.grad for p in self.weights.values() if p.grad is not None]
        length = float(nn.utils.get_total_norm(gradients))
        nn.utils.clip_grad_value_(self.weights.values(), 1.0)
        self.optimizer.step()
        return total + 0.0 * length

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Weights and moments under names that begin with ``name``."""
        moments = self.optimizer.state_dict()["state"]
        return {f"{name}/weights/{key}": value for key, value in self.still.items()} | {
            f"{name}/{slot}/{index}": value
            for index, slots in moments.items()
            for slot, value in slots.items()
        }

    def load(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Go back to what :meth:`tensors` gave."""
        own = {key: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in own.items():
            _, slot, place = key.split("/", 2)
            if slot == "weights":
                self.weights[place].data.copy_(value)
            else:
                state.setdefault(int(place), {})[slot] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


class Kept:
    """Tensors of unfinished training on disk, so that a killed run goes on to the same weights.

    Args:
        run: where, and how often.
        name: of the file, one for every loop of a run.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.saved = run, time.monotonic()
        self.path = run.work / "training" / f"{name}.safetensors" if run.work else None

    def restore(self) -> tuple[int, dict[str, Tensor]]:
        """The steps done and the tensors kept; 0 and none where there are none."""
        if self.path is None or not distributed.on_main(self.path.exists):
            return 0, {}
        found = distributed.tensors_of_main(self.path)
        step = int(found.pop("step"))
        self.run.log("resumed", step=step)
        return step, found

    def save(self, step: int, tensors: Callable[[], Mapping[str, Tensor]], *, last: bool) -> None:
        """Keep this step if it is the last, or if the last one kept is old enough."""
        if self.path is None or not self.run.resumable or not distributed.is_main():
            return
        if not last and time.monotonic() - self.saved < self.run.save_every:
            return
        found = {k: v.detach().cpu().contiguous() for k, v in tensors().items()}
        with written_whole(self.path) as new:
            save_file({**found, "step": torch.tensor(step)}, new)
        self.saved = time.monotonic()
