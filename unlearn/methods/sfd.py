"""SFD: score forgetting distillation (Chen, Zhang, Zhou 2024, ICLR 2025, arXiv 2409.11219).

The model is distilled into a generator that draws in one step (:mod:`unlearn.distillation`), and
while this goes on, what must be forgotten is drawn as something else. Told of the forgotten class
c_f, the generator and the fake score are set against the teacher told of another one, c_o:

    retained  L(c, c) = < phi_c - psi_c, (phi_c - x_g) - alpha (phi_c - psi_c) > / omega
    forgotten L(c_f, c_o), the same with psi told c_f and phi told c_o
    generator mean of L over retained rows + forget_weight * mean of L over forgotten rows
    fake      mean of ||S(x_t, t, c) - noise||^2, over both kinds of rows with the same weights

with phi, psi what teacher and fake score see behind x_t, the noised drawing x_g of the generator.
Both networks take one step in turn, with new noise each time. The override c_o is the anchor, or
drawn anew for each row from what is retained. No data is read at all.

Retained and forgotten rows go through each network together, a row's loss weighted by 1 over the
rows of its kind; the authors pass them apart. With guidance only the teacher is guided, while the
authors guide the fake score, too.

What is left is no score model: it draws in one step, without guidance, and that is all it can do.
It cannot be distilled again, so all that must go has to be named at once.

Cost: 11 forward passes per row and step (13 with guidance), and memory for three networks, a
running mean of the generator, and two moments for generator and fake score each: eight times the
weights, and gradients. The paper's settings are lr 1e-5 for both and 50,000 steps of 128 and 128
rows on CIFAR-10 with forget_weight 0.01, and lr 1e-6, fake_lr 3e-6, alpha 1, forget_weight 1,
guidance 4.5 from a generator distilled before on Stable Diffusion. The defaults are for small
models and a few hundred steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal, NamedTuple, cast

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from unlearn.distillation import Distillation, Kept, Learner, Rows, one_step_scheduler
from unlearn.errors import BadInput, Collapsed, Unsupported
from unlearn.interface import Classes, Concepts, Need, Needs, Request, Subject, Target
from unlearn.noising import time_of
from unlearn.pipeline import Pipeline
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import evaluating
from unlearn.training import collapse

BLANK = "{}"


class Conditions(NamedTuple):
    """What networks are told.

    Attributes:
        table: every condition once, shape (conditions, ...).
        retained: positions of those that must stay, shape (n,).
        forgotten: positions of those that must go, shape (m,).
        instead: positions of what may stand in for each of these, shape (m, k).
    """

    table: Tensor
    retained: Tensor
    forgotten: Tensor
    instead: Tensor


def conditions(model: Pipeline, target: Target, templates: str = BLANK) -> Conditions:
    """The classes or prompts of a request; text states are computed here, once.

    A concept's prompts are the templates around it. What is retained are the templates around the
    anchor and every concept that is kept, or all other classes.

    Raises:
        BadInput: nothing is left to retain, or a template has no place for a concept.
    """
    if isinstance(target, Concepts):
        return _prompts(model, target, [part.strip() for part in templates.split("|")])
    if not isinstance(target, Classes) or model.classes is None:
        raise BadInput("sfd forgets classes or concepts: name them with the flag for either")
    known = [k for k in range(model.classes) if k != model.null_class]
    left = [k for k in known if k not in target.indices]
    if not left:
        raise BadInput("every class would be forgotten, and none be left to stand in: name fewer")
    others = torch.tensor(left if target.anchor is None else [target.anchor])
    return Conditions(
        torch.arange(model.classes, device=model.device), torch.tensor(left),
        torch.tensor(target.indices), others.expand(len(target.indices), -1),
    )  # fmt: skip


def _prompts(model: Pipeline, target: Concepts, templates: list[str]) -> Conditions:
    if odd := [template for template in templates if BLANK not in template]:
        raise BadInput(f"the template {odd[0]!r} has no {BLANK} where a concept would stand")
    kept = list(dict.fromkeys(filter(None, (target.anchor, *target.keep))))
    if not kept:
        raise BadInput(
            "sfd shows something else instead of a concept: pass --anchor, or --keep-concepts to "
            "draw it from"
        )
    words = [*kept, *target.prompts]
    prompts = [template.replace(BLANK, word) for word in words for template in templates]
    with torch.no_grad():
        table = cast(Tensor, model.condition(prompts))
    place = torch.arange(len(prompts)).view(len(words), len(templates))
    others = place[: 1 if target.anchor else len(kept)]  # the anchor comes first
    return Conditions(
        table, place[: len(kept)].flatten(), place[len(kept) :].flatten(),
        others.T.repeat(len(target.prompts), 1),  # under the same template
    )  # fmt: skip


def rows(
    model: Pipeline, told: Conditions, counts: tuple[int, int], weight: float,
    times: tuple[int, int], draw: torch.Generator,
) -> Rows:  # fmt: skip
    """Conditions, times and noise of half a step, drawn on the CPU: retained rows, then forgotten.

    Args:
        model: says what is denoised, where and in which precision.
        told: what to draw conditions from.
        counts: how many rows of each kind.
        weight: of all forgotten rows together; that of the retained ones is 1.
        times: the first one to draw from, and the one behind the last.
        draw: where everything random comes from.
    """

    def among(size: int, count: int) -> Tensor:
        return torch.randint(size, (count,), generator=draw)

    retained = told.retained[among(len(told.retained), counts[0])]
    which, other = (among(size, counts[1]) for size in told.instead.shape)
    start, noise = torch.randn(2, sum(counts), *model.shape, generator=draw).to(
        model.device, model.dtype
    )
    t = torch.randint(*times, (sum(counts),), generator=draw)
    device = model.device
    asked = torch.cat([retained, told.forgotten[which]]).to(device)
    instead = torch.cat([retained, told.instead[which, other]]).to(device)
    shares = torch.tensor([1 / counts[0], weight / counts[1]], dtype=torch.float64)
    return Rows(
        start, noise, t.to(device), told.table[asked], told.table[instead],
        shares.repeat_interleave(torch.tensor(counts)).to(start),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SFD:
    """Distil the model into a one-step generator that draws something else instead."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    steps: Annotated[
        int, Field(ge=1, description="steps of each of the two networks"), Range(50, 800, log=True)
    ] = 200
    lr: Annotated[
        float,
        Field(gt=0, description="learning rate of the generator"),
        Range(5e-5, 5e-3, log=True),
    ] = 5e-4
    fake_lr: Annotated[
        float,
        Field(gt=0, description="learning rate of the fake score"),
        Range(1e-4, 1e-2, log=True),
    ] = 1e-3
    batch_size: Annotated[int, Field(ge=1, description="retained rows per step")] = 32
    forget_rows: Annotated[int, Field(ge=1, description="forgotten rows per step")] = 8
    micro_batch_size: Annotated[
        int, Field(ge=1, description="rows per forward pass: costs memory, does not change the sum")
    ] = 64
    forget_weight: Annotated[
        float,
        Field(gt=0, description="weight of the forgotten rows, in both networks' losses"),
        Range(0.01, 3.0, log=True),
    ] = 0.1
    alpha: Annotated[
        float, Field(ge=0, description="of the generator's loss; papers: 1 to 1.2"), Range(0.8, 1.5)
    ] = 1.2
    guidance: Annotated[
        float, Field(ge=1, description="weight of the condition in the teacher; 1: none")
    ] = 1.0
    templates: Annotated[
        str,
        Field(
            description="prompts around a concept, between bars: 'a photo of {}|a drawing of {}'"
        ),
    ] = BLANK
    average: Annotated[
        float,
        Field(ge=0, lt=1, description="the result is a running mean of the generator; 0: the last"),
    ] = 0.98
    sigma_init: Annotated[
        float, Field(gt=0, description="noise level at which the generator starts")
    ] = 2.5
    sigma_min: Annotated[
        float, Field(gt=0, description="lowest noise level at which scores are compared")
    ] = 0.137
    sigma_max: Annotated[
        float, Field(gt=0, description="highest noise level at which scores are compared")
    ] = 13.1
    precision: Annotated[
        Literal["fp32", "bf16"], Field(description="bf16: autocast over fp32 master weights")
    ] = "fp32"

    needs: ClassVar[Needs] = Needs(
        forget=Need.NO, retain=Need.NO, tasks=("diffusion",), targets=("classes", "concepts")
    )

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Distil, and return a pipeline that is sampled in one step.

        Raises:
            BadInput: nothing is left to retain, or guidance for a network without a null class.
            Unsupported: the model draws in few steps already.
            Collapsed: a loss or gradient is not finite.
        """
        model = cast(Pipeline, subject.model)
        if model.steps is not None:
            raise Unsupported(
                f"this pipeline was made to draw in {model.steps} step"
                f"{'s' if model.steps > 1 else ''} and is no score model any more, so it cannot "
                "be distilled: forget from the original, naming all that must go at once"
            )
        told = conditions(model, request.target, self.templates)
        losses = self._losses(model)
        with evaluating(model), torch.enable_grad():
            weights = self._distilled(losses, told, run)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        scheduler = one_step_scheduler(model.pipeline.scheduler, losses.t_init)
        model.pipeline.register_modules(scheduler=scheduler)
        run.note(
            "The result draws in one step, and is no score model any more: sample it with "
            "num_inference_steps=1 and without guidance."
        )
        return replace(subject, model=Pipeline(model.pipeline, None, 1, model.stated_null).eval())

    def _losses(self, model: Pipeline) -> Distillation:
        with torch.no_grad():
            null = None if self.guidance == 1.0 else model.null(1)
        if null is None and self.guidance != 1.0:
            raise BadInput(
                "guidance needs a class that stands for none: say which (--sampling null_class), "
                "or leave guidance at 1"
            )
        t_init = time_of(self.sigma_init, model.abars)
        bf16 = self.precision == "bf16"
        return Distillation(model, t_init, self.alpha, self.guidance, null, bf16)

    def _distilled(self, losses: Distillation, told: Conditions, run: Run) -> dict[str, Tensor]:
        """The running mean of the generator's weights."""
        model = losses.model
        teacher = {name: p.detach() for name, p in model.named_parameters()}
        generator, fake = Learner(teacher, self.lr), Learner(teacher, self.fake_lr)
        mean = {name: value.clone() for name, value in teacher.items()}
        low, high = (time_of(sigma, model.abars) for sigma in (self.sigma_min, self.sigma_max))
        counts, times = (self.batch_size, self.forget_rows), (low, max(high, low + 1))
        kept = Kept(run, "sfd")
        done, found = kept.restore()
        if done:
            generator.load("generator", found)
            fake.load("fake", found)
            for name in mean:
                mean[name].copy_(found[f"mean/{name}"])

        def state() -> dict[str, Tensor]:
            own = {f"mean/{name}": value for name, value in mean.items()}
            return own | generator.tensors("generator") | fake.tensors("fake")

        def drawn(purpose: str) -> Rows:
            draw = run.generator(purpose)
            return rows(model, told, counts, self.forget_weight, times, draw)

        for step in range(done, self.steps):
            of_fake = partial(losses.fake, generator.still, fake.weights)
            fell = fake.step(of_fake, drawn(f"fake {step}"), self.micro_batch_size)
            of_generator = partial(losses.generator, generator.weights, fake.still, teacher)
            lost = generator.step(of_generator, drawn(f"generator {step}"), self.micro_batch_size)
            numbers = {"fake_loss": fell, "generator_loss": lost}
            for name, value in numbers.items():
                if not math.isfinite(value):
                    raise Collapsed(collapse(step, f"the {name} or its gradient is not finite"))
            keep = min(self.average, (1 + step) / (10 + step))
            for name, weight in generator.still.items():
                mean[name].lerp_(weight, 1 - keep)
            run.log("step", step=step + 1, of=self.steps, **numbers)
            run.progress.advance("unlearn", step + 1, self.steps, numbers)
            kept.save(step + 1, state, last=step + 1 == self.steps)
        return mean
