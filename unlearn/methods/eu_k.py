"""EU-k: retrain the last k blocks on the retain set (Goel et al. 2022, arXiv 2201.06640).

    theta_last = fresh;  min over the last k blocks and what follows  mean NLL(retain)

"Exact unlearning" of deep layers alone: they are drawn anew, as retrain draws them all, and know
nothing; everything in front of them stays bit-identical, batch statistics included, and may still
carry what the forget set taught. With k up to the number of blocks; blocks are those of cf_k. An
output layer that shares its weights with the input stays with the input. The authors give it the
whole schedule of the original training; defaults are those of retrain. Cost: as retrain, with
gradients of fewer weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from unlearn.errors import BadInput
from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.scope import last_blocks
from unlearn.training import Term, Training, descend, likelihood


@dataclass(frozen=True, kw_only=True)
class EUk(Training):
    """Train the deepest layers again, without the forgotten data."""

    k: Annotated[
        int, Field(ge=1, description="blocks drawn anew, counted from the output"), Range(1, 3)
    ] = 1
    scope: Annotated[str, Field(description="must stay all: k decides what may move")] = "all"
    lr: Annotated[
        float, Field(gt=0, description="peak learning rate"), Range(1e-4, 1e-2, log=True)
    ] = 1e-3
    epochs: Annotated[
        float, Field(gt=0, description="passes over the retain set"), Range(0.1, 40.0, log=True)
    ] = 20

    needs: ClassVar[Needs] = Needs(forget=Need.NO, retain=Need.REQUIRED)

    def check(self, request: Request) -> None:
        """Refuse a scope of the user's.

        Raises:
            BadInput: a scope was given.
        """
        if self.scope != "all":
            raise BadInput("eu_k draws the last k blocks anew: leave scope out, or use retrain")

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Renew the last blocks, then train them on the retain set in train mode.

        Raises:
            BadInput: the model has fewer than k blocks, or no way to draw weights anew is known.
            Unsupported: it has no blocks.
        """
        last = last_blocks(subject.model, run.task, self.k)
        _renew(subject.model, last, run)
        named = dict(subject.model.named_parameters())
        scope = " ".join(f"^{re.escape(name)}$" for name in last if name in named)
        term = Term("retain", request.retain_set(), likelihood, "unit")
        return descend(subject, [term], replace(self, scope=scope), run, dropout=True)

    def trained(self, forget: int, retain: int) -> int:
        """Every epoch is over the retain set."""
        return self.steps(retain) * min(self.batch_size, retain)


def _renew(model: torch.nn.Module, names: list[str], run: Run) -> None:
    """Draw these parameters and buffers as retraining would."""
    with torch.random.fork_rng():
        torch.manual_seed(run.seed_of("initial weights"))
        fresh = run.initial_model(None)
    drawn = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
    ours = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name in names:
            ours[name].copy_(drawn[name])
