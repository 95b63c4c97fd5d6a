"""What a quantiser reads before it rounds: conversations and text, each token with a weight.

Pictures bring many tokens that say much the same, and would drown the words in a sum over tokens.
So picture and text tokens count for the same mass in total, and tokens of answers, the ones the
model will have to say, for twice as much as the others (spec/quant.md section 5).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.config import Config
from mmmamba_edge.distill.conversation_tokens import Tokens, pixels, tokenize
from mmmamba_edge.distill.conversations import BadRow, parse_row
from mmmamba_edge.errors import UserError
from mmmamba_edge.prompt import Template, get_template
from mmmamba_edge.quant.builtin_text import foreign, topics
from mmmamba_edge.tokenizer import Tokenizer

LENGTH = 1024  # tokens of a sequence; longer conversations are cut
ANSWER = 2.0  # an answer's token counts for so many others


@dataclass(frozen=True, eq=False)
class Sequence:
    """Something to read.

    Attributes:
        ids: (tokens,) int64.
        pixels: (tiles, 3, height, width) float32; None without pictures.
        answer: (tokens,) bool, what the model would have to say itself.
    """

    ids: NDArray[np.int64]
    pixels: NDArray[np.float32] | None
    answer: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Sequences with a weight for each token, of mean 1.

    Attributes:
        sequences: what is read.
        weights: (tokens,) float32 for each.
        source: where it came from, for the report.
        sha256: over all ids and pixels.
    """

    sequences: list[Sequence]
    weights: list[NDArray[np.float32]]
    source: str
    sha256: str

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(len(s.ids) for s in self.sequences)


def calibrate_on(
    source: str, config: Config, tokenizer: Tokenizer, tokens: int, length: int = LENGTH
) -> Calibration:
    """Up to `tokens` tokens of calibration data.

    Args:
        source: "builtin", a .txt file of text, or a .jsonl of conversations in the InternVL layout
            (pictures by path from its folder).
        config: the model's.
        tokenizer: the checkpoint's.
        tokens: at most; reading stops there.
        length: tokens of a sequence, at most.

    Raises:
        UserError: a file that cannot be read, rows that cannot be used, or nothing in it.
    """
    template = get_template(config.template)
    if source == "builtin":
        found = _talks(template, tokenizer, length)
    elif source.endswith(".txt"):
        found = _pages(Path(source), template, tokenizer, length)
    elif source.endswith(".jsonl"):
        found = _conversations(Path(source), template, tokenizer, config, length)
    else:
        raise UserError(f"--calibration {source}: expected builtin, a .txt or a .jsonl file")
    sequences, read = [], 0
    for sequence in found:
        sequences.append(sequence)
        read += len(sequence.ids)
        if read >= tokens:
            break
    if not sequences:
        raise UserError(f"--calibration {source}: nothing in it that the tokenizer can read")
    return Calibration(
        sequences, balanced(sequences, config.img_context_token_id), source, digest(sequences)
    )


def balanced(sequences: list[Sequence], image_id: int) -> list[NDArray[np.float32]]:
    """Weights of mean 1: pictures and text alike in sum, answers `ANSWER` times the other text."""
    images = [s.ids == image_id for s in sequences]
    plain = [
        np.where(image, 0.0, np.where(s.answer, ANSWER, 1.0))
        for s, image in zip(sequences, images, strict=True)
    ]
    text, shown = sum(w.sum() for w in plain), sum(image.sum() for image in images)
    share = text / shown if shown else 0.0
    weights = [w + share * image for w, image in zip(plain, images, strict=True)]
    mean = sum(w.sum() for w in weights) / sum(len(w) for w in weights)
    return [(w / mean).astype(np.float32) for w in weights]


def digest(sequences: list[Sequence]) -> str:
    """SHA-256 over ids and pixels."""
    total = hashlib.sha256()
    for s in sequences:
        total.update(s.ids.tobytes())
        if s.pixels is not None:
            total.update(s.pixels.tobytes())
    return total.hexdigest()


# --- sources --------------------------------------------------------------------------------------


def _talks(template: Template, tokenizer: Tokenizer, length: int) -> Iterator[Sequence]:
    """Pages of Python's help as answers, a piece to a question."""
    if why_not := foreign(tokenizer, next(topics("calibration"))[1]):
        raise UserError(
            f"--calibration builtin, pages of English: {why_not}; give a .jsonl of what the model "
            "is for"
        )
    for name, text in topics("calibration"):
        prompt = template.opening() + template.user_turn(
            f"Explain {name} in Python.", tokens_per_tile=0
        )
        asked = tokenizer.encode(prompt + template.assistant_prefix)
        said = np.array(tokenizer.encode_text(text, first=False), np.int64)
        room = max(length - len(asked), 1)
        for start in range(0, len(said), room):
            part = said[start : start + room]
            answer = np.arange(len(asked) + len(part)) >= len(asked)
            yield Sequence(np.concatenate([asked, part]), None, answer)


def _pages(path: Path, template: Template, tokenizer: Tokenizer, length: int) -> Iterator[Sequence]:
    """A text file in pieces, each as a conversation begins."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--calibration {path}: cannot be read as UTF-8 text ({error})") from error
    opening = tokenizer.encode(template.opening(""))
    room = length - len(opening)
    for start in range(0, len(text), 1 << 16):  # tokenizers are slow on one huge string
        ids = np.array(tokenizer.encode_text(text[start : start + (1 << 16)]), np.int64)
        for at in range(0, len(ids), room):
            whole = np.concatenate([opening, ids[at : at + room]])
            yield Sequence(whole, None, np.zeros(len(whole), np.bool_))


def _conversations(
    path: Path, template: Template, tokenizer: Tokenizer, config: Config, length: int
) -> Iterator[Sequence]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"--calibration {path}: cannot be opened ({error.strerror})") from error
    with file:
        for number, line in enumerate(file, 1):
            try:
                row = parse_row(line, path, number, path.parent)
                tokens: Tokens = tokenize(row, tokenizer, template, config, max_tiles=1)
            except BadRow as error:
                raise UserError(f"--calibration {error}; repair or remove the row") from error
            stop = _cut(tokens.ids, config, length)
            images = tokens.ids[:stop] == config.img_context_token_id
            tiles = int(images.sum()) // max(config.tokens_per_tile, 1)
            shown = pixels(tokens, config, max_tiles=1)
            yield Sequence(
                tokens.ids[:stop], None if shown is None or not tiles else shown[:tiles],
                tokens.answer[:stop],
            )  # fmt: skip


def _cut(ids: NDArray[np.int64], config: Config, length: int) -> int:
    """Where to end at most `length` tokens without cutting a picture's tile in two."""
    if len(ids) <= length:
        return len(ids)
    images = np.cumsum(ids == config.img_context_token_id)
    whole = images[:length] % max(config.tokens_per_tile, 1) == 0
    return int(np.flatnonzero(whole)[-1]) + 1 if whole.any() else length
