"""Bundles of the golden models and of a small realistic one, exported once for all test modules."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch

import golden
from mmmamba_edge.config import Config, StackConfig
from mmmamba_edge.distill.scratch import from_scratch
from mmmamba_edge.export.to_onnx import export_onnx
from mmmamba_edge.model.checkpoints import save_model
from mmmamba_edge.model.decoder import MMMamba

torch.set_num_threads(1)  # tiny models: a second thread costs more than it brings

ROOT = Path(tempfile.mkdtemp(prefix="mmmamba-edge-tests."))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)


@cache
def checkpoint(part: str, variant: str) -> Path:
    """A golden model as a checkpoint folder; part "small" is `small_model`."""
    model = small_model(variant) if part == "small" else golden.model(part, variant)
    return save_model(model, ROOT / f"{part}-{variant}")


@cache
def bundle(part: str, variant: str, quant: str = "none", ops: str = "com.microsoft") -> Path:
    """Its bundle."""
    out = ROOT / f"{part}-{variant}-{quant}-{ops}"
    export_onnx(checkpoint(part, variant), out, quant=quant, ops=ops)
    return out


def small_model(variant: str) -> MMMamba:
    """Random weights at the scales of a real model: unlike the goldens', well conditioned."""
    half = StackConfig(128, 192, 4, 2, 1e-5, 10000.0, 128, ("mamba2", "mamba2"))
    config = Config(embedding=half, llm=half, vocab_size=300, image_size=56, img_context_token_id=7)
    torch.manual_seed(0)
    return from_scratch(config.with_attention_layers({1} if variant == "hybrid" else set()))


def case(part: str, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids (tokens,) and tiles (or None) of a golden case."""
    tensors = golden.inputs(part, name)
    pixels = tensors.get("pixel_values") if name != "text_only" else None
    return tensors["input_ids"][0].numpy(), None if pixels is None else pixels.numpy()
