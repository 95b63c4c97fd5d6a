"""Stage 3: the student reads by itself and learns the teacher's next-token distributions (6.3).

Layers of `attention_layers` are the teacher's attention again. Trained: everything in the other
layers' mixers but dt_bias, A_log_bias and the output projection.
"""

from mmmamba_edge.distill.logit_matching import LogitMatching, TeacherCache
from mmmamba_edge.distill.run import Run
from mmmamba_edge.distill.student import share_output_projection, train_only
from mmmamba_edge.distill.training import train
from mmmamba_edge.model.checkpoints import Checkpoint


def run_stage(run: Run, start: Checkpoint | None) -> Checkpoint:
    """Train the stage; arguments as in `stage1.run_stage`, its table is `run.recipe.stage3`."""
    config = run.recipe.stage3
    layers = sorted(set(range(len(run.teacher.layers))) - run.kept)
    mixers = run.mixers(layers, start)
    train_only(mixers, config.train)
    share_output_projection(run.teacher, mixers, run.file)
    cache = None
    if config.topk:
        how = run.recipe.engine
        identity = f"{run.file.weights_id()} {config.tau} {how.bf16} {how.teacher_bits}"
        cache = TeacherCache(run.out / "teacher-answers", config.topk, identity)
    stage = LogitMatching(
        run.teacher, mixers, run.engine, tau=config.tau, recompute=config.recompute, cache=cache,
        compiled=run.recipe.engine.compile,
    )  # fmt: skip
    train(
        stage, run.source, run.engine, config, run.begin(3), "stage 3",
        kind=run.recipe.engine, validation=run.validation,
    )  # fmt: skip
    return run.finish(3, mixers)
