"""A fused decoding step recorded for one state as a CUDA graph: a token is one launch.

A copy of a state is another state with a recording of its own: some ten milliseconds; the buffers
between kernels are the model's, so one recording at a time may run.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmmamba_edge.model.decoder import DecoderState
from mmmamba_edge.model.fused_step import BLOCK, FusedStep
from mmmamba_edge.model.layers import AttentionState


class RecordedStep:
    """`FusedStep` for one state, as a CUDA graph (on a CPU, in Triton's interpreter: launched).

    The graph knows the tensors it was recorded on. Reading a prompt may put others into the state:
    `step` brings their contents home first.
    """

    def __init__(self, fused: FusedStep, state: DecoderState):
        self.fused = fused
        self._home = Home(state)
        self._graph: torch.cuda.CUDAGraph | None = None
        if fused.device.type == "cuda":
            with torch.cuda.device(fused.device):
                compile_kernels(fused)
                self._graph = record(lambda: fused.launch(state))

    def step(self, token_id: int, state: DecoderState) -> Tensor:
        """Read one token: logits (vocab_size,) float32, overwritten by the next step.

        Args:
            token_id: of the vocabulary.
            state: the one it was recorded for.
        """
        self._home.settle(state)
        self.fused.token.fill_(token_id)
        return self.replay(state)

    def replay(self, state: DecoderState) -> Tensor:
        """`step` for the token already in the model's `FusedStep.token`, on a settled state."""
        if self._graph is None:
            return self.fused.launch(state)
        self._graph.replay()
        return self.fused.logits


def record(launch: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """What `launch` enqueues, as a graph; everything it needs must be compiled by then."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="relaxed"):
        launch()
    return graph


def compile_kernels(fused: FusedStep) -> None:
    """Compile and load every kernel, on a state of its own: a recording must find them loaded.

    A kernel is compiled for how its arguments are aligned, and all allocated states are alike.
    """
    if fused.compiled_for == fused.how:
        return
    scratch = fused.model.new_state(1, max_context=max(BLOCK, 16))
    fused.launch(scratch)
    torch.cuda.synchronize()
    fused.compiled_for = fused.how


def _make_contiguous(state: DecoderState) -> None:
    """As kernels index them; a scan may have left a state transposed."""
    for owner, name in _places(state):
        setattr(owner, name, getattr(owner, name).contiguous())


class Home:
    """The tensors of a state, made contiguous, and where they belong: a graph knows addresses."""

    def __init__(self, state: DecoderState):
        _make_contiguous(state)
        self._places = list(_places(state))
        self._tensors = [getattr(owner, name) for owner, name in self._places]

    def settle(self, state: DecoderState) -> None:
        """Where the state holds another tensor by now, copy it home and put the old one back."""
        for (owner, name), home in zip(self._places, self._tensors, strict=True):
            now = getattr(owner, name)
            if now is not home:
                home.copy_(now)
                setattr(owner, name, home)


def _places(state: DecoderState) -> Iterable[tuple[Any, str]]:
    yield state, "length"
    for layer in state.layers:
        names = ("key", "value", "length") if isinstance(layer, AttentionState) else ("conv", "ssm")
        for name in names:
            yield layer, name
