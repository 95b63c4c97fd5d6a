"""What the float32 reference says of every position, however large the model and long the text.

One layer is in memory at a time, and passes over all sequences in pieces, its state going on from
piece to piece: what is held of a position is one vector. Logits are made a few positions at a time,
when they are compared.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mmmamba_edge.export.reference import embedded, final_norm, load_layer, new_state
from mmmamba_edge.export.weights import HEAD, Weights
from mmmamba_edge.model.decoder import DecoderLayer
from mmmamba_edge.model.layers import AttentionState
from mmmamba_edge.model.mixer import MixerState
from mmmamba_edge.quant.check_data import Item
from mmmamba_edge.quant.head_memory import fading
from mmmamba_edge.status import Report, silent

Floats = NDArray[np.float32]
PIECE = 1024  # tokens that a layer reads at once

Watch = Callable[[int, DecoderLayer, bool], None]


class Reference:
    """The checkpoint's answers to some sequences.

    Args:
        weights: of the checkpoint, in float32.
        items: the sequences.
        say: told how far it is.
        watch: called with each layer's number, the layer, and whether the stream is normalised
            before it; what else wants the layers need not load them again.

    Attributes:
        head_memory: tokens that each head remembers, by layer (head_memory.py).
    """

    def __init__(
        self, weights: Weights, items: Sequence[Item], say: Report = silent,
        watch: Watch | None = None,
    ) -> None:  # fmt: skip
        config = weights.config
        self.head_memory: dict[str, list[float]] = {}
        with torch.inference_mode():
            hidden = [embedded(weights, [(item.ids, item.tiles())])[0] for item in items]
            total = len(config.layer_types)
            for index, kind in enumerate(config.layer_types):
                say("PyTorch reads, layer", index, total)
                layer = load_layer(weights, index, kind)
                edge = index == len(config.embedding.layer_types)
                normalise = edge and config.normalize_encoder_output
                with fading(layer) as found:
                    for x in hidden:
                        if normalise:
                            nn.functional.normalize(x, dim=-1, eps=0.0, out=x)
                        run_layer(layer, x)
                if found is not None:
                    self.head_memory[str(index)] = found.memory()
                if watch:
                    watch(index, layer, normalise)
            say("PyTorch reads, layer", total, total)
            norm = final_norm(weights)
            self._hidden = [norm(x[0]) for x in hidden]
            self._head = torch.from_numpy(weights.seen(HEAD))

    @torch.inference_mode()
    def logits(self, item: int, positions: slice) -> Floats:
        """(positions, vocab_size) of sequence number `item`."""
        return (self._hidden[item][positions] @ self._head.T).numpy()


def run_layer(layer: DecoderLayer, x: Tensor) -> AttentionState | MixerState:
    """Pass (1, tokens, hidden) through a layer, in place; returns its state after them."""
    state = new_state(layer, x)
    for start in range(0, x.shape[1], PIECE):
        part = x[:, start : start + PIECE]
        part.copy_(layer(part, None, state))
    return state
