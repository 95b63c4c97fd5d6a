"""Draw a scene: `render(scene, art)` gives the picture as an array.

Everything costly is prepared once a process: pictures of each sprite and shape at a few sizes, and
a sheet of noise a split. A scene then takes about a millisecond.
"""

import functools
import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from PIL.ImageFont import FreeTypeFont, ImageFont

from mmmamba_edge.distill.scenes.art import Art
from mmmamba_edge.distill.scenes.cells import Box
from mmmamba_edge.distill.scenes.scene import SIZE, Background, Scene, Thing, Word
from mmmamba_edge.distill.scenes.vocabulary import Split


def render(scene: Scene, art: Art) -> np.ndarray:
    """Draw a scene.

    Args:
        scene: what to draw.
        art: the sprites and fonts.

    Returns:
        (112, 112, 3) uint8, RGB.
    """
    canvas = Image.fromarray(_background(scene.background, scene.split))
    for thing in scene.things:
        _draw_thing(canvas, thing, art)
    if scene.word:
        _draw_word(canvas, scene.word, art)
    if scene.through:
        small = canvas.resize((scene.through, scene.through), Image.Resampling.BILINEAR)
        canvas = small.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    if scene.jpeg:
        file = io.BytesIO()
        canvas.save(file, "JPEG", quality=scene.jpeg)
        canvas = Image.open(file)
    return np.asarray(canvas)


# --- background ---------------------------------------------------------------------------------

_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
_SHEET = 512


def _background(background: Background, split: Split) -> np.ndarray:
    """(112, 112, 3) uint8."""
    if background.style == "plain":
        return np.full((SIZE, SIZE, 3), background.rgb, np.uint8)
    share = _SHARES[background.style](background, split)  # (112, 112), how much of the other tone
    a, b = (np.array(tone, np.float32) for tone in (background.rgb, background.other))
    return (a + share[..., None] * (b - a)).astype(np.uint8)


def _along(background: Background) -> np.ndarray:
    """Distance in px along the pattern's direction."""
    turn = math.radians(background.angle)
    return np.float32(math.cos(turn)) * _X + np.float32(math.sin(turn)) * _Y


def _gradient(background: Background, split: Split) -> np.ndarray:
    along = _along(background)
    low = along.min()
    return (along - low) / (along.max() - low)


def _stripes(background: Background, split: Split) -> np.ndarray:
    return (_along(background) % background.period > background.period / 2).astype(np.float32)


def _checks(background: Background, split: Split) -> np.ndarray:
    turn = math.radians(background.angle)
    across = np.float32(-math.sin(turn)) * _X + np.float32(math.cos(turn)) * _Y
    half = background.period / 2
    return ((_along(background) // half + across // half) % 2).astype(np.float32)


def _from_sheet(kind: str) -> Callable[[Background, Split], np.ndarray]:
    def crop(background: Background, split: Split) -> np.ndarray:
        sheet = _sheet(kind, split)
        x, y = background.seed % (_SHEET - SIZE), background.seed // 1024 % (_SHEET - SIZE)
        part = sheet[y : y + SIZE, x : x + SIZE]
        return part.T if background.seed // 2**20 % 2 else part

    return crop


_SHARES = {
    "gradient": _gradient,
    "stripes": _stripes,
    "checks": _checks,
    "noise": _from_sheet("noise"),
    "blobs": _from_sheet("blobs"),
    "texture": _from_sheet("texture"),
}
# Amplitude of the noise whose grain is 1, 2, 4 ... px.
_OCTAVES = {
    "noise": (1.0, 0.5, 0.0, 0.0, 0.0, 0.0),
    "blobs": (0.0, 0.0, 0.0, 0.0, 1.0, 1.0),
    "texture": (0.25, 0.3, 0.4, 0.6, 0.9, 1.2),
}


@functools.cache
def _sheet(kind: str, split: Split) -> np.ndarray:
    """(512, 512) of noise in 0..1; each split has its own."""
    rng = np.random.Generator(np.random.PCG64(sum(f"{kind} {split}".encode())))
    total = np.zeros((_SHEET, _SHEET), np.float32)
    for octave, amplitude in enumerate(_OCTAVES[kind]):
        side = _SHEET >> octave
        grain = Image.fromarray(rng.standard_normal((side, side)).astype(np.float32))
        total += amplitude * np.asarray(grain.resize((_SHEET, _SHEET), Image.Resampling.BICUBIC))
    total -= total.mean()
    return np.clip(0.5 + total / (4 * total.std()), 0, 1)


# --- things -------------------------------------------------------------------------------------

_SIDES = (24, 32, 42, 56, 74, 100)  # sizes each sprite is kept in


def _draw_thing(canvas: Image.Image, thing: Thing, art: Art) -> None:
    picture = _shape(thing.name) if thing.is_shape else _sprite(art, thing.art)
    base = next((p for p in picture if p.width >= thing.size), picture[-1])
    turn = math.radians(thing.angle)
    extent = math.ceil(thing.size * (abs(math.cos(turn)) + abs(math.sin(turn)))) + 2
    left, top = round(thing.x - extent / 2), round(thing.y - extent / 2)
    # The inverse map, from the small square on the canvas to the sprite.
    scale = base.width / thing.size
    cos, sin = scale * math.cos(turn), scale * math.sin(turn)
    mid, half = base.width / 2, extent / 2
    mirror = -1 if thing.flip else 1
    matrix = (
        mirror * cos, -mirror * sin, mid - mirror * (cos - sin) * half,
        sin, cos, mid - (sin + cos) * half,
    )  # fmt: skip
    small = base.transform(
        (extent, extent), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    if thing.is_shape:
        canvas.paste(thing.rgb, (left, top), small)
    else:
        gains = [min(255, value * gain // 100) for gain in thing.rgb for value in range(256)]
        canvas.paste(small.point(gains + list(range(256))), (left, top), small.getchannel("A"))


_SPRITES: dict[tuple[int, tuple[str, str]], list[Image.Image]] = {}


def _sprite(art: Art, key: tuple[str, str]) -> list[Image.Image]:
    """The sprite in a few sizes, smallest first."""
    place = (id(art), key)
    if place not in _SPRITES:
        whole = art.sprites[key]
        _SPRITES[place] = [_framed(whole, side) for side in _SIDES]
    return _SPRITES[place]


def _framed(picture: Image.Image, side: int) -> Image.Image:
    """Scaled, with an empty border of one pixel: rotated edges stay smooth."""
    inner = picture.resize((side - 2, side - 2), Image.Resampling.LANCZOS)
    framed = Image.new(picture.mode, (side, side))
    framed.paste(inner, (1, 1))
    return framed


@functools.cache
def _shape(name: str) -> list[Image.Image]:
    """The shape's coverage ("L") in a few sizes, smallest first."""
    big = 400
    mask = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(mask)
    if name == "circle":
        draw.ellipse((16, 16, big - 16, big - 16), fill=255)
    else:
        draw.polygon([(x * big, y * big) for x, y in _outline(name)], fill=255)
    return [_framed(mask, side) for side in _SIDES]


def _outline(name: str) -> list[tuple[float, float]]:
    """Corners in the unit square."""
    if name == "square":
        return [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)]
    if name == "triangle":
        return [(0.5, 0.05), (0.98, 0.92), (0.02, 0.92)]
    if name == "diamond":
        return [(0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)]
    if name == "star":
        turns = [(math.pi * i / 5, 0.52 if i % 2 == 0 else 0.21) for i in range(10)]
        return [(0.5 + r * math.sin(t), 0.53 - r * math.cos(t)) for t, r in turns]
    assert name == "heart", name
    turns = [2 * math.pi * i / 90 for i in range(90)]
    return [(0.5 + 0.464 * math.sin(t) ** 3, 0.46 - 0.03 * _heart_height(t)) for t in turns]


def _heart_height(t: float) -> float:
    return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)


# --- the word -----------------------------------------------------------------------------------


def _draw_word(canvas: Image.Image, word: Word, art: Art) -> None:
    draw = ImageDraw.Draw(canvas)
    font, box, left, top = _word_layout(word, art)
    wide, high = box[2] - box[0], box[3] - box[1]
    if word.panel:
        draw.rectangle((left - 4, top - 4, left + wide + 3, top + high + 3), fill=word.panel)
    draw.text((round(left - box[0]), round(top - box[1])), word.text, fill=word.rgb, font=font)


def _word_layout(word: Word, art: Art) -> tuple[FreeTypeFont | ImageFont, Box, float, float]:
    """The font, the text's box as drawn at (0, 0), and where the box's left and top go."""
    size = word.size
    font = art.font(word.font, size)
    box = font.getbbox(word.text)
    while box[2] - box[0] > SIZE - 6:  # a wide face: smaller, until it fits
        size -= 1
        font = art.font(word.font, size)
        box = font.getbbox(word.text)
    wide, high = box[2] - box[0], box[3] - box[1]
    left = min(max(word.x - wide / 2, 3), SIZE - 3 - wide)
    top = min(max(word.y - high / 2, 3), SIZE - 3 - high)
    return font, box, left, top


def letter_boxes(word: Word, art: Art) -> list[tuple[str, Box]]:
    """Each letter of the printed word, and its (left, top, right, bottom) in px."""
    font, box, left, top = _word_layout(word, art)
    ends = [left - box[0] + font.getlength(word.text[:n]) for n in range(len(word.text) + 1)]
    bottom = top + box[3] - box[1]
    return [(letter, (ends[n], top, ends[n + 1], bottom)) for n, letter in enumerate(word.text)]
