"""Warm-up, stable, decay: a factor on the learning rate that ends with the training, at zero."""

import math
from typing import Literal


def wsd(
    step: int, *, steps: int, warmup: int, decay: int, shape: Literal["cosine", "linear"] = "cosine"
) -> float:
    """The factor for 0-based `step` of `steps` (spec 6.4).

    Args:
        step: 0 to steps - 1.
        steps: of the whole training.
        warmup: steps of the linear rise.
        decay: last steps, over which it falls to zero.
        shape: of the fall: half a cosine (the paper's) or a line.
    """
    up = (step + 1) / warmup if warmup else 1.0
    left = (steps - step) / decay if decay else 1.0
    if left < 1.0 and shape == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return min(1.0, up, left)
