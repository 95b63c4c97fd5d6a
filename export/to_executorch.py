"""A checkpoint becomes one .pte for phones: three methods lowered, verified, then put in place."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mmmamba_edge
from mmmamba_edge.bundle import file_sha256, new_bundle, write_manifest
from mmmamba_edge.config import Config
from mmmamba_edge.errors import UserError
from mmmamba_edge.export.decoder_graph import state_layout
from mmmamba_edge.export.pte_backends import check_backend, partition, partitioners
from mmmamba_edge.export.pte_memory import memory_planning
from mmmamba_edge.export.pte_modules import (
    TextDecoder,
    TokenEmbedding,
    VisionEncoder,
    chunk_of,
)
from mmmamba_edge.export.source import (
    codes_setting,
    context_limit,
    copy_tokenizer,
    exportable,
    rope_setting,
    threshold_setting,
)
from mmmamba_edge.export.verify import verify
from mmmamba_edge.export.weights import Weights, open_weights
from mmmamba_edge.manifest import TOKENIZER, FileRecord, Manifest
from mmmamba_edge.model.checkpoints import Checkpoint
from mmmamba_edge.runtimes.executorch_runner import MANIFEST_METHOD, ExecuTorchRunner, quietly
from mmmamba_edge.status import Report, silent

FILE = "model.pte"
PARTITION = "partition.json"  # which operators the backend took, of each method
UNLIMITED = 2**31 - 1  # what a linear model's context is called in a number


def export_executorch(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    *,
    quant: str = "none",
    group_size: int | None = None,
    max_context: int | None = None,
    backend: str = "xnnpack",
    accuracy: bool = True,
    reference: str | Path | Checkpoint | None = None,
    thresholds: Mapping[str, float] | None = None,
    report: Report | None = None,
) -> Manifest:
    """Write the bundle folder `out`, verified against PyTorch; on any failure nothing is left.

    Args:
        checkpoint: a folder of any layout with pixel_shuffle_loc 'pre', or one already open.
        out: the bundle; an existing bundle is replaced, anything else refused.
        quant: "none" (float32), "int8" (8da8w) or "int4" (8da4w): the codes of the ONNX bundle,
            and activations in 8 bits a token.
        group_size: of int4: weights that share a scale; None: 32.
        max_context: tokens that attention layers keep; None: `context_limit`.
        backend: what the methods are lowered to (pte_backends.py). Another than "xnnpack" cannot
            be run here: such a file is written with a report of its partition, unverified.
        accuracy: put `accuracy.json` into a quantised bundle (quant/check_quick.py).
        reference: what that compares with; None: the checkpoint, unless it is a quantised one, of
            which there is then no such report.
        thresholds: limits that `check` holds this bundle to instead of its scheme's.
        report: told what is being done, and how far.

    Returns:
        The manifest, verification figures included.

    Raises:
        UserError: bad options, an unsupported model, or a place that cannot be written.
        CheckFailed: the file's answers are not the checkpoint's.
    """
    say = report or silent
    if quant == "fp16":
        raise UserError("--quant fp16: XNNPACK runs float32 or 8-bit activations; use int8 or int4")
    source = exportable(checkpoint)
    weights = open_weights(source, quant, group_size)
    config = source.config
    check_backend(backend, config, quantised=weights.scheme.bits > 0)
    context = context_limit(config, max_context)
    with new_bundle(out) as folder:
        tokenizer = copy_tokenizer(source, folder)
        settings: dict[str, Any] = {
            "tokenizer_sha256": {n: file_sha256(folder / TOKENIZER / n) for n in tokenizer}
        }
        if weights.scheme.bits:
            settings["activations"] = "8 bits a token, asymmetric"
        settings |= rope_setting(config) | threshold_setting(thresholds)
        manifest = Manifest(
            producer=f"mmmamba-edge {mmmamba_edge.__version__}",
            model_id=source.weights_id(),
            model=config,
            quant=weights.quant,
            ops=backend,
            opset={},
            graphs=dict.fromkeys(("vision", "embed", "decoder"), FILE),
            state=state_layout(config, context),
            max_context=context,
            settings=settings,
        )

        def inside() -> dict[str, Any]:
            nonlocal manifest
            manifest = replace(manifest, settings=settings | codes_setting(weights))
            return constants(config, context, replace(manifest, files={FILE: FileRecord("", 0)}))

        parts = write_pte(folder / FILE, weights, context, inside, backend, say)
        (folder / PARTITION).write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
        manifest = write_manifest(folder, replace(manifest, tokenizer=tuple(tokenizer)))
        if backend != "xnnpack":
            not_run = {"not_run": f"lowered to {backend}, which does not run here"}
            return write_manifest(folder, replace(manifest, verification=not_run))
        say("verifying against PyTorch")
        figures = verify(folder, weights, say, ExecuTorchRunner)
        manifest = replace(manifest, verification=figures)
        if accuracy and weights.quant != "none":
            from mmmamba_edge.quant.check_quick import attach_report  # it runs what was exported

            manifest = attach_report(
                folder, reference or source, manifest,
                lambda: ExecuTorchRunner(folder, verify=False), say,
            )  # fmt: skip
        return write_manifest(folder, manifest)


def constants(config: Config, max_context: int | None, manifest: Manifest) -> dict[str, Any]:
    """Methods without input: what ExecuTorch's own runners ask, and our manifest."""
    return {
        MANIFEST_METHOD: json.dumps(json.loads(manifest.to_json()), ensure_ascii=False),
        "get_max_seq_len": chunk_of(config),
        "get_max_context_len": max_context or UNLIMITED,
        "get_vocab_size": config.vocab_size,
        "get_eos_ids": [config.eos_token_id],
        "get_n_layers": len(config.layer_types),
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def write_pte(
    path: Path, weights: Weights, max_context: int | None,
    constant_methods: Callable[[], dict[str, Any]], backend: str, say: Report,
) -> dict[str, Any]:  # fmt: skip
    """Trace, lower and write the three methods; returns what was lowered (`partition`).

    `constant_methods` is called when all weights have been read.
    """
    with quietly():
        from executorch.exir import (
            EdgeCompileConfig,
            ExecutorchBackendConfig,
            to_edge_transform_and_lower,
        )

    programs = {}
    for name, module, inputs, shapes in _methods(weights, max_context):
        say(f"tracing {name}")
        with torch.no_grad(), quietly():
            programs[name] = torch.export.export(
                module.eval(), inputs, dynamic_shapes=shapes, strict=False
            )
    say(f"lowering to {backend}")
    with quietly():
        edge = to_edge_transform_and_lower(
            programs, partitioner={name: partitioners(backend) for name in programs},
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=constant_methods(),
        )  # fmt: skip
        parts = {name: partition(edge.exported_program(name).graph_module) for name in programs}
    del programs
    say("planning memory")
    config = ExecutorchBackendConfig(
        memory_planning_pass=memory_planning(),
        emit_mutable_buffer_names=True,  # else the state could be neither read nor written
        do_quant_fusion_and_const_prop=True,  # else a quantised table has no kernel
        run_reinplace_pass=True,  # else a cache is copied twice for every token
    )
    with quietly():
        program = edge.to_executorch(config)
    say(f"writing {path.name}")
    with path.open("wb") as file:
        program.write_to_file(file)
    return parts


def _methods(
    weights: Weights, max_context: int | None
) -> list[tuple[str, nn.Module, tuple[torch.Tensor, ...], Any]]:
    config = weights.config
    tokens = torch.export.Dim("tokens", min=1, max=chunk_of(config))
    side, some = config.image_size, 8
    embeds = torch.zeros(1, some, config.hidden_size)
    return [
        ("token_embedding", TokenEmbedding(weights), (torch.zeros(1, some, dtype=torch.int64),),
         ({1: tokens},)),
        ("vision_encoder", VisionEncoder(weights), (torch.zeros(1, 3, side, side),), None),
        ("text_decoder", TextDecoder(weights, max_context),
         (embeds, torch.zeros(1, dtype=torch.int64)), ({1: tokens}, None)),
    ]  # fmt: skip
