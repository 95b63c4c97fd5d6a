"""`mmmamba-edge chat`: show a model pictures and talk about them.

With --prompt one question; otherwise one question a line, with `/commands`, from a terminal or a
pipe. The answer goes to stdout as it is made; everything else goes to stderr.
"""

import argparse
import json
import sys
from pathlib import Path

from mmmamba_edge.bundle import DEFAULT_BUNDLE
from mmmamba_edge.dialogue import Dialogue
from mmmamba_edge.errors import UserError
from mmmamba_edge.prefix import PrefixCache
from mmmamba_edge.reduced_state import PRECISIONS
from mmmamba_edge.resting import check_heads
from mmmamba_edge.runtimes import RUNTIME_NAMES, TORCH_BITS
from mmmamba_edge.runtimes.base import Runner
from mmmamba_edge.session import MAX_NEW_TOKENS, Session
from mmmamba_edge.state import check_writable


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("model", nargs="?", metavar="BUNDLE", type=Path,
        help="bundle folder (with --runtime torch: a checkpoint); default: the embedded model")
    add("--image", action="append", default=[], metavar="FILE",
        help="a picture for the first question; may be given again; sample:NAME for a sample")
    add("--prompt", metavar="TEXT", help="ask this, print the answer, end")
    add("--system", metavar="TEXT", help="system message (default: the model's own)")
    add("--runtime", default="auto", choices=RUNTIME_NAMES)
    add("--provider", default="cpu", metavar="NAME", help="where it runs: cpu (default), cuda, ...")
    add("--threads", type=int, metavar="N", help="CPU threads (default: the runtime's choice)")
    add("--session", type=Path, metavar="FILE",
        help="go on from this file if it is there, and keep the conversation in it")
    add("--session-state", default="float32", choices=PRECISIONS,
        help="how session files keep the state: float32 (default), exact; int16 or float16, half "
        "the size")
    add("--state-memory", default="float32", choices=PRECISIONS,
        help="how a state waits in memory between turns: float32 (default), exact; int16 or "
        "float16, half the size, refused where a head of the model would stagnate")
    add("--allow-other-quant", action="store_true",
        help="go on although the session was held with another quantisation of the model")
    add("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N",
        help="tokens of an answer at most (default: %(default)s)")
    add("--max-tiles", type=int, metavar="N",
        help="tiles of a picture at most (default: as the model says)")
    add("--temperature", type=float, default=0.0, metavar="T",
        help="0 (default): the likeliest word; above: more varied")
    add("--top-p", type=float, default=1.0, metavar="P",
        help="draw among the likeliest words that reach this probability (default: %(default)s)")
    add("--top-k", type=int, default=0, metavar="N",
        help="draw among the N likeliest words; 0 (default): all")
    add("--repetition-penalty", type=float, default=1.0, metavar="R",
        help="above 1: repeat less (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the draw (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object at the end")
    parser.epilog = "example: mmmamba-edge chat --image photo.jpg --prompt 'What is this?'"
# fmt: on


def run(args: argparse.Namespace) -> int:
    """The verb."""
    if args.session is not None:
        check_writable(args.session)  # rather than after an answer that cannot be kept
    runner = open_model(args)
    check_heads(runner, args.state_memory)
    cache = None  # one question reuses nothing
    if args.prompt is None:
        cache = PrefixCache(precision=args.state_memory)
    if args.session is not None and args.session.exists():
        session = Session.load(
            args.session, runner, allow_other_quant=args.allow_other_quant, prefix_cache=cache
        )
        if args.system is not None and args.system != session.system:
            raise UserError(
                f"{args.session}: this conversation was begun with another system message; leave "
                "--system out, or begin a new session file"
            )
    else:
        session = Session(runner, system=args.system, prefix_cache=cache)
    dialogue = Dialogue(session, args)
    dialogue.show(args.image)
    if args.prompt is not None:
        dialogue.ask(args.prompt)
    elif dialogue.interactive:
        dialogue.talk()
    else:
        dialogue.read_lines()
    if args.json:
        print(json.dumps(dialogue.report(), ensure_ascii=False))
    return 0


def open_model(args: argparse.Namespace) -> Runner:
    """The runner that the command line asks for; UserError where there is none."""
    folder = args.model or DEFAULT_BUNDLE
    if not folder.exists():
        raise UserError(
            f"{folder}: not found; give the folder of a bundle (mmmamba-edge export makes one)"
            if args.model
            else "this installation has no embedded model; give the folder of a bundle"
        )
    is_checkpoint = (folder / "config.json").is_file() and not (folder / "manifest.json").is_file()
    if args.runtime in TORCH_BITS and not is_checkpoint:
        raise UserError(f"{folder}: not a checkpoint, and --runtime torch serves those only")
    if args.runtime not in TORCH_BITS and is_checkpoint:
        raise UserError(
            f"{folder}: a checkpoint, not a bundle; serve it with --runtime torch, or make a "
            f"bundle of it: mmmamba-edge export {folder} --to onnx --out BUNDLE"
        )
    from mmmamba_edge.runtimes import open_bundle

    return open_bundle(folder, args.runtime, args.threads, args.provider)


if __name__ == "__main__":
    from mmmamba_edge.cli import main

    sys.exit(main(["chat", *sys.argv[1:]]))
