"""A teacher, data and a recipe so small that a distillation takes a second."""

from pathlib import Path

import numpy as np
import torch

from mmmamba_edge.config import Config, StackConfig
from mmmamba_edge.distill.scratch import from_scratch
from mmmamba_edge.model.checkpoints import save_model

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings

RECIPE = """
teacher = "teacher"
{stages}
[data]
kind = "scenes"
folder = "scenes"
count = 48
[validation]
kind = "scenes"
folder = "held-out"
count = 16
[student]
attention_layers = {attention}
[engine]
bf16 = false
[stage1]
steps = 8
batch = 4
micro_batch = 2
lr = 1e-2
warmup = 2
decay = 2
log_every = 1
save_every = 3
validate_every = 4
[stage2]
steps = 6
batch = 4
micro_batch = 4
lr = 3e-3
warmup = 1
decay = 2
log_every = 1
save_every = 2
[stage3]
steps = 6
batch = 4
micro_batch = 4
lr = 3e-3
warmup = 1
decay = 2
log_every = 1
save_every = 2
"""


def config(**changes) -> Config:
    """Four layers, all attention, 4 image tokens a picture."""
    halves = [
        StackConfig(
            hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
            rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=4096,
            layer_types=("attention",) * 2,
        )
        for _ in range(2)
    ]  # fmt: skip
    return Config(
        embedding=halves[0], llm=halves[1], max_dynamic_patch=1, vocab_size=40, image_size=112,
        patch_size=28, img_context_token_id=7, eos_token_id=4, template="scenes", **changes,
    )  # fmt: skip


def make(folder: Path, *, attention: str = "[]", stages: str = "") -> Path:
    """Everything in `folder`; returns the recipe."""
    torch.manual_seed(0)
    teacher = from_scratch(config())
    with torch.no_grad():  # as if it had learnt: sharper attention, sharper answers
        for layer in teacher.layers:
            layer.attention.wqkv.weight.mul_(10)
            layer.attention.wo.weight.mul_(10)
        teacher.language_model.output.weight.mul_(20)
    save_model(teacher, folder / "teacher", dtype=torch.float32)
    make_scenes(folder / "scenes", 48, seed=1)
    make_scenes(folder / "held-out", 16, seed=2)
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(attention=attention, stages=stages))
    return recipe


def make_scenes(folder: Path, count: int, seed: int) -> None:
    """A scene cache of noise, rows of unequal length, every fourth without a picture."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    talk = np.zeros((count, 2, 24), np.int16)
    flags = np.ones((count, 2), np.uint8)
    for i in range(count):
        length = int(rng.integers(14, 25))
        talk[i, 0], talk[i, 0, :length] = 2, rng.integers(10, 40, length)
        talk[i, 1, 8:length] = 1
        if i % 4 == 3:
            flags[i, 0] = 0
        else:
            talk[i, 0, 2:6] = 7
    np.save(folder / "talk-00000.npy", talk)
    np.save(folder / "cells-00000.npy", np.zeros((count, 4, 3), np.uint8))
    np.save(folder / "flags-00000.npy", flags)
    images = rng.integers(0, 255, (count, 112, 112, 3)).astype(np.uint8)
    np.save(folder / "images-00000.npy", images)
