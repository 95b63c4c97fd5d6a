"""`mmmamba-edge seed`: make a student checkpoint from a teacher's weights."""

import argparse
import sys
from pathlib import Path

from mmmamba_edge.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("teacher", type=Path, metavar="TEACHER", help="HoVLE checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="new checkpoint folder")
    parser.add_argument(
        "--attention-layers",
        default="",
        metavar="N,N,...",
        help="layers that stay attention, 0..N-1 over the whole stack; none: mmMamba-linear",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random parts (default 0)")
    parser.epilog = "example: mmmamba-edge seed HoVLE --out seeded --attention-layers 0,4,8,12"


def run(args: argparse.Namespace) -> int:
    """The verb."""
    try:
        keep = {int(n) for n in args.attention_layers.split(",") if n.strip()}
    except ValueError:
        raise UserError(
            f"--attention-layers {args.attention_layers!r}: expected numbers like 0,4,8"
        ) from None
    from mmmamba_edge.distill.seed import seed_checkpoint
    from mmmamba_edge.model.checkpoints import open_checkpoint

    seed_checkpoint(open_checkpoint(args.teacher), args.out, keep, args.seed)
    print(f"wrote {args.out}", file=sys.stderr)
    return 0
