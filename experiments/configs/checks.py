"""Checks and digests shared by the configuration classes."""

import dataclasses
import hashlib
import json
import math
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from experiments.errors import ConfigError


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Raises unless `value` is a finite number within the given bounds."""
    bounds = [
        (f"> {above}", above is None or value > above),
        (f">= {at_least}", at_least is None or value >= at_least),
        (f"< {below}", below is None or value < below),
        (f"<= {at_most}", at_most is None or value <= at_most),
    ]
    wanted = " and ".join(text for text, _ in bounds if not text.endswith("None"))
    if not math.isfinite(value) or not all(holds for _, holds in bounds):
        raise ConfigError(f"{name} is {value!r}; wanted a finite number {wanted}.")


def check_integer(name: str, value: Any, *, at_least: int) -> None:
    """Raises unless `value` is an integer of at least `at_least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(f"{name} is {value!r}; wanted an integer >= {at_least}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; wanted one of {', '.join(choices)}.")


# What `check` asks of the fields it is given, by the name of the argument.
RULES: dict[str, Callable[[str, Any], None]] = {
    "counts": lambda name, value: check_integer(name, value, at_least=1),
    "integers": lambda name, value: check_integer(name, value, at_least=0),
    "positive": lambda name, value: check_number(name, value, above=0),
    "not_negative": lambda name, value: check_number(name, value, at_least=0),
    "decays": lambda name, value: check_number(name, value, at_least=0, below=1),
    "shares": lambda name, value: check_number(name, value, at_least=0, at_most=1),
}


def check(config: Any, prefix: str = "", **fields: str) -> None:
    """Checks the fields of a configuration, each item of a tuple; None is left alone.

    A ``Literal`` is checked by its type; the names of `RULES` take fields, separated by
    spaces. `prefix` is where the configuration lies on the command line.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        for choices in literals(kind):
            for value in each(getattr(config, name)):
                check_choice(prefix + name.replace("_", "-"), value, choices)
    for rule, names in fields.items():
        for name in names.split():
            for value in each(getattr(config, name)):
                RULES[rule](prefix + name.replace("_", "-"), value)


def literals(kind: Any) -> list[tuple[str, ...]]:
    """The choices of a ``Literal``, also inside of a tuple or a union."""
    if typing.get_origin(kind) is typing.Literal:
        return [typing.get_args(kind)]
    return [found for part in typing.get_args(kind) for found in literals(part)]


def each(value: Any) -> list[Any]:
    """The items of a tuple, or the value itself; nothing for None."""
    if value is None:
        return []
    return list(value) if isinstance(value, tuple) else [value]


def json_values(config: Any, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a configuration class as JSON values, all but some."""
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return {k: v for k, v in values.items() if k not in leave_out}


def digest(values: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of JSON values, whatever their order."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
