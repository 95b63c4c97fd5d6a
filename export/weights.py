"""What an export reads: tensors of a checkpoint under a scheme, a block of rows at a time."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from mmmamba_edge.config import Config
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import Checkpoint
from mmmamba_edge.model.tensor_names import layer_prefix
from mmmamba_edge.quant.codes import Codes, stacked
from mmmamba_edge.quant.schemes import (
    EMBEDDING,
    HEAD,
    PROJECTOR,
    SCHEMES,
    Scheme,
    kept_because,
    scheme,
)
from mmmamba_edge.quant.stored import Facts, QuantizedCheckpoint, codes_digest

__all__ = ["EMBEDDING", "HEAD", "PROJECTOR", "STEM", "Matrix", "Weights"]

STEM = "embedding_model.vision_embeddings."

BLOCK = 1 << 24  # elements that are float32 at a time while codes are made

Matrix = NDArray[np.float32] | NDArray[np.float16] | Codes


class Weights:
    """The tensors of a checkpoint under an export scheme. Names are training names.

    A quantised checkpoint's codes are taken as they are; of any other, codes are made by rounding
    to nearest.
    """

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme):
        self.config: Config = checkpoint.config
        self.scheme = scheme
        self.quant = scheme.name
        self._checkpoint = checkpoint
        self._digests: dict[str, str] = {}

    @property
    def quantized(self) -> Facts | None:
        """Of a checkpoint that holds codes already: what they are."""
        of = self._checkpoint
        return of.facts if isinstance(of, QuantizedCheckpoint) else None

    @property
    def codes_sha256(self) -> str:
        """Over all codes that were asked for: two bundles of the same codes say the same."""
        return codes_digest(self._digests)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor in float32."""
        return self._checkpoint.get(name).to(torch.float32).contiguous().numpy()

    def matrix(self, *names: str) -> Matrix:
        """Matrices stacked below each other, as the scheme stores them.

        None of `names` may be one that is kept.
        """
        if self.scheme.bits:
            assert not any(kept_because(name) for name in names)
            return stacked([self.codes(name) for name in names])
        parts = [self.tensor(name) for name in names]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole.astype(np.float16) if self.quant == "fp16" else whole

    def either(self, name: str) -> Matrix:
        """A matrix as the scheme stores it, or in float32 where it keeps that."""
        return self.tensor(name) if kept_because(name) else self.matrix(name)

    def codes(self, name: str) -> Codes:
        """One matrix in codes."""
        of = self._checkpoint
        if isinstance(of, QuantizedCheckpoint) and name in of.facts.matrices:
            codes = of.codes(name)
        else:
            codes = stacked(list(self._code_blocks(name)))
        self._digests[name] = codes.digest()
        return codes

    def seen(self, name: str, rows: slice | None = None) -> NDArray[np.float32]:
        """The numbers that the bundle has for a tensor (or for some of its rows), in float32."""
        weight = self._rows(name, rows) if rows else self.tensor(name)
        if self.quantized:  # its tensors are what its codes stand for
            return weight
        if weight.ndim != 2 or kept_because(name):
            return weight
        if self.quant == "fp16":
            return weight.astype(np.float16).astype(np.float32)
        return self.scheme.codes(name, weight).dequantized() if self.scheme.bits else weight

    def plain(self) -> "Weights":
        """The same checkpoint as it is."""
        return Weights(self._checkpoint, SCHEMES["none"])

    def prefix(self, layer: int) -> str:
        """Name prefix of a layer, numbered over the whole stack."""
        return layer_prefix(self.config, layer)

    def _code_blocks(self, name: str) -> Iterator[Codes]:
        rows, columns = self._checkpoint.shape(name)
        step = max(1, BLOCK // columns)
        for start in range(0, rows, step):
            part = self._rows(name, slice(start, min(start + step, rows)))
            try:
                yield self.scheme.codes(name, part)
            except ValueError as error:
                raise UserError(f"{self._checkpoint.folder}: {name}: {error}") from error

    def _rows(self, name: str, rows: slice) -> NDArray[np.float32]:
        return self._checkpoint.rows(name, rows).to(torch.float32).contiguous().numpy()


def open_weights(checkpoint: Checkpoint, quant: str, group_size: int | None) -> Weights:
    """The checkpoint under a scheme; a quantised one is under its own.

    Raises:
        UserError: no such scheme, or another one asked of a quantised checkpoint.
    """
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return Weights(checkpoint, scheme(quant, group_size))
    facts = checkpoint.facts
    if group_size is not None or quant not in ("none", facts.scheme):
        raise UserError(
            f"{checkpoint.folder}: its weights are codes already ({facts.scheme}); leave --quant "
            "and --group-size out, or export the checkpoint that it was made of"
        )
    four = [coding.group for coding in facts.matrices.values() if coding.bits == 4]
    return Weights(checkpoint, Scheme("int4", 4, max(four)) if four else SCHEMES["int8"])
