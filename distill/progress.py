"""Saving a run so that it may be killed at any moment: weights, moments, step; no pickle."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mmmamba_edge.errors import UserError
from mmmamba_edge.whole import new_file


def save_progress(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    """Weights, optimiser state and step, written whole or not at all."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"optimizer.{names[id(p)]}.{key}"] = torch.as_tensor(value).contiguous()
    with new_file(path) as part:
        save_file(tensors, part, metadata={"step": str(step)})


def load_progress(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Put a saved run back; returns the step to go on from, 0 if there is none."""
    if not path.is_file():
        return 0
    names = {id(p): name for name, p in model.named_parameters()}
    with safe_open(path, framework="pt") as file, torch.no_grad():
        saved = set(file.keys())
        missing = sorted({f"model.{name}" for name in names.values()} - saved)
        if missing:
            raise UserError(
                f"{path}: no {missing[0]}; it is another recipe's run: choose another --out"
            )
        for name, p in model.named_parameters():
            p.copy_(file.get_tensor(f"model.{name}"))
        for optimizer in optimizers:
            fused = optimizer.defaults.get("fused")
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                    if (full := f"optimizer.{names[id(p)]}.{key}") in saved:
                        # fused AdamW keeps its step on the device, the plain one on the CPU
                        where = p.device if key != "step" or fused else "cpu"
                        optimizer.state[p][key] = file.get_tensor(full).to(where)
        return int(file.metadata()["step"])
