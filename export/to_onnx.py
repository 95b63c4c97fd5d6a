"""A checkpoint becomes an ONNX bundle: three graphs written, verified, then put in place."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mmmamba_edge
from mmmamba_edge.bundle import new_bundle, write_manifest
from mmmamba_edge.config import Config
from mmmamba_edge.errors import UserError
from mmmamba_edge.export.decoder_graph import KINDS, state_layout, write_decoder
from mmmamba_edge.export.graph_writer import GraphWriter
from mmmamba_edge.export.ops import Ops
from mmmamba_edge.export.ops_fused import FusedOps
from mmmamba_edge.export.ops_standard import StandardOps
from mmmamba_edge.export.ort_format import replace_by_ort
from mmmamba_edge.export.source import (
    attending,
    codes_setting,
    context_limit,
    copy_tokenizer,
    exportable,
    rope_setting,
    threshold_setting,
)
from mmmamba_edge.export.verify import verify
from mmmamba_edge.export.vision_graph import write_embed, write_vision
from mmmamba_edge.export.weights import Weights, open_weights
from mmmamba_edge.manifest import Manifest
from mmmamba_edge.model.checkpoints import Checkpoint
from mmmamba_edge.status import Report, silent

DIALECTS: dict[str, type[Ops]] = {"com.microsoft": FusedOps, "standard": StandardOps}


def export_onnx(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    *,
    quant: str = "none",
    group_size: int | None = None,
    ops: str = "com.microsoft",
    max_context: int | None = None,
    cache: str | None = None,
    ort: bool = False,
    accuracy: bool = True,
    reference: str | Path | Checkpoint | None = None,
    thresholds: Mapping[str, float] | None = None,
    report: Report | None = None,
) -> Manifest:
    """Write the bundle folder `out`, verified against PyTorch; on any failure nothing is left.

    Args:
        checkpoint: a folder of any layout with pixel_shuffle_loc 'pre', or one already open.
        out: the bundle; an existing bundle is replaced, anything else refused.
        quant: "none" (float32), "fp16", "int8" or "int4".
        group_size: of int4: weights that share a scale; None: 32.
        ops: "com.microsoft", ONNX Runtime's own operators, or "standard", plain opset 27.
        max_context: tokens that attention layers keep; None: `context_limit`. Not for a linear
            model, which has no limit.
        cache: dtype of the attention layers' keys and values: "float32", or "float16", half the
            memory; None: float32. Not for a linear model.
        ort: graphs in ONNX Runtime's own format, for reduced mobile builds (ort_format.py).
        accuracy: put `accuracy.json` into a quantised bundle (quant/check_quick.py).
        reference: what that compares with; None: the checkpoint, unless it is a quantised one, of
            which there is then no such report.
        thresholds: limits that `check` holds this bundle to instead of its scheme's.
        report: told what is being done, and how far.

    Returns:
        The manifest, verification figures included.

    Raises:
        UserError: bad options, an unsupported model, or a place that cannot be written.
        CheckFailed: the bundle's answers are not the checkpoint's.
    """
    say = report or silent
    if ops not in DIALECTS:
        raise UserError(f"ops {ops!r}: known are {', '.join(DIALECTS)}")
    source = exportable(checkpoint)
    weights = open_weights(source, quant, group_size)
    config = source.config
    context = context_limit(config, max_context)
    kept = cache_dtype(config, cache)

    with new_bundle(out) as folder:
        graphs = _write_graphs(folder, DIALECTS[ops], weights, context, kept, say)
        tokenizer = copy_tokenizer(source, folder)
        say("hashing weights")
        manifest = Manifest(
            producer=f"mmmamba-edge {mmmamba_edge.__version__}",
            model_id=source.weights_id(),
            model=config,
            quant=weights.quant,
            ops=ops,
            opset=DIALECTS[ops].opset,
            graphs=graphs,
            state=state_layout(config, context, kept),
            max_context=context,
            tokenizer=tuple(tokenizer),
            settings=_settings(weights, DIALECTS[ops]) | threshold_setting(thresholds),
        )
        manifest = write_manifest(folder, manifest)
        say("verifying against PyTorch")
        manifest = replace(manifest, verification=verify(folder, weights, say))
        if accuracy and weights.quant != "none":
            manifest = _with_report(folder, reference or source, manifest, say)
        if ort:
            say("converting to ORT format")
            manifest = replace_by_ort(folder, manifest)
        return write_manifest(folder, manifest)


def _with_report(
    folder: Path, reference: str | Path | Checkpoint, manifest: Manifest, say: Report
) -> Manifest:
    from mmmamba_edge.quant.check_quick import attach_report  # it runs what was exported
    from mmmamba_edge.runtimes.onnxruntime_runner import OnnxRuntimeRunner

    return attach_report(
        folder, reference, manifest, lambda: OnnxRuntimeRunner(folder, verify=False), say
    )


def cache_dtype(config: Config, asked: str | None) -> str:
    """What the attention layers' keys and values are kept as."""
    if asked is not None and asked not in KINDS:
        raise UserError(f"--cache {asked}: known are {', '.join(KINDS)}")
    if asked is not None and not attending(config):
        raise UserError(
            "--cache: this model has no attention layer, so it keeps no keys and values; leave the "
            "option out"
        )
    return asked or "float32"


def _write_graphs(
    folder: Path, dialect: type[Ops], weights: Weights, context: int | None, cache: str, say: Report
) -> dict[str, str]:
    graphs = {}
    for name, write in (
        ("vision", write_vision),
        ("embed", write_embed),
        ("decoder", partial(write_decoder, max_context=context, cache=cache, say=say)),
    ):
        say(f"writing {name}.onnx")
        with GraphWriter(folder, name, dialect.opset) as graph:
            write(graph, dialect(graph), weights)
        graphs[name] = graph.file
    return graphs


def _settings(weights: Weights, dialect: type[Ops]) -> dict[str, Any]:
    settings = dict(dialect.settings) if weights.scheme.bits else {}
    return settings | codes_setting(weights) | rope_setting(weights.config)
