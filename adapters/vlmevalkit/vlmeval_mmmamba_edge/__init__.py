"""mmMamba Edge in VLMEvalKit: importing this package lets `run.py --config` know `MMMambaEdge`.

    python -m vlmeval_mmmamba_edge VLMEvalKit/run.py --config models.json

or, from Python, `register("mmMamba-linear", "build/linear")`.
"""

from functools import partial
from typing import Any

import vlmeval.vlm
from vlmeval.config import supported_VLM

from vlmeval_mmmamba_edge.model import MMMambaEdge

__all__ = ["MMMambaEdge", "register"]

vlmeval.vlm.MMMambaEdge = MMMambaEdge  # where run.py looks for a config's "class"


def register(name: str, model_path: str, **settings: Any) -> None:
    """Make a model known to VLMEvalKit by a name, for `run.py --model` and `supported_VLM`.

    Args:
        name: to be.
        model_path, settings: as for `MMMambaEdge`.
    """
    supported_VLM[name] = partial(MMMambaEdge, model_path=model_path, **settings)
