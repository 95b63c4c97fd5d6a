"""`mmmamba-edge export`: turn a checkpoint into a verified bundle for devices."""

import argparse
import json
from contextlib import closing
from pathlib import Path
from typing import Any

from mmmamba_edge.errors import UserError
from mmmamba_edge.export.pte_backends import BACKENDS
from mmmamba_edge.manifest import Manifest
from mmmamba_edge.quant.codes import GROUPS
from mmmamba_edge.quant.thresholds import read as read_thresholds
from mmmamba_edge.status import Report, StatusLine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="checkpoint folder, of any layout")
    add("--to", required=True, choices=["onnx", "executorch"], help="kind of bundle")
    add(
        "--out",
        required=True,
        metavar="BUNDLE",
        type=Path,
        help="folder to write; an existing bundle is replaced",
    )
    add(
        "--quant",
        default="none",
        choices=["none", "fp16", "int8", "int4"],
        help="none (default): float32; fp16: half-precision products; int8, int4: weights as "
        "codes; the scan is float32 in all of them",
    )
    add(
        "--group-size",
        type=int,
        choices=GROUPS,
        help="of int4: weights that share a scale (default 32; 128 is smaller and less exact)",
    )
    add(
        "--ops",
        choices=["com.microsoft", "standard"],
        help="of onnx: com.microsoft (default), ONNX Runtime's fused operators; or standard, plain "
        "ONNX 27",
    )
    add(
        "--max-context",
        type=int,
        metavar="N",
        help="tokens that a hybrid's attention layers keep (default: as trained, at most 4096)",
    )
    add(
        "--cache",
        choices=["float32", "float16"],
        help="of onnx: what a hybrid's attention layers keep keys and values as (default: float32; "
        "float16 is slower on a CPU)",
    )
    add(
        "--ort",
        action="store_true",
        help="of onnx: graphs in ONNX Runtime's own format, with the list of operators that a "
        "reduced mobile build of it needs",
    )
    add(
        "--backend",
        choices=list(BACKENDS),
        help="of executorch: xnnpack (default); the others are lowered and not run here",
    )
    add(
        "--no-report",
        dest="accuracy",
        action="store_false",
        help="leave accuracy.json out of a quantised bundle (see `mmmamba-edge check`)",
    )
    add(
        "--reference",
        metavar="CHECKPOINT",
        type=Path,
        help="of a quantised checkpoint: the one that it was made of, for accuracy.json",
    )
    add(
        "--thresholds",
        metavar="FILE",
        type=Path,
        help="limits for `check` that the bundle carries instead of its scheme's, for a small "
        "model (docs/accuracy.md)",
    )
    add("--json", action="store_true", help="print one JSON object: the verification figures")
    parser.epilog = (
        "example: mmmamba-edge export weights/mmMamba-linear --to onnx --out build/linear "
        "--quant int8"
    )


def run(args: argparse.Namespace) -> int:
    """The verb."""
    with closing(StatusLine()) as status:
        manifest = _export(args, status)
    print(_as_json(args.out, manifest) if args.json else _as_text(args.out, manifest))
    return 0


def _export(args: argparse.Namespace, report: Report) -> Manifest:
    options: dict[str, Any] = {
        "quant": args.quant, "group_size": args.group_size, "max_context": args.max_context,
        "accuracy": args.accuracy, "reference": args.reference, "report": report,
        "thresholds": read_thresholds(args.thresholds) if args.thresholds else None,
    }  # fmt: skip
    if args.to == "onnx":
        if args.backend:
            raise UserError("--backend is for --to executorch; leave it out with --to onnx")
        from mmmamba_edge.export.to_onnx import export_onnx

        return export_onnx(
            args.checkpoint, args.out, ops=args.ops or "com.microsoft", cache=args.cache,
            ort=args.ort, **options,
        )  # fmt: skip
    for name in ("ops", "cache", "ort"):
        if getattr(args, name):
            raise UserError(f"--{name} is for --to onnx; leave it out with --to executorch")
    from mmmamba_edge.export.to_executorch import export_executorch

    backend = args.backend or "xnnpack"
    return export_executorch(args.checkpoint, args.out, backend=backend, **options)


def _as_json(out: Path, manifest: Manifest) -> str:
    return json.dumps(
        {
            "bundle": str(out),
            "bytes": sum(file.bytes for file in manifest.files.values()),
            "state_bytes": manifest.state_bytes,
            "max_context": manifest.max_context,
            "quant": manifest.quant,
            "ops": manifest.ops,
            "model_id": manifest.model_id,
            "codes_sha256": manifest.settings.get("codes_sha256"),
            "verification": manifest.verification,
        },
        ensure_ascii=False,
    )


def _as_text(out: Path, manifest: Manifest) -> str:
    size = sum(file.bytes for file in manifest.files.values())
    context = f" for {manifest.max_context:,} tokens" if manifest.max_context else ""
    lines = [f"{out}: {size:,} bytes; state {manifest.state_bytes:,} bytes{context}"]
    if "not_run" in manifest.verification:
        lines.append(f"  {manifest.verification['not_run']}: not verified")
    if "codes_sha256" in manifest.settings:
        lines.append(f"  codes {manifest.settings['codes_sha256']}")
    for key, what in _COMPARISONS.items():
        figures = manifest.verification.get(key)
        if figures:
            lines.append(
                f"  {what}: {figures['sqnr_db']} dB, same top token {figures['top1']:.2%}, "
                f"mean KLD {figures['mean_kld']:g}, largest difference {figures['max_abs']:g}"
            )
    return "\n".join(lines)


_COMPARISONS = {
    "exact": "codes, computed in float32, against PyTorch on the same codes",
    "shipped": "as shipped, against PyTorch on the same codes",
    "float32": "as shipped, against PyTorch on the float32 weights",
}
