"""Bundles and runners with one thing wrong, for checks that must notice."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exported import ROOT, checkpoint
from mmmamba_edge.bundle import read_manifest, write_manifest
from mmmamba_edge.export.to_onnx import export_onnx
from mmmamba_edge.model.checkpoints import load_model, save_model
from mmmamba_edge.quant.check_state import to_bfloat16
from mmmamba_edge.quant.initializers import Initializers

LAYER = "language_model.model.layers.0."  # number 2 over the whole stack of the small models


def edited(bundle: Path, name: str, change: Callable[[np.ndarray], np.ndarray], label: str) -> Path:
    """The bundle with one initialiser of its decoder changed, and hashes to match."""
    out = ROOT / f"fault-{bundle.name}-{label}"
    shutil.copytree(bundle, out)
    held = Initializers(out / "decoder.onnx")
    found = held.get(name)
    assert isinstance(found, np.memmap), name
    writable = np.memmap(found.filename, found.dtype, "r+", found.offset, found.shape)
    writable[...] = change(np.array(found))
    writable.flush()
    write_manifest(out, replace(read_manifest(out), files={}))
    return out


def remade(
    variant: str, change: Callable[[dict[str, torch.Tensor]], None], quant: str, label: str
) -> Path:
    """A bundle of the small model with weights changed before the export, under its own name."""
    source = checkpoint("small", variant)
    model = load_model(source)
    with torch.no_grad():
        change(model.state_dict())
    folder = save_model(model, ROOT / f"remade-{variant}-{quant}-{label}-checkpoint")
    out = ROOT / f"remade-{variant}-{quant}-{label}"
    manifest = export_onnx(folder, out, quant=quant)
    genuine = export_onnx(source, ROOT / f"genuine-{variant}", quant="none").model_id
    write_manifest(out, replace(manifest, model_id=genuine))
    return out


class CoarseState:
    """A runner whose SSD state is rounded to bfloat16 whenever it has read something."""

    def __init__(self, runner: Any) -> None:
        self.inner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _coarse(self, result: tuple[Any, Any]) -> tuple[Any, Any]:
        logits, state = result
        arrays = {
            name: to_bfloat16(array) if name.endswith(".ssm") else array
            for name, array in state.arrays().items()
        }
        return logits.copy(), self.inner.load_state(arrays, state.tokens)

    def prefill(self, *args: Any, **options: Any) -> tuple[Any, Any]:
        return self._coarse(self.inner.prefill(*args, **options))

    def step(self, *args: Any) -> tuple[Any, Any]:
        return self._coarse(self.inner.step(*args))

    def read_all(self, *args: Any) -> tuple[Any, Any]:
        return self._coarse(self.inner.read_all(*args))
