"""What a memorization audit found, as it stands in report.json."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from unlearn.evaluations.counterfactual import Counterfactual
from unlearn.evaluations.extractable import Extractable
from unlearn.evaluations.recollection import Recollected
from unlearn.evaluations.verbatim import Verbatim


class Example(BaseModel):
    """A text that was extracted."""

    beginning: str
    continuation: str


class Memorization(BaseModel):
    """What was found, as it stands in report.json.

    Attributes:
        records: of the data.
        texts: distinct ones among them.
        extractable: of the data.
        unseen: the same of the holdout, which the model cannot have memorised.
        recollection: what is recognised and recalled.
        retention: the same, while the model is trained on other texts.
        not_run: measurements that were not made, with the reason.
        limits: what these numbers do not show.
        examples: texts, only where they were asked for.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: str = "1"
    kind: str = "memorization"
    title: str
    created: str
    fingerprint: str
    records: int
    texts: int
    sets: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    extractable: Extractable
    unseen: Extractable | None
    recollection: Recollected
    retention: tuple[Recollected, ...]
    verbatim: Verbatim | None
    counterfactual: Counterfactual | None
    not_run: dict[str, str]
    limits: tuple[str, ...]
    examples: tuple[Example, ...]
    environment: dict[str, str]
    seconds: dict[str, float]
    peak_memory_bytes: int | None
