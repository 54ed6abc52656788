"""Representation misdirection for unlearning, RMU (Li et al. 2024, WMDP, arXiv 2403.03218, sec. 4).

    L = mean |h(x_f) - c u|^2 / d  +  retain_weight * mean |h(x_r) - h_ref(x_r)|^2 / d

where h is what one block puts out at one token, of dimension d; h_ref the same before training;
u a direction drawn once; and both means are over all tokens of the batch. Forgotten text is led to
a state in which later blocks find nothing; other text keeps the states it had.

u is uniform in [0, 1)^d, then normalised, as in the authors' code: it is not isotropic, all its
entries are positive. The paper fixes c = 6.5 and retain_weight = 1200 for one model; as the size
of hidden states differs by orders of magnitude between models, c is here a multiple of the median
norm they have on the forget set (the median, because the first token of many models has a norm
hundreds of times that of others). The paper counts every token, padding included. Here it is the
states from which answer tokens are predicted: forget and retain prompts share their templates, and
one state cannot go and stay; records of plain text have no prompt, so all their tokens count.

As in the authors' code, one weight moves in the chosen block and the two before it, the output
projection of the MLP. Nothing after the chosen block is computed. Cost: a third of the model
forward, three blocks backward; h_ref is computed once for the retain examples that will be used
and kept in main memory (tokens x d numbers). Not for classifiers: examples sent to one common
state are as easy to name as before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import IGNORED, Batch, Encoded, Task, evaluating
from unlearn.tasks.causal_lm import states_at
from unlearn.training import Term, Training, schedule

Compat = Literal["none", "broadcast"]


def rmu_terms(states: Tensor, target: Tensor, mask: Tensor, compat: Compat = "none") -> Tensor:
    """What each example adds to the loss, shape (batch,); arguments as for :func:`rmu_loss`.

    A sum over its positions; with ``compat="broadcast"`` that sum divided by every example's
    number of positions in turn, and averaged.
    """
    apart: Tensor = (states - target).square().mean(-1)
    sums: Tensor = apart.masked_fill(~mask, 0.0).sum(1)
    if compat == "none":
        return sums
    return sums.mul(mask.sum(1).to(sums).reciprocal().mean())


def rmu_loss(states: Tensor, target: Tensor, mask: Tensor, compat: Compat = "none") -> Tensor:
    """Mean squared distance per dimension between hidden states and where they should be.

    Args:
        states: hidden states, shape (batch, positions, d).
        target: the same shape, or (d,) for one target everywhere.
        mask: which positions are real, shape (batch, positions).
        compat: none: a mean over all real positions of the batch. broadcast: the mean that
            open-unlearning's code takes, over all pairs of one example's sum and another's length.

    >>> states = torch.tensor([[[1.0, 3.0], [9.0, 9.0]]])
    >>> rmu_loss(states, torch.tensor([1.0, 1.0]), torch.tensor([[True, False]]))
    tensor(2.)
    """
    terms = rmu_terms(states, target, mask, compat)
    mean: Tensor = terms.sum() / mask.sum() if compat == "none" else terms.mean()
    return mean


def control_vector(dim: int, draw: torch.Generator) -> Tensor:
    """A unit vector in the positive orthant, shape (dim,), float64: uniform, then normalised."""
    return F.normalize(torch.rand(dim, generator=draw, dtype=torch.float64), dim=0)


def output_projection(block: nn.Module, width: int) -> str | None:
    """The name of the largest weight matrix of a block with ``width`` outputs; the last of equals.

    In a transformer that is the output projection of the MLP, or of all its experts.
    """
    largest, found = 0, None
    for name, module in block.named_modules():
        outputs = -1 if type(module).__name__ == "Conv1D" else -2  # as in GPT-2: (inputs, outputs)
        for key, parameter in module.named_parameters(name, recurse=False):
            matrix = parameter.ndim > 1 and parameter.shape[outputs] == width
            if matrix and parameter.numel() >= largest:
                largest, found = parameter.numel(), key
    return found


def hidden_states(task: Task, model: nn.Module, batch: Batch, layer: str) -> Tensor:
    """What a block puts out where answer tokens are predicted; nothing after it is computed.

    Args:
        task: of language models.
        model: the network, with or without adapters.
        batch: from :meth:`Encoded.batch`.
        layer: the block's name.

    Returns:
        Shape (batch, units, d).
    """
    inner: nn.Module = getattr(model, "get_base_model", lambda: model)()  # beneath adapters
    handle = inner.get_submodule(layer).register_forward_hook(_stop)
    try:  # compiled blocks do not see hooks that come after them
        with torch.compiler.set_stance("force_eager"):
            task.predictions(model, batch, dense=True)
    except _Reached as reached:
        output = reached.output
    finally:
        handle.remove()
    return states_at(output, batch["positions"])


class _Reached(Exception):
    """Ends a forward pass at the block whose output is wanted."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


def _stop(_: nn.Module, __: object, output: Any) -> None:
    raise _Reached(output[0] if isinstance(output, tuple) else output)


@dataclass(frozen=True, kw_only=True)
class RMU(Training):
    """Lead the hidden states of the forget set astray and hold those of the retain set."""

    layer: Annotated[
        int | None,
        Field(ge=0, description="block whose output is steered, counted from 0; none: a third in"),
    ] = None
    strength: Annotated[
        float,
        Field(gt=0, description="length of the control vector, in median norms of hidden states"),
        Range(0.5, 10.0, log=True),
    ] = 2.0
    coefficient: Annotated[
        float | None,
        Field(gt=0, description="that length itself (c; the paper uses 6.5), instead of strength"),
    ] = None
    retain_weight: Annotated[
        float,
        Field(ge=0, description="weight of the retain term; the paper uses 1200"),
        Range(1.0, 1200.0, log=True),
    ] = 10.0
    positions: Annotated[
        Literal["answer", "all"],
        Field(description="tokens of a record that count: those of its answer, or all (the paper)"),
    ] = "answer"
    compat: Annotated[
        Compat,
        Field(
            description="none: a mean over all tokens of the batch; broadcast: as in "
            "open-unlearning, where it depends on micro_batch_size"
        ),
    ] = "none"
    scope: Annotated[
        str,
        Field(
            description="parameters that may move: all, head, lora, experts, or patterns; "
            "empty: the MLP's output projections of the steered block and the two before it"
        ),
    ] = ""

    @property
    def needs(self) -> Needs:
        """The retain set, unless nothing is retained."""
        retain = Need.REQUIRED if self.retain_weight else Need.NO
        return Needs(retain=retain, tasks=("causal_lm",))

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Descend on the terms; parameters that no gradient reaches stay as they are."""
        if self.scope:
            return super().unlearn(subject, request, run)
        chosen = self._projections(subject.model, request.forget_set(), run)
        run.log("scope", parameters=chosen)
        pattern = f"^({'|'.join(map(re.escape, chosen))})$"
        return replace(self, scope=pattern).unlearn(subject, request, run)

    def terms(self, subject: Subject, request: Request, run: Run) -> list[Term]:
        """Draw the control vector; compute the states to hold."""
        layer, forget = self._blocks(subject.model, run)[-1][0], self._read(request.forget_set())
        control = self._control(subject.model, forget, layer, run)
        per: Literal["example", "unit"] = "unit" if self.compat == "none" else "example"

        def hidden(model: nn.Module, batch: Batch) -> Tensor:
            states = hidden_states(run.task, model, batch, layer)
            if not states.requires_grad:
                raise BadInput(
                    f"scope {self.scope!r} moves nothing up to {layer}, the block that is steered: "
                    "choose earlier parameters or a later layer"
                )
            return states

        def away(states: Tensor, batch: Batch) -> Tensor:
            return rmu_terms(states, control, batch["labels"] != IGNORED, self.compat)

        terms = [Term("forget", forget, away, per, forward=hidden)]
        if not self.retain_weight:
            return terms
        retain = self._read(request.retain_set())
        plan = schedule(self, [len(forget), len(retain)], run)[1]
        start = self._start(subject.model, retain, plan, layer, run)

        def held(states: Tensor, batch: Batch) -> Tensor:
            rows = [start[index] for index in batch["index"].tolist()]
            before = pad_sequence(rows, batch_first=True).to(control)
            return rmu_terms(states, before, batch["labels"] != IGNORED, self.compat)

        return [*terms, Term("retain", retain, held, per, self.retain_weight, hidden)]

    def _blocks(self, model: nn.Module, run: Run) -> list[tuple[str, nn.Module]]:
        """The steered block, last, and up to two before it, with their names."""
        blocks = list(run.task.layers(model).items())
        if not blocks:
            raise Unsupported(f"{type(model).__name__} has no stack of blocks to steer one of")
        layer = len(blocks) // 3 if self.layer is None else self.layer
        if layer >= len(blocks):
            raise BadInput(f"layer {layer} is beyond the model's last block, {len(blocks) - 1}")
        return blocks[max(0, layer - 2) : layer + 1]

    def _projections(self, model: nn.Module, examples: Encoded, run: Run) -> list[str]:
        blocks = self._blocks(model, run)
        with evaluating(model):
            states = hidden_states(run.task, model, examples.batch([0], run.device), blocks[-1][0])
        found = {name: output_projection(block, states.shape[-1]) for name, block in blocks}
        chosen = [f"{name}.{matrix}" for name, matrix in found.items() if matrix]
        if not chosen:
            raise Unsupported(
                f"{type(model).__name__} keeps no weight matrix in its blocks that writes their "
                "output: pass scope"
            )
        return chosen

    def _read(self, examples: Encoded) -> Encoded:
        """The set with the tokens that count as its answers."""
        if self.positions == "answer":
            return examples
        encodings = []
        for i in range(len(examples)):
            tokens = torch.cat((examples[i]["prompt"], examples[i]["answer"]))
            parts = {"prompt": tokens[:1], "answer": tokens[1:], "units": len(tokens) - 1}
            encodings.append({**examples[i], **parts})
        return examples.replaced(encodings)

    def _control(self, model: nn.Module, forget: Encoded, layer: str, run: Run) -> Tensor:
        """The control vector c u, shape (d,), on the run's device."""

        def compute() -> dict[str, Tensor]:
            norms = []
            for indices in run.batches(forget, "reference"):
                batch = forget.batch(indices, run.device)
                states = hidden_states(run.task, model, batch, layer)
                norms.append(states[batch["labels"] != IGNORED].double().norm(dim=-1).cpu())
            median = float(torch.cat(norms).median())
            length = self.coefficient or self.strength * median
            run.log("control vector", layer=layer, median_norm=median, length=length)
            direction = control_vector(states.shape[-1], run.generator("control vector"))
            precision = torch.promote_types(states.dtype, torch.float32)
            return {"control": (length * direction).to(precision)}

        with evaluating(model), self._autocast(run):
            return run.once("rmu_control", compute)["control"].to(run.device)

    def _start(
        self, model: nn.Module, retain: Encoded, plan: list[list[int]], layer: str, run: Run
    ) -> dict[int, Tensor]:
        """The states, (units, d), of every planned example before training, on the CPU."""
        chosen = sorted({index for batch in plan for index in batch})
        part = retain.select(chosen)

        def compute() -> dict[str, Tensor]:
            rows: dict[int, Tensor] = {}
            for indices in run.batches(part, "reference"):
                batch = part.batch(indices, run.device)
                states = hidden_states(run.task, model, batch, layer).cpu()
                for index, row in zip(indices, states, strict=True):
                    rows[index] = row[: int(part[index]["units"])].clone()
            return {"states": torch.cat([rows[i] for i in range(len(part))])}

        with evaluating(model), self._autocast(run):
            states = run.once("rmu_start", compute)["states"].cpu()
        units = [int(retain[index]["units"]) for index in chosen]
        return dict(zip(chosen, torch.split(states, units), strict=True))

    def _autocast(self, run: Run) -> torch.autocast:
        """The precision of training, so that the retain term starts at nothing but rounding."""
        return torch.autocast(run.device.type, torch.bfloat16, enabled=self.precision == "bf16")
