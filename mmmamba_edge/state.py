"""The state on disk: session files.

A session file is safetensors, mode 0600, since it holds a conversation: `state.{name}` for every
array of the neutral layout (`runtimes/base.py`) and, in the metadata, a JSON record. It keeps no
transcript: what the model remembers is the state, so the file is as fixed in size as the state is.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mmmamba_edge.errors import UserError
from mmmamba_edge.reduced_state import reduce_state, restore_state
from mmmamba_edge.runtimes.base import Runner, State
from mmmamba_edge.whole import new_file

SESSION = "mmmamba-edge session"  # the kind of file
VERSION = 1  # of its format; a newer one is refused
REDUCED = 2  # the format of a file whose state is not float32

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Record:
    """What a session file says beside its arrays."""

    model_id: str
    quant: str
    template: str  # name of the prompt template the conversation is written in
    tokens: int  # read so far
    answer: dict[str, Any] | None  # the last one, `Answer.to_dict`; None: nothing was asked yet
    system: str | None = None


# --- session files -------------------------------------------------------------------------------


def save_session(
    path: str | Path, record: Record, state: State, extra: Mapping[str, NDArray[Any]],
    precision: str = "float32",
) -> None:  # fmt: skip
    """Write a session file whole or not at all.

    Args:
        path: the file; its folder must exist. An existing file is replaced.
        record: the model's identity and where the conversation stands.
        state: the state.
        extra: further small arrays, kept under their names.
        precision: what the state is written as (reduced_state.py).

    Raises:
        UserError: the file cannot be written, or the state is beyond the precision.
    """
    kept = reduce_state(state.arrays(), precision)
    tensors: Tensors = {f"state.{name}": array for name, array in kept.items()}
    tensors.update(extra)
    about = {"record": json.dumps(asdict(record), ensure_ascii=False)}
    version = VERSION if precision == "float32" else REDUCED
    write_tensors(path, SESSION, tensors, about, version)


def load_session(
    path: str | Path, runner: Runner, *, allow_other_quant: bool = False
) -> tuple[Record, State, Tensors]:
    """Read a session file for `runner`.

    Returns:
        The record, the state on this runner, and the extra arrays by name.

    Raises:
        UserError: not a session file, damaged, of a newer format, of another model, or of another
            quantisation of this model (unless `allow_other_quant`).
    """
    tensors, metadata = read_tensors(path, SESSION)
    try:
        record = Record(**json.loads(metadata["record"]))
        assert isinstance(record.tokens, int)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{path}: not a session file, or a damaged one ({error!r})") from error
    if record.model_id != runner.model_id:
        raise UserError(
            f"{path}: this conversation was held with model {record.model_id}, and the model here "
            f"is {runner.model_id}; open it with the model it belongs to"
        )
    if record.quant != runner.quant and not allow_other_quant:
        raise UserError(
            f"{path}: this conversation was held with the {record.quant!r} weights of this model, "
            f"and these are {runner.quant!r}; the state fits but answers may drift: allow it with "
            "--allow-other-quant (allow_other_quant=True)"
        )
    arrays = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    extra = {k: v for k, v in tensors.items() if not k.startswith("state.")}
    try:
        state = runner.load_state(restore_state(arrays), record.tokens)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return record, state, extra


# --- safetensors, written atomically and checked on reading --------------------------------------


def write_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str],
    version: int = VERSION,
) -> None:  # fmt: skip
    """Write a safetensors file of mode 0600 under a temporary name, then rename it.

    The arrays go to disk one by one, without the second copy that serialising in memory makes.

    Raises:
        UserError: the file cannot be written; nothing is left behind.
    """
    arrays = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    metadata = {**metadata, "kind": kind, "version": str(version)}
    header = _header(arrays, {**metadata, "sha256": _digest(arrays, metadata)})
    with new_file(path, 0o600) as part, part.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for array in arrays.values():
            file.write(array.data)


def check_writable(path: str | Path) -> None:
    """UserError if `path` could not be written: early, before work is done that it should hold."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UserError(f"{path}: a folder; give the name of a file")
    if not target.parent.is_dir():
        raise UserError(f"{path}: there is no folder {target.parent}; make it first")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"{path}: the folder {target.parent} cannot be written to")


def read_tensors(path: str | Path, kind: str) -> tuple[Tensors, dict[str, str]]:
    """Read a file of `write_tensors`: arrays (copies) and metadata.

    Raises:
        UserError: missing, not safetensors, of another kind, of a newer format, or damaged.
    """
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("kind") != kind:
                raise UserError(
                    f"{path}: not a file of kind {kind!r} (its metadata lacks the name)"
                )
            if metadata.get("version") not in (str(VERSION), str(REDUCED)):
                raise UserError(
                    f"{path}: {kind} format {metadata.get('version')}; this release reads formats "
                    f"{VERSION} and {REDUCED}: open it with the release that wrote it"
                )
            tensors: Tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a {kind}, or a truncated one ({error})") from error
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise UserError(f"{path}: damaged, the contents do not match their hash; it cannot be used")
    return tensors, metadata


def _header(arrays: Tensors, metadata: Mapping[str, str]) -> bytes:
    """The JSON that opens a safetensors file, padded so that the arrays are aligned to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _DTYPES[array.dtype.str],
            "shape": array.shape,
            "data_offsets": (start, start + array.nbytes),
        }
        start += array.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


_DTYPES = {
    "<f4": "F32",
    "|u1": "U8",
    "<i2": "I16",
    "<f2": "F16",
}  # little-endian throughout, as safetensors is


def _digest(arrays: Tensors, metadata: Mapping[str, str]) -> str:
    """SHA-256 over metadata, names, shapes and data: a flipped bit in a state would go unseen."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, array in arrays.items():
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
