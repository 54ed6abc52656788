"""Where a search looks: the ranges beside the fields, and those of the user."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Annotated

import pytest
import yaml
from pydantic import Field

from unlearn import registry
from unlearn.errors import BadInput
from unlearn.ranges import Choice, Range, Subset, chosen, ends, parse, refused, space

NOTHING_TO_TUNE = {"swap_class"}  # it swaps two rows, and has no hyperparameter
METHODS = registry.names()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_where_to_look(name: str) -> None:
    found = space(registry.method_class(name))
    assert bool(found) != (name in NOTHING_TO_TUNE)


@pytest.mark.parametrize("name", METHODS)
def test_a_range_lies_within_what_the_field_allows_and_holds_its_default(name: str) -> None:
    cls = registry.method_class(name)
    method = cls()
    for key, found in space(cls).items():
        for value in ends(found):
            assert refused(cls, key, value) is None, (key, value)
        default = getattr(method, key)
        if default is not None and not isinstance(found, Subset):
            assert found.holds(default), (key, default, str(found))
        if isinstance(found, Range) and found.whole:
            assert refused(cls, key, found.low + 0.5) is not None, f"{key} takes fractions, too"


def test_shipped_recipes_lie_in_the_ranges() -> None:
    seen = 0
    for file in resources.files("unlearn.recipes").iterdir():
        if file.name.endswith(".yaml"):
            recipe = yaml.safe_load(file.read_text())
            settings = recipe.get("set") or {}
            method = registry.build(recipe["method"], settings)
            for key, found in space(type(method)).items():
                value = getattr(method, key)
                if key != "scope" and value is not None and not isinstance(found, Subset):
                    assert found.holds(value), (file.name, key, value, str(found))
                    seen += 1
    assert seen > 50


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A method of nobody's."""

    lr: Annotated[float, Field(gt=0), Range(1e-5, 1e-2, log=True)] = 1e-4
    depth: Annotated[int, Field(ge=1, le=8), Range(1, 8)] = 2
    name: str = "x"


@dataclass(frozen=True, kw_only=True)
class Child(Parent):
    """One that says some of it again."""

    depth: Annotated[int, Field(ge=1, le=8)] = 3
    lr: Annotated[float, Field(gt=0), Range(1e-3, 1e-1, log=True)] = 1e-2


@dataclass(frozen=True, kw_only=True)
class Optional:
    """One whose fields may hold nothing."""

    decay: Annotated[float, Field(ge=0, le=1)] | None = 0.5
    start: str | None = None
    word: str = "none"


def test_a_subclass_keeps_the_range_it_does_not_say_again() -> None:
    assert space(Child) == {"lr": Range(1e-3, 1e-1, log=True), "depth": Range(1, 8)}
    assert space(Parent)["lr"] == Range(1e-5, 1e-2, log=True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1e-5:1e-3:log", Range(1e-5, 1e-3, log=True)),
        ("1:8", Range(1, 8)),
        ("0:1:0.25", Range(0, 1, step=0.25)),
        ("0.05,0.1,0.5", Choice((0.05, 0.1, 0.5))),
        ("nll,kl,None", Choice(("nll", "kl", "none"))),
        ("*a*,all", Choice(("*a*", "all"))),
        ("saliency:0.3,saliency:0.5", Choice(("saliency:0.3", "saliency:0.5"))),
        ("true,false", Choice((True, False))),
        ([1, 2], Choice((1, 2))),
        ("adamw", Choice(("adamw",))),
    ],
)
def test_ranges_as_users_write_them(text: object, found: object) -> None:
    assert parse("key", text) == found


@pytest.mark.parametrize(
    "text",
    [
        "2:1",
        "0:1:log",
        "a:b",
        "1:2:3",
        "1,1",
        "1e-3:1e-2:lin",
        "1:1",
        "1e-5:inf:log",
        "-inf:0",
        "nan:1",
        "1:1e400",
        "1:1" + "0" * 400,
    ],
)
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(BadInput, match=r"--range key=.*LOW:HIGH"):
        parse("key", text)


def test_what_a_range_holds() -> None:
    assert Range(0, 1, step=0.25).holds(0.75)
    assert not Range(0, 1, step=0.25).holds(0.6)
    assert not Range(1, 8).holds(2.5)
    assert not Range(1.0, 8.0).holds(None)
    assert not Range(0, 2).holds(True)
    assert Choice((None, 1)).holds(None)
    assert [str(Range(1e-5, 1.0, log=True)), str(Choice((1, None)))] == ["1e-05:1:log", "1,none"]


def test_the_users_ranges_replace_the_declared() -> None:
    found = chosen(Parent, "parent", {"depth": "2:4", "name": "a,b"})
    assert found == {"lr": space(Parent)["lr"], "depth": Range(2, 4), "name": Choice(("a", "b"))}


def test_none_is_nothing_unless_it_is_a_word_of_the_field() -> None:
    cls = registry.method_class("grad_diff")
    assert chosen(cls, "grad_diff", {"retention": "nll,none"})["retention"].holds("none")
    found = chosen(Optional, "optional", {"decay": "none,0.1", "start": "none,x", "word": "none,x"})
    assert found == {
        "decay": Choice((None, 0.1)), "start": Choice((None, "x")), "word": Choice(("none", "x")),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "bounds"), [("1e0:8", (1, 8)), ("1:8e0", (1, 8)), ("2.0:6.0:2.0", (2, 6))]
)
def test_whole_bounds_of_a_field_for_whole_numbers(text: str, bounds: tuple[int, int]) -> None:
    found = chosen(Parent, "parent", {"depth": text})["depth"]
    assert isinstance(found, Range)
    assert found.whole
    assert (found.low, found.high) == bounds


def test_bounds_of_a_field_for_broken_numbers_stay() -> None:
    within = chosen(Optional, "optional", {"decay": "0.6:0.9"})["decay"]
    assert within == Range(0.6, 0.9)  # though 1.1 is no decay
    assert chosen(Parent, "parent", {"lr": "1.0:10.0"})["lr"].holds(1.5)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"dept": "1:2"}, "parent has no hyperparameter 'dept': did you mean depth"),
        ({"depth": "0:4"}, r"depth=0:4 holds 0, and parent says: .*greater than or equal to 1"),
        ({"depth": "1.5,2"}, "depth=1.5,2 holds 1.5"),
        ({"lr": "-1:1"}, "holds -1"),
        ({"depth": "1.5:8"}, "holds 1.5"),
        ({"depth": "1:4:0.5"}, "holds 1.5"),
    ],
)
def test_a_users_range_that_cannot_be(given: dict[str, str], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        chosen(Parent, "parent", given)
