"""Plain torch networks for feature vectors, named on the command line as tests.plain:factory."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from unlearn.interface import Need, Needs

WIDTH, CLASSES = 5, 3


def factory() -> nn.Module:
    """A two-layer network with random weights."""
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def with_statistics() -> nn.Module:
    """The same shape of network with batch normalisation, which also has integer buffers."""
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))


class NeedsArguments(nn.Module):
    """Cannot be built by calling it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, CLASSES)


def not_a_module() -> str:
    """Returns the wrong kind of thing."""
    return "a network"


def vectors(size: int, seed: int = 0) -> list[dict[str, object]]:
    """Records of feature vectors, every class in turn."""
    draw = torch.Generator().manual_seed(seed)
    return [
        {"features": torch.randn(WIDTH, generator=draw).tolist(), "label": i % CLASSES}
        for i in range(size)
    ]


@dataclass(frozen=True)
class OnlyClassifiers:
    """A method of another package that works on one family only, and does nothing."""

    needs: ClassVar[Needs] = Needs(tasks=("classification",))

    def unlearn(self, subject, request, run):
        return subject


@dataclass(frozen=True)
class OnState:
    """A method of another package that goes on from what an earlier run kept."""

    needs: ClassVar[Needs] = Needs(state=Need.REQUIRED, either=("retain", "state"))

    def unlearn(self, subject, request, run):
        return subject
