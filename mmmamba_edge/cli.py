"""`mmmamba-edge VERB`: the table of verbs, and what becomes of their errors.

A verb is a module with `add_arguments(parser)`, which also sets `parser.epilog` to an example, and
`run(args) -> int`; only the chosen one is imported. To add a verb, add a row.

Exit codes: 0 good, 1 a check failed, 2 wrong use, 130 Ctrl-C, 141 nobody reads the output any more.
"""

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from importlib import import_module

import mmmamba_edge
from mmmamba_edge.errors import CheckFailed, UserError

PROGRAM = "mmmamba-edge"


# verb: (module, what it does)
VERBS = {
    "chat": ("mmmamba_edge.chat", "show a model pictures and talk about them"),
    "quantize": (
        "mmmamba_edge.quant.quantize_command",
        "make codes and scales for a checkpoint, with calibration",
    ),
    "export": ("mmmamba_edge.export.command", "make a verified bundle of a checkpoint"),
    "check": ("mmmamba_edge.quant.check_command", "compare a bundle with its float32 reference"),
    "bench": ("mmmamba_edge.bench", "measure time and memory on this machine"),
    "eval": ("mmmamba_edge.evaluation.command", "score a model on benchmarks and scenes"),
    "inspect": ("mmmamba_edge.inspection", "print config, sizes, state bytes and tensors"),
    "seed": ("mmmamba_edge.distill.seed_command", "make a student of a teacher"),
    "distill": ("mmmamba_edge.distill.distill_command", "train a student from a teacher"),
    "convert": ("mmmamba_edge.model.convert_command", "make a checkpoint of other files"),
}

# What a missing package is installed with.
EXTRAS = {
    "onnxruntime": "onnxruntime",
    "torch": "torch",
    "onnx": "onnx",
    "executorch": "executorch",
    "torchao": "executorch",
    "accelerate": "train",
    "tensorboard": "train",
    "bitsandbytes": "cuda",
    "gguf": "train",
}

_log = logging.getLogger("mmmamba_edge")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; bad input is a message, not a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _speak_utf8()
    with _messages_on_stderr():
        try:
            code = _dispatch(argv)
            sys.stdout.flush()
            return code
        except CheckFailed as error:
            return _fail(error, 1)
        except UserError as error:
            return _fail(error, 2)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            return _fail(missing_package(error.name or "", extra), 2)
        except BrokenPipeError:
            # The reader (head, less) has gone. Python flushes stdout once more at exit: to nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # 128 + SIGPIPE
        except OSError as error:  # a folder without permission, a name too long, a full disk
            return _fail(
                UserError(f"{error.filename or 'input or output'}: {error.strerror or error}"), 2
            )
        except KeyboardInterrupt:
            return 130  # 128 + SIGINT, as shells count


def missing_package(package: str, extra: str) -> UserError:
    """The error for an optional package that is not installed."""
    return UserError(
        f"this needs {package}, which is not installed: pip install '{PROGRAM}[{extra}]'"
    )


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"{PROGRAM} {mmmamba_edge.__version__}")
        return 0
    name = argv[0]
    if name not in VERBS:
        raise UserError(f"unknown command {name!r}; known are {', '.join(VERBS)}")
    module_name, summary = VERBS[name]
    module = import_module(module_name)
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    try:
        args = parser.parse_args(argv[1:])
    except SystemExit as exit:  # argparse has printed its help (0) or its complaint (2)
        return exit.code if isinstance(exit.code, int) else 2
    return module.run(args)


def _overview() -> str:
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in VERBS.items())
    return (
        f"usage: {PROGRAM} VERB ...\n\n"
        "Multimodal Mamba-2 on the edge: distil, export, and chat with a fixed-size state.\n\n"
        f"{rows}\n\n"
        f"'{PROGRAM} VERB --help' explains one of them.\n\n"
        f"example: {PROGRAM} chat --image photo.jpg --prompt 'What is this?'"
    )


def _fail(error: UserError, code: int) -> int:
    print(f"{PROGRAM}: error: {error}", file=sys.stderr)
    return code


def _speak_utf8() -> None:
    """Answers are in any language, whatever the locale (LANG=C) says."""
    for stream, errors in (
        (sys.stdin, "surrogateescape"),  # refused later, by name, where it is no UTF-8
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)


@contextmanager
def _messages_on_stderr():
    """Warnings and the library's log as plain lines on stderr, while a command runs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    level = _log.level
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    with warnings.catch_warnings():
        if not sys.warnoptions:  # python -W wins
            warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            yield
        finally:
            _log.removeHandler(handler)
            _log.setLevel(level)
