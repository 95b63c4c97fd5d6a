"""Recipes are TOML tables read into frozen dataclasses, strictly."""

import tomllib
import types
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from mmmamba_edge.errors import UserError

T = TypeVar("T")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a recipe.

    Raises:
        UserError: missing, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: not a readable recipe ({error})") from error


def read_table(kind: type[T], table: Any, where: str) -> T:
    """A frozen dataclass of a TOML table.

    Raises:
        UserError: unknown or missing keys, values of another type; named by `where`.
    """
    if not isinstance(table, dict):
        raise UserError(f"{where}: expected a table")
    known = {f.name: f for f in fields(kind)}  # pyright: ignore[reportArgumentType]
    if unknown := sorted(set(table) - set(known)):
        raise UserError(f"{where}: unknown key {unknown[0]}; known are {', '.join(sorted(known))}")
    needed = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(needed - set(table)):
        raise UserError(f"{where}: missing key {missing[0]}")
    hints = typing.get_type_hints(kind)
    try:
        return kind(**{key: _as(hints[key], value, key) for key, value in table.items()})
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _as(hint: Any, value: Any, key: str) -> Any:
    """`value` as a type annotation says; ints serve as floats, lists as tuples, text as paths."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            try:
                return _as(option, value, key)
            except ValueError:
                continue
    elif origin is Literal:
        if value in typing.get_args(hint):
            return value
        raise ValueError(f"{key} must be one of {', '.join(map(str, typing.get_args(hint)))}")
    elif origin is dict and isinstance(value, dict):
        return value
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(_as(typing.get_args(hint)[0], item, key) for item in value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is type(None) and value is None:
        return None
    elif hint is Path and isinstance(value, str | Path):
        return Path(value)
    elif (
        isinstance(hint, type)
        and isinstance(value, hint)
        and (hint is bool) == (value is True or value is False)
    ):
        return value
    raise ValueError(f"{key} = {value!r}: expected {getattr(hint, '__name__', hint)}")
