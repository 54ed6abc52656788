"""Few-shot erasing through the text encoder (Fuchi & Takagi, BMVC 2024, arXiv 2405.07288).

Gradient ascent of the denoising loss on a handful of pictures, through the frozen denoiser into the
text encoder, so that prompts of the concept stop describing its pictures:

    min  -mean_i min(L_i, stop_ratio L_i^0)
    L_i = mean per pixel |eps(x_t, t, E(prompt)) - eps|^2

L_i^0 is the same loss, at the same noise, with the text states of the starting encoder, which are
computed once. The paper's loss is -L_i, which has no lower bound, and it stops after about ten
steps; here an example stops pulling where its loss has grown ``stop_ratio`` fold. What moves is as
in the paper: both layers of every MLP, and the self-attention of the last block.

A picture is told its own caption, where the paper fills random templates with the concept: a
caption that does not fit the picture teaches the encoder to confuse something else. Every picture
is seen at a pair of times t and T - 1 - t. With a concept and no pictures (the paper's zero-shot
variant) prompts are drawn from ``templates``, and latents are uniform noise in [0, 1]. Where
prompts are to be kept (``--keep-concepts``, as they are and in ``templates``), ``keep_weight``
holds the encoder's output there: the mean squared distance to the starting encoder's. This is not
in the paper.

AdamW stands in for the paper's Adam with betas (0.9, 0.98): over ten steps, bias correction makes
them alike. Cost: per step and picture four forward passes and two backward of the denoiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from unlearn import weights
from unlearn.cross_attention import TEMPLATES, known_templates
from unlearn.data import Examples
from unlearn.errors import Unsupported
from unlearn.interface import Concepts, Need, Needs, Request, Subject
from unlearn.noising import target
from unlearn.pipeline import Pipeline
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import Batch, Encoded
from unlearn.tasks.diffusion import Diffusion
from unlearn.training import Term, Training, descend

LATENTS = 4  # pictures that the zero-shot variant imagines per concept


def ascent(loss: Tensor, start: Tensor, stop_ratio: float) -> Tensor:
    """The negated loss of each example, held where it has grown enough, shape (batch,).

    Args:
        loss: denoising loss of each example, shape (batch,).
        start: the same with the starting text encoder.
        stop_ratio: > 1.

    >>> ascent(torch.tensor([1.5, 9.0]), torch.tensor([1.0, 1.0]), 2.0)
    tensor([-1.5000, -2.0000])
    """
    return -torch.minimum(loss, stop_ratio * start)


def scope_of(encoder: nn.Module) -> str:
    """Patterns of the parameters that move, whatever comes before ``layers`` in their names.

    Raises:
        Unsupported: its blocks are not named as in CLIP.
    """
    parts = [name.split(".") for name, _ in encoder.named_parameters()]
    numbers = [int(p[p.index("layers") + 1]) for p in parts if "layers" in p]
    if not numbers or not any("fc1" in p for p in parts):
        raise Unsupported(f"{type(encoder).__name__} is no CLIP text encoder: use another method")
    return rf"\.mlp\.fc[12]\. \.layers\.{max(numbers)}\.self_attn\."


@dataclass(frozen=True, kw_only=True)
class FewShotText:
    """Climb the denoising loss of a few pictures in the text encoder."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    lr: Annotated[
        float,
        Field(gt=0, description="learning rate; 1e-5 at CLIP's size, small models need more"),
        Range(1e-6, 1e-2, log=True),
    ] = 1e-5
    epochs: Annotated[
        float, Field(gt=0, description="passes over the pictures"), Range(1.0, 60.0, log=True)
    ] = 5
    batch_size: Annotated[int, Field(ge=1, description="pictures per step")] = 2
    stop_ratio: Annotated[
        float,
        Field(gt=1, description="growth of its loss at which a picture stops pulling"),
        Range(1.2, 5.0, log=True),
    ] = 2.0
    keep_weight: Annotated[
        float,
        Field(ge=0, description="weight of the text states of prompts to keep"),
        Range(0.1, 10.0, log=True),
    ] = 1.0
    templates: Annotated[
        str,
        Field(description="prompts without pictures, between commas; {} stands for the concept"),
    ] = TEMPLATES

    needs: ClassVar[Needs] = Needs(
        forget=Need.OPTIONAL,
        retain=Need.NO,
        tasks=("diffusion",),
        targets=("records", "concepts"),
    )

    def check(self, request: Request) -> None:
        """Refuse what has no prompts.

        Raises:
            Unsupported: the pipeline does not read text.
        """
        forget = request.forget
        if forget is not None and cast(Diffusion, forget.task).tokenizer is None:
            raise Unsupported(
                "few_shot_text trains a text encoder, and this pipeline has none: use another "
                "method"
            )

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Train the text encoder; the denoiser stays as it is."""
        own = cast(Pipeline, subject.model)
        text = own.with_trained("text_encoder")
        settings = Training(
            lr=self.lr, epochs=self.epochs, batch_size=self.batch_size,
            micro_batch_size=self.batch_size, weight_decay=1e-8, scope=scope_of(own.text_encoder),
        )  # fmt: skip
        try:
            descend(replace(subject, model=text), self.terms(text, request, run), settings, run)
            weights.check_finite(text, text.dtype)
        finally:
            own.text_encoder.requires_grad_(False)
            own.denoiser.requires_grad_(True)
        return replace(subject, model=own.eval())

    def terms(self, text: Pipeline, request: Request, run: Run) -> list[Term]:
        """The ascent, and what holds prompts to keep."""
        forget, told = request.forget, request.target
        concepts = told.prompts if isinstance(told, Concepts) else ()
        keep = told.keep if isinstance(told, Concepts) else ()
        filled = known_templates(self.templates, run) if concepts else []
        imagined = forget is None
        if forget is None:
            rows = [{"image": torch.zeros(text.picture_shape), "text": concept}
                    for concept in concepts for _ in range(LATENTS)]  # fmt: skip
            numbers = [str(i) for i in range(len(rows))]
            forget = Encoded(Examples(rows, numbers, "forget", "noise"), run.task)
        prompts = (
            text.token_ids(_filled(concepts, filled))
            if imagined
            else torch.stack([forget[i]["input_ids"] for i in range(len(forget))]).to(text.device)
        )
        start = run.once("text states", lambda: {"before": _states(text, prompts)})["before"]

        def losses(model: Pipeline, batch: Batch) -> tuple[Tensor, Tensor]:
            """Now, and with the starting encoder, at the same noise; each (batch,)."""
            rows, steps = len(batch["index"]), len(model.abars)
            chosen = torch.randint(len(prompts), (rows,)) if imagined else batch["index"].cpu()
            early = torch.randint(steps // 2, (rows,))
            t = torch.cat([early, steps - 1 - early]).to(model.device)
            eps = torch.randn(2 * rows, *model.shape).to(model.device, model.dtype)
            if imagined:
                x_0 = torch.rand(rows, *model.shape).to(model.device, model.dtype)
            else:
                with torch.no_grad():
                    x_0 = model.encode(batch["pixel_values"].to(model.dtype))
            x_0 = x_0.repeat(2, 1, 1, 1)
            x_t, aim = model.noised(x_0, eps, t), target(x_0, eps, model.abars[t], model.kind)

            def loss(states: Tensor) -> Tensor:
                error: Tensor = model(x_t, t, states.repeat(2, 1, 1)) - aim
                return error.square().flatten(1).mean(1).view(2, rows).mean(0)

            with torch.no_grad():
                before = loss(start[chosen].to(model.device))
            return loss(model.text_states(prompts[chosen])), before

        def climb(found: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
            return ascent(*found, self.stop_ratio)

        ascent_term = Term("forget", forget, climb, "example", forward=cast(Any, losses))
        return [ascent_term, *self._held(text, forget, [*keep, *_filled(keep, filled)], run)]

    def _held(self, text: Pipeline, forget: Encoded, keep: Sequence[str], run: Run) -> list[Term]:
        if not keep or not self.keep_weight:
            return []
        ids = text.token_ids(list(dict.fromkeys(["", *keep])))
        start = run.once("kept states", lambda: {"before": _states(text, ids)})["before"]

        def drift(model: Pipeline, batch: Batch) -> Tensor:
            moved = model.text_states(ids) - start.to(ids.device)
            return moved.square().mean()

        def loss(found: Tensor, batch: Batch) -> Tensor:
            return found.expand(len(batch["index"]))

        return [Term("kept", forget, loss, "example", self.keep_weight, cast(Any, drift))]


def _filled(words: Sequence[str], templates: Sequence[str]) -> list[str]:
    return [template.replace("{}", word) for word in words for template in templates]


def _states(model: Pipeline, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.text_states(ids)
