"""Whether the device that somebody asked for is there."""

import torch

from mmmamba_edge.errors import UserError


def require_device(device: str | None) -> None:
    """UserError where "cuda" is asked for and this machine, or this PyTorch, has none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use --device cpu")
