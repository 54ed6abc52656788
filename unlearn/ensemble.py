"""Several networks that answer together (the A of SISA: Bourtoule et al. 2021, 1912.03817)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearn.errors import BadInput, Unsupported

ENSEMBLE = "ensemble.json"  # in a checkpoint directory: how many members it has, and of what kind


class Ensemble(nn.Module):
    """Classifiers of one architecture that answer with their mean probability.

    The logits are the logarithm of that mean, so their softmax is the mean itself:
    log (1/S) sum_k softmax(f_k(x)).

    Args:
        members: transformers classifiers, or modules that map a batch of inputs to logits of shape
            (batch, classes).

    Raises:
        BadInput: no members, or members of different architectures.

    >>> sure, torn = nn.Linear(1, 2), nn.Linear(1, 2)
    >>> _ = nn.init.zeros_(sure.weight), sure.bias.data.copy_(torch.tensor([0.0, 50.0]))
    >>> _ = nn.init.zeros_(torn.weight), nn.init.zeros_(torn.bias)
    >>> Ensemble([sure, torn])(torch.ones(1, 1)).softmax(1)
    tensor([[0.2500, 0.7500]], grad_fn=<SoftmaxBackward0>)
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if not self.members:
            raise BadInput("an ensemble needs at least one member")
        first = shapes(self.members[0])
        if any(shapes(member) != first for member in self.members):
            raise BadInput("the members of an ensemble must be of one architecture")

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Log of the mean probability, shape (batch, classes), at least float32."""
        if len(inputs) > 1 and isinstance(self.members[0], PreTrainedModel):
            raise Unsupported("the inputs of these members go by name: adapters cannot wrap them")
        said = [_log_probabilities(member(*inputs, **named)) for member in self.members]
        return torch.stack(said).logsumexp(0) - math.log(len(said))

    def get_base_model(self) -> nn.Module:
        """A member, which tells whether inputs go by name or by position."""
        return self.members[0]


def single(model: nn.Module) -> nn.Module:
    """A network of the architecture in question: the model, or the first member of an ensemble."""
    return model.members[0] if isinstance(model, Ensemble) else model


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of everything a model stores, by name."""
    return {name: value.shape for name, value in model.state_dict().items()}


def _log_probabilities(output: Any) -> Tensor:
    logits = cast(Tensor, output if isinstance(output, Tensor) else output.logits)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
