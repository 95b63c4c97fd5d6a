"""`mmmamba-edge check`: how far a shipped bundle is from its float32 reference, and whether it may.

The artefact itself is run, on its own runtime. Exit code 1 if a figure is past its limit, with the
failing lines named.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from mmmamba_edge.runtimes import RUNTIME_NAMES
from mmmamba_edge.status import StatusLine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path,
        help="bundle folder or .pte (with --runtime torch: a checkpoint)")  # fmt: skip
    add("--reference", metavar="CHECKPOINT", type=Path, required=True,
        help="the checkpoint it was exported from, read in float32")  # fmt: skip
    add("--data", metavar="builtin|FILE", default="builtin",
        help="builtin (default): Python's documentation and questions about the sample pictures; "
        "or a .txt, or a .jsonl of conversations in InternVL's layout")  # fmt: skip
    add("--out", metavar="REPORT_DIR", type=Path,
        help="folder for report.json and report.html; a report in it is replaced")  # fmt: skip
    add("--other", metavar="BUNDLE2", type=Path,
        help="another bundle of the same model, to be compared with this one")  # fmt: skip
    add("--runtime", default="auto", choices=RUNTIME_NAMES)
    add("--tokens", type=int, default=20_000, metavar="N",
        help="positions to score, pictures not counted (default: %(default)s)")  # fmt: skip
    add("--thresholds", type=Path, metavar="FILE.toml",
        help="limits that win over those of the scheme and of the bundle")  # fmt: skip
    add("--state", metavar="FORMAT", choices=["float16", "int16", "bfloat16"],
        help="also measure the drift of a state that is kept in this format")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object: the report")
    parser.epilog = (
        "example: mmmamba-edge check build/linear-int8 --reference weights/mmMamba-linear "
        "--out build/report"
    )


def run(args: argparse.Namespace) -> int:
    """The verb."""
    from mmmamba_edge.quant import thresholds
    from mmmamba_edge.quant.check_report import as_text, check_place, write
    from mmmamba_edge.quant.check_run import check

    asked = thresholds.read(args.thresholds) if args.thresholds else {}
    if args.out:
        check_place(args.out)
    status = StatusLine()
    try:
        report = check(
            args.bundle, args.reference, data=args.data, tokens=args.tokens, runtime=args.runtime,
            other=args.other, thresholds=asked, state=args.state, say=status,
        )  # fmt: skip
    finally:
        status.close(keep=False)
    report["command"] = _command(args)
    if args.out:
        write(report, args.out)
        status.note(f"{args.out / 'report.html'}: written")
    print(json.dumps(report, ensure_ascii=False, allow_nan=False) if args.json else as_text(report))
    if report["failures"] and args.json:  # the text says so itself
        print(*report["failures"], sep="\n", file=sys.stderr)
    return 1 if report["failures"] else 0


def _command(args: argparse.Namespace) -> str:
    """The command line that makes this report again."""
    words = ["mmmamba-edge", "check", str(args.bundle), "--reference", str(args.reference)]
    plain = {"data": "builtin", "runtime": "auto", "tokens": 20_000}
    for name in ("data", "other", "runtime", "tokens", "thresholds", "state"):
        value = getattr(args, name)
        if value is not None and value != plain.get(name):
            words += [f"--{name}", str(value)]
    return shlex.join(words)
