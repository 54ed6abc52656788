r"""Closed-form edits of what cross-attention reads in prompts.

A text-to-image network sees a prompt only through its keys and values W c, where c is the text
encoder's state at one position and W the ``to_k`` or ``to_v`` of one of its cross-attentions
(``attn2``). An edit that asks W' c_i = W g_i, and W' c_p = W c_p for what stays, with W' close to
W, is the minimiser of

    s_e sum_i |W' c_i - W g_i|^2 + s_p sum_p |W' c_p - W c_p|^2 + lamb |W' - W|^2

which is W' = W M with one square matrix for every layer (Gandikota et al., WACV 2024, arXiv
2308.14761, eq. 7, with v* = W g inserted):

    M = I + s_e [sum_i (g_i - c_i) c_i^T] B^-1
    B = lamb I + s_e sum_i c_i c_i^T + s_p sum_p c_p c_p^T

So M - I has at most as many dimensions as embeddings are erased, and the edit is exactly a
low-rank adapter: W' - W = (W U) V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from unlearn.errors import BadInput, Unsupported
from unlearn.interface import Concepts, Need, Needs, Request, Subject
from unlearn.pipeline import Pipeline
from unlearn.ranges import Range
from unlearn.run import Run
from unlearn.scope import moving

LAYERS = r"lora:\.attn2\.to_[kv]\.weight"  # the scope of these edits
TEMPLATES = "{},a {},a photo of {},an image of {},a picture of {}"
NEGLIGIBLE = 1e-9  # singular values of M - I below this share of the first are rounding errors


@dataclass(frozen=True)
class Embeddings:
    """States of prompts at single positions, each (count, dim), float64 on the CPU.

    Attributes:
        erased: what must be read as something else.
        anchors: what it is read as, row by row.
        kept: what must be read as before.
    """

    erased: Tensor
    anchors: Tensor
    kept: Tensor


def embeddings(model: Pipeline, request: Request, templates: str, run: Run) -> Embeddings:
    """Every position of every concept in every template, beside the anchor's at the same position.

    Kept are the empty prompt, the anchor and the prompts to keep, as they are and in templates.

    Args:
        model: with a text encoder.
        request: whose target is concepts.
        templates: prompts between commas; ``{}`` stands for concept and anchor alike. Those with
            words that the tokenizer does not know are left out.
        run: told which were left out.

    Raises:
        BadInput: no usable template, or concept and anchor are read as the same.
    """
    target = cast(Concepts, request.target)
    filled = known_templates(templates, run)
    prompts = [t.replace("{}", concept) for concept in target.prompts for t in filled]
    aims = [t.replace("{}", target.anchor) if target.anchor else "" for t in filled]
    others = [*target.keep, *([target.anchor] if target.anchor else [])]
    kept = ["", *others, *(t.replace("{}", other) for other in others for t in filled)]
    erased, anchors = states(model, prompts), states(model, aims * len(target.prompts))
    if torch.equal(erased, anchors):
        raise BadInput(
            f"the tokenizer reads {target.prompts[0]!r} and the anchor {target.anchor!r} as the "
            "same: name another anchor"
        )
    return Embeddings(erased, anchors, states(model, list(dict.fromkeys(kept))))


def known_templates(templates: str, run: Run) -> list[str]:
    """Templates all of whose words the tokenizer knows.

    Raises:
        BadInput: there is none, or one has no place for the concept.
    """
    listed = [part.strip() for part in templates.split(",") if part.strip()]
    if bare := [template for template in listed if "{}" not in template]:
        raise BadInput(f"the template {bare[0]!r} has no {{}} where the concept goes: add it")
    lost_words: Any = getattr(run.task, "lost_words", lambda _: [])
    known = [template for template in listed if not lost_words(template.replace("{}", ""))]
    if not known:
        raise BadInput(f"the tokenizer knows no template of {templates!r} wholly: set others")
    if lost := [template for template in listed if template not in known]:
        run.note(f"Templates with words that the tokenizer does not know: {', '.join(lost)}.")
    return known


def states(model: Pipeline, prompts: Sequence[str]) -> Tensor:
    """The text encoder's output at every position of every prompt, (prompts * positions, dim)."""
    with torch.no_grad():
        found = [model.condition([prompt]) for prompt in prompts]
    return torch.cat([cast(Tensor, state)[0] for state in found]).cpu().double()


def erasure(at: Embeddings, lamb: float, erase_weight: float, keep_weight: float) -> Tensor:
    """M, shape (dim, dim), float64; one Cholesky factorisation, whatever the number of layers.

    >>> c, g = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    >>> erasure(Embeddings(c, g, c[:0]), lamb=1.0, erase_weight=1.0, keep_weight=1.0) @ c[0]
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    identity = torch.eye(at.erased.shape[1], dtype=torch.float64)
    b = lamb * identity
    b = b + erase_weight * at.erased.T @ at.erased + keep_weight * at.kept.T @ at.kept
    moved = at.erased.T @ (at.anchors - at.erased)
    return identity + erase_weight * torch.cholesky_solve(moved, torch.linalg.cholesky(b)).T


def projections(model: Pipeline) -> dict[str, nn.Linear]:
    """The layers that read prompts, by name: ``to_k`` and ``to_v`` of every cross-attention.

    Raises:
        Unsupported: there are none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if name.endswith((".attn2.to_k", ".attn2.to_v")) and isinstance(module, nn.Linear)
    }
    if model.text_encoder is None or not found:
        raise Unsupported("this pipeline has no cross-attention to prompts: use another method")
    return found


def factors(m: Tensor) -> tuple[Tensor, Tensor]:
    """(U, V) with M = I + U V, shapes (dim, rank) and (rank, dim), of the smallest rank."""
    u, s, v = torch.linalg.svd(m - torch.eye(len(m), dtype=m.dtype))
    rank = max(1, int((s > NEGLIGIBLE * s[0]).sum()))
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def multiplied(subject: Subject, m: Tensor, run: Run) -> Subject:
    """Every layer W that reads prompts as W M, in place, and kept as an adapter where wanted."""
    layers = projections(cast(Pipeline, subject.model))
    u, v = factors(m)
    bs = {name: (layer.weight.detach().cpu().double() @ u) for name, layer in layers.items()}
    rank = u.shape[1]
    with moving(
        subject, run.task, LAYERS, rank, rank, run.seed_of("adapters"), run.adapter
    ) as moved, torch.no_grad():  # fmt: skip
        for name, parameter in moved.parameters.items():
            layer, _, part = name.removeprefix("base_model.model.").partition(".lora_")
            parameter.copy_(v if part.startswith("A") else bs[layer])
    return replace(subject, model=subject.model.eval())


@dataclass(frozen=True, kw_only=True)
class ClosedForm:
    """What users of closed-form edits choose."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)

    lamb: Annotated[
        float,
        Field(gt=0, description="weight of staying close to the old matrices"),
        Range(0.01, 10.0, log=True),
    ] = 0.5
    erase_weight: Annotated[
        float, Field(gt=0, description="weight of every state that is erased")
    ] = 1.0
    keep_weight: Annotated[
        float,
        Field(ge=0, description="weight of every state that is kept"),
        Range(0.1, 10.0, log=True),
    ] = 1.0
    templates: Annotated[
        str,
        Field(
            description="prompts, between commas, in which the concept is edited; {} stands for it"
        ),
    ] = TEMPLATES

    needs: ClassVar[Needs] = Needs(
        forget=Need.NO, retain=Need.NO, tasks=("diffusion",), targets=("concepts",)
    )
    scope: ClassVar[str] = LAYERS
