"""A stand-in at the released models' full shape: `python benchmarks/full_size.py --out DIR`.

2.7 B parameters in the released layout, sharded bfloat16 safetensors, random but realistic: norms
of one, products that keep their scale, step sizes and decays spread as seeding spreads them. It
says nothing sensible; it costs what the real one costs. `--size smollm2` has the sizes of
SmolLM2-135M instead, for phones.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmmamba_edge.config import Config, StackConfig
from mmmamba_edge.distill.seed import A_LOG, DT_RANGE
from mmmamba_edge.distill.student import attention_layers
from mmmamba_edge.model.checkpoints import save_checkpoint
from mmmamba_edge.model.tensor_names import DEAD, training_shapes
from mmmamba_edge.status import StatusLine

# Of a size: its layers in the two halves, the stacks' sizes, and the rest of the config.
SIZES: dict[str, tuple[tuple[int, int], dict[str, Any], dict[str, Any]]] = {
    # The released models (spec 1.2).
    "mmmamba": (
        (8, 24),
        {
            "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16,
            "num_key_value_heads": 8, "rope_theta": 1e6, "max_position_embeddings": 32768,
        },
        {
            "vocab_size": 92_553, "img_context_token_id": 92_546, "eos_token_id": 92_542,
            "template": "internlm2-chat", "use_thumbnail": True, "max_dynamic_patch": 12,
        },
    ),
    # SmolLM2-135M, as 30 layers of ours.
    "smollm2": (
        (7, 23),
        {
            "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
            "num_key_value_heads": 3, "rope_theta": 1e5, "max_position_embeddings": 8192,
        },
        {
            "vocab_size": 49_152, "img_context_token_id": 49_151, "eos_token_id": 2,
            "template": "chatml",
        },
    ),
}  # fmt: skip


def full_config(
    attention: str = "none", layers: tuple[int, int] | None = None, size: str = "mmmamba"
) -> Config:
    """A size of SIZES; other `layers` than its own for a narrower look."""
    own, stack, rest = SIZES[size]
    layers = layers or own
    halves = [
        StackConfig(rms_norm_eps=1e-5, layer_types=("attention",) * count, **stack)
        for count in layers
    ]
    config = Config(embedding=halves[0], llm=halves[1], image_size=448, patch_size=14, **rest)
    return config.with_attention_layers(attention_layers(attention, sum(layers)))


def write_full_size(out: Path, config: Config, seed: int = 0) -> None:
    """Write the checkpoint, a shard in memory at a time."""
    shapes = training_shapes(config)
    done, total, say = 0, sum(map(math.prod, shapes.values())), StatusLine()
    numbers = {name: i for i, name in enumerate(shapes)}

    def get(name: str) -> Tensor:
        nonlocal done
        random = torch.Generator().manual_seed(seed * 100_003 + numbers[name])
        done += math.prod(shapes[name])
        say("million parameters", done // 10**6, total // 10**6)
        return _tensor(name, shapes[name], len(config.layer_types), random).bfloat16()

    layout = "training" if config.variant == "teacher" else "released"
    save_checkpoint(out, config, get, layout=layout, shard_bytes=1 << 30)
    say.close()


def _tensor(name: str, shape: tuple[int, ...], layers: int, random: torch.Generator) -> Tensor:
    if name == DEAD:
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("A_log_bias"):
        return torch.full(shape, A_LOG)
    if name.endswith("dt_bias"):
        low, high = (math.log(bound) for bound in DT_RANGE)
        dt = torch.exp(torch.rand(shape, generator=random) * (high - low) + low)
        return dt + torch.log(-torch.expm1(-dt))
    if name.endswith("bias"):
        return torch.zeros(shape)
    noise = torch.randn(shape, generator=random)
    if name.endswith("conv1d.weight"):
        noise *= 0.1
        noise[..., -1] += 1.0
        return noise
    if name.endswith("in_proj.weight"):
        return noise * 0.02
    inside = name.removeprefix("embedding_model.")  # of which "encoder" holds layers as any other
    if "embedding" in inside and not inside.endswith("patch_embedding.weight"):
        return noise * 0.5
    noise *= math.prod(shape[1:]) ** -0.5  # a product keeps its input's scale
    into_stream = name.endswith(("o_proj.weight", "wo.weight", "w2.weight"))
    return noise * (2 * layers) ** -0.5 if into_stream else noise


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--attention-layers", default="none", help="'head-interleaved 8': hybrid")
    parser.add_argument("--size", default="mmmamba", choices=list(SIZES))
    parser.add_argument("--layers", help="of the two halves; default: 8,24 or SmolLM2's 7,23")
    args = parser.parse_args()
    layers = None
    if args.layers:
        first, second = map(int, args.layers.split(","))
        layers = first, second
    write_full_size(args.out, full_config(args.attention_layers, layers, args.size))
    print(json.dumps({"checkpoint": str(args.out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
