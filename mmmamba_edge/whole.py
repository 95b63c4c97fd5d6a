"""Files and folders that appear whole or not at all, whatever happens while they are written."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mmmamba_edge.errors import UserError


@contextmanager
def new_file(path: str | Path, mode: int = 0o644) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place on success and goes on any failure.

    A link stays a link: what it points at is replaced.

    Raises:
        UserError: for an OSError inside or around the block; `path` is then what it was.
    """
    target = Path(os.path.realpath(path))
    part = None
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

    Args:
        path: the folder to be. An empty one there is taken.
        refuse: says of a folder with something in it why it must not be replaced; an empty answer
            lets it be replaced, at the end and at once.

    Raises:
        UserError: something is in the way or the place cannot be written, said before the block
            runs; and for an OSError inside it.
    """
    target = Path(os.path.abspath(path))
    part = None
    try:
        reason = _in_the_way(target, refuse)
        if reason:
            raise UserError(f"{path}: {reason}; choose another folder or remove it")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
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
