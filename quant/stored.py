"""A quantised checkpoint: codes and scales on disk, in the one form that every exporter reads.

    config.json, tokenizer files      as in any checkpoint
    model.safetensors                 what stays floating-point, under training names
    codes.safetensors                 NAME.codes (uint8) and NAME.scale (bfloat16) of each matrix
    quantization.json                 what each matrix is and why, folds, calibration, digest

4 bits: code + 8, two in a byte, the first in the low half, (rows, groups, group / 2); 8 bits:
code + 128, (rows, columns). Scales (rows, groups), positive (quant.md section 5). It opens as a
checkpoint: its tensors are the numbers that the codes stand for.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmmamba_edge.config import Config, load_config
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import QUANTIZED, SINGLE, Checkpoint
from mmmamba_edge.model.tensor_names import DEAD, Shape, training_shapes
from mmmamba_edge.quant.codes import Codes, pack_blocks, unpack_blocks

FACTS, CODES, FORMAT = QUANTIZED, "codes.safetensors", 1


@dataclass(frozen=True)
class Coding:
    """How a matrix is stored.

    Attributes:
        bits: 8 or 4.
        group: columns that share a scale.
        algorithm: nearest, clipped, gptq or fisher.
        reason: why this many bits.
        error: mean |Wx - Qx|^2 / |Wx|^2 over the calibration inputs; None: not measured.
    """

    bits: int
    group: int
    algorithm: str
    reason: str
    error: float | None = None


@dataclass(frozen=True)
class Facts:
    """`quantization.json`.

    Attributes:
        scheme: int8, int4 or mixed.
        of: `weights_id` of the checkpoint that was quantised.
        matrices: by training name.
        digest: SHA-256 over codes and scales (`codes_digest`).
        folds: sites whose scales were moved between tensors, and how strongly.
        calibration: what was read for it.
        bits_per_weight: of decoder matrices, scales counted; embedding, head and vision apart.
    """

    scheme: str
    of: str
    matrices: dict[str, Coding]
    digest: str
    folds: dict[str, float]
    calibration: dict[str, Any]
    bits_per_weight: float

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


class QuantizedCheckpoint(Checkpoint):
    """An open quantised checkpoint. `get` gives the weights that codes stand for, in float32."""

    def __init__(self, folder: Path, config: Config, files: dict[str, Path], facts: Facts):
        super().__init__(folder, config, "training", files)
        self.facts = facts

    def codes(self, name: str, rows: slice | None = None) -> Codes:
        """A matrix's codes, or some rows of them."""
        coding, part = self.facts.matrices[name], rows or slice(None)
        data = self._handle(f"{name}.codes").get_slice(f"{name}.codes")[part].numpy()
        scale = self._handle(f"{name}.scale").get_slice(f"{name}.scale")[part].float().numpy()
        columns = training_shapes(self.config)[name][1]
        return unpack_codes(data, scale, columns, coding.bits)

    def get(self, name: str) -> Tensor:
        """As in `Checkpoint`, what codes stand for in float32; the dead table is zeros."""
        if name in self.facts.matrices:
            return torch.from_numpy(self.codes(name).dequantized())
        if name == DEAD:
            return torch.zeros(training_shapes(self.config)[name], dtype=torch.bfloat16)
        return super().get(name)

    def rows(self, name: str, rows: slice) -> Tensor:
        """As in `Checkpoint`."""
        if name in self.facts.matrices:
            return torch.from_numpy(self.codes(name, rows).dequantized())
        return super().rows(name, rows)

    def dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def weights_id(self) -> str:
        """That of the checkpoint that was quantised: it is the same model."""
        return self.facts.of


def open_quantized(folder: Path) -> QuantizedCheckpoint:
    """Open a quantised checkpoint.

    Raises:
        UserError: a missing, damaged or foreign file; it names file and field.
    """
    config, facts = load_config(folder), _read_facts(folder / FACTS)
    files = {**_names(folder / SINGLE), **_names(folder / CODES)}
    checkpoint = QuantizedCheckpoint(folder, config, files, facts)
    found = {name: shape for name, _, shape in checkpoint.stored()}
    for name, shape in training_shapes(config).items():
        if name == DEAD:
            continue
        if (coding := facts.matrices.get(name)) is None:
            if found.get(name) != shape and not _expanded(name, shape, found.get(name), config):
                raise UserError(f"{folder / SINGLE}: {name}: expected {shape}, {found.get(name)}")
            continue
        for end, expected in _stored_shapes(shape, coding).items():
            if found.get(f"{name}.{end}") != expected:
                raise UserError(
                    f"{folder / CODES}: {name}.{end}: expected {expected} from {FACTS}, found "
                    f"{found.get(f'{name}.{end}')}; quantise the checkpoint again"
                )
    return checkpoint


def pack_codes(codes: Codes) -> tuple[Tensor, Tensor]:
    """Codes as `codes.safetensors` has them: bytes and bfloat16 scales."""
    if codes.bits == 4:
        data = pack_blocks(codes, codes.group)[0]
    else:
        data = codes.codes.view(np.uint8) ^ np.uint8(0x80)
    return torch.from_numpy(data), torch.from_numpy(codes.scale).to(torch.bfloat16)


def unpack_codes(data: Any, scale: Any, columns: int, bits: int) -> Codes:
    """`pack_codes` backwards."""
    if bits == 4:
        return unpack_blocks(data, scale, columns, 4)
    return Codes((data ^ np.uint8(0x80)).view(np.int8), scale)


def codes_digest(digests: dict[str, str]) -> str:
    """One SHA-256 over the matrices' `Codes.digest()`, by training name: what bundles compare."""
    total = hashlib.sha256()
    for name in sorted(digests):
        total.update(f"{name} {digests[name]}\n".encode())
    return total.hexdigest()


def _stored_shapes(shape: Shape, coding: Coding) -> dict[str, Shape]:
    rows, columns = shape
    groups = columns // coding.group
    packed = (rows, groups, coding.group // 2) if coding.bits == 4 else (rows, columns)
    return {"codes": packed, "scale": (rows, groups)}


def _expanded(name: str, shape: Shape, found: Shape | None, config: Config) -> bool:
    """Whether it is a g_norm with a weight for each head of its own: a fold makes it so."""
    if found is None or not name.endswith("g_norm.weight"):
        return False
    return found in {(s.num_attention_heads, *shape) for s in (config.embedding, config.llm)}


def _read_facts(path: Path) -> Facts:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT:
            raise UserError(f"{path}: another format than {FORMAT}; quantise the checkpoint again")
        matrices = {name: Coding(**coding) for name, coding in data.pop("matrices").items()}
        return Facts(matrices=matrices, **data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not what `quantize` writes ({error})") from error


def _names(path: Path) -> dict[str, Path]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict.fromkeys(file.keys(), path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
