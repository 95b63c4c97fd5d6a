"""Stage 1: what is new in each mixer learns to imitate the layer's attention (spec 6.1, 6.2).

Trained: conv, dt, gate, norm and decay. Queries, keys, values, output projection, MLPs, norms,
embeddings and head are the teacher's and stay so.
"""

from mmmamba_edge.distill.layer_matching import match_layers
from mmmamba_edge.distill.run import Run
from mmmamba_edge.model.checkpoints import Checkpoint


def run_stage(run: Run, start: Checkpoint | None) -> Checkpoint:
    """Train the stage.

    Args:
        run: what it is run with; `run.recipe.stage1` is its table.
        start: mixers to go on from; None seeds them.

    Returns:
        The finished student.
    """
    return match_layers(run, 1, run.recipe.stage1, start)
