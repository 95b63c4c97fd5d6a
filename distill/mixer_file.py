"""Only what a student has of its own: its mixers, in small files beside the teacher.

    python -m mmmamba_edge.distill.mixer_file split runs/linear/stage3/checkpoint --out mixers/
    python -m mmmamba_edge.distill.mixer_file join teacher mixers/ --out student/

Everything else of a student is its teacher's, so a student travels as its mixers: safetensors,
`{layer}.{tensor}`, over files of bounded size. A run that has not finished travels too: its saved
progress over the checkpoint that the stage began from.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmmamba_edge.distill.student import student_tensors
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import Checkpoint, open_checkpoint, save_checkpoint
from mmmamba_edge.model.tensor_names import layer_prefix, mixer_shapes
from mmmamba_edge.tokenizer import tokenizer_files
from mmmamba_edge.whole import new_file, new_folder

FILE_BYTES = 15 << 20

Mixers = dict[int, dict[str, Tensor]]  # by layer and name


def mixers_of(student: Checkpoint) -> Mixers:
    """Every mixer tensor of a student's checkpoint."""
    return {
        layer: {
            name: student.get(f"{layer_prefix(student.config, layer)}attention.{name}")
            for name in mixer_shapes(student.config, layer)
        }
        for layer, kind in enumerate(student.config.layer_types)
        if kind == "mamba2"
    }


def with_progress(mixers: Mixers, progress: Path) -> Mixers:
    """Mixers with what a stage has learnt since (its progress.safetensors)."""
    mixers = {layer: dict(tensors) for layer, tensors in mixers.items()}
    learnt = {}
    with safe_open(progress, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (no mapping)
            if key.startswith("model."):
                learnt[key.removeprefix("model.")] = file.get_tensor(key)
    layers = {int(name.partition(".")[0]) for name in learnt}
    if not layers <= set(mixers):
        raise UserError(f"{progress}: trains layers that the checkpoint has no mixers for")
    mixers = {layer: mixers[layer] for layer in sorted(layers)}
    for name, tensor in learnt.items():
        layer, _, local = name.partition(".")
        mixers[int(layer)][local] = tensor
    return mixers


def save_mixers(mixers: Mixers, out: Path, dtype: torch.dtype, limit: int = FILE_BYTES) -> None:
    """Write `mixers-00.safetensors` and so on into the new folder `out`.

    Args:
        mixers: to write.
        out: folder to make.
        dtype: to store in.
        limit: bytes of a file, at least one tensor's.
    """
    flat = {
        f"{layer}.{name}": tensor.to(dtype).contiguous()
        for layer, tensors in sorted(mixers.items())
        for name, tensor in sorted(tensors.items())
    }
    files: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in flat.items():
        if size + tensor.nbytes > limit and files[-1]:
            files.append({})
            size = 0
        files[-1][name] = tensor
        size += tensor.nbytes
    with new_folder(out) as folder:
        for number, tensors in enumerate(files):
            with new_file(folder / f"mixers-{number:02}.safetensors") as part:
                save_file(tensors, part)


def load_mixers(folder: Path) -> Mixers:
    """What `save_mixers` wrote."""
    paths = sorted(folder.glob("mixers-*.safetensors"))
    if not paths:
        raise UserError(f"{folder}: holds no mixers-*.safetensors")
    mixers: Mixers = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (no mapping)
                    layer, _, name = key.partition(".")
                    mixers.setdefault(int(layer), {})[name] = file.get_tensor(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a file of mixers ({error})") from error
    return mixers


def join(teacher: Checkpoint, mixers: Mapping[int, Mapping[str, Tensor]], out: Path) -> None:
    """Write the student that has `mixers` where they are and the teacher's layers elsewhere.

    Raises:
        UserError: a mixer lacks a tensor, or has one of another shape.
    """
    total = range(len(teacher.config.layer_types))
    if strange := sorted(set(mixers) - set(total)):
        raise UserError(f"mixers of layer {strange[0]}: {teacher.folder} has layers 0..{total[-1]}")
    config = teacher.config.with_attention_layers(set(total) - set(mixers))
    for layer, tensors in mixers.items():
        for name, shape in mixer_shapes(config, layer).items():
            if name not in tensors:
                raise UserError(f"layer {layer}: no {name} among the mixers; a file is missing")
            if tuple(tensors[name].shape) != shape:
                found = tuple(tensors[name].shape)
                raise UserError(f"layer {layer}, {name}: {found}, the teacher's needs {shape}")
    dtype = next(iter(next(iter(mixers.values())).values())).dtype
    save_checkpoint(
        out, config, lambda name: student_tensors(teacher, config, mixers, name), dtype=dtype,
        extra_files=tokenizer_files(teacher.folder),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmmamba_edge.distill.mixer_file",
        description="A student as the mixers that it has of its own, and back.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    split = verbs.add_parser("split", help="a student's mixers to files of at most 15 MiB")
    split.add_argument("student", type=Path, help="checkpoint folder")
    split.add_argument("--progress", type=Path, help="progress.safetensors of the stage after it")
    split.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    glue = verbs.add_parser("join", help="mixers and teacher to a student")
    glue.add_argument("teacher", type=Path, help="checkpoint folder")
    glue.add_argument("mixers", type=Path, help="folder of mixers-*.safetensors")
    for each in (split, glue):
        each.add_argument("--out", type=Path, required=True, help="folder to make")
    args = parser.parse_args(argv)
    try:
        if args.verb == "split":
            mixers = mixers_of(open_checkpoint(args.student))
            if args.progress:
                mixers = with_progress(mixers, args.progress)
            save_mixers(mixers, args.out, getattr(torch, args.dtype))
        else:
            join(open_checkpoint(args.teacher), load_mixers(args.mixers), args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
