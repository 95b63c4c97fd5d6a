"""`mmmamba-edge convert`: other people's files into a checkpoint, and one layout into another.

stage2.pt stage3.pt --teacher HoVLE    the original's training checkpoints over their teacher
model.gguf                             a Llama-architecture language model, as a teacher
CHECKPOINT --layout released           the same tensors, fused as the released models have them
"""

import argparse
import sys
from pathlib import Path

from mmmamba_edge.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help=".pt files, one .gguf, or a checkpoint"
    )
    parser.add_argument("--out", type=Path, required=True, help="new checkpoint folder")
    parser.add_argument("--teacher", type=Path, help="checkpoint that .pt files were trained from")
    parser.add_argument(
        "--layout",
        choices=("training", "released"),
        default="training",
        help="released: fused as in the published models (default training)",
    )
    parser.add_argument(
        "--embedding-layers",
        type=int,
        help="GGUF: how many of its layers become embedding layers (default a quarter)",
    )
    parser.add_argument("--seed", type=int, default=0, help="GGUF: of the new vision stem")
    parser.epilog = "example: mmmamba-edge convert stage2.pt stage3.pt --teacher HoVLE --out linear"


def run(args: argparse.Namespace) -> int:
    """The verb."""
    from mmmamba_edge.model.convert import convert_layout, convert_stages

    files: list[Path] = args.files
    if all(file.is_dir() for file in files) and len(files) == 1:
        convert_layout(files[0], args.out, args.layout)
    elif all(file.suffix in (".pt", ".pth", ".bin") for file in files):
        if args.teacher is None:
            raise UserError(f"{files[0]}: a stage file holds the trained part only; give --teacher")
        convert_stages(files, args.teacher, args.out, args.layout)
    elif len(files) == 1 and files[0].suffix == ".gguf":
        from mmmamba_edge.model.gguf_llama import convert_gguf

        convert_gguf(files[0], args.out, args.embedding_layers, args.seed)
    else:
        raise UserError(
            f"{' '.join(map(str, files))}: expected .pt files, one .gguf, or one checkpoint folder"
        )
    print(f"wrote {args.out}", file=sys.stderr)
    return 0
