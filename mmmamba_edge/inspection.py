"""`mmmamba-edge inspect`: what a checkpoint or bundle is: config, sizes, state bytes, tensors.

Reads headers only, so it needs neither torch nor the memory for the weights.
"""

import argparse
import json
import math
import struct
from pathlib import Path
from typing import Any

from mmmamba_edge.config import Config, load_config
from mmmamba_edge.errors import UserError

MANIFEST = "manifest.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("path", type=Path, metavar="CHECKPOINT|BUNDLE", help="folder to look into")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = "example: mmmamba-edge inspect weights/mmMamba-linear"


def run(args: argparse.Namespace) -> int:
    """The verb."""
    facts = inspect(args.path)
    print(json.dumps(facts, ensure_ascii=False) if args.json else as_text(facts))
    return 0


def inspect(path: Path) -> dict[str, Any]:
    """Facts about a checkpoint or bundle folder, as one JSON-ready object.

    Raises:
        UserError: neither kind of folder, or files that cannot be read.
    """
    if (path / MANIFEST).is_file():
        from mmmamba_edge.bundle import read_manifest

        manifest = read_manifest(path)
        config = manifest.model
        files = [(name, file.bytes) for name, file in manifest.files.items()]
        own = {
            "kind": "bundle",
            "quant": manifest.quant,
            "ops": manifest.ops,
            "model_id": manifest.model_id,
            "files": [{"name": name, "bytes": size} for name, size in files],
            "bytes": sum(size for _, size in files),
            "verification": manifest.verification,
        }
    else:
        config = load_config(path)
        tensors = [
            {"name": name, "dtype": dtype, "shape": shape, "bytes": size}
            for file in sorted(path.glob("model*.safetensors"))  # not a run's progress beside it
            for name, dtype, shape, size in read_header(file)
        ]
        if not tensors:
            raise UserError(f"{path}: no model*.safetensors; expected a checkpoint's weights there")
        own = {
            "kind": "checkpoint",
            "layout": "released" if any("wvkqgdt" in t["name"] for t in tensors) else "training",
            "parameters": sum(math.prod(t["shape"]) for t in tensors),
            "bytes": sum(t["bytes"] for t in tensors),
            "tensors": tensors,
        }
    return {"path": str(path), **own, "variant": config.variant, **_sizes(config)}


def read_header(path: Path) -> list[tuple[str, str, list[int], int]]:
    """(name, dtype, shape, bytes) of every tensor of a safetensors file, in order of offset."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(100 << 20, path.stat().st_size):
                raise ValueError(f"header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        rows = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        return [
            (name, info["dtype"], info["shape"], info["data_offsets"][1] - info["data_offsets"][0])
            for name, info in rows
        ]
    except (OSError, struct.error, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from error


def state_bytes(config: Config) -> tuple[int, int]:
    """Bytes of a float32 decoding state: the fixed part, and what each token of context adds."""
    fixed = per_token = 0
    for layer, kind in enumerate(config.layer_types):
        size = 4 * sum(math.prod(shape) for shape in config.state_shapes(layer, tokens=1).values())
        if kind == "attention":
            per_token += size
        else:
            fixed += size
    return fixed, per_token


def _sizes(config: Config) -> dict[str, Any]:
    fixed, per_token = state_bytes(config)
    return {
        "state_bytes": fixed,
        "state_bytes_per_token": per_token,
        "image_tokens_per_tile": config.tokens_per_tile,
        "config": config.to_dict(),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts for a terminal."""
    config, llm = facts["config"], facts["config"]["llm"]
    halves = [config[name]["layer_types"] for name in ("embedding", "llm")]
    attention = [i for i, kind in enumerate(halves[0] + halves[1]) if kind == "attention"]
    between = ", another between the halves" if config["normalize_encoder_output"] else ""
    growth = f" + {facts['state_bytes_per_token']:,} a token" if attention else ", at any context"
    rows = [
        ("layers", f"{len(halves[0])} embedding + {len(halves[1])} language"),
        ("attention", f"layers {attention}" if attention else "none"),
        ("hidden", f"{llm['hidden_size']}, feed-forward {llm['intermediate_size']}"),
        ("heads", f"{llm['num_attention_heads']}, {llm['num_key_value_heads']} key/value"),
        ("vocabulary", f"{config['vocab_size']}"),
        ("images", _images(config, facts["image_tokens_per_tile"])),
        ("positions", _positions(llm) if attention else "none: Mamba-2 needs no RoPE"),
        ("norms", f"epsilon {llm['rms_norm_eps']:g}{between}"),
        ("prompt", f"template {config['template']}, image token {config['img_context_token_id']}"),
        ("state", f"{facts['state_bytes']:,} bytes{growth} (float32)"),
    ]
    if facts["kind"] == "bundle":
        rows += [
            ("bundle", f"quant {facts['quant']}, ops {facts['ops']}, {facts['bytes']:,} bytes"),
            ("model id", facts["model_id"]),
        ]
        table = [f"{file['bytes']:>14,}  {file['name']}" for file in facts["files"]]
    else:
        rows.append(
            (
                "weights",
                f"{facts['parameters']:,} parameters, {facts['bytes']:,} bytes, "
                f"{facts['layout']} layout",
            )
        )
        table = [
            f"{tensor['dtype']:>5} {'x'.join(map(str, tensor['shape'])):>14} "
            f"{tensor['bytes']:>14,}  {tensor['name']}"
            for tensor in facts["tensors"]
        ]
    title = f"{facts['path']}: {facts['kind']} of mmMamba {facts['variant']}"
    return "\n".join([title, *(f"{name:<11} {text}" for name, text in rows), *table])


def _images(config: dict[str, Any], tokens: int) -> str:
    several = config["max_dynamic_patch"] > 1
    thumbnail = " and a thumbnail" if several and config["use_thumbnail"] else ""
    return (
        f"{config['image_size']} px tiles of {tokens} tokens ({config['patch_size']} px patches, "
        f"pixel shuffle {config['pixel_shuffle_loc']!r}), {config['min_dynamic_patch']} to "
        f"{config['max_dynamic_patch']} tiles{thumbnail}"
    )


def _positions(stack: dict[str, Any]) -> str:
    scaling = stack["rope_scaling"]
    scaled = f", {scaling['type']} scaling by {scaling['factor']:g}" if scaling else ""
    return f"RoPE theta {stack['rope_theta']:g}{scaled}, up to {stack['max_position_embeddings']:,}"
