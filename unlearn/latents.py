"""Fixed noisy pictures with what a diffusion model said about them before it forgot.

Methods that lead a model away from a concept ask it about noisy pictures x_t. Sampling a
trajectory for every step costs nine tenths of such a run, so pictures x_0 are generated once (or
come from a forget set) and noised again, a few times each. What the starting model predicts there
is computed once too: there is no second live model, and an interrupted run goes on with the same
values. A bank of these is a set like any other: batches are drawn from it, epochs pass over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unlearn.data import parse_ids
from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Classes, Concepts, Request, Subject, Target
from unlearn.noising import to_eps
from unlearn.pipeline import Pipeline
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import Batch, Encoded, Task, evaluating
from unlearn.training import Term, Training, descend

SETS = {"x": "attn2", "x-strict": r"attn2\.to_[kv]\.", "u": "^(?!.*attn2)", "all": "all"}


class Bank(Encoded):
    """Tensors, row by row, as a set that batches are drawn from.

    Args:
        name: ``retain`` for what is held, which surgery protects; anything for the rest.
        told: what the network may be told, shape (conditions, ...); on the model's device.
        columns: of equal length; ``told`` among them holds positions in that table.
    """

    def __init__(self, name: str, told: Tensor, columns: dict[str, Tensor]) -> None:
        self.name, self.table, self.columns = name, told, columns

    def __len__(self) -> int:
        return len(self.columns["told"])

    def __getitem__(self, index: Any) -> Any:
        return {"units": 1, "length": 1, **{k: v[index] for k, v in self.columns.items()}}

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """The rows at ``indices``."""
        chosen = torch.as_tensor(indices)
        found = {**{k: v[chosen] for k, v in self.columns.items()}, "index": chosen}
        return {key: value.to(device) for key, value in found.items()}

    def select(self, indices: Sequence[int], name: str | None = None) -> Bank:
        """The rows at ``indices``."""
        chosen = torch.as_tensor(indices)
        return Bank(name or self.name, self.table, {k: v[chosen] for k, v in self.columns.items()})

    def eps(self, model: nn.Module, batch: Batch) -> Tensor:
        """The noise a model, or one beneath adapters, now predicts for a batch of this bank."""
        own, x_t, t = beneath(model), batch["x_t"], batch["t"]
        return to_eps(model(x_t, t, self.table[batch["told"]]), x_t, own.abars[t], own.kind)


def beneath(model: nn.Module) -> Pipeline:
    """The pipeline itself, without adapters.

    Raises:
        Unsupported: it is none.
    """
    inner = getattr(model, "get_base_model", lambda: model)()
    if not isinstance(inner, Pipeline):
        raise Unsupported(f"{type(model).__name__} is not a diffusion pipeline")
    return inner


def matched(bank: Bank, weight: float = 1.0) -> Term:
    """Mean over pixels (eps(x_t, t, told) - aim)^2, as a term over a bank with a column ``aim``."""

    def loss(found: Tensor, batch: Batch) -> Tensor:
        return (found - batch["aim"]).square().flatten(1).mean(1)

    return Term(bank.name, bank, loss, "example", weight, bank.eps)


def generated(
    model: Pipeline, wanted: Sequence[Any], count: int, run: Run, name: str, *,
    steps: int = 20, guidance: float = 3.0, at_once: int = 16,
) -> Tensor:  # fmt: skip
    """Pictures x_0 of every one of ``wanted`` in turn, as they are denoised, in main memory.

    Made once: an interrupted run reads them back.

    Args:
        model: to sample from.
        wanted: prompts or class indices.
        count: of pictures.
        run: its seed and ``name`` decide the starting noise.
        name: of this use.
        steps: of sampling, a network call each.
        guidance: weight of the condition; 1: none.
        at_once: pictures of one network call.

    Returns:
        Shape (count, channels, height, width), of latents where there is an autoencoder.
    """
    rows, draw = [wanted[i % len(wanted)] for i in range(count)], run.generator(f"latents {name}")

    def compute() -> dict[str, Tensor]:
        parts = []
        for start in range(0, count, at_once):
            some = rows[start : start + at_once]
            parts.append(model.sample(some, draw, steps, guidance, decode=False).cpu())
            run.progress.advance(f"pictures for {name}", start + len(some), count, {})
        return {"x_0": torch.cat(parts)}

    with evaluating(model):
        return run.once(f"latents_{name}", compute)["x_0"].cpu()


def renoised(
    x_0: Tensor, draws: int, model: Pipeline, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Every picture noised ``draws`` times, once in each ``draws``-th of the times.

    Returns:
        x_t, shape (pictures * draws, c, h, w), rows of a picture together, and t, (rows,).
    """
    place = (torch.arange(draws) + torch.rand(len(x_0), draws, generator=draw)) / draws
    t = (place * len(model.abars)).long().flatten()
    x_0 = x_0.repeat_interleave(draws, 0)
    eps = torch.randn(x_0.shape, generator=draw).to(x_0)
    x_t = model.noised(x_0.to(model.device), eps.to(model.device), t.to(model.device))
    return x_t.cpu(), t


Moved = Annotated[
    Literal["x", "x-strict", "u", "all"],
    Field(
        description="what moves with scope all: cross-attention (x), its keys and values "
        "(x-strict), everything else (u), all; networks without cross-attention move as a whole"
    ),
]


@dataclass(frozen=True, kw_only=True)
class Renoised(Training):
    """Hyperparameters of methods that train on noised pictures of what a target names."""

    epochs: Annotated[
        float, Field(gt=0, description="passes over the noisy pictures"), Range(0.5, 10.0, log=True)
    ] = 2
    batch_size: Annotated[int, Field(ge=1, description="noisy pictures per step and term")] = 16
    pictures: Annotated[int, Field(ge=1, description="generated for a term, before training")] = 64
    draws: Annotated[int, Field(ge=1, description="times every picture is noised")] = 8
    sampling_steps: Annotated[int, Field(ge=1, description="of generating a picture")] = 20
    guidance: Annotated[
        float, Field(ge=0, description="weight of the condition in generating; 1: none")
    ] = 3.0
    contexts: Annotated[
        str,
        Field(
            description="captions in which prompts take the place of {}, between | or '@file', one "
            "a line: 'a photo of {}|{} on a table'; {}: prompts as they are"
        ),
    ] = "{}"
    parameters: Moved = "x"
    retain_weight: Annotated[
        float,
        Field(ge=0, description="weight of what the starting model said about what stays"),
        Range(0.1, 10.0, log=True),
    ] = 1.0

    def trained(self, forget: int, retain: int) -> int:
        """Rows that go through forward and backward."""
        rows = self.steps(self.pictures * self.draws) * self.batch_size
        return rows * (2 if self.retain_weight else 1)

    def check(self, request: Request) -> None:
        """Refuse what would fail after loading."""
        for context in self._contexts():
            if "{}" not in context:
                raise BadInput(f"the context {context!r} has no {{}} for a prompt to stand in")

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Descend on the terms, over the parameters that are to move.

        Raises:
            BadInput: a request that :meth:`check` refuses.
            Unsupported: under FSDP.
        """
        settings = self.prepared(subject.model, request, run)
        return descend(subject, self.terms(subject, request, run), settings, run)

    def prepared(self, model: nn.Module, request: Request, run: Run) -> Training:
        """The same settings with the scope that ``parameters`` stands for, if all is well."""
        self.check(request)
        if run.sharded:
            raise Unsupported("this method trains on pictures of its own: launch without FSDP")
        if self.scope != "all":
            return self
        crossed = any("attn2" in name for name, _ in model.named_parameters())
        return replace(self, scope=SETS[self.parameters] if crossed else "all")

    def within(self, prompts: Sequence[Any]) -> list[Any]:
        """Every prompt in every context, all of a context together; class indices as they are."""
        if not all(isinstance(prompt, str) for prompt in prompts):
            return list(prompts)
        return [c.replace("{}", str(prompt)) for c in self._contexts() for prompt in prompts]

    def _contexts(self) -> list[str]:
        given = self.contexts
        return parse_ids(given) if given.startswith("@") else [c.strip() for c in given.split("|")]

    def bank(
        self, model: Pipeline, name: str, shown: Sequence[Any], told: Sequence[Any] | Tensor,
        aim: Callable[[Callable[[Tensor], Tensor]], Tensor], run: Run, x_0: Tensor | None = None,
    ) -> Bank:  # fmt: skip
        """Noisy pictures, what the network is told about them, and what it should say.

        Args:
            model: as it starts.
            name: of the bank; ``retain`` for what is held.
            shown: prompts or classes that pictures are generated of, in turn.
            told: about a picture of each of them; prompts, classes or token ids, as many.
            aim: makes the column ``aim`` from what the starting model says. It is given a
                function: what is told instead, (told, ...) -> predicted noise, shape of x_t.
            run: keeps the values of interrupted runs.
            x_0: pictures that take the place of generated ones, one of each.
        """
        table = conditions(model, told)

        def compute() -> dict[str, Tensor]:
            pictures = x_0
            if pictures is None:
                pictures = generated(
                    model, shown, self.pictures, run, name, steps=self.sampling_steps,
                    guidance=self.guidance, at_once=self.micro_batch_size,
                )  # fmt: skip
            x_t, t = renoised(pictures, self.draws, model, run.generator(f"noise {name}"))
            which = torch.arange(len(pictures)).repeat_interleave(self.draws) % len(told)

            def said(instead: Tensor) -> Tensor:
                parts = []
                for rows in torch.split(torch.arange(len(t)), self.micro_batch_size):
                    own = instead[which[rows].to(instead.device)]
                    x, times = x_t[rows].to(model.device), t[rows].to(model.device)
                    parts.append(model.eps(x, times, own).cpu())
                    done = int(rows[-1]) + 1
                    run.progress.advance(f"reference for {name}", done, len(t), {})
                return torch.cat(parts)

            return {"x_t": x_t, "t": t, "told": which, "aim": aim(said)}

        with evaluating(model):
            columns = run.once(f"bank_{name}", compute)
        return Bank(name, table, {key: value.cpu() for key, value in columns.items()})

    def held(self, model: Pipeline, kept: Sequence[Any], run: Run) -> list[Term]:
        """What the starting model said about what stays, and when told nothing.

        Args:
            model: as it starts.
            kept: prompts or classes that stay.
            run: keeps the values of interrupted runs.
        """
        if not self.retain_weight:
            return []
        nothing = "" if model.text_encoder is not None else model.null_class
        every = [*self.within(kept), *([] if nothing is None else [nothing])]
        if not every:
            return []
        table = conditions(model, every)
        bank = self.bank(model, "retain", every, every, lambda said: said(table), run)
        return [matched(bank, self.retain_weight)]


def conditions(model: Pipeline, wanted: Sequence[Any] | Tensor) -> Tensor:
    """What the denoiser is told, a row each.

    Raises:
        Unsupported: it is told nothing.
    """
    with torch.no_grad():
        found = model.condition(wanted)
    if found is None:
        raise Unsupported("this pipeline is not conditioned on classes or prompts")
    return found


def named(target: Target) -> list[Any]:
    """The prompts or class indices that must go."""
    if isinstance(target, Classes):
        return list(target.indices)
    return list(target.prompts) if isinstance(target, Concepts) else []


def neighbours(target: Target, task: Task) -> list[Any]:
    """The prompts to keep, the anchor among them, or all other classes of the task."""
    if isinstance(target, Classes):
        return [i for i in range(task.classes) if i not in target.indices]
    if not isinstance(target, Concepts):
        return []
    return list(dict.fromkeys([*([target.anchor] if target.anchor else []), *target.keep]))


def need_anchor(target: Target) -> None:
    """Refuse prompts without an anchor.

    Raises:
        BadInput: it is missing.
    """
    if isinstance(target, Concepts) and not target.anchor:
        raise BadInput("name what the concept turns into, such as its kind: pass --anchor")


def anchor_of(target: Target, task: Task) -> Any:
    """The prompt or class that takes the place of what must go.

    For classes that name none, it is the next that stays.

    Raises:
        BadInput: prompts that name none, or no class is left.
    """
    need_anchor(target)
    if not isinstance(target, Classes):
        return target.anchor if isinstance(target, Concepts) else None
    if target.anchor is not None:
        return target.anchor
    following = [(target.indices[-1] + shift) % task.classes for shift in range(1, task.classes)]
    left = [i for i in following if i not in target.indices]
    if not left:
        raise BadInput("every class is to be forgotten: none is left to turn into")
    return left[0]
