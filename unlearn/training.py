"""The one gradient loop: weighted terms, descended together. Knows no method's name.

A method states *terms*: which examples, which per-example loss, with which weight. Each step
draws a batch per term and runs forward and backward term by term, micro-batch by micro-batch, so
that two graphs are never alive together. A term's loss is the mean over its whole batch (over
examples, or over units: the global token mean), so the result does not depend on how the batch
is cut into micro-batches (in train mode, dropout and batch statistics still do).

With several processes a step is the same step: each takes its share of every batch, and gradients
are added up once before the optimiser moves. With ``run.sharded`` each also keeps only its part of
every weight, gradient and moment while this lasts.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from unlearn import distributed
from unlearn.errors import BadInput, Collapsed, Unsupported
from unlearn.interface import Request, Subject
from unlearn.ranges import Range
from unlearn.scope import SALIENCY, Moving, moving, share_of
from unlearn.surgery import Rule, Surgery
from unlearn.tasks.base import Batch, Encoded, Predictions, evaluating

if TYPE_CHECKING:
    from unlearn.run import Run

Numbers = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every gradient method lets its user choose."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    lr: Annotated[
        float,
        Field(
            gt=0,
            description="peak learning rate; papers use 1e-5 at 7B, small models need more",
        ),
        Range(1e-6, 1e-2, log=True),
    ] = 1e-4
    epochs: Annotated[
        float,
        Field(
            gt=0,
            description="passes over the forget set (finetune, refresh and retrain: over the "
            "retain set)",
        ),
        Range(0.1, 20.0, log=True),
    ] = 6
    batch_size: Annotated[
        int, Field(ge=1, description="examples per step and term, of all processes together")
    ] = 32
    micro_batch_size: Annotated[
        int,
        Field(
            ge=1,
            description="examples per forward pass: costs memory, does not change the mean",
        ),
    ] = 16
    optimizer: Annotated[
        Literal["adamw", "sgd"],
        Field(description="adamw (betas 0.9, 0.999) or sgd with Nesterov momentum 0.9"),
    ] = "adamw"
    weight_decay: Annotated[float, Field(ge=0, description="decoupled (adamw) or L2 (sgd)")] = 0.01
    schedule: Annotated[
        Literal["linear", "cosine", "constant"],
        Field(description="learning rate after the warm-up"),
    ] = "constant"
    warmup: Annotated[
        float,
        Field(ge=0, le=1, description="share of the steps over which the learning rate rises"),
    ] = 0.0
    packing: Annotated[
        bool,
        Field(description="texts of a batch in one row without padding, none seeing another"),
    ] = False
    max_grad_norm: Annotated[
        float, Field(gt=0, description="gradients are clipped to this norm")
    ] = 1.0
    precision: Annotated[
        Literal["fp32", "bf16"], Field(description="bf16: autocast over fp32 master weights")
    ] = "fp32"
    scope: Annotated[
        str,
        Field(
            description="parameters that may move: all, head, lora, lora:PATTERN, saliency:SHARE, "
            "experts, or patterns"
        ),
    ] = "all"
    lora_rank: Annotated[int, Field(ge=1, description="rank of the adapters, with scope lora")] = 8
    lora_alpha: Annotated[
        float, Field(gt=0, description="adapters are scaled by lora_alpha / lora_rank")
    ] = 16
    max_loss: Annotated[
        float,
        Field(
            gt=1,
            description="collapse guard: largest loss per unit, in multiples of guessing",
        ),
    ] = 10.0

    surgery: Annotated[
        Rule,
        Field(
            description="what becomes of a tensor's forget gradient where it conflicts with the "
            "retain gradient: nothing (none), the conflict goes (projection), or what DoCo's code "
            "does (as_published)"
        ),
    ] = "none"
    compile: Annotated[
        bool, Field(description="torch.compile every block: pays on a GPU and for long runs")
    ] = False
    checkpointing: Annotated[
        bool, Field(description="compute activations again in the backward pass, to save memory")
    ] = False

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """The objective; references are computed here, before anything moves."""
        raise NotImplementedError(f"{type(self).__name__} states no terms")

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Descend on the terms."""
        return descend(subject, self.terms(subject, request, run), self, run)

    def joined(self) -> Surgery:
        """How the gradients of what must go and of what is held become one."""
        return Surgery(self.surgery)

    def steps(self, examples: int) -> int:
        """Number of optimiser steps over ``examples``."""
        return max(1, math.ceil(self.epochs * len(_cuts(examples, self.batch_size))))

    def trained(self, forget: int, retain: int) -> int:
        """Examples that go through forward and backward, for the cost estimate."""
        return 2 * self.steps(forget) * min(self.batch_size, forget)


@dataclass(frozen=True)
class Term:
    """One summand of the objective.

    Attributes:
        name: in logs.
        examples: what batches are drawn from.
        loss: (predictions, batch) -> per-example loss, shape (batch,).
        per: the mean is over ``example``s or over all ``unit``s of the batch.
        weight: of the summand; 0 skips its forward pass.
        forward: (model, batch) -> what ``loss`` gets instead of the task's predictions, for
            objectives on something else, such as a hidden layer.
    """

    name: str
    examples: Encoded
    loss: Callable[[Any, Batch], Tensor]
    per: Literal["example", "unit"]
    weight: float = 1.0
    forward: Callable[[nn.Module, Batch], Any] | None = None

    @property
    def held(self) -> bool:
        """Whether it is about what stays; surgery protects that."""
        return self.examples.name == "retain"


def likelihood(predictions: Predictions, batch: Batch) -> Tensor:
    """The negative log-likelihood itself, shape (batch,)."""
    return predictions.nll()


def ascent(predictions: Predictions, batch: Batch) -> Tensor:
    """The negated likelihood: minimising it climbs the loss, shape (batch,)."""
    return -predictions.nll()


def schedule(
    settings: Training, sizes: Sequence[int], run: Run, phase: str = ""
) -> list[list[list[int]]]:
    """Which examples every step uses: ``[term][step] -> indices``; a function of the seed alone.

    Every set is walked in shuffled passes; the first set's size decides the number of steps.
    """
    steps = settings.steps(sizes[0])
    plan = []
    for number, size in enumerate(sizes):
        draw = run.generator(f"schedule/{phase}{number}")
        take = min(settings.batch_size, size)
        passes = _shuffled_batches(size, take, draw)
        plan.append([next(passes) for _ in range(steps)])
    return plan


def _shuffled_batches(size: int, take: int, draw: torch.Generator) -> Iterator[list[int]]:
    while True:
        order = torch.randperm(size, generator=draw).tolist()
        for start, end in _cuts(size, take):
            yield order[start:end]


def _cuts(size: int, take: int) -> list[tuple[int, int]]:
    """One pass in batches; a last example left alone joins the batch before it."""
    starts = list(range(0, size, take))
    if len(starts) > 1 and size - starts[-1] == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], size], strict=True))


def descend(
    subject: Subject,
    terms: Sequence[Term],
    settings: Training,
    run: Run,
    *,
    phase: str = "",
    dropout: bool = False,
    before: Callable[[Moving, Callable[[], Numbers]], None] | None = None,
    reweigh: Callable[[int, list[float], Numbers], list[float]] | None = None,
    after: Callable[[Moving, int, dict[str, Tensor]], None] | None = None,
    memory: dict[str, Tensor] | None = None,
) -> Subject:
    """Minimise the weighted sum of ``terms`` over the parameters in scope, in place.

    Args:
        subject: whose model is trained; already on ``run.device``.
        terms: the objective; the first term's examples define an epoch.
        settings: the hyperparameters.
        run: seed, device, progress, and where to keep unfinished work.
        phase: a word of letters for every one of several descents of one run; a killed run skips
            those that were finished.
        dropout: train in train mode (dropout on, batch statistics updated). Off by default: a
            model that forgets must not renew its statistics on the forget set, and losses are
            compared with references computed without dropout.
        before: called ahead of every step with the parameters that may move and a function that
            computes the gradients of this step's batches; may move the parameters.
        reweigh: (steps done, weights, the step's numbers) -> the weights from now on. Terms of
            weight 0 are then computed, too.
        after: called behind every step with the parameters that may move, the number of steps
            done, and a dictionary of tensors of the caller's, kept with unfinished training.
        memory: that dictionary, for losses that read what an interrupted run kept there.

    Raises:
        Collapsed: a loss or gradient is not finite, or a loss exploded.
        BadInput: surgery, and only one side has a term.
        Unsupported: with ``run.sharded``, ``before`` or ``after``, surgery, or a scope with parts
            of tensors.
    """
    surgery = _surgery(settings, terms, run)
    plan = schedule(settings, [len(term.examples) for term in terms], run, phase)
    masks = _masks(subject, terms, settings, run)
    steps = len(plan[0])
    subject.model.train(dropout)
    with torch.random.fork_rng(), moving(
        subject, run.task, settings.scope, settings.lora_rank, settings.lora_alpha,
        run.seed_of(f"adapters{phase}"), run.adapter, masks,
    ) as whole, _parted(
        whole, terms, settings, run, plain=before is None and after is None
    ) as (moved, apply), _blocks(subject.model, settings, run):  # fmt: skip
        if settings.scope != "all":
            _still(moved)
        parameters = list(moved.parameters.values())
        torch.manual_seed(run.seed_of(f"dropout{phase}") + distributed.rank())
        optimizer = optimizer_for(moved, settings)
        guard = Guard(settings, run)
        weights = [term.weight for term in terms]
        memory = {} if memory is None else memory
        kept = _Kept(run, phase, moved, optimizer, guard, weights, memory, apply.whole)

        def gradients(step: int) -> Numbers:
            if before:  # which may have moved the parameters of this process by its own draws
                distributed.same(parameters)
                moved.settle()
            optimizer.zero_grad()
            numbers: Numbers = {}
            forget: list[Tensor | None] = []
            for side in (False, True) if surgery else (None,):
                for term, batches, weight in zip(terms, plan, weights, strict=True):
                    if (weight or reweigh) and side in (None, term.held):
                        numbers |= _accumulate(apply, term, batches[step], weight, settings, run)
                        guard.check(numbers, term.name, step)
                if apply.whole:
                    distributed.add_gradients(parameters)
                if side is False:
                    forget = [p.grad for p in parameters]
                    optimizer.zero_grad()
            if surgery:
                surgery.operate(parameters, forget)
            return numbers

        started = time.monotonic()
        for step in range(kept.restore(), steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * factor(settings, step, steps)
            if before:
                before(moved, partial(gradients, step))
                distributed.same(parameters)  # it may have drawn random numbers
                moved.settle()
            numbers = gradients(step)
            norm = _clipped(parameters, settings.max_grad_norm)
            if not math.isfinite(norm):
                raise Collapsed(collapse(step, "the gradient is not finite"))
            optimizer.step()
            if after:
                after(moved, step + 1, memory)
            moved.settle()
            if reweigh:
                weights[:] = reweigh(step + 1, weights, numbers)
            rate = optimizer.param_groups[0]["lr"]
            run.log("step", phase=phase, step=step + 1, of=steps, lr=rate, grad_norm=norm,
                    **numbers)  # fmt: skip
            run.progress.advance(f"unlearn {phase}".strip(), step + 1, steps, numbers)
            kept.save(step + 1, final=step + 1 == steps)
        optimizer.zero_grad()
        run.log("trained", steps=steps, seconds=time.monotonic() - started)
    norms = (m for m in subject.model.modules() if isinstance(m, _BatchNorm) and m.training)
    distributed.averaged(b for m in norms for b in m.buffers() if b.is_floating_point())
    subject.model.eval()
    return subject


def _surgery(settings: Training, terms: Sequence[Term], run: Run) -> Surgery | None:
    """The surgery the settings ask for, where there are two sides to it."""
    surgery = settings.joined()
    if surgery.rule == "none" and surgery.adds:
        return None
    if run.sharded:
        raise Unsupported(
            "surgery compares whole gradients, which FSDP keeps apart: launch without FSDP"
        )
    if {term.held for term in terms} != {False, True}:
        raise BadInput(
            "surgery needs losses on the forget set and on the retain set, and this method states "
            "one of them only: choose another retention or method"
        )
    return surgery


def _still(moved: Moving) -> None:
    """Stop the running statistics of every normalisation that is not wholly in scope."""
    for name, module in moved.model.named_modules():
        if isinstance(module, _BatchNorm):
            own = {f"{name}.{n}".removeprefix(".") for n, _ in module.named_parameters()}
            module.train(module.training and bool(own) and own <= moved.parameters.keys())


def _masks(
    subject: Subject, terms: Sequence[Term], settings: Training, run: Run
) -> dict[str, Tensor] | None:
    """Which single weights move, with scope saliency: by the gradient of the true answers."""
    if not settings.scope.startswith(SALIENCY):
        return None
    found = next((term.examples for term in terms if term.examples.name == "forget"), None)
    if found is None:
        raise Unsupported(
            f"scope {settings.scope} needs a method with a loss on the forget set alone"
        )
    from unlearn.gradients import mean_gradient, salient

    named, forget = dict(subject.model.named_parameters()), found.as_read()
    share = share_of(settings.scope)

    def compute() -> dict[str, Tensor]:
        gradient = mean_gradient(subject.model, forget, named, run, settings.micro_batch_size)
        return salient(gradient, share)

    return run.once("saliency", compute)


def _accumulate(
    apply: _Apply,
    term: Term,
    indices: list[int],
    weight: float,
    settings: Training,
    run: Run,
) -> Numbers:
    """Forward and backward of this process's share of one term; gradients add up."""
    examples = term.examples
    units = examples.total_units(indices)
    mean_over = units if term.per == "unit" else len(indices)
    order = sorted(indices, key=lambda i: (int(examples[i]["length"]), i))  # less padding
    loss_sum = nll_sum = 0.0
    # even micro-batches: batch statistics need more than one example
    for piece in distributed.dealt(order, settings.micro_batch_size, equally_often=not apply.whole):
        batch = examples.batch(piece or order[:1], run.device)
        losses, nll = apply(partial(_scored, term, batch, settings, run))
        share = apply.gradients / mean_over if piece else 0.0  # none: only to keep the others going
        (losses.sum() * (weight * share)).backward()
        loss_sum += float(losses.detach().sum()) * bool(piece) / mean_over
        nll_sum += float(nll.sum()) * bool(piece)
    loss_sum, nll_sum = distributed.summed((loss_sum, nll_sum))
    numbers = {f"{term.name}_loss": loss_sum}
    return numbers if term.forward else {**numbers, f"{term.name}_nll": nll_sum / units}


def _scored(
    term: Term, batch: Batch, settings: Training, run: Run, model: nn.Module
) -> tuple[Tensor, Tensor]:
    """Losses of a batch, and its likelihoods where the term is about predictions."""
    if settings.packing:
        batch = run.task.packed(model, batch)
    # the output layer runs inside the loss
    with torch.autocast(run.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        found = (term.forward or run.task.predictions)(model, batch)
        losses = term.loss(found, batch)
        with torch.no_grad():
            nll = losses.detach() if term.forward else found.nll().detach()
    return losses, nll


def _clipped(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale the gradients down to this norm; returns what it was."""
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


@dataclass(frozen=True)
class _Apply:
    """How the model is run.

    Attributes:
        call: runs a function of the model.
        whole: every process holds all of every weight.
        gradients: factor that makes the gradients of all processes add up.
    """

    call: Callable[[Callable[[nn.Module], Any]], Any]
    whole: bool = True
    gradients: float = 1.0

    def __call__(self, work: Callable[[nn.Module], Any]) -> Any:
        return self.call(work)


@contextmanager
def _parted(
    moved: Moving, terms: Sequence[Term], settings: Training, run: Run, *, plain: bool
) -> Iterator[tuple[Moving, _Apply]]:
    """What moves, and how the model is run; under FSDP every process keeps its parts of both."""
    distributed.same(moved.parameters.values())
    if not run.sharded:
        yield moved, _Apply(lambda work: work(moved.model))
        return
    named = dict(moved.model.named_parameters())
    if not plain or not named.keys() >= moved.parameters.keys():
        raise Unsupported(
            "this method or scope moves parts of weights by itself, which FSDP keeps apart: "
            "launch without FSDP"
        )
    run.progress.say("With FSDP unfinished training is not kept: if killed, it starts again.")
    with evaluating(moved.model):  # what tasks look up once, before all must keep in step
        batch = terms[0].examples.batch([0], run.device)
        run.task.predictions(
            moved.model, run.task.packed(moved.model, batch) if settings.packing else batch
        )
    blocks = run.task.layers(moved.model).values()
    bf16 = settings.precision == "bf16"
    with distributed.sharded(moved.model, blocks, run.device, bf16=bf16) as root:
        parts = dict(moved.model.named_parameters())
        yield (
            replace(moved, parameters={name: parts[name] for name in moved.parameters}),
            _Apply(root, whole=False, gradients=distributed.world()),
        )


@contextmanager
def _blocks(model: nn.Module, settings: Training, run: Run) -> Iterator[None]:
    """The blocks of the model compiled, or run again in the backward pass, while this lasts."""
    blocks = list(run.task.layers(model).values())
    if not blocks and (settings.compile or settings.checkpointing):
        raise Unsupported(f"{type(model).__name__} has no blocks to compile or to run again")
    try:
        for block in blocks:
            if settings.checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if settings.compile:
                block.compile()
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
            block._compiled_call_impl = None


class Guard:
    """Stops a run whose model is being destroyed.

    A loss may reach ``max_loss`` times that of guessing, or as many times its first value where
    that is higher (wrong labels start out very unlikely).
    """

    def __init__(self, settings: Training, run: Run) -> None:
        self.settings, self.chance = settings, run.task.chance()
        self.first: dict[str, float] = {}

    def check(self, numbers: dict[str, float], name: str, step: int) -> None:
        """Look at the losses of one term after its forward passes."""
        loss, nll = numbers[f"{name}_loss"], numbers.get(f"{name}_nll", 0.0)
        if not (math.isfinite(loss) and math.isfinite(nll)):
            raise Collapsed(collapse(step, f"the {name} loss is not finite"))
        limit = self.settings.max_loss * max(self.chance, self.first.setdefault(name, nll))
        if nll > limit:
            what = f"the {name} loss reached {nll:.1f} nats per unit, and the limit is {limit:.1f}"
            raise Collapsed(collapse(step, f"{what} (max_loss times that of guessing)"))


def collapse(step: int, what: str) -> str:
    """What is said when training destroyed the model."""
    return (
        f"the model collapsed at step {step + 1}: {what}. Nothing was written; use a smaller lr or "
        "fewer epochs, or a method with a retain term"
    )


def factor(settings: Training, step: int, steps: int) -> float:
    """Learning-rate factor of a 0-based step: linear warm-up, then the schedule."""
    rising = settings.warmup * steps
    if step + 1 < rising:
        return (step + 1) / rising
    left = (steps - step) / max(1.0, steps - rising + 1)
    if settings.schedule == "linear":
        return min(1.0, left)
    if settings.schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * min(1.0, left)))
    return 1.0


def optimizer_for(moved: Moving, settings: Training) -> torch.optim.Optimizer:
    """The optimiser the settings name, over the parameters that may move."""
    parameters = list(moved.parameters.values())
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(parameters, settings.lr, weight_decay=settings.weight_decay)


class _Kept:
    """Unfinished training on disk, so that a killed run goes on to the same weights."""

    def __init__(
        self,
        run: Run,
        phase: str,
        moved: Moving,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        weights: list[float],
        memory: dict[str, Tensor],
        whole: bool,
    ) -> None:
        self.run, self.moved, self.optimizer, self.guard = run, moved, optimizer, guard
        self.weights, self.memory = weights, memory
        self.name = f"training-{phase}-" if phase else "training-"
        self.keeps = run.work is not None and run.resumable and whole
        self.saved = time.monotonic()

    def _tensors(self) -> dict[str, Tensor]:
        buffers = dict(self.moved.model.named_buffers())
        return {**self.moved.parameters, **{f"buffer:{k}": v for k, v in buffers.items()}}

    def save(self, step: int, *, final: bool) -> None:
        """Keep this step if it is the last, or if the last one kept is old enough."""
        if self.run.work is None or not self.keeps or not distributed.is_main():
            return
        if not final and time.monotonic() - self.saved < self.run.save_every:
            return
        new = self.run.work / "training.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        for name, tensors in (("weights", self._tensors()), ("memory", self.memory)):
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()},
                      new / f"{name}.safetensors")  # fmt: skip
        moments = {
            f"{i}.{key}": value.detach().cpu().contiguous()
            for i, slots in self.optimizer.state_dict()["state"].items()
            for key, value in slots.items()
            if isinstance(value, Tensor)
        }
        moments["rng"] = torch.get_rng_state()
        if self.run.device.type == "cuda":
            moments["rng_cuda"] = torch.cuda.get_rng_state(self.run.device)
        save_file(moments, new / "optimizer.safetensors")
        progress = {"step": step, "first": self.guard.first, "weights": self.weights}
        (new / "step.json").write_text(json.dumps(progress))
        new.rename(self.run.work / f"{self.name}{step:09d}")
        for older in self._all()[:-1]:
            shutil.rmtree(older)
        self.saved = time.monotonic()

    def _all(self) -> list[Path]:
        return sorted(self.run.work.glob(f"{self.name}[0-9]*")) if self.run.work else []

    def restore(self) -> int:
        """Go back to the newest step kept; returns the number of steps already done."""
        kept = distributed.on_main(self._all) if self.keeps else []
        if not kept:
            return 0
        weights = distributed.tensors_of_main(kept[-1] / "weights.safetensors")
        with torch.no_grad():
            for name, value in self._tensors().items():
                value.copy_(weights[name])
        self.moved.settle()
        self.memory.update(distributed.tensors_of_main(kept[-1] / "memory.safetensors"))
        moments = distributed.tensors_of_main(kept[-1] / "optimizer.safetensors")
        rng, rng_cuda = moments.pop("rng"), moments.pop("rng_cuda", None)
        if distributed.is_main():  # the others drew numbers of their own
            torch.set_rng_state(rng)
            if rng_cuda is not None:
                torch.cuda.set_rng_state(rng_cuda, self.run.device)
        state: dict[int, dict[str, Any]] = {}
        for name, value in moments.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        full = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**full, "state": state})
        text = distributed.on_main((kept[-1] / "step.json").read_text)
        progress = json.loads(text)
        self.guard.first, self.weights[:] = progress["first"], progress["weights"]
        step: int = progress["step"]
        self.run.log("resumed", step=step)
        return step
