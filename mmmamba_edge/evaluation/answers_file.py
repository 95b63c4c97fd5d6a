"""Answers as they are made, one a line, so that a killed run goes on where it was.

The first line says what was asked, of which model. Who goes on with another is refused: answers of
two models, or to two wordings, have no common score.

    {"mmmamba-edge answers": 1, "task": "pope", "model_id": "...", ...}
    {"id": "random/1", "answer": "yes", "end": "stop"}
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from mmmamba_edge.errors import UserError
from mmmamba_edge.whole import new_file

try:
    import fcntl
except ModuleNotFoundError:  # Windows: there two runs may write one file
    fcntl = None

FORMAT = "mmmamba-edge answers"


@dataclass(frozen=True)
class Given:
    """An answer, and what ended it: a "stop" token, or its "length" or "context" limit."""

    answer: str
    end: str


class AnswersFile:
    """The answers of a run; `given` are those there are.

    Args:
        path: the file; it is begun, or gone on with if it is there. None: answers are not kept.
        asked: what was asked, of which model: names and JSON values.
        ids: of the questions.

    Raises:
        UserError: the file is another run's, not ours, in use or cannot be written.
    """

    def __init__(self, path: Path | None, asked: Mapping[str, Any], ids: frozenset[str]) -> None:
        self.path = path
        self.given: dict[str, Given] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        head = {FORMAT: 1, **asked}
        if not path.exists() or path.stat().st_size == 0:
            with new_file(path) as part:  # so a file without a whole first line is not ours
                part.write_text(json.dumps(head) + "\n", encoding="utf-8")
        try:
            self._file = path.open("r+b")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        try:
            _lock(self._file, path)
            self._go_on(self._file, path, head, ids)
        except BaseException:
            self._file.close()
            raise

    def add(self, id: str, given: Given) -> None:
        """Keep an answer; it is in the file when this returns."""
        if self._file is not None:
            row = {"id": id, "answer": given.answer, "end": given.end}
            line = json.dumps(row, ensure_ascii=False) + "\n"
            try:
                self._file.write(line.encode())
                self._file.flush()
            except OSError as error:
                raise UserError(
                    f"{self.path}: cannot be written ({error.strerror}); the answers up to here "
                    "are in it, the same command goes on"
                ) from error
        self.given[id] = given

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._file is not None:
            self._file.close()

    def _go_on(
        self, file: BinaryIO, path: Path, head: Mapping[str, Any], ids: frozenset[str]
    ) -> None:
        whole, newline, _ = file.read().rpartition(b"\n")
        first, *lines = whole.split(b"\n")
        _check_head(path, first, head)
        for number, line in enumerate(lines, start=2):
            try:
                row = json.loads(line)
                id, given = row["id"], Given(str(row["answer"]), str(row["end"]))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}: line {number} is damaged; remove it, and its question is asked again"
                ) from error
            if id not in ids:
                raise UserError(f"{path}: line {number}: id {id!r} is no question of this task")
            self.given[id] = given
        file.truncate(len(whole) + len(newline))  # a line cut by a kill is asked again
        file.seek(0, os.SEEK_END)


def _check_head(path: Path, line: bytes, head: Mapping[str, Any]) -> None:
    try:
        found = json.loads(line)
        ours = isinstance(found, dict) and FORMAT in found
    except ValueError:
        ours, found = False, {}
    if not ours:
        raise UserError(f"{path}: not an answers file of `eval`; choose another --out")
    for name in [*head, *(name for name in found if name not in head)]:
        if found.get(name) != head.get(name):
            raise UserError(
                f"{path}: {name} is {found.get(name)!r} there and {head.get(name)!r} in this run; "
                "choose another --out, or remove the file to begin again"
            )


def _lock(file: BinaryIO, path: Path) -> None:
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{path}: another run is writing it") from error
