"""Training data in the InternVL conversation layout: datasets and their rows (spec 6.5).

    for dataset in read_meta("data/meta.json"):
        rows = RowFile(dataset.annotation, dataset.root, index="cache/rows.npy")
        first = rows[0]

Files are never held in memory as a whole. What cannot be used is a `BadRow` that says why.
"""

import json
import logging
import math
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.errors import UserError
from mmmamba_edge.prompt import IMAGE_PLACEHOLDER
from mmmamba_edge.whole import new_file

_log = logging.getLogger(__name__)


# --- the meta file --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """One entry of a meta file; names of pictures start from `root`."""

    name: str
    root: Path
    annotation: Path  # the JSONL file
    repeat_time: float = 1  # how often an epoch reads each row; below 1: the share of rows it reads
    length: Any = None  # rows, as the meta file has it


def read_meta(path: str | Path) -> tuple[Dataset, ...]:
    """The datasets of a meta file; names of files in it start from its own folder.

    Raises:
        UserError: not a meta file, or one that names what is not there.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict) or not data:
        raise UserError(f'{path}: no datasets; expected {{"NAME": {{"root", "annotation", ...}}}}')
    return tuple(_dataset(f"{path}: {name}", path.parent, name, data[name]) for name in data)


def _dataset(where: str, folder: Path, name: str, entry: Any) -> Dataset:
    for key in ("root", "annotation"):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
            raise UserError(f"{where}: no {key!r}; expected the name of a folder and of a JSONL")
    known = {"root", "annotation", "data_augment", "repeat_time", "length"}
    if unknown := sorted(entry.keys() - known):
        _log.warning("%s: unknown key %s; ignored", where, ", ".join(unknown))
    if entry.get("data_augment"):
        _log.warning("%s: data_augment is not done; pictures are taken as they are", where)
    root, annotation = folder / entry["root"], folder / entry["annotation"]
    if not root.is_dir():
        raise UserError(f"{where}: root {root} is not a folder; unpack the pictures there")
    if not annotation.is_file():
        raise UserError(f"{where}: annotation {annotation} is not a file")
    repeat = entry.get("repeat_time", 1)
    number = isinstance(repeat, int | float) and not isinstance(repeat, bool)
    if not number or not 0 < repeat < math.inf:
        raise UserError(f"{where}: repeat_time is {repeat!r}; expected a number above 0")
    return Dataset(name, root, annotation, repeat, entry.get("length"))


# --- rows -----------------------------------------------------------------------------------------


class BadRow(Exception):
    """A row that cannot be used: `file`, `line` (from 1) and `reason`."""

    def __init__(self, file: Path, line: int, reason: str) -> None:
        super().__init__(file, line, reason)
        self.file, self.line, self.reason = file, line, reason

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Row:
    """One conversation, and where it stands; the first line is 1."""

    file: Path
    line: int
    turns: tuple[tuple[str, str], ...]  # questions with their answers, at least one
    images: tuple[Path, ...] = ()  # one for each `<image>` of the questions, in order
    system: str | None = None  # None: the template's own


class RowFile:
    """The rows of a JSONL file, any of them at once; blank lines are none.

    One pass finds where rows begin: [offset in bytes, line number] of each, (rows + 1, 2) uint64,
    kept in a file and memory-mapped. In front stands [size, mtime in ns] of the JSONL: where they
    differ the index is made anew.

    Args:
        path, root: a dataset's `annotation` and `root`.
        index: the file to keep the index in; its folder exists.

    Raises:
        UserError: the JSONL cannot be read, or the index cannot be written.
    """

    def __init__(self, path: str | Path, root: str | Path, index: str | Path) -> None:
        self.path, self.root = Path(path), Path(root)
        try:
            status = self.path.stat()
            stamp = status.st_size, status.st_mtime_ns
            found = _open_index(Path(index), stamp)
            if found is None:
                with new_file(index) as part, part.open("wb") as file:
                    np.save(file, _scan(self.path, stamp))
                found = np.load(index, mmap_mode="r")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        self._index: NDArray[np.uint64] = found[1:]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Row:
        """Row i, 0 <= i < len; BadRow where it is none, IndexError where there is none."""
        offset, line = map(int, self._index[i])
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                data = file.readline()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        return parse_row(data, self.path, line, self.root)


def _open_index(path: Path, stamp: tuple[int, int]) -> NDArray[np.uint64] | None:
    try:
        index = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # none yet, or damaged
        return None
    fits = index.dtype == np.uint64 and index.ndim == 2 and index.shape[1] == 2 and len(index)
    return index if fits and tuple(map(int, index[0])) == stamp else None


def _scan(path: Path, stamp: tuple[int, int]) -> NDArray[np.uint64]:
    numbers = array("Q", stamp)
    offset = 0
    with path.open("rb") as file:
        for line, data in enumerate(file, 1):
            if not data.isspace():
                numbers.extend((offset, line))
            offset += len(data)
    return np.frombuffer(numbers, np.uint64).reshape(-1, 2)


def parse_row(data: bytes, file: Path, line: int, root: Path) -> Row:
    """A line as a row. Turns are the human's and the model's in turn, whatever their "from" says,
    but for a system message in front (spec 6.5).

    Raises:
        BadRow: not JSON, no conversation, or `<image>` in the questions that do not fit the images.
    """

    def bad(reason: str) -> BadRow:
        return BadRow(file, line, reason)

    try:
        row = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise bad(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise bad(f"unknown shape: {type(row).__name__}; expected an object")
    said = row.get("conversations")
    if not isinstance(said, list) or not said:
        raise bad("no conversations")
    for number, turn in enumerate(said, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise bad(f"the value of turn {number} is not text")
    system = said.pop(0)["value"] if said[0].get("from") == "system" else None
    if not said or len(said) % 2:
        raise bad(f"{len(said)} turns; expected a question and an answer in turn")
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise bad("unknown shape: image is neither a name nor a list of names")
    values = [turn["value"] for turn in said]
    placeholders = sum(question.count(IMAGE_PLACEHOLDER) for question in values[::2])
    if images and not placeholders:  # as in chat: pictures without a place come first
        values[0] = f"{IMAGE_PLACEHOLDER}\n" * len(images) + values[0]
    elif len(images) != placeholders:
        raise bad(f"placeholders do not fit: {placeholders} {IMAGE_PLACEHOLDER} for {len(images)}")
    turns = tuple(zip(values[::2], values[1::2], strict=True))
    return Row(file, line, turns, tuple(root / name for name in images), system)
