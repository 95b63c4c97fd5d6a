"""`python -m mmmamba_edge.export.verify_traced GRAPH CHECKPOINT`: a traced decoder against PyTorch.

What `verify` does for bundles, for graphs of `traced_decoder.read` that another exporter has
written, such as optimum-onnx: the same prompts, read whole and in pieces, the same figures, the
same threshold. Graphs with `input_ids` read text, image tokens among it as rows of the table; to
those with `inputs_embeds` go the checkpoint's vectors of text and pictures.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from mmmamba_edge.errors import CheckFailed, UserError
from mmmamba_edge.export.reference import read_streamed
from mmmamba_edge.export.traced_decoder import empty_state, state_names
from mmmamba_edge.export.verify import EXACT_DB, compare, make_prompts
from mmmamba_edge.export.weights import Weights
from mmmamba_edge.model.checkpoints import load_model, open_checkpoint
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.quant.schemes import SCHEMES
from mmmamba_edge.runtimes.onnxruntime_runner import OnnxRuntimeRunner

Floats = NDArray[np.float32]
JUDGED = ("sqnr_db", "worst_sqnr_db", "worst_state_sqnr_db")


def verify_traced(graph: str | Path, checkpoint: str | Path) -> dict[str, Any]:
    """Compare a graph with the checkpoint it was made of.

    Args:
        graph: an ONNX file, or the folder in which it is `model.onnx`.
        checkpoint: a checkpoint folder, of any layout.

    Returns:
        prompts, positions, pictures (0 for a graph of ids), and the figures of `verify.compare`.

    Raises:
        UserError: not a traced decoder of such a checkpoint.
        CheckFailed: a figure in dB is below 75.
    """
    source = open_checkpoint(checkpoint)
    runner = TracedRunner(_file(graph), load_model(source, dtype=torch.float32))
    prompts = list(make_prompts(source.config, None))
    if runner.takes_ids:
        prompts = [replace(prompt, pixels=None) for prompt in prompts]
    wanted = read_streamed(
        Weights(source, SCHEMES["none"]), [(prompt.ids, prompt.pixels) for prompt in prompts]
    )
    # `compare` asks no more of a runner than this one has.
    figures = compare(cast(OnnxRuntimeRunner, runner), prompts, wanted)
    for name in JUDGED:
        if not figures[name] >= EXACT_DB:  # NaN fails too
            raise CheckFailed(f"{graph}: {name} is {figures[name]}, below {EXACT_DB:g}: {figures}")
    return {
        "prompts": len(prompts),
        "positions": sum(len(prompt.ids) for prompt in prompts),
        "pictures": sum(prompt.pixels is not None for prompt in prompts),
        **figures,
    }


@dataclass
class TracedState:
    """Inputs of the graph by name; batch 1."""

    tensors: dict[str, Floats]

    def arrays(self) -> dict[str, Floats]:
        """The neutral layout of runtimes/base.py."""
        return {name: tensor[0] for name, tensor in self.tensors.items()}


class TracedRunner:
    """A traced decoder in ONNX Runtime; what it does not hold, the PyTorch model does."""

    def __init__(self, graph: Path, model: MMMamba):
        self._session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self._model = model
        self._names = state_names(model.config)
        inputs = {tensor.name: tensor.shape for tensor in self._session.get_inputs()}
        self.takes_ids = "input_ids" in inputs
        for name, tensor in zip(self._names, empty_state(model.config), strict=True):
            found = inputs.get(f"past_state.{name}")
            sizes = ["batch", *(size or "past" for size in tensor.shape[1:])]
            # Free axes may have any name.
            fixed = [size if isinstance(size, int) else None for size in found or ()]
            if fixed != [size if isinstance(size, int) else None for size in sizes]:
                raise UserError(
                    f"{graph}: not a traced decoder of this checkpoint: past_state.{name} is "
                    f"{found or 'missing'}, expected {sizes}"
                )
        self._outputs = ["logits", *(f"present_state.{name}" for name in self._names)]

    def new_state(self) -> TracedState:
        """A state that has read nothing."""
        tensors = (tensor.numpy() for tensor in empty_state(self._model.config))
        return TracedState(dict(zip(self._names, tensors, strict=True)))

    def read_all(self, ids: NDArray[np.int64], pixels: Floats | None) -> tuple[Floats, TracedState]:
        """Logits of every position (tokens, vocab_size), and the state."""
        return self._read(ids, pixels, self.new_state())

    def prefill(
        self, ids: NDArray[np.int64], pixels: Floats | None, state: TracedState
    ) -> tuple[Floats, TracedState]:
        """Logits of the last position (vocab_size,), and the state."""
        logits, state = self._read(ids, pixels, state)
        return logits[-1], state

    def step(self, token_id: int, state: TracedState) -> tuple[Floats, TracedState]:
        """Read one token; as `prefill`."""
        return self.prefill(np.array([token_id]), None, state)

    def _read(
        self, ids: NDArray[np.int64], pixels: Floats | None, state: TracedState
    ) -> tuple[Floats, TracedState]:
        feed: dict[str, Any] = {f"past_state.{name}": x for name, x in state.tensors.items()}
        if self.takes_ids:
            feed["input_ids"] = ids[None]
        else:
            feed["inputs_embeds"] = self._embedded(ids, pixels)
        logits, *after = cast(list[Floats], self._session.run(self._outputs, feed))
        return logits[0], TracedState(dict(zip(self._names, after, strict=True)))

    @torch.inference_mode()
    def _embedded(self, ids: NDArray[np.int64], pixels: Floats | None) -> Floats:
        images = None if pixels is None else self._model.image_vectors(torch.from_numpy(pixels))
        return self._model.embed_tokens(torch.from_numpy(ids[None]), None, images).numpy()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: prints the figures; 0 good, 1 a figure is too low, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m mmmamba_edge.export.verify_traced",
        description="Compare a decoder that optimum-cli has exported with its checkpoint.",
    )
    parser.add_argument("graph", type=Path, help="ONNX file, or the folder that holds model.onnx")
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder, of any layout")
    args = parser.parse_args(argv)
    try:
        figures = verify_traced(args.graph, args.checkpoint)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CheckFailed) else 2
    print(args.graph, *(f"{name} {value}" for name, value in figures.items()), sep="\n  ")
    return 0


def _file(graph: str | Path) -> Path:
    path = Path(graph)
    path = path / "model.onnx" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: not found")
    return path


if __name__ == "__main__":
    sys.exit(main())
