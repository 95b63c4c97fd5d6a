"""A training step recorded once as a CUDA graph: one launch in place of thousands."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmmamba_edge.distill.batches import Batch
from mmmamba_edge.distill.student import trained

if TYPE_CHECKING:
    from mmmamba_edge.distill.training import Stage


def graphed(backward: Callable[..., Tensor], example: dict[str, Tensor]) -> Callable[..., Tensor]:
    """`backward`, recorded on the current device; a call copies a batch in and replays it.

    A small model's kernels finish sooner than Python launches them, so replaying is about twice as
    fast. What `backward` leaves in `.grad` stays in place and is overwritten by every replay: do
    not set gradients to None in between.

    A graph knows addresses and keeps no tensor alive: `backward` is kept with it, and whatever else
    it reads must live as long.

    Args:
        backward: batch -> loss. It must drop old gradients itself or add to them in place, do the
            same work on every call, and never wait for the device.
        example: a batch; all batches have its shapes and types.

    Returns:
        A function of the same arguments; the next call overwrites the loss it returns.
    """
    inputs = {name: tensor.clone() for name, tensor in example.items()}
    # Compile, autotune and allocate on a side stream first, as capture demands.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            backward(**inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = backward(**inputs)

    def replay(**batch: Tensor) -> Tensor:
        for name, tensor in batch.items():
            inputs[name].copy_(tensor, non_blocking=True)
        graph.replay()
        return loss

    replay.reads = backward  # pyright: ignore[reportFunctionMemberAccess]
    return replay


class RecordedStage:
    """A distillation stage whose gradients of dense micro-batches are replayed from a CUDA graph.

    The first dense batch is recorded, and those of its shape replay it; others run as they are. All
    add to the same `.grad` tensors, which must stay: zero them, do not set them to None.

    Args:
        stage: what is recorded; one process, and nothing read from disk by its `backward`.
    """

    def __init__(self, stage: "Stage") -> None:
        self.mixers, self.units, self.loss = stage.mixers, stage.units, stage.loss
        self._backward = stage.backward
        self._parameters = list(trained(stage.mixers).values())
        self._shape: torch.Size | None = None

    def backward(self, batch: Batch, factor: Tensor | float) -> Tensor:
        """`Stage.backward`; the loss is a copy."""
        if not batch.dense or self._shape not in (None, batch.ids.shape):
            return self._backward(batch, factor)
        factor = torch.as_tensor(factor, dtype=torch.float32, device=batch.ids.device)
        if self._shape is None:
            self._shape = batch.ids.shape
            self._replay = self._record(batch, factor)
        return self._replay(ids=batch.ids, weights=batch.weights, factor=factor).clone()

    def _record(self, batch: Batch, factor: Tensor) -> Callable[..., Tensor]:
        for p in self._parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        before = [p.grad.clone() for p in self._parameters if p.grad is not None]

        self._recorded = batch  # a recording reads its tensors where they are

        def backward(ids: Tensor, weights: Tensor, factor: Tensor) -> Tensor:
            return self._backward(replace(batch, ids=ids, weights=weights), factor)

        inputs = {"ids": batch.ids, "weights": batch.weights, "factor": factor}
        replay = graphed(backward, inputs)
        for p, gradient in zip(self._parameters, before, strict=True):
            assert p.grad is not None
            p.grad.copy_(gradient)  # without what the warm-up added
        return replay
