"""Seeding: turn a teacher's attention layers into Mamba-2 mixers (spec 4).

Queries, keys, values, the output projection, norms, MLPs, embeddings and head are the teacher's.
New are the conv (an identity), dt (a random step per head), a = -e, the norm and a small random
gate; the randomness comes from a stored seed.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmmamba_edge.config import Config
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import Checkpoint, save_checkpoint
from mmmamba_edge.model.layers import split_wqkv
from mmmamba_edge.model.tensor_names import layer_prefix, mixer_shapes
from mmmamba_edge.tokenizer import tokenizer_files

DT_RANGE = (0.001, 0.1)
A_LOG = 1.0  # a = -exp(1)
GATE_GAIN = 2**-2.5


@dataclass(frozen=True)
class Seeding:
    """How mixers begin (the paper's ablation, spec 8.3).

    Attributes:
        seed: of the random parts.
        inherit: queries, keys and values are the teacher's; else random.
        mimic: conv, dt and decay are set so that the mixer begins close to linear attention; else
            as Mamba-2 is usually initialised.
    """

    seed: int = 0
    inherit: bool = True
    mimic: bool = True


def seed_checkpoint(
    teacher: Checkpoint, out: Path, attention_layers: set[int] | None = None, seed: int = 0
) -> Config:
    """Write the seeded student of `teacher` to the new folder `out`, one tensor at a time.

    Args:
        teacher: an all-attention checkpoint.
        out: where to; `seed.json` beside the weights records what was drawn.
        attention_layers: layers that stay as they are, numbered over the whole stack.
        seed: of dt and the gate.

    Returns:
        The student's config.
    """
    if teacher.config.variant != "teacher":
        raise UserError(
            f"{teacher.folder}: a {teacher.config.variant} model; seeding starts from a teacher, "
            "whose layers are all attention"
        )
    keep = frozenset(attention_layers or ())
    config = teacher.config.with_attention_layers(keep)
    owner = {}  # name of a new tensor -> its layer
    for layer, kind in enumerate(config.layer_types):
        if kind == "mamba2":
            prefix = f"{layer_prefix(config, layer)}attention."
            owner |= {prefix + name: (layer, name) for name in mixer_shapes(config, layer)}
    seeded: dict[int, dict[str, Tensor]] = {}

    def get(name: str) -> Tensor:
        if name not in owner:
            return teacher.get(name)
        layer, local = owner[name]
        if layer not in seeded:
            seeded.clear()  # a layer's tensors are asked for together: hold one layer at a time
            prefix = f"{layer_prefix(config, layer)}attention."
            wqkv, wo = teacher.get(f"{prefix}wqkv.weight"), teacher.get(f"{prefix}wo.weight")
            seeded[layer] = seed_mixer(wqkv, wo, config, layer, Seeding(seed))
        return seeded[layer][local]

    tokenizer = tokenizer_files(teacher.folder)
    record = {"seed": seed, "attention_layers": sorted(keep), "teacher": teacher.weights_id()}
    texts = {"seed.json": json.dumps(record, indent=2) + "\n"}
    save_checkpoint(out, config, get, extra_files=tokenizer, extra_texts=texts)
    return config


def seed_mixer(
    wqkv: Tensor, wo: Tensor, config: Config, layer: int, seeding: Seeding
) -> dict[str, Tensor]:
    """The tensors of one mixer, in the dtype of the teacher's weights.

    The random parts depend on (seed, layer) alone, whatever other layers are seeded.
    """
    stack = config.stack_of(layer)
    shapes = mixer_shapes(config, layer)
    random = torch.Generator().manual_seed(seeding.seed * 10_007 + layer)

    def uniform(name: str, low: float, high: float) -> Tensor:
        return torch.rand(shapes[name], generator=random) * (high - low) + low

    low, high = (math.log(bound) for bound in DT_RANGE)
    dt = torch.exp(uniform("dt_bias", low, high))
    gate_bound = GATE_GAIN * math.sqrt(6 / (2 * stack.hidden_size))  # Xavier, fan in = fan out
    gate = uniform("g_proj.weight", -gate_bound, gate_bound)
    conv = torch.zeros(shapes["conv1d.weight"])
    conv[..., -1] = 1.0
    q, k, v = split_wqkv(wqkv, stack)
    mixer = {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "g_proj.weight": gate,
        "in_proj.weight": torch.zeros(shapes["in_proj.weight"]),
        "conv1d.weight": conv,
        "conv1d.bias": torch.zeros(shapes["conv1d.bias"]),
        "dt_bias": dt + torch.log(-torch.expm1(-dt)),  # softplus^-1
        "A_log_bias": torch.full(shapes["A_log_bias"], A_LOG),
        "g_norm.weight": torch.ones(shapes["g_norm.weight"]),
        "o_proj.weight": wo,
    }
    inner = stack.hidden_size**-0.5  # the bound of torch's Linear
    if not seeding.mimic:
        edge = shapes["conv1d.weight"][-1] ** -0.5  # and of its depthwise Conv1d
        mixer |= {
            "conv1d.weight": uniform("conv1d.weight", -edge, edge),
            "conv1d.bias": uniform("conv1d.bias", -edge, edge),
            "in_proj.weight": uniform("in_proj.weight", -inner, inner),
            "dt_bias": torch.zeros(shapes["dt_bias"]),
            "A_log_bias": uniform("A_log_bias", 1.0, 16.0).log(),
        }
    if not seeding.inherit:
        names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        mixer |= {name: uniform(name, -inner, inner) for name in names}
    return {name: tensor.to(wqkv.dtype) for name, tensor in mixer.items()}
