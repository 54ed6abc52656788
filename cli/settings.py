"""One flag per setting: flags, environment, YAML and Python never differ."""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import click
from click.core import ParameterSource

from unlearn.config import CaseConfig, read_yaml
from unlearn.errors import BadInput

# settings that take key=value pairs, with the word that stands for one
MAPPINGS = {
    "set": "KEY=VALUE", "columns": "FIELD=COLUMN", "training": "KEY=VALUE", "sampling": "KEY=VALUE",
    "range": "KEY=RANGE",
}  # fmt: skip
FLAGS = {"columns": "--column"}  # given once per pair


def options(
    kind: type[CaseConfig],
    command: str,
    arguments: tuple[str, ...] = (),
    hidden: Container[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that adds one flag per field of ``kind``, but for positional ``arguments``.

    Help does not show those that are ``hidden``: the command refuses them with a reason.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        fields = kind.model_fields
        own = [name for name in fields if name not in CaseConfig.model_fields]
        ordered = [*own, *(name for name in fields if name not in own)]
        for name in reversed([n for n in ordered if n not in arguments]):
            flag, settings = _flag(name, fields[name], command)
            hide = name in hidden
            function = click.option(flag, f"{name}_", hidden=hide, **settings)(function)
        return function

    return decorate


def _flag(name: str, declared: Any, command: str) -> tuple[str, dict[str, Any]]:
    flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
    settings: dict[str, Any] = {
        "help": declared.description,
        "default": None,
        "envvar": f"UNLEARN_{command.upper()}_{name.upper()}",
    }
    kinds = _kinds(declared.annotation)
    choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
    if name in MAPPINGS:
        settings |= {"multiple": True, "metavar": MAPPINGS[name]}
    elif choices:
        settings |= {"type": click.Choice(choices)}
    elif bool in kinds:
        flag = f"{flag}/--no-{name.replace('_', '-')}"
    elif int in kinds or float in kinds:
        settings |= {"type": int if int in kinds else float}
    else:
        settings |= {"type": str}
    if name not in MAPPINGS and not declared.is_required() and declared.default is not None:
        settings["help"] = f"{declared.description}  [default: {declared.default}]"
    return flag, settings


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)


def gathered(
    config: Path | None, arguments: dict[str, Any], flags: dict[str, Any]
) -> dict[str, Any]:
    """YAML below environment and flags; pairs merge key by key."""
    source = click.get_current_context().get_parameter_source
    settings = read_yaml(config) if config else {}
    given = {name: (name, value) for name, value in arguments.items()}
    given |= {name.removesuffix("_"): (name, value) for name, value in flags.items()}
    for name, (parameter, value) in given.items():
        if value is None or source(parameter) is ParameterSource.DEFAULT:
            continue
        if name in MAPPINGS:
            below = settings.get(name) or {}
            if not isinstance(below, dict):
                raise BadInput(f"{name} in {config} must hold `name: value` lines")
            settings[name] = {**below, **_pairs(value, name)}
        else:
            settings[name] = value
    return settings


def _pairs(values: tuple[str, ...], name: str) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals:
            raise BadInput(f"{FLAGS.get(name, f'--{name}')} {text!r} is not of the form key=value")
        pairs[key.strip()] = value.strip()
    return pairs
