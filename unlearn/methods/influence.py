"""Influence unlearning (Koh & Liang 2017, arXiv 1703.04730; Guo et al. 2020, arXiv 1911.03030).

    theta <- theta + scale * (H + damping I)^-1 * (1 / n_remaining) * sum_forget grad NLL

One Newton step from the optimum on all data towards that on what remains: at the old optimum the
retain gradients sum to minus the forget gradients. For convex models the rest is of second order
in the share that is forgotten (Guo et al., theorem 1); with a ridge penalty (r / 2) |theta|^2
beside the *sum* of losses, damping = r / n_remaining makes it that Newton step exactly.

H is the curvature of the mean NLL per example over the retain set, or a sample of it. It is never
formed, only multiplied: by conjugate gradients (``cg``: whole set per iteration), or by LiSSA
(``lissa``: one batch per iteration; Agarwal et al. 2017, arXiv 1602.03943). The Hessian of a
network need not be positive, and off an exact optimum its inverse points anywhere along directions
of negative curvature. By default H is therefore the Gauss-Newton matrix: positive semi-definite
always, the same matrix where logits are linear in the weights, and what influence functions of
networks amount to (Bae et al. 2022, arXiv 2209.05364; Grosse et al. 2023, arXiv 2308.03296).

Cost: one gradient of the forget set, and per iteration about two forward and backward passes over
the retain set (lissa: a batch); memory of two of them and, with cg, five vectors of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from unlearn.errors import BadInput, Collapsed
from unlearn.gradients import Curvature, curvature_product, mean_gradient
from unlearn.interface import Need, Needs, Request, Subject
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.scope import in_scope
from unlearn.tasks.base import Encoded

Product = Callable[[Tensor], Tensor]


def conjugate_gradients(
    product: Product, target: Tensor, iterations: int, tolerance: float
) -> Tensor:
    """Solve A x = target for x, for a positive definite A (Hestenes & Stiefel 1952).

    Args:
        product: x -> A x, shape (n,).
        target: shape (n,).
        iterations: at most so many products.
        tolerance: it ends when |target - A x| is at most so much of |target|.

    Raises:
        BadInput: A is not positive along a direction that was met.
    """
    solution, residual = torch.zeros_like(target), target.clone()
    direction, size = residual.clone(), _dot(residual, residual)
    enough = tolerance**2 * size
    for _ in range(iterations):
        if size <= enough:
            break
        image = product(direction)
        curvature = _dot(direction, image)
        if curvature <= 0:
            raise BadInput(
                "the curvature is not positive in every direction: raise damping, or use "
                "curvature gauss_newton"
            )
        solution += (size / curvature) * direction
        residual -= (size / curvature) * image
        before, size = size, _dot(residual, residual)
        direction = residual + (size / before) * direction
    return solution


def lissa(product: Product, target: Tensor, iterations: int, bound: float) -> Tensor:
    """Solve A x = target for x from a Neumann series, each term by its own estimate of A.

    x_0 = target / bound, x_(j+1) = x_j + (target - A_j x_j) / bound.

    Args:
        product: x -> A_j x, shape (n,); may draw a new estimate every time.
        target: shape (n,).
        iterations: terms of the series.
        bound: at least the largest eigenvalue.
    """
    solution = target / bound
    for _ in range(iterations):
        solution = solution + (target - product(solution)) / bound
    return solution


def largest_curvature(product: Product, start: Tensor, iterations: int = 10) -> float:
    """The largest eigenvalue of a positive matrix by power iteration from ``start``, shape (n,)."""
    value = 0.0
    for _ in range(iterations):
        start = start / start.norm()
        image = product(start)
        value = _dot(start, image)
        if value == 0:
            break
        start = image
    return value


def _dot(one: Tensor, other: Tensor) -> float:
    return float(torch.dot(one.double(), other.double()))


@dataclass(frozen=True, kw_only=True)
class Influence:
    """Undo what the forget set did to the optimum, to first order."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    scale: Annotated[
        float,
        Field(gt=0, description="of the step; 1: the influence of the forget set, as it is"),
        Range(0.1, 10.0, log=True),
    ] = 1.0
    damping: Annotated[
        float,
        Field(ge=0, description="added to the curvature; smaller: longer steps"),
        Range(1e-3, 10.0, log=True),
    ] = 0.1
    curvature: Annotated[
        Curvature,
        Field(
            description="gauss_newton: never negative; hessian: exact, for convex models or with "
            "damping above its most negative eigenvalue"
        ),
    ] = "gauss_newton"
    solver: Annotated[
        Literal["cg", "lissa"],
        Field(description="cg: whole set per iteration; lissa: one random batch per iteration"),
    ] = "cg"
    iterations: Annotated[int, Field(ge=1, description="at most so many of the solver")] = 50
    tolerance: Annotated[
        float,
        Field(gt=0, lt=1, description="relative residual at which the system counts as solved"),
    ] = 1e-3
    bound: Annotated[
        float | None,
        Field(
            gt=0,
            description="lissa: at least the largest eigenvalue; none: twice that of the whole set",
        ),
    ] = None
    curvature_examples: Annotated[
        int | None,
        Field(ge=1, description="retain examples the curvature is of, drawn once; none: all"),
    ] = None
    batch_size: Annotated[
        int, Field(ge=1, description="examples per pass; changes the result only with lissa")
    ] = 64
    scope: Annotated[
        str, Field(description="parameters that may move: all, head, experts, or patterns")
    ] = "all"

    needs: ClassVar[Needs] = Needs(retain=Need.REQUIRED)

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Solve for the step, check it, take it.

        Raises:
            BadInput: the curvature is not positive (see ``curvature`` and ``damping``).
            Collapsed: the solver diverged.
        """
        parameters = in_scope(subject.model, run.task, self.scope)

        def compute() -> dict[str, Tensor]:
            return self._step(subject.model, parameters, request, run)

        found = run.once("influence", compute)
        step, residual = found["step"], float(found["residual"])
        if not float(found["gain"]) > 0:
            raise Collapsed(
                f"{self.solver} diverged (relative residual {residual:.3g}). Nothing was written; "
                "use more damping" + ("" if self.solver == "cg" else " or a larger bound")
            )
        if residual > self.tolerance:
            run.note(
                f"Warning: {self.solver} did not converge in {self.iterations} iterations: "
                f"relative residual {residual:.2g}, asked for {self.tolerance:g}."
            )
        run.note(f"The weights moved by {self.scale * float(step.double().norm()):.4g} in norm.")
        moved = [p + self.scale * part for p, part in _parts(step, parameters)]
        if not all(bool(p.isfinite().all()) for p in moved):
            raise Collapsed("the influence step overflows. Nothing was written; use more damping")
        with torch.no_grad():
            for p, value in zip(parameters.values(), moved, strict=True):
                p.copy_(value)
        subject.model.eval()
        return subject

    def trained(self, forget: int, retain: int) -> int:
        """The forget set once, the retain set twice per iteration (lissa: a batch)."""
        seen = min(retain, self.curvature_examples or retain)
        each = seen if self.solver == "cg" else min(self.batch_size, seen)
        return forget + 2 * self.iterations * each

    def _step(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], request: Request, run: Run
    ) -> dict[str, Tensor]:
        """The step before it is scaled, as one vector, and how good a solution it is."""
        forget, retain = request.forget_set(), request.retain_set()
        gradient = mean_gradient(model, forget, parameters, run, self.batch_size)
        target = _vector(gradient) * (len(forget) / len(retain))
        if not bool(target.isfinite().all()):
            raise Collapsed("the forget set's gradient is not finite. Nothing was written")
        if not bool(target.any()):
            raise BadInput("the forget set has no influence on these parameters: change scope")
        examples = retain.sample(self.curvature_examples or len(retain), run.seed_of("curvature"))

        def times(vector: Tensor, over: Encoded = examples) -> Tensor:
            parts = (part for _, part in _parts(vector, parameters))
            found = curvature_product(
                model, over, parameters, dict(zip(parameters, parts, strict=True)), run,
                kind=self.curvature, batch_size=self.batch_size,
            )  # fmt: skip
            return _vector(found) + self.damping * vector

        if self.solver == "cg":
            step = conjugate_gradients(times, target, self.iterations, self.tolerance)
        else:
            draw = run.generator("lissa")
            bound = self.bound or 2 * largest_curvature(times, target)

            def some(vector: Tensor) -> Tensor:
                order = torch.randperm(len(examples), generator=draw)
                return times(vector, examples.select(order[: self.batch_size].tolist()))

            step = lissa(some, target, self.iterations, bound)
        image = times(step)
        residual = (target - image).double().norm() / target.double().norm()
        # of the quadratic model, whose optimum is the step wanted: without any step it is 0
        gain = torch.dot(step.double(), (target - image / 2).double())
        return {"step": step, "residual": residual, "gain": gain}


def _vector(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def _parts(
    vector: Tensor, parameters: Mapping[str, nn.Parameter]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Every parameter with its share of a vector, in its shape."""
    pieces = torch.split(vector, [p.numel() for p in parameters.values()])
    return [(p, part.view(p.shape)) for p, part in zip(parameters.values(), pieces, strict=True)]
