"""What `check` reads: texts and conversations as ids, and what of each position is judged.

`builtin` needs nothing but the package: the evaluation half of Python's own documentation
(builtin_text.py) and, for a model that sees, questions about the sample pictures; for the embedded
model also rendered scenes of the test split, where their artwork is at hand.
"""

import hashlib
import platform
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmmamba_edge.bundle import file_sha256
from mmmamba_edge.config import Config
from mmmamba_edge.distill.conversation_tokens import MAX_TILES, pixels, tokenize
from mmmamba_edge.distill.conversations import BadRow, Row, parse_row
from mmmamba_edge.errors import UserError
from mmmamba_edge.prompt import Prompt, check_unicode, get_template
from mmmamba_edge.quant.accuracy import ANSWER, IMAGE, TEXT
from mmmamba_edge.quant.builtin_text import foreign, topics
from mmmamba_edge.tokenizer import Tokenizer, check_tokenizer

Floats = NDArray[np.float32]

LENGTH = 1024  # tokens of a text sequence, but for one long one, which takes half of the text
ART = Path("cache/art")  # where the scenes' artwork is, if it was built (docs/scenes.md)
QUESTIONS = 8  # about a sample picture, in one conversation
ROUNDS = 3  # conversations about each sample picture


@dataclass(frozen=True, eq=False)
class Item:
    """One sequence.

    Attributes:
        name: where it is from, for the report.
        ids: (tokens,) int64.
        answer: (tokens,) bool, True at what the model is to say.
        pixels: makes the tiles (tiles, 3, height, width) float32; None: no pictures.
    """

    name: str
    ids: NDArray[np.int64]
    answer: NDArray[np.bool_]
    pixels: Callable[[], Floats | None] | None = None

    def tiles(self) -> Floats | None:
        """The pictures' tiles, decoded now."""
        return self.pixels() if self.pixels else None

    def kinds(self, config: Config) -> NDArray[np.uint8]:
        """(tokens - 1,) text, image or answer: what is read there, or is to be said next."""
        read = np.where(self.ids[:-1] == config.img_context_token_id, IMAGE, TEXT)
        return np.where(self.answer[1:], ANSWER, read).astype(np.uint8)

    def following(self, config: Config) -> NDArray[np.int64]:
        """(tokens - 1,) the next id; -1 where the model was never meant to say it.

        That is amid a picture and before one, and in a conversation at all that is no answer.
        """
        image = self.ids == config.img_context_token_id
        unsaid = image[:-1] | image[1:]
        if self.answer.any():
            unsaid |= ~self.answer[1:]
        return np.where(unsaid, -1, self.ids[1:])

    def answers(self) -> Iterator[slice]:
        """The positions from which each answer is said, token by token."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], self.answer, [False]]).astype(int)))
        for first, stop in zip(edges[::2], edges[1::2], strict=True):
            if first:
                yield slice(int(first) - 1, int(stop) - 1)


@dataclass
class Data:
    """What is read, what it is, and what was left out and why."""

    items: list[Item] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spoken: bool = True  # False: random ids, of which no perplexity can be told

    def add(self, source: dict[str, Any], items: Iterable[Item]) -> None:
        """Items of one source; the report counts them."""
        new = list(items)
        self.items += new
        if new:
            self.sources.append({**source, "sequences": len(new)})


def collect(
    asked: str, config: Config, tokenizer_dir: Path | None, tokens: int, max_context: int | None,
    scratch: Path, art: Path = ART,
) -> Data:  # fmt: skip
    """What to read.

    Args:
        asked: "builtin", or a .txt or .jsonl file (conversations in InternVL's layout, pictures by
            path from the file's folder).
        config: the model's.
        tokenizer_dir: folder of its tokenizer; None: random ids are read.
        tokens: positions to score, those of pictures not counted; fewer where there is less.
        max_context: no sequence is longer.
        scratch: a folder that lasts as long as the items.
        art: the scenes' artwork, for the embedded model.

    Raises:
        UserError: a file that is missing, of another kind, or holds nothing to read.
    """
    limit = max_context or 1 << 60
    data = Data()
    if tokenizer_dir is None:
        if asked != "builtin":
            raise UserError(
                f"--data {asked}: this bundle has no tokenizer, so it reads no text; leave --data "
                "out, and random ids are read"
            )
        data.spoken = False
        data.notes.append("no tokenizer: random ids are read, so perplexity says nothing")
        data.add({"name": "random ids and noise pictures"}, _random(config, tokens, limit))
        return data
    reader = _Reader(config, _load(tokenizer_dir), limit, data)
    if asked == "builtin":
        _builtin(reader, tokens, scratch, art)
    else:
        _file(reader, Path(asked), tokens)
    if not data.items:
        raise UserError(f"--data {asked}: nothing in it can be read; {'; '.join(data.notes)}")
    return data


def _load(folder: Path) -> Tokenizer:
    from mmmamba_edge.tokenizer import load_tokenizer

    return load_tokenizer(folder)


class _Reader:
    """Makes items of texts and rows."""

    def __init__(self, config: Config, tokenizer: Tokenizer, limit: int, data: Data) -> None:
        self.config, self.tokenizer, self.limit, self.data = config, tokenizer, limit, data
        self.template = get_template(config.template)
        self.opening = tokenizer.encode(Prompt((self.template.first,)))

    def sees(self) -> bool:
        """Whether the tokenizer has the marks of a conversation with pictures."""
        try:
            check_tokenizer(self.tokenizer, self.config)
        except UserError as error:
            self.data.notes.append(f"no conversations: {error}")
            return False
        return True

    def texts(self, texts: Iterable[str], name: str, tokens: int) -> Iterator[Item]:
        """Texts, one behind the other, as sequences: a long one first, then of LENGTH."""
        ids: list[int] = []
        for text in texts:
            ids += self.tokenizer.encode_text(text, first=not ids)
            if len(ids) > tokens:
                break
        ids = ids[: tokens + 1]
        start, number = 0, 1
        while len(ids) - start > 1:
            long = number == 1 and len(ids) > 4 * LENGTH
            size = len(ids) // 2 if long else LENGTH
            size = min(size, self.limit - len(self.opening))
            part = np.array([*self.opening, *ids[start : start + size]], np.int64)
            yield Item(f"{name} {number}", part, np.zeros(len(part), np.bool_))
            start, number = start + size, number + 1

    def rows(self, rows: Iterable[Row], tokens: int, max_tiles: int = MAX_TILES) -> Iterator[Item]:
        """Conversations, until there are `tokens` positions beside those of pictures."""
        found = 0
        for row in rows:
            try:
                read = tokenize(
                    row, self.tokenizer, self.template, self.config, max_tiles=max_tiles
                )
            except BadRow as error:
                self.data.notes.append(f"left out: {error}")
                continue
            if len(read.ids) > self.limit:
                self.data.notes.append(f"left out: {read.where}: longer than {self.limit} tokens")
                continue
            see = None
            if read.images:
                see = partial(pixels, read, self.config, max_tiles=max_tiles)
            yield Item(read.where, read.ids, read.answer, see)
            found += int((read.ids != self.config.img_context_token_id).sum())
            if found >= tokens:
                return


# --- builtin --------------------------------------------------------------------------------------


def _builtin(reader: _Reader, tokens: int, scratch: Path, art: Path) -> None:
    data, texts = reader.data, [text for _, text in topics("evaluation")]
    why_not = foreign(reader.tokenizer, texts[0])
    talks = reader.sees()
    if why_not and talks:
        data.notes.append(f"no general text: {why_not}")
    share = tokens // 2 if talks and not why_not else tokens
    left = tokens
    if talks:
        # One tile each: pictures are many positions, and nothing is said amid them.
        samples = list(reader.rows(_sample_rows(), share, max_tiles=1))
        data.add({"name": "questions about the sample pictures"}, samples)
        left -= _spoken(reader, samples)
        if reader.config.template == "scenes" and share > _spoken(reader, samples):
            left -= _scenes(reader, share - _spoken(reader, samples), scratch, art)
    if not (why_not and talks) and left > 0:
        whole = hashlib.sha256("".join(texts).encode()).hexdigest()
        python = platform.python_version()
        source = {
            "name": f"pydoc_data.topics of Python {python}, the evaluation half (PSF-2.0)",
            "sha256": whole,
        }
        data.add(source, reader.texts(texts, "documentation", left))


def _spoken(reader: _Reader, items: list[Item]) -> int:
    image = reader.config.img_context_token_id
    return sum(int((item.ids != image).sum()) for item in items)


def _scenes(reader: _Reader, tokens: int, scratch: Path, folder: Path) -> int:
    from mmmamba_edge.distill.scenes.art import load_art
    from mmmamba_edge.distill.scenes.evaluation import iter_eval

    try:
        art = load_art(folder)
    except UserError as error:
        reader.data.notes.append(f"no scenes: {error}")
        return 0

    def rows() -> Iterator[Row]:
        count = tokens // 60 + 1  # a scene's questions and answers are longer than that
        for number, (picture, questions) in enumerate(iter_eval("test", count, art)):
            file = scratch / f"scene-{number}.png"
            Image.fromarray(picture).save(file)
            turns = tuple((q.question, q.answer) for q in questions)
            if turns:
                turns = ((f"<image>\n{turns[0][0]}", turns[0][1]), *turns[1:])
                yield Row(Path("scene"), number, turns, (file,), None)

    items = list(reader.rows(rows(), tokens))
    reader.data.add(
        {"name": "scenes, test split", "sha256": file_sha256(folder / "art.json")}, items
    )
    return _spoken(reader, items)


def _sample_rows() -> Iterator[Row]:
    """Is there this, is there that: the sample pictures, of which it is known what they show."""
    from mmmamba_edge.dialogue import find_picture
    from mmmamba_edge.distill.scenes.phrasing import noun, plural
    from mmmamba_edge.distill.scenes.samples import SAMPLES
    from mmmamba_edge.distill.scenes.vocabulary import KINDS

    rng = random.Random(0)
    for number in range(ROUNDS):
        for name, sample in SAMPLES.items():
            shown = [piece.kind for piece in sample.pieces]
            others = rng.sample([kind for kind in KINDS if kind not in shown], QUESTIONS)
            asked = [*dict.fromkeys(shown), *others][: QUESTIONS - 1]
            rng.shuffle(asked)
            turns = [
                (f"Is there {noun(kind)}?", "yes" if kind in shown else "no") for kind in asked
            ]
            if shown:
                kind = shown[0]
                turns.append((f"How many {plural(kind)} are there?", str(shown.count(kind))))
            turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
            yield Row(Path(name), number, tuple(turns), (find_picture(name),), None)


# --- files ----------------------------------------------------------------------------------------


def _file(reader: _Reader, path: Path, tokens: int) -> None:
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"--data {path}: expected builtin, or a .txt or .jsonl file")
    if not path.is_file():
        raise UserError(f"--data {path}: no such file")
    source = {"name": path.name, "sha256": file_sha256(path)}
    if path.suffix == ".txt":
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--data {path}: not UTF-8 ({error}); save it as UTF-8") from error
        check_unicode(text, where=str(path))
        reader.data.add(source, reader.texts([text], path.name, tokens))
        return
    check_tokenizer(reader.tokenizer, reader.config)
    reader.data.add(source, reader.rows(_jsonl(path, reader.data), tokens))


def _jsonl(path: Path, data: Data) -> Iterator[Row]:
    with path.open("rb") as file:
        for line, text in enumerate(file, 1):
            if text.isspace():
                continue
            try:
                yield parse_row(text, path, line, path.parent)
            except BadRow as error:
                data.notes.append(f"left out: {error}")


# --- without a tokenizer --------------------------------------------------------------------------


def _random(config: Config, tokens: int, limit: int) -> Iterator[Item]:
    """Sequences of 256 random ids, a tile of noise in every fourth."""
    rng = np.random.default_rng(0)
    text = np.setdiff1d(np.arange(config.vocab_size), [config.img_context_token_id])
    size, tile = min(256, limit), config.tokens_per_tile
    for number in range(-(-tokens // max(size - 1, 1))):
        ids, see = rng.choice(text, size).astype(np.int64), None
        if number % 4 == 0 and size + tile <= limit:
            ids = np.insert(ids, 4, np.full(tile, config.img_context_token_id))
            see = partial(_noise, config, number)
        yield Item(f"random {number}", ids, np.zeros(len(ids), np.bool_), see)


def _noise(config: Config, seed: int) -> Floats:
    shape = (1, 3, config.image_size, config.image_size)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
