"""The manifest of a bundle: what a runtime must know before it opens a graph (FORMAT.md).

Read strictly: a key that is not known is refused, for whoever skips it runs what he does not know.
"""

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from mmmamba_edge.config import Config
from mmmamba_edge.errors import UserError

FORMAT = 1  # the one format this release writes and reads
TOKENIZER = "tokenizer"  # folder of the tokenizer files inside a bundle


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle: what must be on disk."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class StateTensor:
    """One tensor that the decoder reads as `past_state.*` and gives back as `present_state.*`."""

    name: str  # "{layer}.conv", "{layer}.ssm", "{layer}.key" or "{layer}.value"
    shape: tuple[int, ...]  # with the batch axis in front
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        """Bytes of one copy."""
        return math.prod(self.shape) * _DTYPES[self.dtype]


def is_cache(name: str) -> bool:
    """Whether a state tensor has a row for each token read: an attention layer's keys or values."""
    return name.rpartition(".")[2] in ("key", "value")


@dataclass(frozen=True)
class Manifest:
    """Everything a runtime must know before it opens a graph. Field by field in FORMAT.md."""

    producer: str
    model_id: str
    model: Config
    quant: str
    ops: str
    opset: dict[str, int]
    graphs: dict[str, str]
    state: tuple[StateTensor, ...]
    max_context: int | None
    tokenizer: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def state_bytes(self) -> int:
        """Bytes of one state, whatever it has read."""
        return sum(tensor.nbytes for tensor in self.state)

    def to_json(self) -> str:
        """The text of manifest.json: the same manifest always gives the same bytes."""
        data = {
            "format": FORMAT,
            "producer": self.producer,
            "model_id": self.model_id,
            "quant": self.quant,
            "max_context": self.max_context,
            "ops": self.ops,
            "opset": self.opset,
            "settings": self.settings,
            "graphs": self.graphs,
            "state": {
                "bytes": self.state_bytes,
                "tensors": [
                    {"name": t.name, "shape": list(t.shape), "dtype": t.dtype} for t in self.state
                ],
            },
            "template": self.model.template,
            "tokenizer": list(self.tokenizer),
            "model": self.model.to_dict(),
            "verification": self.verification,
            "files": {name: asdict(self.files[name]) for name in sorted(self.files)},
        }
        text = json.dumps(data, indent=1, ensure_ascii=False)
        # Lists of plain values on one line. No string can hold a line break, so none is touched.
        flat = re.compile(r"\[\n\s+([^][{}]*?)\n\s+\]")
        return flat.sub(lambda m: "[" + re.sub(r"\n\s+", " ", m[1]) + "]", text) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Read `to_json`'s text; every departure from it is a UserError that names `where`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(data, dict) or not isinstance(data.get("format"), int):
            raise UserError(f"{where}: no format number; this is not a bundle's manifest")
        if data["format"] != FORMAT:
            raise UserError(
                f"{where}: bundle format {data['format']}; this release reads {FORMAT}. Export the "
                "checkpoint again with this release, or use the release that made the bundle"
            )
        _check_shape(data, where)
        manifest = cls(
            producer=data["producer"],
            model_id=data["model_id"],
            model=Config.from_dict(data["model"], where=f"{where} model"),
            quant=data["quant"],
            ops=data["ops"],
            opset=data["opset"],
            graphs=data["graphs"],
            state=tuple(
                StateTensor(t["name"], tuple(t["shape"]), t["dtype"])
                for t in data["state"]["tensors"]
            ),
            max_context=data["max_context"],
            tokenizer=tuple(data["tokenizer"]),
            settings=data["settings"],
            verification=data["verification"],
            files={name: FileRecord(**record) for name, record in data["files"].items()},
        )
        again = json.loads(manifest.to_json())
        for key in data:  # what the manifest says twice must agree
            if again[key] != data[key]:
                raise UserError(f"{where}: {key} contradicts the rest; expected {again[key]!r}")
        check_names(manifest, where)
        return manifest


# --- checks --------------------------------------------------------------------------------------

_KEYS: dict[str, type | tuple[type, ...]] = {
    "format": int, "producer": str, "model_id": str, "quant": str, "max_context": (int, type(None)),
    "ops": str, "opset": dict, "settings": dict, "graphs": dict, "state": dict, "template": str,
    "tokenizer": list, "model": dict, "verification": dict, "files": dict,
}  # fmt: skip
_DTYPES = {"float32": 4, "float16": 2, "int8": 1}  # bytes of an element


def _check_shape(data: Any, where: str) -> None:
    """Keys and kinds of everything but `model`, which `Config.from_dict` checks."""
    _exact_keys(data, _KEYS, where)
    _exact_keys(data["state"], {"bytes": int, "tensors": list}, f"{where} state")
    for tensor in data["state"]["tensors"]:
        _exact_keys(tensor, {"name": str, "shape": list, "dtype": str}, f"{where} state tensors")
        sizes = tensor["shape"]
        if tensor["dtype"] not in _DTYPES or not all(isinstance(n, int) and n > 0 for n in sizes):
            raise UserError(f"{where} state tensors: {tensor}: no such shape or dtype")
    for record in data["files"].values():
        _exact_keys(record, {"sha256": str, "bytes": int}, f"{where} files")
    _exact_keys(data["graphs"], dict.fromkeys(("vision", "embed", "decoder"), str), where)


def _exact_keys(data: Any, keys: dict[str, Any], where: str) -> None:
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected an object, found {type(data).__name__}")
    unknown, missing = sorted(set(data) - set(keys)), sorted(set(keys) - set(data))
    if unknown:
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; known are {sorted(keys)}")
    if missing:
        raise UserError(f"{where}: missing key {', '.join(missing)}")
    for key, kind in keys.items():
        if not isinstance(data[key], kind):
            raise UserError(f"{where}: {key} is {data[key]!r}; expected another kind of value")


def check_names(manifest: Manifest, where: str) -> None:
    """File names stay inside the folder, and what the manifest speaks of is among its files."""
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or os.sep != "/" and os.sep in name:
            raise UserError(f"{where}: file name {name!r} leads out of the bundle")
    needed = [*manifest.graphs.values(), *(f"{TOKENIZER}/{name}" for name in manifest.tokenizer)]
    for name in needed:
        if name not in manifest.files:
            raise UserError(f"{where}: names {name}, but its files do not list it")
