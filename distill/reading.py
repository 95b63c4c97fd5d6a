"""A model reads a batch: what the vocabulary's head is given, and at which positions it counts."""

from torch import Tensor

from mmmamba_edge.distill.batches import Batch
from mmmamba_edge.model.decoder import MMMamba


def read(model: MMMamba, batch: Batch) -> Tensor:
    """(rows, seq, hidden): the normed hidden states of every position."""
    if batch.dense:
        x = model.embedding_model.llm_text_embeddings(batch.ids)
        return model.read(model.normalize(model.encode(x, None, None)))
    x = model.embed(batch.ids, batch.lengths, batch.pixel_values)
    return model.read(x, batch.lengths)


def weighted(hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The positions that count: (tokens, hidden) and their weights (tokens,)."""
    if batch.dense:
        return hidden.flatten(0, 1), batch.weights.flatten()
    picked = batch.weights > 0
    return hidden[picked], batch.weights[picked]
