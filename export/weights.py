"""What an export reads: tensors of a checkpoint one at a time, as numbers or as codes.

Which matrices are quantised is decided here, by name, with the reason where one is not.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from mmmamba_edge.config import Config
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import Checkpoint
from mmmamba_edge.model.tensor_names import layer_prefix
from mmmamba_edge.quant.codes import Codes, quantize_int8, stacked

SCHEMES = ("none", "int8")

EMBEDDING = "embedding_model.llm_text_embeddings.weight"
HEAD = "language_model.output.weight"
STEM = "embedding_model.vision_embeddings."
PROJECTOR = "embedding_model.pixel_shuffle_proj."

# Ends of names that stay float32 whatever the scheme, and why.
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


def kept_because(name: str) -> str | None:
    """Why the tensor with this training name is never quantised; None: it may be."""
    return next((reason for end, reason in KEPT.items() if name.endswith(end)), None)


class Weights:
    """The tensors of a checkpoint under an export scheme. Names are training names."""

    def __init__(self, checkpoint: Checkpoint, quant: str):
        self.config: Config = checkpoint.config
        self.quant = quant
        self._checkpoint = checkpoint

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor in float32."""
        return self._checkpoint.get(name).to(torch.float32).contiguous().numpy()

    def matrix(self, *names: str) -> NDArray[np.float32] | Codes:
        """Matrices stacked below each other: codes under a scheme, float32 without one.

        None of `names` may be one that is kept.
        """
        if self.quant == "none":
            parts = [self.tensor(name) for name in names]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        assert not any(kept_because(name) for name in names)
        return stacked([self.codes(name) for name in names])

    def codes(self, name: str) -> Codes:
        """One matrix under the scheme."""
        try:
            return quantize_int8(self.tensor(name))
        except ValueError as error:
            raise UserError(f"{self._checkpoint.folder}: {name}: {error}") from error

    def prefix(self, layer: int) -> str:
        """Name prefix of a layer, numbered over the whole stack."""
        return layer_prefix(self.config, layer)
