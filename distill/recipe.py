"""Recipes: TOML files that fix a training run, read strictly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmamba_edge.config import Config, StackConfig
from mmmamba_edge.distill.tables import read_table, read_toml
from mmmamba_edge.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """The [train] table. Rates are per optimiser step.

    Attributes:
        perception: weight of the labels of image tokens beside the answers' loss; 0: none.
        perception_layers: after how many layers of the decoder they are asked for.
        bf16: autocast to bfloat16; weights stay float32.
    """

    steps: int
    batch: int
    lr: float
    warmup: int
    decay: int
    weight_decay: float
    clip: float
    seed: int
    bf16: bool
    perception: float
    perception_layers: tuple[int, ...]
    save_every: int
    log_every: int


@dataclass(frozen=True)
class DataConfig:
    """The [data] table."""

    scenes: int
    reuse: int


def read_recipe(
    path: Path, *, steps: int | None = None, batch: int | None = None
) -> tuple[Config, DataConfig, TrainConfig]:
    """Read a recipe; an unknown or missing key is an error that names it."""
    recipe = read_toml(path)
    unknown = sorted(set(recipe) - {"model", "data", "train"})
    if unknown:
        raise UserError(f"{path}: unknown table [{unknown[0]}]; known are [model], [data], [train]")
    override = {k: v for k, v in (("steps", steps), ("batch", batch)) if v is not None}
    train = read_table(TrainConfig, recipe.get("train", {}) | override, f"{path} [train]")
    data = read_table(DataConfig, recipe.get("data", {}), f"{path} [data]")
    return _model_config(recipe.get("model", {}), f"{path} [model]"), data, train


def _model_config(table: dict[str, Any], where: str) -> Config:
    table = dict(table)
    try:
        counts = table.pop("embedding_layers"), table.pop("llm_layers")
        attention = set(table.pop("attention_layers"))
        sizes = {
            name: table.pop(name)
            for name in (
                "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
            )
        }  # fmt: skip
    except KeyError as error:
        raise UserError(f"{where}: missing key {error.args[0]}") from error
    halves = [
        StackConfig(
            **sizes, rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=4096,
            layer_types=("mamba2",) * count,
        )
        for count in counts
    ]  # fmt: skip
    try:
        config = Config(embedding=halves[0], llm=halves[1], max_dynamic_patch=1, **table)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error
    return config.with_attention_layers(attention)
