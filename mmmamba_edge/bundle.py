"""The exported folder: written whole or not at all, checked on opening (FORMAT.md is the spec).

A bundle is what ships to a device. Nothing here needs torch, onnx or a runtime.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from mmmamba_edge.errors import UserError
from mmmamba_edge.manifest import FileRecord, Manifest, check_names
from mmmamba_edge.whole import new_folder

MANIFEST = "manifest.json"
DEFAULT_BUNDLE = Path(__file__).parent / "assets" / "default"  # the embedded model
SMALL = 64 << 20  # bytes; a bundle below is hashed whole on every opening (about 0.1 s)

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
_REPAIR = "Copy or export the bundle again"


# --- opening -------------------------------------------------------------------------------------


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of the bundle folder `path`.

    Raises:
        UserError: no such folder, no manifest, not JSON, another format, unknown or missing keys.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a bundle is a folder with {MANIFEST} in it")
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{folder}: no {MANIFEST}, so this is not a bundle; make one of a checkpoint with "
            "`mmmamba-edge export CHECKPOINT --to onnx --out BUNDLE`"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    return Manifest.from_json(text, str(file))


def verify_files(
    path: str | Path,
    manifest: Manifest | None = None,
    *,
    hashes: bool | None = None,
    progress: Progress | None = None,
) -> None:
    """Check that every file of the bundle is there, whole and unchanged.

    Args:
        path: the bundle folder.
        manifest: its manifest, if already read.
        hashes: True compares every SHA-256; False sizes only; None hashes bundles below 64 MiB,
            where that costs nothing one would notice.
        progress: called while hashing.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    folder = Path(path)
    manifest = manifest or read_manifest(folder)
    total = sum(record.bytes for record in manifest.files.values())
    for name, record in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(
                f"{file}: missing; {MANIFEST} names it (sha256 {record.sha256}). {_REPAIR}"
            )
        size = file.stat().st_size
        if size != record.bytes:
            kind = "truncated" if size < record.bytes else "too long"
            raise UserError(
                f"{file}: {kind}, {size} bytes of {record.bytes} (sha256 {record.sha256}). "
                f"{_REPAIR}"
            )
    if hashes or (hashes is None and total < SMALL):
        done = 0
        for name, record in manifest.files.items():
            found = file_sha256(folder / name)
            if found != record.sha256:
                raise UserError(
                    f"{folder / name}: corrupt, sha256 is {found}; {MANIFEST} says "
                    f"{record.sha256}. {_REPAIR}"
                )
            done += record.bytes
            if progress:
                progress(done, total)


# --- writing -------------------------------------------------------------------------------------


def new_bundle(out: str | Path) -> AbstractContextManager[Path]:
    """`whole.new_folder` for a bundle: it replaces a bundle and nothing else."""
    return new_folder(out, _not_a_bundle)


def _not_a_bundle(folder: Path) -> str:
    """Why `folder` is more than a bundle, or none; empty if it is one."""
    try:
        known = {MANIFEST, *read_manifest(folder).files}
    except UserError:
        return "exists and is not a bundle"
    here = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if not f.is_dir()}
    more = sorted(here - known)
    return f"holds {more[0]}, which is not the bundle's" if more else ""


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file under `folder`, and write the manifest that lists them.

    Files whose record `manifest` already holds are not hashed again.
    """
    files = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != MANIFEST:
            known = manifest.files.get(name)
            files[name] = known or FileRecord(file_sha256(file), file.stat().st_size)
    manifest = replace(manifest, files=files)
    check_names(manifest, MANIFEST)
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def file_sha256(file: Path) -> str:
    """SHA-256 of a file, as the manifest has it."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
