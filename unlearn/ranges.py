"""Where good hyperparameters are looked for: ranges that stand beside the fields of a method.

    lr: Annotated[float, Field(gt=0, description="..."), Range(1e-5, 1e-2, log=True)] = 1e-4

A range says where a search is worth its time, not what is allowed: that is the field's own type. A
field that a subclass declares again without a range keeps the one it had. Fields without a range
stay as they are unless the user names one for them.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from unlearn.errors import BadInput, did_you_mean

NOTHING = "none"  # the word of users for None, where it is no word of the field's own


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; whole ones where both bounds are whole.

    Attributes:
        low: the smallest.
        high: the largest.
        log: every factor is as likely as another, instead of every difference.
        step: between neighbours, from ``low`` on; None: any number, or every whole one.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        """Refuse a range that holds nothing, or that no search can draw from."""
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise ValueError(f"a range goes from one finite number to another: {self}")
        if not self.low < self.high:
            raise ValueError(f"a range goes from a lower to a higher number: {self}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"a logarithmic range begins above 0 and has no step: {self}")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise ValueError(f"a step is above 0 and fits in its range: {self}")

    @property
    def whole(self) -> bool:
        """Whether it holds whole numbers only."""
        return all(isinstance(v, int) for v in (self.low, self.high, self.step or 1))

    def in_whole_numbers(self) -> Range:
        """The same in whole numbers."""
        step = None if self.step is None else int(self.step)
        return Range(int(self.low), int(self.high), self.log, step)

    def holds(self, value: Any) -> bool:
        """Whether a value lies in it."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not self.low <= value <= self.high or (self.whole and value != int(value)):
            return False
        steps = (value - self.low) / self.step if self.step else 0.0
        return abs(steps - round(steps)) < 1e-9

    def __str__(self) -> str:
        more = ":log" if self.log else f":{self.step:g}" if self.step else ""
        return f"{self.low:g}:{self.high:g}{more}"


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        """Refuse a choice of nothing."""
        if not self.values or len({str(value) for value in self.values}) < len(self.values):
            raise ValueError(f"a choice is between different values: {self.values}")

    def holds(self, value: Any) -> bool:
        """Whether a value is one of them."""
        return value in self.values

    def __str__(self) -> str:
        return ",".join("none" if value is None else str(value) for value in self.values)


@dataclass(frozen=True)
class Subset:
    """Names between commas, each in or out by itself.

    Attributes:
        of: names of a model's parameters -> what can be chosen among.
        every: the word for all of them.
    """

    of: Callable[[Iterable[str]], Iterable[str]]
    every: str = "all"

    def holds(self, value: Any) -> bool:
        """Never: what it holds depends on the model."""
        return False

    def __str__(self) -> str:
        return "any subset"


Space = Range | Choice | Subset


def space(method: type[Any]) -> dict[str, Space]:
    """The declared ranges of a method, by hyperparameter, in the order of its fields."""
    found: dict[str, Space] = {}
    for cls in reversed(method.__mro__):  # a subclass has the last word, where it says one
        hints = get_type_hints(cls, include_extras=True)
        for name in inspect.get_annotations(cls):
            said = get_args(hints[name]) if get_origin(hints[name]) is Annotated else ()
            found.update((name, item) for item in said if isinstance(item, Space))
    return {f.name: found[f.name] for f in dataclasses.fields(method) if f.name in found}


def chosen(method: type[Any], name: str, given: Mapping[str, Any]) -> dict[str, Space]:
    """The declared ranges of a method with those of the user in their place.

    Args:
        method: its class.
        name: what it is called.
        given: by hyperparameter: ``low:high``, ``low:high:log``, ``low:high:step``, or choices
            between commas (in Python also a list, or a range itself).

    Raises:
        BadInput: no such hyperparameter, no range, or one that holds what the method refuses.
    """
    fields = {f.name: f.default for f in dataclasses.fields(method) if f.init}
    ranges = space(method)
    for key, text in given.items():
        if key not in fields:
            raise BadInput(f"{name} has no hyperparameter {key!r}: {did_you_mean(key, fields)}")
        found = parse(key, text)
        if isinstance(found, Choice) and (fields[key] is None or refused(method, key, NOTHING)):
            found = Choice(tuple(None if value == NOTHING else value for value in found.values))
        for value in ends(found):
            if fault := refused(method, key, value):
                raise BadInput(f"--range {key}={text} holds {value!r}, and {name} says: {fault}")
        if isinstance(found, Range) and found.low % 1 == found.high % 1 == 0:
            between = found.low + 0.5
            found = found.in_whole_numbers() if refused(method, key, between) else found
        ranges[key] = found
    return ranges


def ends(found: Space) -> tuple[Any, ...]:
    """The values that a field must take: both bounds and a step from the first, or every choice."""
    if isinstance(found, Range):
        return (found.low, found.high, *([found.low + found.step] if found.step else []))
    return found.values if isinstance(found, Choice) else ()


def refused(method: type[Any], key: str, value: Any) -> str | None:
    """What the type of a field says against a value; None: nothing."""
    hint = get_type_hints(method, include_extras=True)[key]
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        return str(error.errors()[0]["msg"])
    return None


def parse(key: str, text: Any) -> Space:
    """A range as users write it.

    Raises:
        BadInput: it is none.
    """
    if isinstance(text, Space):
        return text
    form = f"--range {key}={text!s} is no range: write {key}=LOW:HIGH, {key}=LOW:HIGH:log, "
    form += f"{key}=LOW:HIGH:STEP, or choices {key}=A,B,C"
    try:
        if isinstance(text, list | tuple):
            return Choice(tuple(text))
        parts = str(text).split(":")
        if len(parts) in (2, 3) and "," not in str(text):
            low, high = map(_number, parts[:2])
            if parts[2:] == ["log"]:
                return Range(low, high, log=True)
            return Range(low, high, step=_number(parts[2]) if parts[2:] else None)
        return Choice(tuple(map(_value, str(text).split(","))))
    except (OverflowError, ValueError) as error:
        raise BadInput(f"{form} ({error})") from error


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _value(text: str) -> Any:
    """A choice: a number where it is one (YAML takes 1e-4 for a word), else what YAML reads."""
    try:
        return _number(text)
    except ValueError:
        pass
    if text.strip().lower() == NOTHING:
        return NOTHING  # what that means depends on the field
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # such as a pattern that begins with a star
