"""Reads tests/goldens: models, inputs and expected outputs of the original code."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from mmmamba_edge.config import load_config
from mmmamba_edge.model.checkpoints import load_model
from mmmamba_edge.model.decoder import MMMamba

ROOT = Path(__file__).parent / "goldens"
CASES = ("text_only", "one_tile", "two_tiles")


def model(part: str, variant: str) -> MMMamba:
    """A golden model; hybrids without a final file are the teacher plus the stage file's mixers."""
    root = ROOT / part
    if variant == "teacher":
        return load_model(root / "teacher")
    if (root / variant / "final" / "model.safetensors").exists():
        return load_model(root / variant / "final")
    built = MMMamba(load_config(root / variant / "final"))
    tensors = load_file(root / "teacher/model.safetensors")
    tensors |= load_file(root / variant / "stage.safetensors")
    built.load_state_dict({name: tensors[name] for name in built.state_dict()})
    return built.eval()


def inputs(part: str, case: str) -> dict[str, torch.Tensor]:
    """The keyword arguments of `MMMamba.forward` for a case."""
    tensors = load_file(ROOT / part / "inputs.safetensors")
    return {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{case}.")}


def outputs(part: str, variant: str) -> dict[str, torch.Tensor]:
    """Expected tensors, `<case>.<name>`."""
    name = "teacher_outputs" if variant == "teacher" else f"{variant}/outputs"
    return load_file(ROOT / part / f"{name}.safetensors")
