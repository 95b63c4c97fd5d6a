"""Decoding many rows at once, its step recorded as a CUDA graph.

`MMMamba.step` asks the device how far every layer's cache is filled, and launches its hundreds of
kernels from Python: for a small model that takes longer than they run, however many rows there are.
"""

import torch
from torch import Tensor

from mmmamba_edge.errors import UserError
from mmmamba_edge.model.decoder import DecoderState, MMMamba
from mmmamba_edge.model.layers import AttentionState
from mmmamba_edge.model.recorded_step import Home, record


class RecordedRows:
    """`MMMamba.step` for one state of any number of rows, without images.

    The first step runs as it is, so that the recording finds every kernel loaded; the second is
    recorded, and from then on it is replayed. On a CPU all steps run as they are. Caches are read
    as far as they reach: make them no larger than needed.

    Args:
        model: any mix of layers.
        state: it has read its prompt; it is this object's from here on.
    """

    def __init__(self, model: MMMamba, state: DecoderState):
        self.model, self.state = model, state
        caches = [layer for layer in state.layers if isinstance(layer, AttentionState)]
        for cache in caches:
            cache.reach = cache.key.shape[2]
        # Of each cache its own: with pictures the two halves may have read different numbers.
        self._room = min((c.key.shape[2] - int(c.length.max()) for c in caches), default=None)
        self._ids = torch.empty_like(state.length)
        self._home = Home(state)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ran = False

    @torch.inference_mode()
    def step(self, token_ids: Tensor) -> Tensor:
        """Read one token a row: (batch,) -> logits (batch, vocab_size), overwritten by the next."""
        if self._room is not None:
            if not self._room:
                raise UserError(
                    f"context of {int(self.state.length.max()) + 1} tokens: the attention cache "
                    "was made for fewer; start with a larger max_context"
                )
            self._room -= 1
        self._ids.copy_(token_ids)
        if not self._ids.is_cuda:
            return self._read()
        if not self._ran:
            self._ran = True
            return self._read()
        if self._graph is None:
            with torch.cuda.device(self._ids.device):
                self._graph = record(self._record)
        self._graph.replay()
        return self._logits

    def _record(self) -> None:
        self._logits = self._read()

    def _read(self) -> Tensor:
        model, state = self.model, self.state
        x = model.embedding_model.llm_text_embeddings(self._ids[:, None])
        x = model.normalize(model.encode(x, None, state))
        logits = model.read_on(x, None, state)
        self._home.settle(state)  # a mixer's new state comes back to where the graph reads it
        return logits
