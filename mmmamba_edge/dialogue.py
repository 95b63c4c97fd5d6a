"""A conversation at a terminal or through pipes: questions, answers, `/commands`."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

import mmmamba_edge
from mmmamba_edge import terminal
from mmmamba_edge.answer import Answer, Stats
from mmmamba_edge.errors import UserError
from mmmamba_edge.image import load_image
from mmmamba_edge.prompt import prompt_text
from mmmamba_edge.session import Session

SAMPLES = Path(__file__).parent / "assets" / "samples"
ABOUT_DEFAULT = (
    "It is small: ask it which objects and shapes a drawn picture shows, their colour, how many,\n"
    "where; or to read a short word. It knows no photographs (README). /image lists samples."
)


class Dialogue:
    """One conversation at a terminal or through pipes.

    Args:
        session: what is talked with.
        args: the command line.
    """

    def __init__(self, session: Session, args: argparse.Namespace) -> None:
        self.session = session
        self.args = args
        self.interactive = args.prompt is None and not args.json and sys.stdin.isatty()
        self.pictures: list[tuple[str, Image.Image]] = []  # for the next question
        self.turns: list[dict[str, Any]] = []  # for --json

    # --- three ways to be asked ---------------------------------------------------------------

    def talk(self) -> None:
        """Questions and commands from a terminal until /quit or Ctrl-D; errors do not end it."""
        terminal.say(self._banner())
        for line in terminal.lines():
            try:
                self.handle(line)
            except EOFError:
                return
            except UserError as error:
                terminal.say(f"error: {error}")
            except BrokenPipeError:
                raise
            except OSError as error:
                terminal.say(f"error: {error.filename}: {error.strerror}")
            except KeyboardInterrupt:
                terminal.say("stopped")

    def read_lines(self) -> None:
        """Questions and commands from a pipe, one a line; an error ends it."""
        for line in sys.stdin:
            try:
                self.handle(line)
            except EOFError:
                return

    def handle(self, line: str) -> None:
        """Obey a line: a command, a question, or nothing. EOFError: it was /quit."""
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self.ask(line)
            return
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            raise UserError(f"unknown command {name}; known are {', '.join(COMMANDS)}")
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise UserError(f"{name}: {str(error).lower()}; quote names with spaces") from error
        COMMANDS[name][2](self, words)

    # --- a turn -------------------------------------------------------------------------------

    def ask(self, text: str) -> None:
        """Ask, with the pictures that wait, and print the answer as it comes."""
        args = self.args
        pictures = self.pictures
        # Arguments and pipes hand on bytes that are no UTF-8 as surrogates: named in the error.
        text = prompt_text(text.encode("utf-8", "surrogateescape"))
        try:
            with terminal.reading() as progress:
                answer = self.session.ask(
                    text,
                    [picture for _, picture in pictures],
                    max_new_tokens=args.max_new_tokens,
                    max_tiles=args.max_tiles,
                    temperature=args.temperature,
                    top_p=args.top_p,
                    top_k=args.top_k,
                    repetition_penalty=args.repetition_penalty,
                    seed=args.seed,
                    progress=progress,
                )
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            terminal.say("stopped; the question is forgotten, the conversation is not")
            return
        self.pictures = []
        self._print(answer, text, [name for name, _ in pictures])

    def _print(self, answer: Answer, question: str | None, pictures: list[str]) -> None:
        said: list[str] = []
        try:
            for piece in answer:
                if self.args.json:
                    said.append(piece)
                else:
                    terminal.write(piece)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        finally:
            self._keep()  # first: the terminal may be gone
            if not self.args.json:
                terminal.write("\n")
        if self.args.json:
            self.turns.append(
                {
                    "prompt": question,
                    "images": pictures,
                    "answer": "".join(said).strip(),
                    "finish_reason": answer.reason,
                    "stats": _figures(answer.stats),
                }
            )
        terminal.say_if_watched(self._after(answer))

    def _keep(self) -> None:
        self.session.rest(self.args.state_memory)
        if self.args.session is not None:
            self.session.save(self.args.session, self.args.session_state)

    def _after(self, answer: Answer) -> str:
        hint = {
            None: "stopped, /continue goes on; ",
            "length": f"cut at {self.args.max_new_tokens} tokens, /continue goes on; ",
            "context": "the context is full, /reset begins anew; ",
        }
        return hint.get(answer.reason, "") + _line(answer.stats)

    def report(self) -> dict[str, Any]:
        """What --json prints."""
        runner = self.session.runner
        return {
            "model": {
                "model_id": runner.model_id,
                "quant": runner.quant,
                "variant": runner.config.variant,
            },
            "turns": self.turns,
            "answer": self.turns[-1]["answer"] if self.turns else None,
        }

    # --- commands -----------------------------------------------------------------------------

    def show(self, names: list[str]) -> None:
        """Let pictures wait for the next question; all of them, or none if one is bad."""
        self.pictures += [(name, load_image(find_picture(name))) for name in names]

    def _image(self, words: list[str]) -> None:
        if not words:
            terminal.say("samples: " + (", ".join(sample_names()) or "none in this installation"))
            return
        self.show(words)
        count = len(self.pictures)
        terminal.say(f"{count} picture{'s' * (count > 1)} will go with your next question")

    def _continue(self, words: list[str]) -> None:
        self._print(self.session.resume(self.args.max_new_tokens), None, [])

    def _stats(self, words: list[str]) -> None:
        terminal.say(_line(self.session.stats))

    def _reset(self, words: list[str]) -> None:
        self.session.reset()
        self.pictures = []
        self._keep()
        terminal.say("forgotten")

    def _save(self, words: list[str]) -> None:
        path = _one_file("/save", words)
        self.session.save(path, self.args.session_state)
        terminal.say(f"kept in {path}")

    def _load(self, words: list[str]) -> None:
        old = self.session
        self.session = Session.load(
            _one_file("/load", words),
            old.runner,
            allow_other_quant=self.args.allow_other_quant,
            prefix_cache=old.prefix_cache,
        )
        terminal.say(f"going on after {self.session.stats.context_tokens} tokens")

    def _help(self, words: list[str]) -> None:
        for name, (operand, what, _) in COMMANDS.items():
            terminal.say(f"  {f'{name} {operand}':<16} {what}")

    def _quit(self, words: list[str]) -> None:
        raise EOFError

    def _banner(self) -> str:
        runner = self.session.runner
        state = terminal.size(runner.new_state().nbytes)
        lines = [
            f"mmMamba Edge {mmmamba_edge.__version__}: mmMamba-{runner.config.variant}, weights "
            f"{runner.quant}, state {state}"
            + ("" if runner.max_context else " however long we talk"),
        ]
        if self.args.model is None:
            lines.append(ABOUT_DEFAULT)
        if self.session.stats.turn:
            lines.append(f"going on after {self.session.stats.context_tokens} tokens")
        lines.append("/image FILE shows a picture, /help lists the rest, Ctrl-C stops an answer")
        return "\n".join(lines)


COMMANDS: dict[str, tuple[str, str, Callable[[Dialogue, list[str]], None]]] = {
    "/image": (
        "FILE...",
        "show pictures with the next question; alone: samples",
        Dialogue._image,
    ),
    "/continue": ("", "let the last answer go on where it was cut", Dialogue._continue),
    "/stats": ("", "speed, tokens and state bytes of the last turn", Dialogue._stats),
    "/reset": ("", "forget the conversation", Dialogue._reset),
    "/save": ("FILE", "keep the conversation in a file", Dialogue._save),
    "/load": ("FILE", "go on from a file", Dialogue._load),
    "/help": ("", "this list", Dialogue._help),
    "/quit": ("", "end (so does Ctrl-D)", Dialogue._quit),
}


# --- pictures and figures -------------------------------------------------------------------------


def sample_names() -> list[str]:
    """Names of the sample pictures that come with the package."""
    return sorted(path.stem for path in SAMPLES.glob("*.png"))


def find_picture(name: str) -> Path:
    """A file, or the sample picture of that name (`sample:NAME`, or NAME where no file has it)."""
    names, path = sample_names(), Path(os.path.expanduser(name))
    asked = name.removeprefix("sample:")
    if name.startswith("sample:") and asked not in names:
        raise UserError(f"{name}: no such sample; there are {', '.join(names) or 'none'}")
    if asked in names and (asked != name or not path.exists()):
        return SAMPLES / f"{asked}.png"
    return path


def _one_file(command: str, words: list[str]) -> Path:
    if len(words) != 1:
        raise UserError(f"{command} takes one file name")
    return Path(os.path.expanduser(words[0]))


def _line(stats: Stats) -> str:
    reused = f", {stats.reused_tokens} of them reused" if stats.reused_tokens else ""
    return (
        f"{stats.generated_tokens} tokens at {stats.tokens_per_s:.1f} tok/s; prompt "
        f"{stats.prompt_tokens} tokens{reused} in {stats.prefill_s:.2f} s; context "
        f"{stats.context_tokens} tokens; state {terminal.size(stats.state_bytes)}"
    )


def _figures(stats: Stats) -> dict[str, Any]:
    return {
        **{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(stats).items()},
        "tokens_per_s": round(stats.tokens_per_s, 2),
        "prefill_tokens_per_s": round(stats.prefill_tokens_per_s, 2),
    }
