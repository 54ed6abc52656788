"""What an attacker holds, and what an attack is.

A membership attack gives every record of a set a score, higher for records it takes for members
of the training data. It reads :class:`Evidence` about one model: tables of signals, never the
model itself. Who is right is decided elsewhere, from the scores of records that were members and
of records that were not.

A search looks for what is left in a model itself: it rounds or trains its weights, or talks to it.
What it finds means something only beside the same search on a model that never saw the records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from unlearn.attacks.signals import Signals
from unlearn.errors import BadInput
from unlearn.interface import WITH_LOGITS
from unlearn.run import Run
from unlearn.tasks.base import Encoded

Array = npt.NDArray[np.float64]
Depth = Literal["quick", "standard", "deep"]
DEPTHS: tuple[Depth, ...] = ("quick", "standard", "deep")


@dataclass(frozen=True)
class Shadows:
    """What S shadow models say, each trained on half of the records under attack.

    Attributes:
        member: by set, which shadow was trained on which record, shape (S, n).
        phi: by set, logit of the probability of the label or answer, shape (S, n), as trained.
        loss: by set, mean NLL per unit, shape (S, n), in nats, as trained; "population" holds
            records no shadow was trained on.
        unlearned: by set, phi after each shadow forgot its own half by the method under audit;
            empty where none was asked to.
    """

    member: Mapping[str, npt.NDArray[np.bool_]]
    phi: Mapping[str, Array]
    loss: Mapping[str, Array]
    unlearned: Mapping[str, Array]


@dataclass(frozen=True)
class Evidence:
    """What an attacker holds about one model.

    Attributes:
        signals: by set (forget, retain, holdout, holdout_forget), and by "set/variant" for sets
            read differently, such as "forget/lowercase".
        reference: the same about a model that never saw the forget set; empty if there is none.
        numbers: further per-example numbers, by name and set: numbers["grad_norm"]["forget"].
        population: the set whose records were certainly no members; "" if there is none.
        seed: of everything random in an attack.
        shadows: what shadow models say about the same records, if there are any.
    """

    signals: Mapping[str, Signals]
    reference: Mapping[str, Signals] = field(default_factory=dict)
    numbers: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    population: str = ""
    seed: int = 0
    shadows: Shadows | None = None

    def pool(self) -> Shadows:
        """The shadow models of an attack that declared to need them."""
        if self.shadows is None:
            raise BadInput("this attack needs shadow models.")
        return self.shadows


@dataclass(frozen=True)
class Attack:
    """One membership attack.

    Attributes:
        name: stable key in snake_case.
        title: for people.
        source: where it was published.
        score: (evidence, set) -> one score per record of the set, shape (n,).
        needs: beyond the signals of the attacked set: "reference", "retain", "population", the
            name of a variant ("lowercase", "neighbours") or of a number ("grad_norm"), "shadows"
            or "unlearned shadows".
        tasks: model families it works on.
        depth: the lightest audit that runs it.
    """

    name: str
    title: str
    source: str
    score: Callable[[Evidence, str], Array]
    needs: tuple[str, ...] = ()
    tasks: tuple[str, ...] = WITH_LOGITS
    depth: Depth = "quick"


class Inapplicable(BadInput):
    """These records, or this model, are of a kind in which a search has nothing to look at."""


@dataclass(frozen=True)
class Ground:
    """What a search may use besides the model.

    Attributes:
        forget: the records under search.
        retain: records that were to stay; None where there are none.
        translations: by language, records of ``forget`` in other words and languages.
        rows: by language, which record of ``forget`` each translation is of.
        templates: jailbreak prompts, each with ``{question}`` in it.
    """

    forget: Encoded
    retain: Encoded | None = None
    translations: Mapping[str, Encoded] = field(default_factory=dict)
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    templates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Search:
    """One way of looking for what is left of the forget set in a model.

    Attributes:
        name: stable key in snake_case.
        title: for people.
        unit: of the scores.
        source: where it was published.
        score: (model, ground, run) -> one number in [0, 1] per record looked for, shape (n,);
            higher: more is left. The same records for every model; the model is left as it was.
            Raises BadInput where something is missing, Inapplicable where nothing could be given
            that would help.
        tasks: model families it works on.
        depth: the lightest audit that runs it.
        needs: what must be given besides the forget set and a retrained model, for people.
        records: at most so many forget records are looked at; None: as is usual in their family.
    """

    name: str
    title: str
    unit: str
    source: str
    score: Callable[[nn.Module, Ground, Run], Array]
    tasks: tuple[str, ...] = ("causal_lm",)
    depth: Depth = "deep"
    needs: tuple[str, ...] = ()
    records: int | None = None


@dataclass(frozen=True)
class Elicited:
    """What an attacker got a language model to say; a record has an entry for each of its truths.

    Attributes:
        record: which forget record each entry is about.
        truth: what the model should not say, a text per entry.
        said: every try, texts per entry.
    """

    record: list[int]
    truth: list[str]
    said: list[list[str]]


@dataclass(frozen=True)
class Prompting:
    """One way of talking a language model into saying what it forgot.

    Attributes:
        name: stable key in snake_case.
        title: for people.
        source: where it was published.
        elicit: (model, ground, run) -> what it said; raises as ``Search.score`` does.
        needs: as of a search.
        records: as of a search.
    """

    name: str
    title: str
    source: str
    elicit: Callable[[nn.Module, Ground, Run], Elicited]
    needs: tuple[str, ...] = ()
    records: int | None = None
