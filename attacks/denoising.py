"""Whose pictures does a diffusion model know: membership scores from how well it denoises.

With e(x, t) the predicted noise, abar_t the noise schedule and sigma_t = sqrt(1/abar_t - 1):

    loss    - mean over draws of ||e(x_t, t) - noise||^2                  (Matsumoto et al. 2023)
    secmi   - ||x~_t - back(forth(x~_t))||^2                                    (Duan et al. 2023)
    pia     - ||e(x_0, 0) - e(x~_t, t)||_4^4                             (Kong et al. 2023)
    pian    the same with e(x_0, 0) scaled to the mean magnitude of noise, sqrt(2 / pi)

SecMI walks to x~_t by DDIM without randomness and takes one more step forth and back; PIA goes
there in one step, x~_t = sqrt(abar) x_0 + sqrt(1 - abar) e(x_0, 0). Norms are means over pixels,
of latents where there is an autoencoder. Every record is denoised under its own condition.

Published codes name t by its index in one schedule; here the noise level sigma is named and t
follows, so that schedules of any shape and length are attacked at the same place. SecMI's path is
even in sigma. arXiv 2302.03262, 2302.01316, 2305.18355.

SecMI and PIAN are made for networks that have memorised: there they lead with the others, but
while a network still learns its records they can rank members *below* others. Read them beside the
same scores of the original model.

Cost in network calls per record: loss as many as the task has draws, SecMI ``WALK`` + 2, PIA 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from unlearn.attacks.interface import Array
from unlearn.errors import BadInput, Unsupported
from unlearn.noising import noised, time_of, to_x0
from unlearn.pipeline import Pipeline
from unlearn.run import Run
from unlearn.tasks.base import Encoded, evaluating
from unlearn.tasks.diffusion import Diffusion

SIGMA = 0.3  # where members and others differ most in networks that have memorised
WALK = 10  # steps of SecMI to that level


def loss_scores(
    model: Pipeline, examples: Encoded, run: Run, size: int = 64, phase: str = "denoising loss"
) -> Array:
    """The negated denoising loss at the record's own draws of time and noise.

    Args:
        model: on ``run.device``.
        examples: encoded by the task of the pipeline.
        run: device and progress.
        size: records of one batch.
        phase: what progress calls it.

    Returns:
        Shape (n,), at most 0; higher means more likely a member.

    Raises:
        Unsupported: the records are not those of a diffusion model.
    """
    task, found = _task(examples), np.zeros(len(examples))
    with evaluating(model):
        for indices in run.batches(examples, phase, size):
            found[indices] = -task.nll(model, examples.batch(indices, run.device)).double().cpu()
    return found


def secmi_scores(
    model: Pipeline, examples: Encoded, run: Run, sigma: float = SIGMA, size: int = 64
) -> Array:
    """SecMI alone; see :func:`denoising_scores`."""
    return denoising_scores(model, examples, run, ("secmi",), sigma, size)["secmi"]


def pia_scores(
    model: Pipeline, examples: Encoded, run: Run, sigma: float = SIGMA, size: int = 64
) -> Array:
    """PIA alone; see :func:`denoising_scores`."""
    return denoising_scores(model, examples, run, ("pia",), sigma, size)["pia"]


def pian_scores(
    model: Pipeline, examples: Encoded, run: Run, sigma: float = SIGMA, size: int = 64
) -> Array:
    """PIAN alone; see :func:`denoising_scores`."""
    return denoising_scores(model, examples, run, ("pian",), sigma, size)["pian"]


def denoising_scores(
    model: Pipeline,
    examples: Encoded,
    run: Run,
    names: Sequence[str] = ("secmi", "pia", "pian"),
    sigma: float = SIGMA,
    size: int = 64,
) -> dict[str, Array]:
    """Several scores in one pass: pictures and conditions are encoded once.

    Args:
        model: on ``run.device``.
        examples: encoded by the task of the pipeline.
        run: device and progress.
        names: of the scores.
        sigma: noise level at which the model is asked.
        size: records of one batch.

    Returns:
        By name, shape (n,), at most 0; higher means more likely a member.

    Raises:
        BadInput: an unknown name, or a noise level outside the schedule.
        Unsupported: the records are not those of a diffusion model.
    """
    if odd := sorted({*names} - {*SCORES}):
        raise BadInput(f"there is no score {odd[0]!r}: choose from {', '.join(SCORES)}")
    path, task = walk(sigma, model.abars), _task(examples)
    found = {name: np.zeros(len(examples)) for name in names}
    with evaluating(model):
        for indices in run.batches(examples, "denoising scores", size):
            batch = examples.batch(indices, run.device)
            x_0 = model.encode(batch["pixel_values"].to(model.dtype))
            told = task.conditions(model, batch)
            for name in names:
                found[name][indices] = SCORES[name](model, x_0, told, path).double().cpu()
    return found


def walk(sigma: float, abars: Tensor) -> list[int]:
    """Times from 0 to the level ``sigma`` in steps even in sigma, and one step beyond.

    Where a schedule is too coarse for that, there are fewer.

    Args:
        sigma: the noise level of the last but one time.
        abars: of all times, shape (T,).

    Raises:
        BadInput: a schedule that does not reach that far, or begins later.
    """
    first, last = (float(((1 - a) / a).sqrt()) for a in (abars[0], abars[-2]))
    if not first < sigma <= last or (end := time_of(sigma, abars)) == 0:
        raise BadInput(
            f"the noise level {sigma} is outside the schedule: choose one between {first:.3g} "
            f"and {last:.3g}"
        )
    on_the_way = {time_of(sigma * k / WALK, abars) for k in range(1, WALK)}
    beyond = max(end + 1, time_of(sigma * (1 + 1 / WALK), abars))
    return [*sorted({0, end, *on_the_way}), beyond]


def _secmi(model: Pipeline, x_0: Tensor, told: Tensor | None, path: Sequence[int]) -> Tensor:
    x = x_0
    for here, there in pairwise(path[:-1]):
        x = _moved(model, x, told, here, there)
    forth = _moved(model, x, told, path[-2], path[-1])
    back = _moved(model, forth, told, path[-1], path[-2])
    return -(back.double() - x.double()).square().flatten(1).mean(1)


def _moved(model: Pipeline, x: Tensor, told: Tensor | None, here: int, there: int) -> Tensor:
    """One step of DDIM without randomness (Song et al. 2021, eq. 12), in either direction."""
    eps = _eps(model, x, told, here)
    a, b = (model.abars[t].expand(len(x)) for t in (here, there))
    return noised(to_x0(eps, x, a, "epsilon"), eps, b)


def _pia(model: Pipeline, x_0: Tensor, told: Tensor | None, path: Sequence[int]) -> Tensor:
    return _proximal(model, x_0, told, path[-2], _eps(model, x_0, told, 0))


def _pian(model: Pipeline, x_0: Tensor, told: Tensor | None, path: Sequence[int]) -> Tensor:
    start = _eps(model, x_0, told, 0)
    size = start.abs().flatten(1).mean(1).clamp_min(torch.finfo(start.dtype).tiny)
    return _proximal(
        model, x_0, told, path[-2], start * (math.sqrt(2 / math.pi) / size).view(-1, 1, 1, 1)
    )


def _proximal(model: Pipeline, x_0: Tensor, told: Tensor | None, t: int, start: Tensor) -> Tensor:
    x_t = noised(x_0, start, model.abars[t].expand(len(x_0)))
    error = start.double() - _eps(model, x_t, told, t).double()
    return -error.pow(4).flatten(1).mean(1)


def _eps(model: Pipeline, x: Tensor, told: Tensor | None, t: int) -> Tensor:
    return model.eps(x, torch.full((len(x),), t, device=x.device), told)


SCORES = {"secmi": _secmi, "pia": _pia, "pian": _pian}


def _task(examples: Encoded) -> Diffusion:
    if not isinstance(examples.task, Diffusion):
        raise Unsupported(f"denoising scores are for diffusion models, not {examples.task.name}")
    return examples.task
