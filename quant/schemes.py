"""What a bundle's weights are stored as: schemes, and which matrix gets what, with the reason."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.errors import UserError
from mmmamba_edge.quant.codes import GROUPS, Codes, group_of, quantize_int4, quantize_int8

EMBEDDING = "embedding_model.llm_text_embeddings.weight"
HEAD = "language_model.output.weight"
PROJECTOR = "embedding_model.pixel_shuffle_proj."

# Ends of names that stay float32 under every scheme of codes, and why.
KEPT = {
    "in_proj.weight": "dt: its error is exponentiated and carried on; 0.05 % of the weights",
    "dt_bias": "as dt",
    "A_log_bias": "the decay itself",
    "conv1d.weight": "two taps a channel: nothing to win",
    "conv1d.bias": "as conv1d.weight",
    "norm.weight": "one number a channel",
    "bias": "one number a channel",
    "position_embedding": "read once a tile",
    "patch_embedding.weight": "sees raw pixels; runs once a tile",
}

# Matrices that int4 keeps in 8 bits, and why.
WIDE = {
    HEAD: "every token's logits; the worst tensor to round",
    EMBEDDING: "read a row at a time: its size costs no time",
    f"{PROJECTOR}0.weight": "pictures enter here; 1 % of the weights",
    f"{PROJECTOR}2.weight": "pictures enter here",
}


@dataclass(frozen=True)
class Scheme:
    """How matrices are stored.

    Attributes:
        name: none (float32), fp16, int8 or int4.
        bits: of codes; 0 without.
        group: of 4 bits: columns that share a scale, at most.
    """

    name: str
    bits: int = 0
    group: int = 0

    def codes(self, name: str, weight: NDArray[np.float32]) -> Codes:
        """Some rows of the matrix `name`, rounded to nearest.

        Raises:
            ValueError: weights that are not finite.
        """
        group = self.group_for(name, weight.shape[1])
        return quantize_int4(weight, group) if group else quantize_int8(weight)

    def group_for(self, name: str, columns: int) -> int | None:
        """The group of a matrix in 4 bits; None: it is in 8."""
        if self.bits != 4 or name in WIDE:
            return None
        return group_of(columns, self.group)


SCHEMES = {
    "none": Scheme("none"),
    "fp16": Scheme("fp16"),
    "int8": Scheme("int8", 8),
    "int4": Scheme("int4", 4, 32),
}


def scheme(name: str, group_size: int | None = None) -> Scheme:
    """The scheme `name`, int4 with another group if asked.

    Raises:
        UserError: no such scheme or group.
    """
    if name not in SCHEMES:
        raise UserError(f"quant {name!r}: known are {', '.join(SCHEMES)}")
    found = SCHEMES[name]
    if group_size is None:
        return found
    if found.bits != 4:
        raise UserError(f"--group-size {group_size}: only --quant int4 has groups")
    if group_size not in GROUPS:
        raise UserError(f"--group-size {group_size}: expected one of {', '.join(map(str, GROUPS))}")
    return Scheme("int4", 4, group_size)


def kept_because(name: str) -> str | None:
    """Why the tensor with this training name is never codes; None: it may be."""
    return next((reason for end, reason in KEPT.items() if name.endswith(end)), None)
