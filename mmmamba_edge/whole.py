"""Files and folders that appear whole or not at all, whatever happens while they are written."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmmamba_edge.errors import UserError

try:
    import fcntl
except ModuleNotFoundError:  # Windows: what a kill leaves stays until someone removes it
    fcntl = None


@contextmanager
def new_file(path: str | Path, mode: int = 0o644) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place on success and goes on any failure.

    A link stays a link: what it points at is replaced.

    Raises:
        UserError: for an OSError inside or around the block; `path` is then what it was.
    """
    target = Path(os.path.realpath(path))
    part = None
    if target.exists() and not target.is_file():  # a device would be replaced, a folder cannot be
        raise UserError(f"{path}: exists and is not a file; choose another name")
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".mmmamba-", suffix=".tmp")
        os.close(handle)
        part = Path(name)
        yield part
        part.chmod(mode)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


@contextmanager
def new_folder(
    path: str | Path, refuse: Callable[[Path], str] = lambda _: "exists already"
) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place on success and goes on any failure.

    Even a kill leaves no half of `path`; what it leaves beside it, the next call removes.

    Args:
        path: the folder to be. An empty one there is taken.
        refuse: says of a folder with something in it why it must not be replaced; an empty answer
            lets it be replaced, at the end and at once.

    Raises:
        UserError: something is in the way or the place cannot be written, said before the block
            runs; and for an OSError inside it.
    """
    target = Path(os.path.abspath(path))
    part = lock = None
    try:
        reason = _in_the_way(target, refuse)
        if reason:
            raise UserError(f"{path}: {reason}; choose another folder or remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_over(target)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PART, dir=target.parent))
        lock = _lock(part)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    try:
        yield part
        part.chmod(0o755)
        _put_in_place(part, target)
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def refuse_taken(path: str | Path) -> None:
    """UserError where `new_folder` would refuse: said before long work, not after it."""
    if reason := _in_the_way(Path(os.path.abspath(path)), lambda _: "exists already"):
        raise UserError(f"{path}: {reason}; choose another folder or remove it")


_PART = ".part"  # how temporary folders end


def _remove_left_over(target: Path) -> None:
    """Remove temporary folders whose writer was killed: a live one holds a lock."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}{re.escape(_PART)}")
    for part in target.parent.iterdir():
        if fcntl is not None and part.is_dir() and pattern.fullmatch(part.name):
            lock = _lock(part)
            if lock is not None:
                shutil.rmtree(part, ignore_errors=True)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """The open, locked folder; None where another process holds it or locks do not exist."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _in_the_way(target: Path, refuse: Callable[[Path], str]) -> str:
    if not target.exists():
        return ""
    if not target.is_dir():
        return "exists and is not a folder"
    if target == Path.cwd():
        return "is the current folder"
    return refuse(target) if any(target.iterdir()) else ""


def _put_in_place(part: Path, target: Path) -> None:
    if not target.exists():
        part.rename(target)
        return
    # A rename cannot replace a folder that has files: the old one steps aside for a moment.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    target.rename(aside / "old")
    try:
        part.rename(target)
    except BaseException:
        (aside / "old").rename(target)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def working_folder(folder: Path, facts: dict[str, Any]) -> Path:
    """A folder for the finished parts of a long run; emptied if they are of another run.

    Args:
        folder: made if missing.
        facts: as JSON, what tells runs apart.
    """
    note, said = folder / "run.json", json.dumps(facts)
    if note.is_file() and note.read_text(encoding="utf-8") != said:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(note) as part:
        part.write_text(said, encoding="utf-8")
    return folder
