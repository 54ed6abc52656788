"""What a report consists of: the versioned record behind report.json.

A report holds numbers, names, counts and fingerprints. It never holds records, unless examples were
asked for explicitly; so it can be passed on where the forgotten data must not go. Records are
immutable and know no field beyond their own; numbers are finite, and where a model may produce
others (losses, training terms) None stands for them.

Run as a program, it prints the JSON Schema of report.json:
``python -m unlearn.evaluations.schema > docs/report.schema.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

SCHEMA_VERSION: Literal["1"] = "1"

Subset = Literal["forget", "retain", "holdout", "holdout_forget", "neighbours"]
Verdict = Literal["pass", "fail", "inconclusive", "invalid", "not_run", "info"]
Group = Literal[
    "extraction", "membership", "probe", "robustness", "distance", "durability", "utility", "guard"
]
Depth = Literal["quick", "standard", "deep"]
Checkpoint = Literal["original", "unlearned", "retrained"]

CHECKPOINTS: tuple[Checkpoint, ...] = ("original", "unlearned", "retrained")
SUBSETS: dict[Subset, str] = {
    "forget": "Forget set",
    "retain": "Retain set",
    "holdout": "Holdout set",
    "holdout_forget": "Holdout of the forgotten kind",
    "neighbours": "Neighbouring topics",
}
GROUPS: dict[Group, str] = {
    "extraction": "Can the records be drawn out?",
    "membership": "Can it be told that the records were trained on?",
    "probe": "Do the model's inner layers still hold them?",
    "robustness": "Do other ways of asking bring them back?",
    "distance": "Does the model behave like one that never saw them?",
    "durability": "Does it last?",
    "utility": "What was lost besides?",
    "guard": "Can these numbers be relied on?",
}
# groups that speak of forgetting, and the subsets that were to be forgotten
EVIDENCE: tuple[Group, ...] = ("extraction", "membership", "probe", "robustness", "durability")
FORGOTTEN: tuple[Subset, ...] = ("forget", "holdout_forget")
DRAWN: dict[Subset, str] = {
    "forget": "Drawn for what must be gone",
    "retain": "Drawn for what must stay",
}
VERDICTS: dict[Verdict, str] = {
    "pass": "pass",
    "fail": "fail",
    "inconclusive": "inconclusive",
    "invalid": "invalid",
    "not_run": "not run",
    "info": "for information",
}
BETTER = {
    "lower": "lower is better",
    "higher": "higher is better",
    "closer_to_retrained": "closer to retrained is better",
}


def _finite_or_none(value: Any) -> float | None:
    """A number as JSON can hold it: None stands for NaN and infinities."""
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _finite_or_nones(values: Iterable[Any]) -> tuple[float | None, ...]:
    """Numbers as JSON can hold them."""
    return tuple(_finite_or_none(value) for value in values)


Share = Annotated[float, Field(ge=0, le=1)]
Point = tuple[Share, Share]
Number = Annotated[float | None, BeforeValidator(_finite_or_none)]
Numbers = Annotated[tuple[float | None, ...], BeforeValidator(_finite_or_nones)]


class _Record(BaseModel):
    """Immutable, without unknown fields, without NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Interval(_Record):
    """A two-sided confidence interval."""

    low: float
    high: float
    level: float = Field(default=0.95, gt=0, lt=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} lies above high {self.high}")
        return self


class Value(_Record):
    """A measured number, with its interval where one can be given."""

    value: float
    interval: Interval | None = None


class Finding(_Record):
    """One measurement on the checkpoints, the rule it is held against, and the outcome.

    Attributes:
        name: Stable key in snake_case, such as "extraction_strength".
        title: What was measured, for people.
        subset: The records it was measured on.
        unit: Unit of the values, such as "share of tokens"; empty for pure numbers.
        better: Which way is better.
        n: Number of records measured.
        original: The checkpoint as it came in; None if not measured.
        unlearned: The checkpoint under audit; None if not measured.
        retrained: A checkpoint trained without the forget set; None if there is none.
        criterion: The rule in words; empty for mere information.
        verdict: The outcome of the rule; "invalid" where a guard failed, so that the number cannot
            be relied on.
        reason: One sentence on why it was not run, stays inconclusive or is invalid.
        group: What the measurement is evidence of.
        required: Whether the overall verdict hangs on it.
        p_value: Of the claim that the limit is exceeded, adjusted over the checks of the audit.
        detectable: The smallest effect that these record counts would detect with 80 % power, in
            the unit of the values.
        source: The literature it follows, such as "Yeom et al. 2018, arXiv 1709.01604".
        counted: What ``n`` counts: records of the subset, or pictures drawn for it.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    title: str
    subset: Subset
    unit: str = ""
    better: Literal["lower", "higher", "closer_to_retrained"]
    n: int = Field(ge=0)
    original: Value | None = None
    unlearned: Value | None = None
    retrained: Value | None = None
    criterion: str = ""
    verdict: Verdict
    reason: str = ""
    group: Group = "utility"
    required: bool = False
    p_value: float | None = Field(default=None, ge=0, le=1)
    detectable: float | None = Field(default=None, ge=0)
    source: str = ""
    counted: Literal["records", "pictures"] = "records"

    @property
    def where(self) -> str:
        """What was measured, in words."""
        return (DRAWN if self.counted == "pictures" else SUBSETS).get(self.subset, self.subset)


class Hyperparameter(_Record):
    """A setting of the method; ``given`` tells whether the user set it or the default held."""

    name: str
    value: str
    given: bool = False


class RecordSet(_Record):
    """A set of records by its size and fingerprint."""

    name: str
    n: int = Field(ge=0)
    fingerprint: str


class Cost(_Record):
    """What the run took: seconds by phase, peak memory in bytes, and the device."""

    seconds: dict[str, float] = Field(default_factory=dict)
    peak_memory_bytes: int | None = Field(default=None, ge=0)
    device: str = ""


class Distribution(_Record):
    """Mean negative log-likelihood of each record of a subset, in nats, by checkpoint.

    A loss that is not finite is kept as None, so that it can be counted.
    """

    subset: Subset
    original: Numbers = ()
    unlearned: Numbers = ()
    retrained: Numbers = ()


class Curve(_Record):
    """Receiver operating characteristic of an attack: points (FPR, TPR) by checkpoint.

    Attributes:
        attack: Stable key of the attack in snake_case.
        title: What it is called, for people.
        subset: The members it was run on.
        original: Points of the original checkpoint, in ascending order of both rates.
        unlearned: Points of the unlearned checkpoint.
        retrained: Points of the retrained checkpoint.
    """

    attack: str
    title: str
    subset: Subset
    original: tuple[Point, ...] = ()
    unlearned: tuple[Point, ...] = ()
    retrained: tuple[Point, ...] = ()


class Layers(_Record):
    """What a probe reads from each layer.

    Attributes:
        probe: Stable key of the probe in snake_case.
        title: What it is called, for people.
        unit: Unit of the values, such as "accuracy".
        layers: Names of the layers, from input to output.
        original: One value by layer on the original checkpoint; empty if not measured.
        unlearned: The same on the unlearned checkpoint.
        retrained: The same on the retrained checkpoint.
        control: The same on the unlearned checkpoint with shuffled labels.
    """

    probe: str
    title: str
    unit: str
    layers: tuple[str, ...]
    original: Numbers = ()
    unlearned: Numbers = ()
    retrained: Numbers = ()
    control: Numbers = ()

    @model_validator(mode="after")
    def _one_value_by_layer(self) -> Self:
        for name in (*CHECKPOINTS, "control"):
            if (count := len(getattr(self, name))) not in (0, len(self.layers)):
                raise ValueError(f"{name} holds {count} values for {len(self.layers)} layers")
        return self


class Exposed(_Record):
    """A record that an attack still ranks high, named by its salted hash.

    Attributes:
        record: Keyed hash of the record, hex; never its text.
        attack: Stable key of the attack in snake_case.
        original: Share of nonmembers that score lower, on the original checkpoint.
        unlearned: The same on the unlearned checkpoint.
        retrained: The same on the retrained checkpoint.
        rank: 1 for the most exposed record.
    """

    record: str
    attack: str
    original: Number = None
    unlearned: Number = None
    retrained: Number = None
    rank: int = Field(ge=1)


class TrajectoryPoint(_Record):
    """Training terms at one step; a value that is not finite is kept as None."""

    step: int = Field(ge=0)
    terms: dict[str, Number]


class Example(_Record):
    """A record's prompt and answers before and after. Only for reports that may hold record texts.

    Attributes:
        subset: The set the record belongs to.
        prompt: What the models were given.
        reference: The true continuation; None to leave it out.
        original: Answer of the original checkpoint.
        unlearned: Answer of the unlearned checkpoint.
        retrained: Answer of the retrained checkpoint.
    """

    subset: Subset
    prompt: str
    reference: str | None = None
    original: str | None = None
    unlearned: str | None = None
    retrained: str | None = None


class Strip(_Record):
    """Pictures that one model drew, side by side.

    Attributes:
        png: One PNG file of all of them, base64.
        seen: What the judge sees in each; empty without one.
    """

    png: str = Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$")
    seen: tuple[str, ...] = ()


class Grid(_Record):
    """Pictures for one condition; every model started from the same noise, column by column.

    Attributes:
        condition: What was asked for.
        subset: "forget" where it must be gone, "retain" where it must stay.
        count: Number of pictures in a strip.
        original: Those of the original checkpoint.
        unlearned: Those of the unlearned checkpoint.
        retrained: Those of the retrained checkpoint.
    """

    condition: str
    subset: Subset
    count: int = Field(ge=1)
    original: Strip | None = None
    unlearned: Strip | None = None
    retrained: Strip | None = None


class Moment(_Record):
    """How a model of a series stands on everything that was or will be asked.

    Attributes:
        request: Requests carried out so far; 0 for the model before the first.
        target: What the last of them named.
        forget: One value for the forget set of each request of the series, in their order.
        retain: On records that every request retains.
        holdout: On unseen records.
        seconds: What the last request took, without the audit.
    """

    request: int = Field(ge=0)
    target: str = ""
    forget: Numbers
    retain: Number = None
    holdout: Number = None
    seconds: float | None = Field(default=None, ge=0)


class Series(_Record):
    """Requests one after another on one lineage, and the worst moments along the way.

    Attributes:
        unit: Of all values: the share of answers, or of their tokens, that the model gets right.
        moments: The model before the first request and after each.
        worst: Numbers over all moments, by their meaning.
    """

    unit: str
    moments: tuple[Moment, ...]
    worst: dict[str, float] = Field(default_factory=dict)


class Look(_Record):
    """How a model stands while it is made to forget.

    Attributes:
        step: Optimiser steps taken so far, over all phases of the method.
        forget: On the records to be forgotten.
        retain: On records that stay.
        holdout: On unseen records.
    """

    step: int = Field(ge=0)
    forget: Number = None
    retain: Number = None
    holdout: Number = None


class Course(_Record):
    """One run from within: looks every few steps, and the worst moments.

    Attributes:
        every: Steps between two looks.
        unit: Of all values: the share of answers, or of their tokens, that the model gets right.
        looks: Before the first step, on the way, and at the model that was written.
        worst: Numbers over all looks, by their meaning.
        note: One sentence on what was seen on the way, or why nothing was.
    """

    every: int = Field(ge=1)
    unit: str
    looks: tuple[Look, ...]
    worst: dict[str, float] = Field(default_factory=dict)
    note: str = ""


class Report(_Record):
    """Everything a reader needs to judge one erasure, except the erased data.

    Attributes:
        schema_version: Version of this format.
        title: Headline.
        created: Time of writing, ISO 8601 in UTC.
        verdict: The outcome over all required checks.
        verdict_reason: One or two sentences on what decided it.
        request: Facts on what was asked, such as the kind of target and the number of records.
        method: Name of the unlearning method; empty where it is unknown.
        depth: How much was tried.
        criteria: The criteria that decided, as YAML, word for word; empty if not stated.
        criteria_digest: SHA-256 of their bytes, hex.
        hyperparameters: Every setting of the method.
        sets: The record sets involved.
        findings: The measurements.
        notes: Sentences on choices made on the way.
        limits: Sentences on what this evidence does not show.
        cost: What the run took.
        environment: Versions of the software involved.
        distributions: Per-record losses.
        curves: What attacks achieve at every threshold.
        layers: What probes read from each layer.
        exposed: The records that are most exposed.
        trajectory: Training terms over the steps.
        series: The requests so far; None where this is the only one.
        course: The run from within; None where nobody looked.
        examples: Texts before and after; None unless they were asked for.
        grids: Pictures before and after; of forgotten records only if they were asked for.
        checkpoint_in: Fingerprint of the original checkpoint.
        checkpoint_out: Fingerprint of the unlearned checkpoint.
    """

    schema_version: Literal["1"] = SCHEMA_VERSION
    title: str
    created: str
    verdict: Literal["forgotten", "not forgotten", "inconclusive"]
    verdict_reason: str
    request: dict[str, str] = Field(default_factory=dict)
    method: str = ""
    depth: Depth = "quick"
    criteria: str = ""
    criteria_digest: str = ""
    hyperparameters: tuple[Hyperparameter, ...] = ()
    sets: tuple[RecordSet, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    cost: Cost = Cost()
    environment: dict[str, str] = Field(default_factory=dict)
    distributions: tuple[Distribution, ...] = ()
    curves: tuple[Curve, ...] = ()
    layers: tuple[Layers, ...] = ()
    exposed: tuple[Exposed, ...] = ()
    trajectory: tuple[TrajectoryPoint, ...] = ()
    series: Series | None = None
    course: Course | None = None
    examples: tuple[Example, ...] | None = None
    grids: tuple[Grid, ...] = ()
    checkpoint_in: str
    checkpoint_out: str

    @field_validator("created")
    @classmethod
    def _utc(cls, created: str) -> str:
        if datetime.fromisoformat(created).utcoffset() != timedelta(0):
            raise ValueError("must be a time in UTC, such as 2025-01-31T12:00:00+00:00")
        return created


AuditReport = Report  # what pipelines call it


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) that every report.json meets."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **Report.model_json_schema()}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
