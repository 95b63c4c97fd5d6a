"""What every export asks of a checkpoint: whether it can be, for how many tokens, its tokenizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmmamba_edge.config import Config, StackConfig
from mmmamba_edge.errors import UserError
from mmmamba_edge.export.weights import Weights
from mmmamba_edge.manifest import TOKENIZER
from mmmamba_edge.model.checkpoints import Checkpoint, open_checkpoint
from mmmamba_edge.model.decoder import DEFAULT_CONTEXT
from mmmamba_edge.quant.thresholds import checked
from mmmamba_edge.tokenizer import save_tokenizer_files


def exportable(checkpoint: str | Path | Checkpoint) -> Checkpoint:
    """The checkpoint, open; UserError for a model that no exporter serves."""
    source = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    if source.config.pixel_shuffle_loc == "post":
        raise UserError(
            f"{source.folder}: pixel_shuffle_loc 'post' (HoVLE-HD) reads two sequences at once and "
            "is not exported; run it in PyTorch with load_model"
        )
    return source


def copy_tokenizer(source: Checkpoint, bundle: Path) -> list[str]:
    """Put the checkpoint's tokenizer files into the bundle's folder for them; their names."""
    folder = bundle / TOKENIZER
    folder.mkdir()
    names = save_tokenizer_files(source.folder, folder)
    if not names:
        folder.rmdir()
    return names


def context_limit(config: Config, asked: int | None) -> int | None:
    """Tokens that the attention caches are made for; None for a model without such layers.

    RoPE with dynamic NTK rotates by a base that depends on the whole length, which a cache of
    rotated keys cannot follow; within max_position_embeddings it is the plain base. So such a
    model is exported up to there. The others default to the length they were trained for, at most
    `DEFAULT_CONTEXT`, and take any that is asked for.
    """
    stacks = attending(config)
    if not stacks:
        if asked is not None:
            raise UserError(
                "--max-context: this model has no attention layer, so its context has no limit; "
                "leave the option out"
            )
        return None
    if asked is not None and asked < 1:
        raise UserError(f"--max-context {asked}: expected a whole number above 0")
    limits = [
        s.max_position_embeddings
        for s in stacks
        if s.rope_scaling and s.rope_scaling.type == "dynamic"
    ]
    if limits and asked is not None and asked > min(limits):
        raise UserError(
            f"--max-context {asked}: this model's RoPE scaling is dynamic NTK beyond "
            f"{min(limits)} tokens, which a decoding cache cannot follow; ask for that at most"
        )
    trained = min(s.max_position_embeddings * _stretch(s) for s in stacks)
    return asked or int(min(trained, DEFAULT_CONTEXT))


def attending(config: Config) -> list[StackConfig]:
    """The halves that have attention layers."""
    return [s for s in (config.embedding, config.llm) if "attention" in s.layer_types]


def _stretch(stack: StackConfig) -> float:
    """How much longer than max_position_embeddings linear scaling makes the trained context."""
    scaling = stack.rope_scaling
    return scaling.factor if scaling and scaling.type == "linear" else 1.0


def rope_setting(config: Config) -> dict[str, str]:
    """What a manifest says of rotations that are not the checkpoint's own beyond the limit."""
    if any(s.rope_scaling and s.rope_scaling.type == "dynamic" for s in attending(config)):
        return {"rope": "plain base: dynamic NTK would begin beyond max_position_embeddings"}
    return {}


def threshold_setting(limits: Mapping[str, float] | None) -> dict[str, Any]:
    """What a manifest says of the limits that `check` holds its bundle to; UserError: unknown."""
    return {"thresholds": checked(dict(limits), "thresholds")} if limits else {}


def codes_setting(weights: Weights) -> dict[str, Any]:
    """What a manifest says of the codes that were written: to be asked when all are."""
    settings: dict[str, Any] = {}
    if weights.scheme.bits:
        settings["codes_sha256"] = weights.codes_sha256
    if weights.scheme.bits == 4:
        settings["group_size"] = weights.scheme.group
    if facts := weights.quantized:
        settings["quantized"] = {
            "scheme": facts.scheme, "bits_per_weight": facts.bits_per_weight,
            "calibration": facts.calibration,
        }  # fmt: skip
    return settings
