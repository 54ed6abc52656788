"""MemControl: fine-tune only what need not memorise (Dutt et al., WACV 2025, arXiv 2405.19458).

    min over the weights of the groups in ``moves``  mean NLL(retain)

How much a fine-tuned model memorises hangs on which of its weights may move. The paper's inner
level is this method: fine-tuning with a mask over blocks of the network. Its outer level searches
the mask and the learning rate, with memorisation and quality as two rewards: that is ``unlearn tune
--method memcontrol``, which also says what the two are here. The paper's masks choose among the
places of small adapters of a diffusion model; here a group is a kind of layer (attention, feed
forward, convolution, norm, embedding, other) in one third of the depth: ``attention.1`` is the
first third, ``embedding`` is outside the blocks. Both are told by the names of the parameters, as
transformers, torchvision and diffusers give them; what has no telling name is ``other``, and a
model without numbered blocks has no thirds. Everything else stays
bit-identical, batch statistics included. The forget set is never read: what it holds can only fade,
as with finetune. Cost: as finetune, with gradients of fewer weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import Field

from unlearn.errors import BadInput, did_you_mean
from unlearn.interface import ALL_TASKS, Need, Needs, Request, Subject
from unlearn.ranges import Range, Subset
from unlearn.run import Run
from unlearn.training import Term, Training, descend, likelihood

ALL = "all"
KINDS = {  # by the first that is found in a parameter's name
    "norm": r"norm|(^|\.)(ln|bn)(_|\d|\.)",
    "attention": r"attn|attention",
    "feed_forward": r"mlp|feed_?forward|intermediate|(^|\.)(ff|fc|ffn)(\d|\.|_)|experts"
    r"|(^|\.)output\.dense",  # of BERT, where the output of attention is named so as well
    "convolution": r"conv|resnets?\.\d",
    "embedding": r"emb|(^|\.)(wte|wpe|shared)\.",
}
SIDES = ("down_blocks", "mid_block", "up_blocks")  # of a UNet, as data goes through them
BLOCK = re.compile(rf"^(?:[^.]*\.)*?(?:\d+|{SIDES[1]})(?=\.)")


def groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The parameters of a model by group, a group by its name.

    A block is what stands in front of the first name that is a number, with that number, if its
    stack has others (a ResNet's ``layer1.0``); and the middle of a UNet. Stacks count in the order
    in which they first appear (the sides of a UNet in that of the data), blocks within one in that
    of their numbers; a third is of all blocks, whatever their size.

    >>> groups(["embed.weight", "layers.0.mlp.up.weight", "layers.1.attn.q.weight"])
    {'attention.2': ['layers.1.attn.q.weight'], 'embedding': ['embed.weight'], \
'feed_forward.1': ['layers.0.mlp.up.weight']}
    """
    names = list(names)
    blocks = {name: match[0] for name in names if (match := BLOCK.search(name))}
    sizes = Counter(_stack(block) for block in set(blocks.values()))
    blocks = {n: b for n, b in blocks.items() if sizes[_stack(b)] > 1 or b.endswith(SIDES[1])}
    first: dict[str, int] = {}
    for block in blocks.values():
        first.setdefault(_family(block)[0], len(first))
    order = sorted(set(blocks.values()), key=lambda block: _place(block, first))
    third = {block: i * 3 // len(order) + 1 for i, block in enumerate(order)}
    found: dict[str, list[str]] = {}
    for name in names:
        kind = next((k for k, text in KINDS.items() if re.search(text, name.lower())), "other")
        group = f"{kind}.{third[blocks[name]]}" if name in blocks else kind
        found.setdefault(group, []).append(name)
    return dict(sorted(found.items()))


def _stack(block: str) -> str:
    """What the blocks that follow each other have in common."""
    return block if block.endswith(SIDES[1]) else block.rpartition(".")[0]


def _family(block: str) -> tuple[str, int]:
    """Its stack, or for a UNet what all its sides have in common; and which side it is."""
    outer, _, own = _stack(block).rpartition(".")
    return (outer, SIDES.index(own)) if own in SIDES else (_stack(block), 0)


def _place(block: str, first: Mapping[str, int]) -> tuple[int, int, int]:
    family, side = _family(block)
    own = block.rpartition(".")[2]
    return first[family], side, int(own) if own.isdigit() else 0


@dataclass(frozen=True, kw_only=True)
class MemControl(Training):
    """Continue training chosen parts of the model on the retain set alone."""

    moves: Annotated[
        str,
        Field(
            description="groups of parameters that may move, between commas, such as "
            "attention.1,norm.3; all: every group"
        ),
        Subset(groups),
    ] = ALL
    scope: Annotated[str, Field(description="must stay all: moves decides what may move")] = "all"
    lr: Annotated[
        float,
        Field(gt=0, description="peak learning rate; the paper searches 1e-5 to 1e-3"),
        Range(1e-5, 1e-2, log=True),
    ] = 1e-4

    needs: ClassVar[Needs] = Needs(forget=Need.NO, retain=Need.REQUIRED, tasks=ALL_TASKS)

    def check(self, request: Request) -> None:
        """Refuse a scope of the user's, and an empty choice.

        Raises:
            BadInput: a scope was given, or no group.
        """
        if self.scope != "all":
            raise BadInput("memcontrol moves the groups named in moves: leave scope out")
        if not self._named():
            raise BadInput("moves names no group of parameters: name one, or all")

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse a group that a model with these parameters does not have.

        Raises:
            BadInput: which one.
        """
        self.chosen(names)

    def _named(self) -> list[str]:
        return [part.strip() for part in self.moves.split(",") if part.strip()]

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Those of a model's parameters that may move.

        Raises:
            BadInput: the model has no such group.
        """
        names = list(names)
        there = groups(names)
        wanted = list(there) if self._named() == [ALL] else self._named()
        for group in wanted:
            if group not in there:
                raise BadInput(f"this model has no group {group!r}: {did_you_mean(group, there)}")
        moved = {name for group in wanted for name in there[group]}
        return [name for name in names if name in moved]  # optimisers go by the model's order

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Train on, in train mode, without the forget set.

        Raises:
            BadInput: the model has no such group.
        """
        moved = self.chosen(name for name, _ in subject.model.named_parameters())
        scope = " ".join(f"^{re.escape(name)}$" for name in moved)
        term = Term("retain", request.retain_set(), likelihood, "unit")
        return descend(subject, [term], replace(self, scope=scope), run, dropout=True)

    def trained(self, forget: int, retain: int) -> int:
        """Every epoch is over the retain set."""
        return self.steps(retain) * min(self.batch_size, retain)
