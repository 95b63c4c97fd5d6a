"""`mmmamba-edge convert`: other people's files into a checkpoint, and one layout into another.

stage2.pt stage3.pt --teacher HoVLE    the original's training checkpoints over their teacher
model.gguf                             a Llama-architecture language model, as a teacher
CHECKPOINT --layout released           the same tensors, fused as the released models have them
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from mmmamba_edge.config import Config
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import (
    Layout,
    open_checkpoint,
    save_checkpoint,
    tensor_report,
)
from mmmamba_edge.model.tensor_names import layer_prefix, training_shapes
from mmmamba_edge.tokenizer import tokenizer_files


def convert_layout(folder: Path, out: Path, layout: Layout) -> None:
    """Write a checkpoint's tensors in another layout. Every tensor survives, bit for bit."""
    source = open_checkpoint(folder)
    files = tokenizer_files(folder)
    save_checkpoint(out, source.config, source.get, layout=layout, extra_files=files)


def convert_stages(files: list[Path], teacher: Path, out: Path, layout: Layout) -> Config:
    """Lay the original's stage checkpoints over their teacher, later files over earlier ones.

    Layers with mixer tensors in the files become Mamba-2; the others stay attention. The original's
    stage 3 saves neither dt_bias nor A_log_bias, so its stage-2 (or 1) file is needed too.

    Returns:
        The config of what was written.

    Raises:
        UserError: a file that is not the original's, or a list of the tensors still missing.
    """
    base = open_checkpoint(teacher)
    trained: dict[str, Tensor] = {}
    for file in files:
        trained |= read_stage(file)
    config = _with_mixers(base.config, set(trained))
    shapes = training_shapes(config)
    kept = set(base.names())
    inherited = _inherited(config, base.config)
    found = {name: tuple(tensor.shape) for name, tensor in trained.items()}
    found |= {name: shapes[name] for name in shapes if name in kept or name in inherited}
    found |= {name: tuple(tensor.shape) for name, tensor in trained.items()}
    report = tensor_report(shapes, found)
    if report:
        hint = ""
        if "dt_bias" in report or "A_log_bias" in report:
            hint = (
                "\nthe original's stage 3 omits dt_bias and A_log_bias: give its stage-2 file first"
            )
        raise UserError(
            f"{' + '.join(map(str, files))} over {teacher} is incomplete\n{report}{hint}"
        )

    def get(name: str) -> Tensor:
        if name in trained:
            return trained[name]
        return base.get(inherited.get(name, name))

    save_checkpoint(
        out, config, get, layout=layout,
        extra_files=tokenizer_files(teacher),
    )  # fmt: skip
    return config


def read_stage(path: Path) -> dict[str, Tensor]:
    """The trained tensors of one of the original's .pt files, by torch's weights-only loader."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{path}: not a .pt file that torch's weights-only loader reads ({first})"
        ) from error
    tensors = data.get("model_state_dict") if isinstance(data, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(
            f"{path}: no 'model_state_dict' of tensors; expected one of mmMamba's stage files"
        )
    return {
        name.removeprefix("module."): tensor
        for name, tensor in tensors.items()
        if "_shadow." not in name  # stage 2's frozen copies of the teacher
    }


def _with_mixers(config: Config, names: set[str]) -> Config:
    """`config` with Mamba-2 wherever `names` holds a mixer tensor."""
    attention = {
        layer
        for layer in range(len(config.layer_types))
        if f"{layer_prefix(config, layer)}attention.conv1d.weight" not in names
    }
    return config.with_attention_layers(attention)


def _inherited(config: Config, teacher: Config) -> dict[str, str]:
    """Mixer tensors that are the teacher's under another name: o_proj is its wo (spec 3.1)."""
    return {
        f"{layer_prefix(config, i)}attention.o_proj.weight": (
            f"{layer_prefix(teacher, i)}attention.wo.weight"
        )
        for i, kind in enumerate(config.layer_types)
        if kind == "mamba2"
    }
