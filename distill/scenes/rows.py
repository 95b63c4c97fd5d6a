"""One row of training data: a picture and a conversation about it, as token ids.

The prompt format is the template `scenes`: internlm2-chat's, without a system turn, `<s>` first.
"""

import functools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from mmmamba_edge.distill.scenes.art import Art
from mmmamba_edge.distill.scenes.cells import cell_labels, unknown_cells
from mmmamba_edge.distill.scenes.phrasing import Question
from mmmamba_edge.distill.scenes.questions import ask, small_talk, without_picture
from mmmamba_edge.distill.scenes.render import letter_boxes, render
from mmmamba_edge.distill.scenes.sample import level_at, sample_scene
from mmmamba_edge.distill.scenes.scene import SIZE, scene_rng
from mmmamba_edge.distill.scenes.tokenizer import (
    BOS,
    IM_END,
    IM_START,
    IMG,
    IMG_CONTEXT,
    IMG_END,
    PAD,
)
from mmmamba_edge.distill.scenes.vocabulary import Split
from mmmamba_edge.errors import UserError


@dataclass(frozen=True)
class Spec:
    """What fixes every byte of a cache, but for the artwork.

    Attributes:
        level: 0, 1 or 2 for all scenes; None follows the curriculum.
        ramp: scene index from which the curriculum has (nearly) all difficulty.
        length: tokens of a row; image_tokens: `<IMG_CONTEXT>`s of a picture.
        tokenizer: SHA-256 of the tokenizer.json.
        spelling: more words, made up, in more fonts (`sample_scene`); of the training split alone.
    """

    split: Split
    seed: int
    level: int | None
    ramp: int
    length: int
    image_tokens: int
    tokenizer: str
    spelling: bool = False


@dataclass(frozen=True)
class Row:
    """One conversation: `ids` and `mask` are (length,), `image` (112, 112, 3) uint8.

    `cells` are the labels of the image tokens, (image_tokens, 3) uint8 (cells.py).
    """

    image: np.ndarray
    cells: np.ndarray
    ids: np.ndarray
    mask: np.ndarray
    has_image: bool
    easy_vqa: bool


_TEXT_ONLY, _EASY_VQA, _LATE_PICTURE = 0.04, 0.08, 0.03  # shares of rows


def make_row(spec: Spec, art: Art, tokenizer: Tokenizer, index: int) -> Row:
    """Scene `index` of a cache, with its conversation.

    Args:
        spec: fixes the row together with `index`.
        art: sprites and fonts; with an easy_vqa folder, its train split is mixed in.
        tokenizer: of the scenes task.
        index: from 0.
    """
    rng = scene_rng(spec.seed, spec.split, index)
    draw = rng.random()
    easy, side = False, math.isqrt(spec.image_tokens)
    cells = unknown_cells(side)
    if draw < _TEXT_ONLY:
        image = np.zeros((SIZE, SIZE, 3), np.uint8)
        turns = [without_picture(rng) if rng.random() < 0.35 else small_talk(rng) for _ in range(7)]
        picture_turn = None
    elif draw < _TEXT_ONLY + _EASY_VQA and spec.split == "train" and art.folder:
        image, turns = _easy_vqa_row(rng, art.folder)
        easy, picture_turn = True, 0
    else:
        level = level_at(rng, index, spec.ramp) if spec.level is None else spec.level
        scene = sample_scene(rng, spec.split, level, spelling=spec.spelling)
        image = render(scene, art)
        cells = cell_labels(scene, letter_boxes(scene.word, art) if scene.word else [], side)
        turns = ask(rng, scene, 8)
        picture_turn = 0
        if rng.random() < _LATE_PICTURE:
            turns.insert(0, small_talk(rng))
            picture_turn = 1
    ids, mask = encode_turns(turns, tokenizer, spec, picture_turn)
    return Row(image, cells, ids, mask, picture_turn is not None, easy)


def encode_turns(
    turns: list[Question], tokenizer: Tokenizer, spec: Spec, picture_turn: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """As many whole turns as fit, in the template 'scenes' (internlm2-chat without a system turn).

    Args:
        turns: questions with answers, in order.
        tokenizer: of the scenes task.
        spec: gives the length and the number of image tokens.
        picture_turn: the turn that shows the picture; None: no picture.

    Returns:
        ids (length,) int16 padded with `</s>`, and mask (length,) int16: 1 at answers and the
        `<|im_end|>` after each.
    """
    start, middle = _frame(tokenizer)
    ids, mask = [BOS], [0]
    for place, turn in enumerate(turns):
        ask_ids = list(start)
        if place == picture_turn:
            newline = start[-1]
            ask_ids += [IMG] + [IMG_CONTEXT] * spec.image_tokens + [IMG_END, newline]
        ask_ids += [*_encode(tokenizer, turn.question), *middle]
        answer = [*_encode(tokenizer, turn.answer), IM_END]
        if len(ids) + len(ask_ids) + len(answer) > spec.length:
            if picture_turn is not None and place <= picture_turn:
                raise UserError(f"length {spec.length} is too short for a picture and its question")
            continue
        ids += ask_ids + answer
        mask += [0] * len(ask_ids) + [1] * len(answer)
    gap = spec.length - len(ids)
    return np.array(ids + [PAD] * gap, np.int16), np.array(mask + [0] * gap, np.int16)


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Tokens before a question, and between it and its answer."""
    user, assistant = _encode(tokenizer, "user\n"), _encode(tokenizer, "assistant\n")
    return [IM_START, *user], [IM_END, IM_START, *assistant]


@functools.lru_cache(maxsize=50_000)
def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


# --- easy-vqa -----------------------------------------------------------------------------------


def _easy_vqa_row(rng: random.Random, folder: Path) -> tuple[np.ndarray, list[Question]]:
    images, questions = _easy_vqa(folder, "train")
    place = rng.randrange(len(images))
    asked = questions[place]
    picked = rng.sample(asked, min(8, len(asked)))
    return _enlarge(images[place]), [Question("easy-vqa", "easy-vqa", q, a) for q, a in picked]


@functools.cache
def _easy_vqa(folder: Path, split: str) -> tuple[np.ndarray, list[list[tuple[str, str]]]]:
    """(n, 64, 64, 3) uint8, and each picture's questions with answers."""
    path = folder / "easy_vqa" / f"{split}.npz"
    try:
        with np.load(path, allow_pickle=False) as data:
            images = data["images"]
        rows = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: {error}; build the art folder again") from error
    questions: list[list[tuple[str, str]]] = [[] for _ in images]
    for question, answer, place in rows:
        questions[place].append((question, answer))
    return images, questions


def _enlarge(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def easy_vqa_test(art: Art) -> Iterator[tuple[np.ndarray, str, str]]:
    """The official test split: (picture (112, 112, 3) uint8, question, answer)."""
    if art.folder is None:
        raise UserError("this art has no folder, hence no easy_vqa")
    images, questions = _easy_vqa(art.folder, "test")
    for image, asked in zip(images, questions, strict=True):
        large = _enlarge(image)
        for question, answer in asked:
            yield large, question, answer
