"""Data files of others, read row by row, so that a bad one is named: file, row, field."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmmamba_edge.errors import UserError

Kind = TypeVar("Kind")

_NAMES = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Row:
    """One record of a file.

    Attributes:
        where: the file and the record's place in it: its line, or the key it stands under.
        values: its fields.
    """

    where: str
    values: Mapping[str, Any]

    def get(self, field: str, kind: type[Kind]) -> Kind:
        """A field of that type; UserError where it is missing or of another."""
        if field not in self.values:
            raise UserError(f"{self.where}: no field {field!r}; the file is another or damaged")
        value = self.values[field]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(field, f"expected {_NAMES[kind]}")
        return value

    def text(self, field: str) -> str:
        """A field of text that is not empty."""
        value = self.get(field, str)
        if not value.strip():
            raise self.error(field, "expected text")
        return value

    def choice(self, field: str, known: tuple[str, ...]) -> str:
        """A field of text that is one of `known`, whatever its case."""
        value = self.get(field, str).strip().lower()
        if value not in known:
            raise self.error(field, f"expected {' or '.join(known)}")
        return value

    def picture(self, field: str, folder: Path, name: str) -> Path:
        """The picture `name`, which `field` speaks of, in `folder`."""
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"{self.where}: {field}: there is no {path}; --images takes the folder that has it"
            )
        return path

    def error(self, field: str, expected: str) -> UserError:
        """The error for a field whose value cannot be used."""
        found = json.dumps(self.values.get(field), ensure_ascii=False)
        found = found if len(found) <= 60 else f"{found[:57]}..."
        return UserError(f"{self.where}: {field} is {found}; {expected}")


def read_lines(path: Path) -> list[Row]:
    """A file with a JSON object on each line; empty lines are passed over."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            rows.append(Row(where, _object(where, line)))
    return rows


def read_object(path: Path) -> Row:
    """A file that is one JSON object."""
    return Row(str(path), _object(str(path), read_text(path)))


def read_records(path: Path) -> dict[str, Row]:
    """A file that is a JSON object of JSON objects, by key."""
    outer = read_object(path)
    rows = {}
    for key, value in outer.values.items():
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key}: expected an object")
        rows[key] = Row(f"{path}: {key}", value)
    return rows


def read_text(path: Path) -> str:
    """A file of UTF-8 text."""
    if not path.is_file():
        raise UserError(f"{path}: not found; --data takes the folder that has it")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); download it again") from error


def _object(where: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object")
    return value
