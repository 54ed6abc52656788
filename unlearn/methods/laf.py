"""Label-Agnostic Forgetting, LAF and LAF+R (Shen et al., ICLR 2024, arXiv 2404.00506).

Works on representations h (the input of the output layer) and never reads a label. Two variational
autoencoders learn what h looks like before anything moves, s_vae on the retain set and u_vae on
the forget set. Every iteration then makes two steps, each with an optimiser of its own:

    extraction:  L_UE = mean_retain e(m_s(h)) - mean_forget e(m_u(h)),  e(m) = exp(m / (m+1))
    alignment:   L_RA = mean_retain d - log mean_forget exp(d / temperature)

where m(h) = |vae(h) - h|^2 / dim and d = 1 - cos(h, h_start). The first leads the representations
of forgotten records away from where they were, and keeps the others plausible; the second holds
those of retained records to the starting model's, computed once. The output layer does not move.

With ``repair_epochs`` it is LAF+R: afterwards the output layer alone is trained on those retain
records that carry a label.

Differences from the authors' code, all for the better of the first step, which hardly acts there:
h is standardised by the retain set and the decoder is linear at its end (theirs ends in a sigmoid,
which cannot say what is not between 0 and 1); m is a mean over dimensions, not a sum (the gradient
of e fades with (m+1)^-2); autoencoders draw no noise once they are trained; the model is in eval
mode; s_vae sees the retain set instead of all data. Both losses are means over the batch.

Cost: five forward and three backward passes per forget example, four and two per retain example
beside it, and two small networks on vectors. Kept in main memory: one vector per record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unlearn.errors import BadInput, Collapsed, Unsupported
from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.scope import SALIENCY, Moving
from unlearn.tasks.base import IGNORED, Batch, Encoded, evaluating
from unlearn.training import (
    Term,
    Training,
    collapse,
    descend,
    factor,
    likelihood,
    optimizer_for,
    schedule,
)

KL_WEIGHT = 0.025


class RepresentationVAE(nn.Module):
    """A variational autoencoder of vectors; draws noise in train mode only.

    Args:
        width: dimensions of a vector.
        latent: dimensions of the code.
    """

    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        narrow = max(2 * latent, width // 8)
        middle = max(narrow, width // 2)
        self.encoder = nn.Sequential(
            nn.Linear(width, middle), nn.ReLU(), nn.Linear(middle, narrow), nn.ReLU()
        )
        self.mean, self.log_variance = nn.Linear(narrow, latent), nn.Linear(narrow, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, narrow), nn.ReLU(),
            nn.Linear(narrow, middle), nn.ReLU(),
            nn.Linear(middle, width),
        )  # fmt: skip

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction (batch, width), mean and log-variance of the code (batch, latent)."""
        hidden = self.encoder(vectors)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean
        if self.training:
            code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(code), mean, log_variance


def vae_loss(reconstruction: Tensor, vectors: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Squared error plus 0.025 KL(code || standard normal), mean over the batch, a scalar.

    Args:
        reconstruction: shape (batch, width).
        vectors: the same shape.
        mean: of the code, shape (batch, latent).
        log_variance: of the code, the same shape.
    """
    error = (reconstruction - vectors).square().sum(1)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
    loss: Tensor = (error + KL_WEIGHT * divergence).mean()
    return loss


def extraction_score(reconstruction: Tensor, vectors: Tensor) -> Tensor:
    """exp(m / (m + 1)) with m the mean squared error per dimension, shape (batch,), in [1, e).

    >>> extraction_score(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]))  # exp(1/2)
    tensor([1.6487])
    """
    m = (reconstruction - vectors).square().mean(1)
    score: Tensor = (m / (m + 1)).exp()
    return score


def cosine_distance(vectors: Tensor, start: Tensor) -> Tensor:
    """1 - cos, shape (batch,), of two (batch, width); in [0, 2]."""
    return 1 - F.cosine_similarity(vectors, start, dim=1)


def alignment_loss(retain: Tensor, forget: Tensor, temperature: float) -> Tensor:
    """The mean of d_retain - log mean exp(d_forget / temperature), a scalar.

    Args:
        retain: cosine distances of retained records from where they were, shape (batch,).
        forget: of forgotten ones, any number of them.
        temperature: above 0.
    """
    pushed = torch.logsumexp(forget / temperature, 0) - math.log(len(forget))
    return retain.mean() - pushed


@dataclass(frozen=True, kw_only=True)
class LAF(Training):
    """Lead forgotten representations astray without labels, hold the others where they were."""

    lr: Annotated[
        float,
        Field(gt=0, description="learning rate of the extraction steps"),
        Range(1e-6, 1e-3, log=True),
    ] = 5e-5
    align_lr: Annotated[
        float, Field(gt=0, description="of the alignment steps"), Range(1e-6, 1e-2, log=True)
    ] = 1e-4
    epochs: Annotated[
        float, Field(gt=0, description="passes over the forget set"), Range(0.5, 40.0, log=True)
    ] = 20
    weight_decay: Annotated[float, Field(ge=0, description="of both optimisers")] = 0.0
    temperature: Annotated[
        float,
        Field(gt=0, description="of the forget distances; the paper uses 5 or 20"),
        Range(1.0, 50.0, log=True),
    ] = 20.0
    latent: Annotated[
        int, Field(ge=1, description="code of the autoencoders; the paper uses 8 or 16")
    ] = 16
    vae_steps: Annotated[
        int, Field(ge=1, description="steps each autoencoder trains for (paper: 10 epochs)")
    ] = 500
    vae_lr: Annotated[float, Field(gt=0, description="of their Adam optimisers")] = 1e-3
    repair_epochs: Annotated[
        float,
        Field(ge=0, description="passes of the output layer over labelled retain records; 0: LAF"),
    ] = 0
    repair_lr: Annotated[float, Field(gt=0, description="of the repair")] = 1e-4

    @property
    def needs(self) -> Needs:
        """Both sets; no labels, or those there are for the repair."""
        labels = Need.OPTIONAL if self.repair_epochs else Need.NO
        return Needs(retain=Need.REQUIRED, labels=labels, tasks=("classification",))

    def check(self, request: Request) -> None:
        """Refuse scopes that cannot work."""
        if self.scope == "head":
            raise BadInput("laf moves representations, which the head does not: use another scope")
        if self.scope.startswith(SALIENCY):
            raise Unsupported("scope saliency needs labels, which laf does not read")

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Learn the representations, lead them apart, repair the output layer if asked.

        Raises:
            BadInput: a repair is asked for and no retain record has a label.
            Collapsed: a loss or gradient is not finite.
        """
        self.check(request)
        forget, retain = request.forget_set(), request.retain_set()
        labelled = _labelled(retain) if self.repair_epochs else None
        starts = {e.name: self._representations(subject.model, e, run) for e in (forget, retain)}
        standard = _Standard(starts[retain.name], run.device)
        terms = []
        for examples, weight in ((forget, -1.0), (retain, 1.0)):
            vae = self._autoencoder(standard(starts[examples.name].to(run.device)), examples, run)
            terms.append(self._extraction(examples, weight, vae, standard, run))
        align = _Alignment(self, forget, retain, starts, run)
        subject = descend(subject, terms, self, run, phase=EXTRACT, after=align)
        if labelled is None:
            return subject
        run.note(f"The output layer was repaired on {len(labelled):,} labelled retain records.")
        settings = replace(self, scope="head", epochs=self.repair_epochs, lr=self.repair_lr)
        term = Term("repair", labelled, likelihood, "unit")
        return descend(subject, [term], settings, run, phase="repair")

    def trained(self, forget: int, retain: int) -> int:
        """One pass over everything, two steps on both sets, and the repair."""
        both = super().trained(forget, retain)
        return forget + retain + 2 * both + round(self.repair_epochs * retain)

    def _extraction(
        self, examples: Encoded, weight: float, vae: nn.Module, standard: _Standard, run: Run
    ) -> Term:
        def hidden(model: nn.Module, batch: Batch) -> Tensor:
            return _moved(run.task.features(model, batch), self.scope)

        def score(found: Tensor, _: Batch) -> Tensor:
            vectors = standard(found)
            return extraction_score(vae(vectors)[0].to(vectors.dtype), vectors)

        return Term(examples.name, examples, score, "example", weight, hidden)

    def _representations(self, model: nn.Module, examples: Encoded, run: Run) -> Tensor:
        """What h is of every record before anything moves, (records, width), in main memory."""

        def compute() -> dict[str, Tensor]:
            rows: dict[int, Tensor] = {}
            for indices in run.batches(examples, f"representations of {examples.name}"):
                found = run.task.features(model, examples.batch(indices, run.device))
                rows.update(zip(indices, found.cpu(), strict=True))
            return {"h": torch.stack([rows[i] for i in range(len(examples))])}

        with evaluating(model), self._autocast(run):
            return run.once(f"laf_representations_{examples.name}", compute)["h"].cpu()

    def _autoencoder(self, vectors: Tensor, examples: Encoded, run: Run) -> RepresentationVAE:
        """Trained on these vectors, and frozen."""
        name = f"laf_vae_{examples.name}"
        with torch.random.fork_rng():
            torch.manual_seed(run.seed_of(name))
            vae = RepresentationVAE(vectors.shape[1], self.latent).to(vectors)

            def compute() -> dict[str, Tensor]:
                optimizer = torch.optim.Adam(vae.parameters(), self.vae_lr)
                batches = _batches(len(vectors), self.batch_size, run.generator(name))
                for step in range(self.vae_steps):
                    some = vectors[next(batches).to(vectors.device)]
                    code = vae(some)
                    optimizer.zero_grad()
                    loss = vae_loss(code[0], some, *code[1:])
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    if (step + 1) % 50 == 0 or step + 1 == self.vae_steps:
                        numbers = {"loss": float(loss.detach())}
                        phase = f"autoencoder of {examples.name}"
                        run.progress.advance(phase, step + 1, self.vae_steps, numbers)
                return {key: value.detach() for key, value in vae.state_dict().items()}

            vae.load_state_dict(run.once(name, compute))
        return vae.eval().requires_grad_(False)

    def _autocast(self, run: Run) -> torch.autocast:
        return torch.autocast(run.device.type, torch.bfloat16, enabled=self.precision == "bf16")


EXTRACT = "extract"


class _Standard:
    """Vectors with mean 0 and deviation 1 in every dimension of the retain set.

    One that hardly varies there counts as if it did a tenth as much as others: else the least
    change of it would drown the rest.
    """

    def __init__(self, vectors: Tensor, device: torch.device) -> None:
        vectors = vectors.float() if vectors.dtype is not torch.float64 else vectors
        spread = vectors.std(0, correction=0)
        floor = 0.1 * spread.square().mean().sqrt() + torch.finfo(spread.dtype).tiny
        self.mean, self.spread = vectors.mean(0).to(device), spread.clamp_min(floor).to(device)

    def __call__(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean) / self.spread


class _Alignment:
    """The second optimiser: behind every extraction step, one on L_RA over the same batches."""

    def __init__(
        self, method: LAF, forget: Encoded, retain: Encoded, starts: dict[str, Tensor], run: Run
    ) -> None:
        self.settings = replace(method, lr=method.align_lr)
        self.sets, self.starts, self.run = (forget, retain), starts, run
        self.plan = schedule(method, [len(forget), len(retain)], run, EXTRACT)
        self.optimizer: torch.optim.Optimizer | None = None

    def __call__(self, moved: Moving, done: int, memory: dict[str, Tensor]) -> None:
        moved.settle()
        optimizer = self.optimizer = self.optimizer or self._restored(moved, memory)
        for group in optimizer.param_groups:
            group["lr"] = self.settings.lr * factor(self.settings, done - 1, len(self.plan[0]))
        optimizer.zero_grad()
        loss = self._gradients(moved.model, done - 1)
        norm = nn.utils.clip_grad_norm_(moved.parameters.values(), self.settings.max_grad_norm)
        if not (math.isfinite(loss) and bool(norm.isfinite())):
            raise Collapsed(collapse(done - 1, "the alignment loss or its gradient is not finite"))
        optimizer.step()
        optimizer.zero_grad()
        self.run.log("align", step=done, loss=loss, grad_norm=float(norm))
        for index, slots in optimizer.state_dict()["state"].items():
            memory.update({f"{index}.{k}": v for k, v in slots.items() if isinstance(v, Tensor)})

    def _restored(self, moved: Moving, memory: dict[str, Tensor]) -> torch.optim.Optimizer:
        """The optimiser, with the moments an interrupted run had reached."""
        optimizer = optimizer_for(moved, self.settings)
        state: dict[int, dict[str, Any]] = {}
        for name, value in memory.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return optimizer

    def _gradients(self, model: nn.Module, step: int) -> float:
        """Adds up the gradients of L_RA, micro-batch by micro-batch; returns its value.

        The derivative of the logarithm is a mean weighted by softmax(d / temperature), so the
        weights are computed first, without a graph.
        """
        (forget, retain), temperature = self.sets, self.settings.temperature
        with torch.no_grad():
            pushed = torch.cat(list(self._distances(model, forget, self.plan[0][step])))
        weights = iter(
            torch.split((pushed / temperature).softmax(0), self.settings.micro_batch_size)
        )
        for found in self._distances(model, forget, self.plan[0][step]):
            torch.autograd.backward((next(weights) * found).sum() / -temperature)
        held = []
        for found in self._distances(model, retain, self.plan[1][step]):
            torch.autograd.backward(found.sum() / len(self.plan[1][step]))
            held.append(found.detach())
        return float(alignment_loss(torch.cat(held), pushed, temperature))

    def _distances(
        self, model: nn.Module, examples: Encoded, indices: list[int]
    ) -> Iterator[Tensor]:
        for start in range(0, len(indices), self.settings.micro_batch_size):
            piece = indices[start : start + self.settings.micro_batch_size]
            batch = examples.batch(piece, self.run.device)
            with self.settings._autocast(self.run):
                found = self.run.task.features(model, batch)
            before = self.starts[examples.name][piece].to(self.run.device)
            yield cosine_distance(*(h.to(torch.promote_types(h.dtype, torch.float32))
                                    for h in (found, before)))  # fmt: skip


def _moved(found: Tensor, scope: str) -> Tensor:
    if not found.requires_grad:
        raise BadInput(
            f"scope {scope!r} moves nothing in front of the output layer, and laf moves what that "
            "layer reads: choose other parameters"
        )
    return found


def _labelled(retain: Encoded) -> Encoded:
    """The records that carry a label."""
    chosen = [i for i in range(len(retain)) if retain[i]["label"] != IGNORED]
    if not chosen:
        raise BadInput("no retain record has a label to repair with: leave repair_epochs out")
    return retain.select(chosen)


def _batches(size: int, take: int, draw: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from torch.split(torch.randperm(size, generator=draw), take)
