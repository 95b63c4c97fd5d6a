"""`python -m transformers_mmmamba_edge.onnx_command CHECKPOINT OUT`: by transformers' own exporter.

For transformers 5.23, whose `transformers.exporters` is marked experimental. The graph has the
names and axes of optimum's (optimum_onnx.py).
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.exporters import OnnxConfig, OnnxExporter

import transformers_mmmamba_edge  # noqa: F401  (registers on import)
from mmmamba_edge.export.traced_decoder import state_names
from mmmamba_edge.manifest import is_cache

BATCH, TOKENS, PAST = 2, 16, 5  # of the traced inputs: all different, so that none is mixed up


def export(checkpoint: str | Path, out: str | Path, *, embeds: bool = False) -> None:
    """Write `out`/model.onnx, in float32.

    Args:
        checkpoint: an mmMamba folder, of any layout.
        out: a folder.
        embeds: `inputs_embeds` rather than `input_ids`.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = model.model.config
    if embeds:
        tokens = {"inputs_embeds": torch.rand(BATCH, TOKENS, config.hidden_size)}
    else:
        tokens = {"input_ids": torch.zeros(BATCH, TOKENS, dtype=torch.int64)}
    sizes = {
        f"{layer}.{name}": shape
        for layer in range(len(config.layer_types))
        for name, shape in config.state_shapes(layer, PAST).items()
    }
    state = {name: torch.rand(BATCH, *sizes[name]) for name in state_names(config)}
    free = torch.export.Dim.DYNAMIC
    axes: dict[str, Any] = {name: {0: free, 1: free} for name in tokens}
    axes["past_state"] = {
        name: {0: free, **({2: free} if is_cache(name) else {})} for name in state
    }
    exporter_config = OnnxConfig(dynamic=True, dynamic_shapes=axes)
    exported = OnnxExporter().export(model, {**tokens, "past_state": state}, exporter_config)
    exported.save_pretrained(out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m transformers_mmmamba_edge.onnx_command")
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder, of any layout")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--embeds", action="store_true", help="inputs_embeds, not input_ids")
    args = parser.parse_args()
    export(args.checkpoint, args.out, embeds=args.embeds)


if __name__ == "__main__":
    main()
