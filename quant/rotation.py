"""Turning the residual stream: every answer stays, every matrix becomes another one.

With R orthogonal, what writes into the stream is turned by R and what reads it by R's inverse; an
RMS norm does not notice, once its weight is in the matrices that read it (QuaRot, arXiv 2404.00456,
the rotation called R1). Two uses: a full random rotation spreads outliers before quantising; and
one that turns only pairs of channels moves weights off a grid that they lie on, outliers kept, so
that a model that was published in 4 bits can be quantised for a fair comparison.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mmmamba_edge.model.checkpoints import Checkpoint
from mmmamba_edge.model.tensor_names import layer_prefix
from mmmamba_edge.quant.schemes import EMBEDDING, HEAD, PROJECTOR

Kind = Literal["full", "pairs"]
FINAL_NORM = "language_model.model.norm.weight"
READ_BY = {  # which matrices of a layer read a norm
    "attention_norm": ("wqkv", "q_proj", "k_proj", "v_proj", "g_proj", "in_proj"),
    "ffn_norm": ("w1", "w3"),
}
WRITE = ("attention.wo", "attention.o_proj", "feed_forward.w2")
STEM = "embedding_model.vision_embeddings."


def rotation(width: int, kind: Kind, seed: int = 0) -> Tensor:
    """(width, width) float64: a random orthogonal matrix, or random turns of random pairs."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "full":
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        return q * r.diagonal().sign()
    turn = torch.eye(width, dtype=torch.float64)
    order = torch.randperm(width, generator=generator)
    angles = (0.15 + 0.7 * torch.rand(width // 2, generator=generator, dtype=torch.float64)) * (
        torch.pi / 2
    )
    for (i, j), angle in zip(order[: width // 2 * 2].view(-1, 2).tolist(), angles, strict=True):
        c, s = float(angle.cos()), float(angle.sin())
        turn[i, i], turn[j, j], turn[i, j], turn[j, i] = c, c, -s, s
    return turn


def turned(checkpoint: Checkpoint, kind: Kind, seed: int = 0) -> Callable[[str], Tensor]:
    """Gives the tensors of the turned model, float32, by training name."""
    config = checkpoint.config
    turn = rotation(config.hidden_size, kind, seed)
    prefixes = [layer_prefix(config, i) for i in range(len(config.layer_types))]

    def get(name: str) -> Tensor:
        return checkpoint.get(name).double()

    def reads(weight: Tensor, norm: str) -> Tensor:
        return (weight * get(norm)) @ turn

    def new(name: str) -> Tensor:
        if name in (EMBEDDING, f"{STEM}position_embedding", f"{STEM}class_embedding"):
            # Vision's stem stays as it is: its vectors meet the stream behind the projector.
            return get(name) @ turn if name == EMBEDDING else get(name)
        if name == HEAD:
            return reads(get(name), FINAL_NORM)
        if name == f"{PROJECTOR}2.weight":
            return turn.T @ get(name)
        if name == f"{PROJECTOR}2.bias":
            return get(name) @ turn
        if name == FINAL_NORM or name.endswith(("attention_norm.weight", "ffn_norm.weight")):
            return torch.ones_like(get(name))
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            return get(name)
        inner = name.removeprefix(prefix).removesuffix(".weight")
        if inner in WRITE:
            return turn.T @ get(name)
        last = inner.rpartition(".")[2]
        norm = next((norm for norm, readers in READ_BY.items() if last in readers), None)
        return reads(get(name), f"{prefix}{norm}.weight") if norm else get(name)

    return lambda name: new(name).float()
