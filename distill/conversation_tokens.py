"""A row of a conversation as the model's tokens, with room for its pictures (spec 6.5, 7).

Training text is chat's: the same templates, tokenizer and tiles. Planning reads only the headers of
pictures; `pixels` decodes them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.config import Config
from mmmamba_edge.distill.conversations import BadRow, Row
from mmmamba_edge.errors import UserError
from mmmamba_edge.image import choose_grid, image_size, image_tiles
from mmmamba_edge.prompt import IMAGE_PLACEHOLDER, Prompt, Template, Text
from mmmamba_edge.tokenizer import Tokenizer

MAX_TILES = 12  # of all pictures of a row together, thumbnails not counted (spec 6.5)


@dataclass(frozen=True, eq=False)
class Tokens:
    """What the model reads of a row.

    Attributes:
        ids: (seq,) int64.
        answer: (seq,) bool, True at the answers and the marks that end them (spec 7.4).
        images: each picture's file, and how many tiles `ids` has room for, thumbnail included.
        where: the row's file and line.
    """

    ids: NDArray[np.int64]
    answer: NDArray[np.bool_]
    images: tuple[tuple[Path, int], ...] = ()
    where: str = ""


def tokenize(
    row: Row,
    tokenizer: Tokenizer,
    template: Template,
    config: Config,
    *,
    max_tiles: int = MAX_TILES,
    max_length: int | None = None,
) -> Tokens:
    """A row's ids, piece by piece those that chat reads and the model says (spec 7.1, 7.2).

    Of the pictures only the headers are read.

    Args:
        max_tiles: of all pictures together, thumbnails not counted; each may have its share.
        max_length: most tokens; None: any number.

    Raises:
        BadRow: a picture is missing or unreadable, too long, or text that is not valid Unicode.
    """
    images = tuple((path, _planned_tiles(row, path, config, max_tiles)) for path in row.images)
    try:
        pieces = list(_pieces(row, [n for _, n in images], tokenizer, template, config))
    except UserError as error:
        raise BadRow(row.file, row.line, str(error)) from error
    ids, answer = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    if max_length is not None and len(ids) > max_length:
        raise BadRow(row.file, row.line, f"too long ({len(ids)} tokens > {max_length})")
    return Tokens(ids, answer, images, f"{row.file}:{row.line}")


def pixels(
    tokens: Tokens, config: Config, *, max_tiles: int = MAX_TILES
) -> NDArray[np.float32] | None:
    """The tiles of a row's pictures, (tiles, 3, height, width) float32; None without pictures.

    Raises:
        UserError: a picture cannot be decoded, or has other tiles than its header promised.
    """
    limit = _tile_limit(config, max_tiles, len(tokens.images))
    pictures = []
    for path, planned in tokens.images:
        pictures.append(image_tiles(path, config, max_tiles=limit))
        if len(pictures[-1]) != planned:
            raise UserError(f"{path}: {len(pictures[-1])} tiles; its header promised {planned}")
    return np.concatenate(pictures) if pictures else None


def _tile_limit(config: Config, max_tiles: int, pictures: int) -> int:
    return max(config.min_dynamic_patch, max_tiles // max(pictures, 1), 1)


def _planned_tiles(row: Row, path: Path, config: Config, max_tiles: int) -> int:
    try:
        size = image_size(path)
    except FileNotFoundError as error:
        raise BadRow(row.file, row.line, f"image missing ({path})") from error
    except (OSError, ValueError) as error:  # a ValueError: UserErrors, and impossible names
        raise BadRow(row.file, row.line, f"unreadable image ({error})") from error
    low, high = config.min_dynamic_patch, _tile_limit(config, max_tiles, len(row.images))
    tiles = math.prod(choose_grid(*size, min_tiles=low, max_tiles=high, tile=config.image_size))
    return tiles + 1 if config.use_thumbnail and tiles > 1 else tiles


def _pieces(
    row: Row, tile_counts: list[int], tokenizer: Tokenizer, template: Template, config: Config
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """(ids, answer) of what chat reads, what the model says, what chat reads next, and so on."""
    counts = iter(tile_counts)
    prompt, ended = template.opening(row.system), 0
    for question, answer in row.turns:
        shown = list(islice(counts, question.count(IMAGE_PLACEHOLDER)))
        turn = template.user_turn(question, shown, tokens_per_tile=config.tokens_per_tile)
        prompt = prompt + turn + template.assistant_prefix
        ids = tokenizer.encode(prompt)
        yield ids, np.arange(len(ids)) < ended
        whole = tokenizer.encode(prompt + Prompt((Text(answer),)))
        if np.array_equal(whole[: len(ids)], ids):
            said = whole[len(ids) :]
        else:  # prompt and answer would share a token, but chat reads the prompt before the answer
            said = np.array(tokenizer.encode_text(answer, first=False), np.int64)
        yield said, np.ones(len(said), np.bool_)
        # The mark that ends an answer is the model's to say; chat reads it with what follows.
        prompt, ended = template.after_answer, int(template.end is not None)
    ids = tokenizer.encode(prompt)
    yield ids, np.arange(len(ids)) < ended
