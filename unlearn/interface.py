"""The words everything else is written in: Request, Subject, Needs, Method.

A *method* turns a *subject* (what a checkpoint directory holds) and a *request* (what must go,
and the data at hand) into a new subject. It declares what it needs; the harness checks that
before any weight is loaded and withholds what the method declares it does not use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from unlearn.run import Run
    from unlearn.tasks.base import Encoded


@dataclass(frozen=True)
class Records:
    """Single records must go: people, documents, images."""

    count: int

    def __str__(self) -> str:
        return f"{self.count} record{'s' if self.count != 1 else ''}"


@dataclass(frozen=True)
class Classes:
    """Whole classes must go.

    Attributes:
        indices: label ids.
        names: what people call them.
        anchor: class to turn into, for models that generate; None: the method chooses.
    """

    indices: tuple[int, ...]
    names: tuple[str, ...]
    anchor: int | None = None

    def __str__(self) -> str:
        return f"class{'es' if len(self.names) != 1 else ''} {', '.join(self.names)}"


@dataclass(frozen=True)
class Concepts:
    """What prompts name must go from a text-to-image model.

    Attributes:
        prompts: that name it, such as "circle" or a memorised caption.
        anchor: what is shown instead; "": the method chooses.
        keep: prompts of neighbouring concepts that must stay.
    """

    prompts: tuple[str, ...]
    anchor: str = ""
    keep: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = ", ".join(self.prompts[:3])
        more = f" and {len(self.prompts) - 3} more" if len(self.prompts) > 3 else ""
        return f"concept{'s' if len(self.prompts) != 1 else ''} {shown}{more}"


Target = Records | Classes | Concepts


@dataclass(frozen=True)
class Request:
    """What must go, and the data at hand; a set the method declared NO for is ``None``."""

    target: Target
    forget: Encoded | None = None
    retain: Encoded | None = None

    def forget_set(self) -> Encoded:
        """The forget set of a method that declared it REQUIRED."""
        return _present(self.forget, "forget")

    def retain_set(self) -> Encoded:
        """The retain set of a method that declared it REQUIRED."""
        return _present(self.retain, "retain")


def _present(examples: Encoded | None, name: str) -> Encoded:
    if examples is None:
        from unlearn.errors import MissingNeed

        raise MissingNeed(f"this method needs a {name} set: pass --{name}")
    return examples


@dataclass(frozen=True)
class Subject:
    """Exactly what a checkpoint directory holds.

    Attributes:
        model: the network, in float32 (or float64), on the run's device.
        processor: tokenizer, image processor, or a callable on one raw input.
        state: named tensors a method keeps for the next request, saved beside the model.
        note: facts about ``state`` that are not tensors (counts, fingerprints), as strings.
    """

    model: nn.Module
    processor: Any = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    note: Mapping[str, str] = field(default_factory=dict)

    def with_state(self, state: Mapping[str, Tensor], note: Mapping[str, str]) -> Subject:
        """The same model, keeping ``state`` for the next request."""
        return replace(self, state=state, note=note)


class Need(Enum):
    """Whether a method uses something."""

    NO = "not used"
    OPTIONAL = "optional"
    REQUIRED = "required"


WITH_LOGITS = ("causal_lm", "classification")
ALL_TASKS = (*WITH_LOGITS, "diffusion")  # of methods that ask for losses alone
ALL_TARGETS = ("records", "classes")
FLAGS = {"records": "forget-ids", "classes": "forget-classes", "concepts": "forget-concepts"}


@dataclass(frozen=True)
class Needs:
    """What a method asks for.

    Attributes:
        forget: the forget set.
        retain: the retain set.
        state: what an earlier run kept.
        labels: of classifiers' records; NO: they are withheld, and records need none.
        tasks: model families it works on.
        targets: what it can forget: records, whole classes, concepts named by prompts.
        either: sets of which at least one must be given.
    """

    forget: Need = Need.REQUIRED
    retain: Need = Need.OPTIONAL
    state: Need = Need.NO
    labels: Need = Need.REQUIRED
    tasks: tuple[str, ...] = WITH_LOGITS
    targets: tuple[str, ...] = ALL_TARGETS
    either: tuple[str, ...] = ()

    def faults(
        self, name: str, given: Mapping[str, bool], task: str, target: str = "records"
    ) -> list[str]:
        """Sentences for every need that ``given`` (set name -> present) does not meet."""
        found = [
            f"{name} needs a {what} set: pass --{what} (or --data with --forget-ids)"
            for what in ("forget", "retain")
            if getattr(self, what) is Need.REQUIRED and not given.get(what)
        ]
        if self.state is Need.REQUIRED and not given.get("state"):
            found.append(f"{name} needs the state of an earlier run: pass that run's directory")
        if self.either and not any(given.get(what) for what in self.either):
            found.append(f"{name} needs one of: {', '.join(self.either)}")
        if task not in self.tasks:
            found.append(f"{name} works on {' and '.join(self.tasks)}, and this model is {task}")
        if target not in self.targets:
            flags = " or ".join(f"--{FLAGS[known]}" for known in self.targets)
            known = " and ".join(self.targets)
            found.append(f"{name} forgets {known}, not {target}: pass {flags}")
        return found


@runtime_checkable
class Method(Protocol):
    """One unlearning algorithm: a frozen dataclass whose fields are its hyperparameters.

    ``needs`` may depend on the fields. ``unlearn`` consumes the subject (it may change the model
    in place) and returns the new one.
    """

    @property
    def needs(self) -> Needs:
        """What the method asks for, given its hyperparameters."""
        ...

    def unlearn(self, subject: Subject, request: Request, run: Run) -> Subject:
        """Make the subject forget what the request names."""
        ...
