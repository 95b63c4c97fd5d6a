"""The loop of a distillation stage: batches, gradients, optimiser, progress, until it ends.

It may be killed at any moment: the last saved progress goes on bit for bit on a CPU. A loss that is
no number, a full disk or Ctrl-C end it with a message that names what was saved.
"""

from collections.abc import Generator, Iterator, Mapping
from itertools import islice
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Protocol

import torch
from torch import Tensor, nn

from mmmamba_edge.distill.batches import Batch, Share, Source, StepBatches
from mmmamba_edge.distill.cuda_graph import RecordedStage
from mmmamba_edge.distill.distill_recipe import EngineConfig, StageConfig
from mmmamba_edge.distill.engine import Engine
from mmmamba_edge.distill.metrics import Metrics
from mmmamba_edge.distill.progress import load_progress, save_progress
from mmmamba_edge.distill.schedule import wsd
from mmmamba_edge.distill.student import trained
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.mixer import Mamba2Mixer

PROGRESS = "progress.safetensors"


class Stage(Protocol):
    """What a stage file gives the loop (layer_matching.py, logit_matching.py)."""

    mixers: Mapping[int, Mamba2Mixer]
    units: list[nn.Module]

    def backward(self, batch: Batch, factor: Tensor | float) -> Tensor:
        """Add up gradients of `factor` times the batch's loss; returns that product."""
        ...

    def loss(self, batch: Batch) -> Tensor:
        """The batch's loss, summed over tokens by weight; nothing learnt."""
        ...


def train(
    stage: Stage, source: Source, engine: Engine, config: StageConfig, out: Path, title: str,
    *, kind: EngineConfig, validation: Source | None = None,
) -> None:  # fmt: skip
    """Train a stage's mixers to the end of its schedule, from `out`'s progress if there is any.

    Args:
        stage: the model and its loss.
        source: of the batches.
        engine: device and processes.
        config: the stage's table of the recipe.
        out: the stage's folder.
        title: of the progress line.
        kind: which optimiser, and whether steps are recorded.
        validation: held-out rows; their mean loss is measured now and then.
    """
    parameters = trained(stage.mixers)
    optimizer = make_optimizer(parameters, config, kind, engine)
    progress = load_progress(out / PROGRESS, parameters, [optimizer])
    if progress.step >= config.steps:
        return
    share = engine.share(config.batch, config.micro_batch)
    feed = ahead(source.steps(progress.position, share))
    metrics = Metrics(out, title, engine, config.steps, progress.step)
    validate = Validation(stage, validation, engine, share)
    saved = progress.step
    if kind.cuda_graph:
        stage = RecordedStage(stage)
    try:
        if progress.step == 0:
            validate(metrics, 0)
        for step in range(progress.step, config.steps):
            batches = next(feed)
            metrics.skipped(batches.skipped)
            rate = config.lr * wsd(
                step, steps=config.steps, warmup=config.warmup, decay=config.decay
            )
            loss, norm = optimise(stage, optimizer, parameters, batches, engine, config.clip, rate)
            metrics.count(loss, norm, sum(batch.tokens for batch in batches.micro))
            done = step + 1
            last = done >= config.steps
            if last or done % config.log_every == 0:
                _check_finite(metrics.log(done, rate), done, out, saved, engine)
            if last or done % config.save_every == 0:
                # The loss is of the weights before the step, the norm of the step itself.
                _check_finite(loss + norm, done, out, saved, engine)
                save_progress(
                    out / PROGRESS, parameters, [optimizer], done,
                    position=batches.position, write=engine.is_main,
                )  # fmt: skip
                saved = done
            if last or done % config.validate_every == 0:
                validate(metrics, done)
    except UserError as error:
        if saved and "--resume" not in str(error):
            raise UserError(f"{error}\n{_resume_hint(out, saved)}") from error
        raise
    finally:
        metrics.close()
        feed.close()


def optimise(
    stage: Stage, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter],
    batches: StepBatches, engine: Engine, clip: float, rate: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One optimiser step; returns this process's share of the loss and the gradients' norm."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    # A token weighs the same wherever it is: the whole global batch divides.
    weight = engine.total(sum(float(batch.weights.sum()) for batch in batches.micro))
    factor = (engine.world / weight.clamp(min=1e-9)).float()
    losses = []
    for i, batch in enumerate(batches.micro):
        with engine.accumulating(stage.units, last=i == len(batches.micro) - 1):
            losses.append(stage.backward(batch.to(engine.device), factor))
    norm = engine.clip(list(parameters.values()), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=not isinstance(stage, RecordedStage))
    return torch.stack(losses).sum() / engine.world, norm


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: StageConfig, kind: EngineConfig, engine: Engine
) -> torch.optim.Optimizer:
    """AdamW; tensors named "bias" do not decay (spec 6.4)."""
    groups = [
        {
            "params": [p for name, p in parameters.items() if ("bias" in name) == exempt],
            "weight_decay": 0.0 if exempt else config.weight_decay,
        }
        for exempt in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    if kind.optimizer == "adamw8bit":
        if engine.shards:
            raise UserError("optimizer adamw8bit: not with FSDP; use adamw, whose state is sharded")
        from bitsandbytes.optim.adamw import AdamW8bit

        return AdamW8bit(groups, lr=config.lr)  # pyright: ignore[reportReturnType]
    return torch.optim.AdamW(groups, lr=config.lr, fused=engine.device.type == "cuda")


class Validation:
    """The mean loss over a few held-out batches, always the same ones."""

    STEPS = 8

    def __init__(self, stage: Stage, source: Source | None, engine: Engine, share: Share) -> None:
        self.stage, self.source, self.engine, self.share = stage, source, engine, share

    def __call__(self, metrics: Metrics, step: int) -> None:
        if self.source is None:
            return
        loss = mean_loss(self.stage, self.source, self.engine, self.share, self.STEPS)
        metrics.validation(step, loss)


def mean_loss(stage: Stage, source: Source, engine: Engine, share: Share, steps: int) -> float:
    """A stage's loss per weighted token over a source's first steps, in all processes together."""
    total = weight = 0.0
    with torch.compiler.set_stance("force_eager"):  # not worth a compilation of its own
        for batch in (b for step in islice(source.steps(None, share), steps) for b in step.micro):
            batch = batch.to(engine.device)
            total += float(stage.loss(batch))
            weight += float(batch.weights.sum())
    return float(engine.total(total) / engine.total(weight))


def ahead(steps: Iterator[StepBatches], depth: int = 1) -> Generator[StepBatches, None, None]:
    """The same steps, prepared by a thread while the device computes."""
    queue: Queue[StepBatches | BaseException] = Queue(depth)
    closed = False

    def fill() -> None:
        try:
            for step in steps:
                queue.put(step)
                if closed:
                    return
        except BaseException as error:
            queue.put(error)

    Thread(target=fill, daemon=True).start()
    try:
        while True:
            step = queue.get()
            if isinstance(step, BaseException):
                raise step
            yield step
    finally:
        closed = True
        while not queue.empty():  # let the thread see it
            queue.get_nowait()


def _check_finite(loss: Tensor | float, step: int, out: Path, saved: int, engine: Engine) -> None:
    """All processes stop together: the sum is no number in any of them."""
    value = float(engine.total(torch.as_tensor(loss).detach()))
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(
            f"the loss is {value} at step {step}; lower lr or clip. {_resume_hint(out, saved)}"
        )


def _resume_hint(out: Path, saved: int) -> str:
    if not saved:
        return "Nothing was saved yet."
    return f"The last good checkpoint is {out / PROGRESS}, of step {saved}; --resume goes on there."
