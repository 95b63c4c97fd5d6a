"""Saving a run so that it may be killed at any moment and goes on bit for bit; no pickle.

One safetensors file holds weights, optimiser state, random states, the step and where the data goes
on. It replaces the one before it when it is whole. Sharded tensors are gathered: the file does not
depend on how many processes there were.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mmmamba_edge.errors import UserError
from mmmamba_edge.whole import new_file

Parameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: optimiser steps done; 0: nothing was saved.
        position: of the data, JSON; None: its beginning.
    """

    step: int = 0
    position: dict | None = None


def save_progress(
    path: Path, parameters: Parameters, optimizers: list[torch.optim.Optimizer], step: int,
    *, position: dict | None = None, write: bool = True,
) -> None:  # fmt: skip
    """Save a run.

    Args:
        path: the file.
        parameters: what is trained, by name.
        optimizers: over these parameters.
        step: optimiser steps done.
        position: of the data, JSON.
        write: only one of several processes writes; all must call, for sharded tensors.
    """
    names = {id(p): name for name, p in parameters.items()}
    tensors = {f"model.{name}": _whole(p, write) for name, p in parameters.items()}
    numbers: dict[str, int | float] = {}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for key, value in state.items():
                name = f"optimizer.{names[id(p)]}.{key}"
                if isinstance(value, Tensor):
                    tensors[name] = _whole(value, write)
                else:
                    numbers[name] = value
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    if not write:
        return
    # Clones: bitsandbytes' states share one table, and a file holds no tensor twice.
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    notes = {"step": str(step), "position": json.dumps(position), "numbers": json.dumps(numbers)}
    try:
        with new_file(path) as part:
            save_file(tensors, part, metadata=notes)
    except SafetensorError as error:  # a full disk, in safetensors' words
        raise UserError(f"{path}: cannot be written ({error})") from error


def load_progress(
    path: Path, parameters: Parameters, optimizers: list[torch.optim.Optimizer]
) -> Progress:
    """Put a saved run back into parameters and optimisers.

    Raises:
        UserError: the file is damaged or another recipe's.
    """
    if not path.is_file():
        return Progress()
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            saved = set(file.keys())
            weights = {name for name in saved if name.startswith("model.")}
            wanted = {f"model.{name}" for name in parameters}
            if odd := sorted(weights ^ wanted):
                word = "no" if odd[0] in wanted else "an unknown"
                raise UserError(
                    f"{path}: {word} {odd[0]}; it is another recipe's run: choose another --out"
                )
            for name, p in parameters.items():
                p.copy_(_like(file.get_tensor(f"model.{name}"), p))
            notes = file.metadata()
            numbers: dict[str, Any] = json.loads(notes.get("numbers", "{}"))
            for optimizer in optimizers:
                _load_optimizer(optimizer, parameters, file, saved, numbers)
            if "random.cpu" in saved:
                torch.set_rng_state(file.get_tensor("random.cpu"))
            if "random.cuda" in saved and torch.cuda.is_available():
                torch.cuda.set_rng_state(file.get_tensor("random.cuda"))
            return Progress(int(notes["step"]), json.loads(notes.get("position", "null")))
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: not this run's progress ({error}); delete it") from error


def _load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Parameters, file: safe_open, saved: set[str],
    numbers: dict[str, Any],
) -> None:  # fmt: skip
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    fused = optimizer.defaults.get("fused")
    for name, p in parameters.items():
        prefix = f"optimizer.{name}."
        if id(p) not in mine:
            continue
        # In one order in all processes: sharding a tensor is a collective.
        for full in sorted(n for n in saved if n.startswith(prefix)):
            key, value = full.removeprefix(prefix), file.get_tensor(full)
            # fused AdamW keeps its step on the device, the plain one on the CPU
            on_cpu = key == "step" and not fused
            state = _like(value, p) if value.shape == p.shape else value
            optimizer.state[p][key] = state if on_cpu else state.to(p.device)
        for full in (n for n in numbers if n.startswith(prefix)):
            optimizer.state[p][full.removeprefix(prefix)] = numbers[full]


def _whole(tensor: Tensor, wanted: bool) -> Tensor:
    """On the CPU; where it is not wanted, only the gathering of a sharded one is taken part in."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu() if wanted else tensor


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, sharded as the parameter is."""
    if isinstance(parameter, DTensor):
        tensor = tensor.to(parameter.device)
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor
