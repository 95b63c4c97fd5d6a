"""`mmmamba-edge quantize`: codes and scales for a checkpoint, made with calibration."""

import argparse
import json
from contextlib import closing
from pathlib import Path

from mmmamba_edge.errors import UserError
from mmmamba_edge.quant.codes import GROUPS
from mmmamba_edge.quant.plan import ALGORITHMS, make_plan
from mmmamba_edge.status import StatusLine

MIXED_BITS = 4.9  # a weight, scales counted
CALIBRATION_TOKENS = 32_768


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint folder, of any layout")
    add(
        "--scheme",
        required=True,
        metavar="int8|int4|mixed|FILE.toml",
        help="mixed: 4 bits, and 8 where answers lose most without; FILE.toml: bits by name",
    )
    add(
        "--calibration",
        default="builtin",
        metavar="builtin|FILE",
        help="what is read: Python's own help pages, a .txt, or a .jsonl of conversations with "
        "pictures in the InternVL layout",
    )
    add("--out", required=True, metavar="CHECKPOINT", type=Path, help="folder to write")
    add(
        "--group-size",
        type=int,
        default=32,
        choices=GROUPS,
        help="of 4 bits: weights that share a scale (32)",
    )
    add(
        "--bits",
        type=float,
        default=MIXED_BITS,
        metavar="B",
        help=f"of mixed: bits a decoder weight, scales counted ({MIXED_BITS})",
    )
    add(
        "--algorithm",
        default="gptq",
        choices=ALGORITHMS,
        help="gptq (default): columns make up for what those before lost; fisher: rows as well, by "
        "what answers depend on, which takes a backward pass; clipped: to nearest, outliers "
        "clipped where that loses less",
    )
    add("--no-folds", action="store_true", help="leave scales where they are")
    add(
        "--tokens",
        type=int,
        default=CALIBRATION_TOKENS,
        metavar="N",
        help=f"calibration tokens, at most ({CALIBRATION_TOKENS:,})",
    )
    add(
        "--device",
        default="cpu",
        choices=("cpu", "cuda"),
        help="where layers read and are rounded (cpu); one layer is there at a time, with --scheme "
        "mixed the whole model once",
    )
    add("--json", action="store_true", help="print one JSON object")
    parser.epilog = (
        "example: mmmamba-edge quantize weights/mmMamba-linear --scheme mixed "
        "--calibration data/calibration.jsonl --out build/linear-mixed"
    )


def run(args: argparse.Namespace) -> int:
    """The verb."""
    from mmmamba_edge.model.checkpoints import open_checkpoint
    from mmmamba_edge.model.device import require_device
    from mmmamba_edge.quant.quantize_data import calibrate_on
    from mmmamba_edge.quant.quantize_layers import quantize_checkpoint
    from mmmamba_edge.quant.quantize_units import measure_units, promoted
    from mmmamba_edge.quant.stored import QuantizedCheckpoint
    from mmmamba_edge.tokenizer import load_tokenizer
    from mmmamba_edge.whole import refuse_taken

    plan = make_plan(args.scheme, args.group_size, args.algorithm, folds=not args.no_folds)
    if args.tokens < 1:
        raise UserError(f"--tokens {args.tokens}: expected a number above 0")
    require_device(args.device)
    refuse_taken(args.out)
    source = open_checkpoint(args.checkpoint)
    if isinstance(source, QuantizedCheckpoint):
        raise UserError(f"{args.checkpoint}: is quantised already; give the one it was made of")
    tokenizer = load_tokenizer(args.checkpoint)
    with closing(StatusLine()) as status:
        status("reading calibration data")
        data = calibrate_on(args.calibration, source.config, tokenizer, args.tokens)
        if args.scheme == "mixed":
            units = measure_units(source, plan, data, status, device=args.device)
            plan = plan.promote(promoted(units, args.bits))
        facts = quantize_checkpoint(source, args.out, plan, data, status, args.device)
    eight = [c for c in facts.matrices.values() if c.bits == 8]
    shown = {
        "checkpoint": str(args.out), "scheme": facts.scheme, "codes_sha256": facts.digest,
        "bits_per_weight": facts.bits_per_weight, "matrices": len(facts.matrices),
        "in_8_bits": len(eight), "folds": len(facts.folds), "calibration": facts.calibration,
    }  # fmt: skip
    if args.json:
        print(json.dumps(shown))
        return 0
    print(
        f"{args.out}: {len(facts.matrices)} matrices, {len(eight)} of them in 8 bits; "
        f"{facts.bits_per_weight} bits a decoder weight; {len(facts.folds)} folds\n"
        f"  codes {facts.digest}\n"
        f"  calibrated on {facts.calibration['tokens']:,} tokens of {facts.calibration['source']}\n"
        f"  next: mmmamba-edge export {args.out} --to onnx --out BUNDLE"
    )
    return 0
