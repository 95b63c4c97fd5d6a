"""Where a bundle departs from its reference: by layer, and by what each layer adds.

ONNX graphs are copied with the residual stream between their parts as further outputs. Of each half
of a layer (mixer or attention, feed-forward) two errors are told: the *running* one, of the stream
behind it, which grows from layer to layer; and the *added* one, of what this half alone contributes
to the stream, PyTorch computing it from the artefact's own input. A fault is an outlier of the
second. A .pte hides its layers in a delegate; there, and for ONNX too, the states are compared.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

from mmmamba_edge.config import Config
from mmmamba_edge.export.reference import embedded, new_state, normalised
from mmmamba_edge.export.verify import link, sqnr_db
from mmmamba_edge.export.weights import Weights
from mmmamba_edge.manifest import Manifest, is_cache
from mmmamba_edge.model.decoder import DecoderLayer
from mmmamba_edge.model.tensor_names import layer_prefix
from mmmamba_edge.quant.check_data import Item
from mmmamba_edge.quant.check_read import Artefact, cuts
from mmmamba_edge.runtimes.base import State
from mmmamba_edge.runtimes.onnxruntime_runner import OnnxRuntimeRunner, session_options

Floats = NDArray[np.float32]

PROBE_TOKENS = 384  # of a sequence that layers are compared on
HALVES = ("mix", "feed_forward")


@dataclass(frozen=True)
class HalfLayer:
    """Half a layer of the artefact against the reference.

    Attributes:
        layer: number over the whole stack.
        half: "mix" (mixer or attention) or "feed_forward".
        running_db: signal to error of the stream behind it.
        cosine: mean cosine of the stream's vectors with the reference's.
        added_db: signal to error of what it adds, given the artefact's own input.
    """

    layer: int
    half: str
    running_db: float
    cosine: float
    added_db: float


@dataclass
class Probe:
    """What an artefact did to a few sequences, and what the reference does to them.

    Args:
        config: the model's.
        items: the sequences, cut to PROBE_TOKENS.

    Attributes:
        streams: of each sequence, the stream before layer 0, behind its mixer, behind its
            feed-forward, behind layer 1's mixer, and so on; empty where the artefact hides it.
        states: of each sequence, the state after it.
    """

    config: Config
    items: Sequence[Item]
    streams: list[list[Floats]] = field(default_factory=list)
    states: list[dict[str, Floats]] = field(default_factory=list)
    halves: list[HalfLayer] = field(default_factory=list)
    state_db: dict[str, float] = field(default_factory=dict)
    _hidden: list[Tensor] = field(default_factory=list)

    # --- the artefact ---------------------------------------------------------------------------

    def watch_graph(self, folder: Path, manifest: Manifest) -> None:
        """Read the sequences with a copy of the ONNX bundle that shows its stream."""
        with tempfile.TemporaryDirectory(prefix="mmmamba-edge-") as scratch:
            graph, names = open_up(folder, manifest, Path(scratch))
            runner = OnnxRuntimeRunner(folder, verify=False)
            vectors = [runner.vectors(item.ids, item.tiles()) for item in self.items]
            del runner  # its decoder's weights: two at a time are one too many
            session = ort.InferenceSession(
                graph, session_options(manifest, None), providers=["CPUExecutionProvider"]
            )
            self.streams = [_streams(session, manifest, v, names) for v in vectors]

    def watch_states(self, runner: Artefact) -> None:
        """Read the sequences with the artefact itself, and keep the states after them."""
        for item in self.items:
            state: State = runner.new_state()
            for part, tiles in cuts(item.ids, item.tiles(), self.config):
                _, state = runner.prefill(item.ids[part], tiles, state)
            self.states.append(state.arrays())

    # --- the reference --------------------------------------------------------------------------

    def begin(self, weights: Weights) -> None:
        """Before the first layer."""
        with torch.inference_mode():
            self._hidden = [embedded(weights, [(i.ids, i.tiles())])[0] for i in self.items]

    def layer(self, index: int, layer: DecoderLayer, normalise: bool) -> None:
        """The reference's layer `index`; a `check_reference.Watch`."""
        with torch.inference_mode():
            sums = {half: _Sum() for half in HALVES}
            for number, x in enumerate(self._hidden):
                x = normalised(x) if normalise else x
                state = new_state(layer, x)
                middle = x + layer.attention(layer.attention_norm(x), None, state)
                end = middle + layer.feed_forward(layer.ffn_norm(middle))
                self._hidden[number] = end
                if self.states:
                    for name, tensor in state.tensors().items():
                        self._compare_state(number, f"{index}.{name}", tensor[0].numpy())
                if self.streams:
                    got = [_tensor(s) for s in self.streams[number][2 * index : 2 * index + 3]]
                    before = normalised(got[0]) if normalise else got[0]
                    adds = layer.attention(layer.attention_norm(before), None, new_state(layer, x))
                    sums["mix"].add(got[1], middle, got[1] - before, adds)
                    adds = layer.feed_forward(layer.ffn_norm(got[1]))
                    sums["feed_forward"].add(got[2], end, got[2] - got[1], adds)
            if self.streams:
                self.halves += [HalfLayer(index, half, *sums[half].figures()) for half in HALVES]

    def _compare_state(self, number: int, name: str, want: Floats) -> None:
        got = self.states[number][name]
        if is_cache(name):
            want = want[:, : got.shape[1]]
        if name.endswith(".value"):  # a fold may have moved factors from values to what reads them
            power = np.square(want).sum(axis=1, keepdims=True)
            want = want * ((got * want).sum(axis=1, keepdims=True) / np.maximum(power, 1e-30))
        db = sqnr_db(got, want)
        self.state_db[name] = min(self.state_db.get(name, 200.0), db)


class _Sum:
    """Signal and error over sequences."""

    def __init__(self) -> None:
        self.running = [0.0, 0.0]
        self.added = [0.0, 0.0]
        self.cosines: list[Floats] = []

    def add(self, got: Tensor, want: Tensor, adds: Tensor, should: Tensor) -> None:
        for sums, a, b in ((self.running, got, want), (self.added, adds, should)):
            sums[0] += float(b.double().square().sum())
            sums[1] += float((a.double() - b.double()).square().sum())
        self.cosines.append(nn.functional.cosine_similarity(got, want, dim=-1)[0].numpy())

    def figures(self) -> tuple[float, float, float]:
        return _db(*self.running), float(np.concatenate(self.cosines).mean()), _db(*self.added)


def _db(signal: float, error: float) -> float:
    if not np.isfinite(error):
        return -200.0
    if error == 0:
        return 200.0
    return float(np.clip(10 * np.log10((signal + 1e-300) / (error + 1e-300)), -200, 200))


def _tensor(array: Floats) -> Tensor:
    return torch.from_numpy(array)[None]


# --- the graph that shows its stream --------------------------------------------------------------


def open_up(folder: Path, manifest: Manifest, shown: Path) -> tuple[Path, list[str]]:
    """The decoder with further outputs, in the folder `shown`; its weights are linked, not copied.

    Returns:
        The graph, and the stream's values in order (see `Probe.streams`).
    """
    name = manifest.graphs["decoder"]
    model = onnx.load(folder / name, load_external_data=False)
    values = stream_values(model.graph, manifest.model)
    inputs = {value.name for value in model.graph.input}
    for value in values:
        if value not in inputs:
            model.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and not (shown / entry.value).exists():
                link(folder / entry.value, shown / entry.value)
    (shown / name).write_bytes(model.SerializeToString())
    return shown / name, values


def stream_values(graph: onnx.GraphProto, config: Config) -> list[str]:
    """The values of a decoder graph that hold the stream, 2 layers + 1 of them.

    They are found by the labels of the norms that read them, in both dialects.
    """
    read_by = {}
    for node in graph.node:
        label = node.name.partition(".")[2]
        sums = [out for out in node.output[3:4] if out]  # the fused add and norm gives both
        read_by[label] = sums[0] if sums else node.input[0]
    values = []
    for index in range(len(config.layer_types)):
        prefix = layer_prefix(config, index)
        values += [read_by[f"{prefix}attention_norm"], read_by[f"{prefix}ffn_norm"]]
    edge = len(config.embedding.layer_types)
    if config.normalize_encoder_output and edge:
        values[2 * edge] = read_by["normalize_encoder_output"]
    return [*values, read_by["language_model.model.norm"]]


def _streams(
    session: ort.InferenceSession, manifest: Manifest, vectors: Floats, names: list[str]
) -> list[Floats]:
    """Every value of the stream, (tokens, hidden) each."""
    feed: dict[str, Any] = {"inputs_embeds": vectors, "logits_to_keep": np.zeros(1, np.int64)}
    for tensor in manifest.state:
        feed[f"past_state.{tensor.name}"] = np.zeros(tensor.shape, tensor.dtype)
    if any(is_cache(tensor.name) for tensor in manifest.state):
        feed["past_length"] = np.zeros(1, np.int64)
    outside = [name for name in names if name not in feed]
    found = dict(zip(outside, session.run(outside, feed), strict=True)) | {"inputs_embeds": vectors}
    return [cast(Floats, found[name])[0] for name in names]


def probes(items: Sequence[Item], config: Config, limit: int | None) -> list[Item]:
    """One sequence with pictures and one without, cut to what is quickly read."""
    chosen = [
        *[item for item in items if item.pixels][:1],
        *[item for item in items if not item.pixels][:1],
    ]
    if len(chosen) == 1:
        chosen = list(items[:2])
    out = []
    for item in chosen:
        most = min(PROBE_TOKENS, limit or PROBE_TOKENS)
        tiles = item.tiles()
        stop, shown = 0, 0
        for part, some in cuts(item.ids, tiles, config):
            if part.stop > most and stop:
                break
            stop, shown = part.stop, shown + (0 if some is None else len(some))
        if tiles is None:
            stop = min(len(item.ids), most)
        cut = None if tiles is None or not shown else tiles[:shown]
        see = None if cut is None else (lambda cut=cut: cut)
        out.append(Item(item.name, item.ids[:stop], item.answer[:stop], see))
    return out
