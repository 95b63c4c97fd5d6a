"""Activation checkpointing in two strengths: what is cheap to compute again is not kept.

Between projections a layer works elementwise or along short chunks: little arithmetic, most of the
memory that a backward pass needs. "cheap" computes that part again from the projections' outputs;
"layers" keeps only each layer's input and computes all of it again, the cheap part twice.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Recompute = Literal["nothing", "cheap", "layers"]


class Frugal(nn.Module):
    """A module some of whose work may be done again in the backward pass.

    Attributes:
        frugal: whether it is. Without gradients it makes no difference.
    """

    frugal = False

    def again(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), whose intermediate results are not kept if `frugal`."""
        if self.frugal and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)
