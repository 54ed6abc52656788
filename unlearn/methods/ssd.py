"""Selective Synaptic Dampening (Foster, Schoepf & Brintrup, AAAI 2024, arXiv 2308.07707).

With I_S = mean over the examples of S of the squared gradient of the example's NLL, per parameter:

    where I_forget > alpha * I_all:   theta <- theta * min(lambda * I_all / I_forget, 1)

No training, no learning rate. The estimator is exact: one gradient per example, squared, from one
forward and one backward per batch (``unlearn/importance.py``). The authors' code squares the
gradient of a batch mean instead, which depends on the order of the data; ``estimator="compat"``
reproduces it.

Exact importances obey I_all >= (n_forget / n_all) I_forget, so no ratio I_forget / I_all exceeds
n_all / n_forget, and a fixed alpha above that does nothing. By default alpha is therefore the
p-th percentile of the finite ratios, with p = 100 - ln(1 + 100 n_forget / n_all) (ASSD, Schoepf et
al. 2024, arXiv 2402.10098; its code measures I_all on the retain set, in train mode).

A diffusion model's loss is a mean over draws of time and noise. Each draw counts as an example of
its own: the squares are those of single draws, whose expectation is the Fisher information.

``importance="output"`` needs no labels (LFSSD, Foster et al. 2024, arXiv 2402.19308): gradients are
those of |f(x)|^2, the squared length of the logits, added up over an answer's tokens. The paper
averages absolute gradients, so that its ratios, and the alpha they are compared with, are of first
order. I_S is therefore the root of the mean of the squares here, and with ``compat`` the authors'
mean of absolute batch gradients. The cap on the ratio becomes sqrt(n_all / n_forget).

The sums behind I_all are kept as state, with the forget set's share subtracted: exactly the sums
over the data that remain, at the weights they were measured at. The next request reads its forget
set alone. Since dampening has moved the weights by then, its share is measured at other weights
than the kept sums: they are raised to it where they are smaller, and never fall below zero.
``prepare`` takes the sums before any request. The first request from then on gives, bit for bit,
the weights of one that measures them itself, since that prepares them first: batches go by the
records' content, whatever set they are in, and what is kept has the weights' own precision.

Cost: one forward and backward over forget and retain set and once more over the forget set; later
requests, and the first after ``prepare``: over the forget set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from unlearn.data import record_hashes
from unlearn.errors import BadInput
from unlearn.importance import squared_gradients
from unlearn.interface import ALL_TASKS, WITH_LOGITS, Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.tasks.base import IGNORED, Batch, Encoded, Predictions

Importances = dict[str, Tensor]
PREFIX, COUNT, KIND = "ssd.", "ssd.count", "ssd.importance"


def output_size(predictions: Predictions, units: Tensor) -> Tensor:
    """|f(x)|^2: the squared length of the logits of each example, added up over its units.

    Args:
        predictions: of the batch; labels are not looked at.
        units: how many units each example has, shape (batch,).

    Returns:
        Shape (batch,).
    """
    places = torch.arange(predictions.labels.shape[1], device=units.device)
    everywhere = torch.where(places < units[:, None], 0, IGNORED)
    said = replace(predictions, labels=everywhere)
    return said.each(lambda logits, _: logits.square().sum(-1)).sum(1)


@dataclass(frozen=True, kw_only=True)
class SSD:
    """Dampen the weights that matter far more to the forget set than to all data."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    alpha: Annotated[
        float | None,
        Field(gt=0, description="fixed selection threshold on the ratio; none: by percentile"),
    ] = None
    percentile: Annotated[
        float | None,
        Field(
            ge=0, le=100,
            description="percentile of the ratios that alpha is; none: 100 - ln(1 + 100 n_f/n)",
        ), Range(50.0, 99.9),
    ] = None  # fmt: skip
    dampening: Annotated[
        float,
        Field(gt=0, description="lambda: how far selected weights are kept"),
        Range(0.1, 10.0, log=True),
    ] = 1.0
    importance: Annotated[
        Literal["loss", "output"],
        Field(
            description="gradients of the loss, or of the squared length of the output, which "
            "need no labels"
        ),
    ] = "loss"
    estimator: Annotated[
        Literal["exact", "compat"],
        Field(
            description="exact: squares per example; compat: squared batch means in data order, "
            "retain then forget, as in the authors' code"
        ),
    ] = "exact"
    batch_size: Annotated[
        int,
        Field(
            ge=1,
            description="examples per pass; changes the result only with compat (the authors: 64)",
        ),
    ] = 256

    @property
    def needs(self) -> Needs:
        """All data, or what was kept of them; labels for the loss alone."""
        return Needs(
            retain=Need.OPTIONAL,
            state=Need.OPTIONAL,
            labels=Need.REQUIRED if self.importance == "loss" else Need.NO,
            tasks=ALL_TASKS if self.importance == "loss" else WITH_LOGITS,
            either=("retain", "state"),
        )

    def prepare(self, subject: Subject, examples: Encoded, run: Run) -> Subject:
        """Measure all data before any request, which will then read its forget set alone.

        Args:
            subject: whose model is measured; its weights stay as they are.
            examples: everything the model was trained on.
            run: task, device and progress.

        Returns:
            The same model with the sums as its state.

        Raises:
            BadInput: estimator compat, whose importances depend on the request.
        """
        if self.estimator == "compat":
            raise BadInput("estimator compat keeps no state: prepare with estimator exact")
        return self._measured(subject, [examples], run)

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Measure, select, dampen; keep the sums over what remains."""
        if self.estimator == "compat":
            return self._unlearn_as_authors(subject, request, run)
        forget = request.forget_set()
        subject = self._with_sums(subject, request, run)
        count, n_forget = int(subject.note[COUNT]), len(forget)
        on_forget = self._exact(subject.model, [forget], run, "forget")
        kept = {
            name.removeprefix(PREFIX): value.to(run.device, torch.float64)
            for name, value in subject.state.items()
            if name.startswith(PREFIX)
        }
        if {n: v.shape for n, v in kept.items()} != {n: v.shape for n, v in on_forget.items()}:
            raise BadInput(
                "the kept importances belong to another architecture: use the checkpoint they "
                "were kept with, or this one without them"
            )
        # kept sums may be those of earlier weights: what the forget set weighs now is a floor
        on_all = {name: torch.maximum(value, on_forget[name]) for name, value in kept.items()}
        self._dampen(
            subject.model, self._means(on_forget, n_forget), self._means(on_all, count),
            n_forget, count, run,
        )  # fmt: skip
        rest = {name: on_all[name] - on_forget[name] for name in on_all}
        return self._keeping(subject, rest, count - n_forget)

    def trained(self, forget: int, retain: int) -> int:
        """Every example is seen forward and backward, those to forget twice."""
        return 2 * forget + retain

    def _with_sums(self, subject: Subject, request: Request, run: Run) -> Subject:
        """The subject with the sums of all data, kept ones where they serve this request."""
        forget, kind = request.forget_set(), subject.note.get(KIND, "loss")
        if COUNT not in subject.note or (kind != self.importance and request.retain is not None):
            return self._measured(subject, [request.retain_set(), forget], run)
        if kind != self.importance:
            raise BadInput(
                f"the kept importances are gradients of the {kind}, and importance "
                f"{self.importance} cannot be compared with them: set importance to {kind}, or "
                "pass --retain to measure again"
            )
        count = int(subject.note[COUNT])
        if count <= len(forget):
            raise BadInput(
                f"the kept importances cover {count} records and {len(forget)} are to be "
                "forgotten: nothing would remain"
            )
        run.note(
            f"Importances of all {count:,} remaining training records were kept by an earlier "
            "run; only the forget set was read."
        )
        return subject

    def _measured(self, subject: Subject, sets: Sequence[Encoded], run: Run) -> Subject:
        sums = self._exact(subject.model, sets, run, "all")
        return self._keeping(subject, sums, sum(map(len, sets)))

    def _keeping(self, subject: Subject, sums: Importances, count: int) -> Subject:
        weights = dict(subject.model.named_parameters())
        state = {PREFIX + n: value.to(weights[n].dtype) for n, value in sums.items()}
        return subject.with_state(state, {COUNT: str(count), KIND: self.importance})

    def _means(self, sums: Importances, count: int) -> Importances:
        """From sums of squares to the importances that are compared."""
        power = 1.0 if self.importance == "loss" else 0.5
        return {name: (value / count) ** power for name, value in sums.items()}

    def _unlearn_as_authors(self, subject: Subject, request: Request, run: Run) -> Subject:
        forget, retain = request.forget_set(), request.retain
        if retain is None:
            raise BadInput("estimator compat keeps no state: pass --retain")
        on_forget = self._compat(subject.model, [forget], run, "forget")
        on_all = self._compat(subject.model, [retain, forget], run, "all")
        count = len(retain) + len(forget)
        self._dampen(subject.model, on_forget, on_all, len(forget), count, run)
        return subject.with_state({}, {})

    def _dampen(
        self,
        model: nn.Module,
        on_forget: Importances,
        on_all: Importances,
        n_forget: int,
        n_all: int,
        run: Run,
    ) -> None:
        parameters = dict(model.named_parameters())
        alpha = self._alpha(on_forget, on_all, n_forget, n_all, run)
        selected = dampen(parameters, on_forget, on_all, alpha, self.dampening)
        total = sum(p.numel() for p in parameters.values())
        run.note(f"{selected:,} of {total:,} weights ({selected / total:.2%}) were dampened.")

    def _loss(self, predictions: Predictions, batch: Batch) -> Tensor:
        """What importances are gradients of, per example, shape (batch,)."""
        if self.importance == "output":
            return output_size(predictions, batch["units"])
        return predictions.nll()

    def _batches(self, rows: Sequence[tuple[Encoded, int]], run: Run, name: str) -> Iterator[Batch]:
        """Examples of several sets in this order, with progress."""
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            batch = run.task.collate([examples[i] for examples, i in part])
            yield {key: value.to(run.device) for key, value in batch.items()}
            run.progress.advance(f"importances of {name}", start + len(part), len(rows), {})

    def _exact(self, model: nn.Module, sets: Sequence[Encoded], run: Run, name: str) -> Importances:
        """Sum over examples of squared gradients, per parameter, float64.

        Lengths and contents decide the order, so how records are split over sets does not matter.
        """
        parameters = dict(model.named_parameters())

        def losses(batch: Batch) -> Tensor:
            return self._loss(run.task.predictions(model, batch, dense=True), batch)

        def compute() -> Importances:
            rows = sorted(
                (int(examples[i]["length"]), key, number, i)
                for number, examples in enumerate(sets)
                for i, key in enumerate(record_hashes(examples.examples, examples.task.content))
            )
            order = [(sets[number], i) for _, _, number, i in rows]
            sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
            for whole in self._batches(order, run, name):
                for batch in run.task.singly(whole):
                    found = squared_gradients(model, partial(losses, batch), parameters)
                    for key, value in found.items():
                        sums[key] += value
            return sums

        model.eval()
        return run.once(f"importances_{name}", compute)

    def _compat(
        self, model: nn.Module, sets: Sequence[Encoded], run: Run, name: str
    ) -> Importances:
        """Mean over batches of what a batch mean's gradient gives, data in their own order."""
        parameters = dict(model.named_parameters())
        sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
        model.eval()
        order = [(examples, i) for examples in sets for i in range(len(examples))]
        count = -(-len(order) // self.batch_size)
        for batch in self._batches(order, run, name):
            loss = self._loss(run.task.predictions(model, batch), batch).sum()
            found = torch.autograd.grad(
                loss / batch["units"].sum(), list(parameters.values()), allow_unused=True
            )
            for key, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    size = gradient.double().abs()
                    sums[key] += (size if self.importance == "output" else size.square()) / count
        return sums

    def _alpha(
        self,
        on_forget: Mapping[str, Tensor],
        on_all: Mapping[str, Tensor],
        n_forget: int,
        n_all: int,
        run: Run,
    ) -> float:
        if self.alpha is not None:
            squares = self.importance == "loss"
            cap = n_all / n_forget if squares else (n_all / n_forget) ** 0.5
            if self.estimator == "exact" and self.alpha >= cap:
                run.note(
                    f"Warning: alpha {self.alpha:g} does nothing: with exact importances no ratio "
                    f"exceeds {'' if squares else 'the root of '}n_all / n_forget = {cap:.3g}."
                )
            return self.alpha
        percentile = self.percentile
        reason = "as asked"
        if percentile is None:
            percentile = max(0.0, 100 - float(np.log1p(100 * n_forget / n_all)))
            reason = f"100 - ln(1 + 100 * {n_forget}/{n_all})"
        alpha = ratio_percentile(on_forget, on_all, percentile)
        run.note(
            f"alpha = {alpha:.4g}, the {percentile:.2f}th percentile of the importance ratios "
            f"({reason})."
        )
        return alpha


def ratio_percentile(
    on_forget: Mapping[str, Tensor], on_all: Mapping[str, Tensor], percentile: float
) -> float:
    """The percentile of the finite ratios I_forget / I_all over all parameters."""
    ratios = torch.cat([(on_forget[n] / on_all[n]).flatten() for n in on_all])
    ratios = ratios[torch.isfinite(ratios)]
    if len(ratios) == 0:
        raise BadInput("no weight has any influence on the loss: the importances are all zero")
    rank = min(len(ratios), max(1, round(percentile / 100 * len(ratios))))
    return float(ratios.kthvalue(rank).values)


@torch.no_grad()
def dampen(
    parameters: Mapping[str, nn.Parameter],
    on_forget: Mapping[str, Tensor],
    on_all: Mapping[str, Tensor],
    alpha: float,
    dampening: float,
) -> int:
    """Scale the selected weights in place (eqs. 8 and 9 of the paper).

    Args:
        parameters: by name.
        on_forget: mean squared gradients over the forget set.
        on_all: the same over all data.
        alpha: a weight is selected when on_forget > alpha * on_all (strictly).
        dampening: lambda; factors above 1 are cut to 1.

    Returns:
        How many weights were selected.
    """
    selected = 0
    for name, parameter in parameters.items():
        chosen = on_forget[name] > alpha * on_all[name]
        factor = (dampening * on_all[name] / on_forget[name]).clamp_max(1.0)
        parameter.mul_(torch.where(chosen, factor, 1.0).to(parameter.dtype))
        selected += int(chosen.sum())
    return selected
