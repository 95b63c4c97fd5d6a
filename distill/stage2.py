"""Stage 2: the inherited queries, keys and values learn too, towards the same targets (spec 6.1).

The targets still come from the teacher's own attention. Nothing is shared with what learns here:
the original's shadow weights could be, and were then trained along (spec 9.3).
"""

from mmmamba_edge.distill.layer_matching import match_layers
from mmmamba_edge.distill.run import Run
from mmmamba_edge.model.checkpoints import Checkpoint


def run_stage(run: Run, start: Checkpoint | None) -> Checkpoint:
    """Train the stage; arguments as in `stage1.run_stage`, its table is `run.recipe.stage2`."""
    return match_layers(run, 2, run.recipe.stage2, start)
