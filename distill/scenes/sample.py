"""Draw scenes: `sample_scene` decides everything that a picture shows.

What a split may show alone is kept apart here: shades, poses, patterns, words, fonts (see
vocabulary.py), and which things come together (`combination_split`).
"""

import functools
import itertools
import random
import zlib

from mmmamba_edge.distill.scenes.scene import RGB, SIZE, Background, Scene, Thing, Word
from mmmamba_edge.distill.scenes.shades import brightness_step, contrast, distance, muted, shade
from mmmamba_edge.distill.scenes.spelling import LETTERS, made_up_number, made_up_word
from mmmamba_edge.distill.scenes.vocabulary import (
    COLOURS,
    FONTS,
    KINDS,
    MORE_FONTS,
    SHAPES,
    SOURCES,
    SPLITS,
    Split,
    angles_of_split,
    periods_of_split,
    words_of_split,
)


def level_at(rng: random.Random, index: int, ramp: int) -> int:
    """The curriculum: easy scenes first, from index `ramp` on nearly all of level 2."""
    progress = index / ramp if ramp else 1.0
    draw = rng.random()
    if draw < max(0.04, 1 - 2 * progress):
        return 0
    return 1 if draw < max(0.10, 1.5 - 1.5 * progress) else 2


def sample_scene(rng: random.Random, split: Split, level: int, *, spelling: bool = False) -> Scene:
    """Draw a scene.

    Args:
        rng: all randomness comes from here.
        split: chooses shades, poses, words, fonts and combinations that no other split has.
        level: 0 (one or two things, plain backgrounds), 1, or 2 (the full task).
        spelling: for training alone: more words, most of them made up, in more fonts.
    """
    assert split == "train" or not spelling, "validation and test print their own words"
    plan = _weighted(rng, _PLANS[level])
    background = _background(rng, split, level, simple=plan == "one")
    word = None
    share = 0.6 if spelling else 0.35
    if plan == "word" or (plan in ("few", "same") and level and rng.random() < share):
        word = _word(rng, split, level, background, alone=plan == "word", spelling=spelling)
    main, more = _numbers(rng, level, plan)
    if word:
        main, more = min(main, 4), min(more, max(0, 4 - main))
    for tries in itertools.count():
        looks = _looks(rng, plan, main, more, background)
        if combination_split(looks) not in (split, None):
            continue
        # Where it is hard to find room, things get smaller, then fewer; beside a word that leaves
        # none, there are none.
        things = _place(rng, split, level, plan, looks, word, background, shrink=tries)
        if things is not None:
            through, jpeg = _wear(rng) if level == 2 else (0, 0)
            return Scene(split, level, background, things, word, through, jpeg)
        if tries > 8:
            main, more = max(0 if word else 1, main - (more == 0)), max(0, more - 1)
    raise AssertionError


def _wear(rng: random.Random) -> tuple[int, int]:
    """Now and then a picture is a little blurred, or was a JPEG file: users' pictures are."""
    draw = rng.random()
    if draw < 0.06:
        return rng.randint(76, 100), 0
    return 0, rng.randint(45, 90) if draw < 0.14 else 0


def combination_split(looks: list[tuple[str, str]]) -> Split | None:
    """The split that a combination of (name, colour) belongs to; None: too small to be held out."""
    if len(set(looks)) < 2:
        return None
    bucket = zlib.crc32(repr(sorted(looks)).encode()) % 10
    return "val" if bucket == 8 else "test" if bucket == 9 else "train"


# one: a big thing; few, many: different things; same: several of one kind; word: hardly but a word
_PLANS: tuple[dict[str, float], ...] = (
    {"one": 30, "few": 45, "same": 15, "word": 10},
    {"one": 18, "few": 36, "many": 10, "same": 24, "word": 12},
    {"one": 13, "few": 28, "many": 22, "same": 26, "word": 11},
)
_SIZES = ((36, 60), (30, 56), (26, 52))  # px of things that share the picture, by level
_STYLES: tuple[dict[str, float], ...] = (
    {"plain": 1},
    {"plain": 5, "gradient": 3, "stripes": 1, "checks": 1},
    {
        "plain": 4,
        "gradient": 2,
        "stripes": 1,
        "checks": 1,
        "noise": 1,
        "blobs": 1.5,
        "texture": 1.5,
    },
)


def _weighted(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


# --- background ---------------------------------------------------------------------------------


def _background(rng: random.Random, split: Split, level: int, simple: bool) -> Background:
    styles = {"plain": 3, "gradient": 2, "blobs": 0.5} if simple and level else _STYLES[level]
    style = _weighted(rng, styles)
    colour = ""
    if style == "plain" and rng.random() < 0.6:
        colour = rng.choice(COLOURS)
        rgb = other = shade(rng, split, colour)
    else:
        rgb = muted(rng, split)
        other = rgb if style == "plain" else muted(rng, split)
        if style in ("stripes", "checks"):
            while not 60 < distance(rgb, other) < 260:
                other = muted(rng, split)
    return Background(
        style, colour, rgb, other,
        angle=rng.choice(angles_of_split(split, 90)),
        period=rng.choice(periods_of_split(split)),
        seed=rng.getrandbits(30),
    )  # fmt: skip


# --- things -------------------------------------------------------------------------------------

_TONES: dict[str, RGB] = {
    "red": (215, 40, 50), "orange": (250, 160, 50), "yellow": (255, 215, 60),
    "green": (80, 170, 60), "blue": (50, 130, 220), "purple": (110, 70, 190),
    "pink": (250, 160, 190), "brown": (130, 80, 60), "black": (30, 30, 35),
    "gray": (150, 150, 160), "white": (250, 250, 250),
}  # fmt: skip
_SHAPE_CONTRAST, _OBJECT_CONTRAST = 140.0, 110.0


def _numbers(rng: random.Random, level: int, plan: str) -> tuple[int, int]:
    """How many things the plan asks for, and how many others with them."""
    if plan == "one":
        return 1, 0
    if plan == "word":
        return int(rng.random() < 0.3), 0
    if plan == "few":
        return rng.choice((1, 2, 2) if level == 0 else (1, 2, 2, 3, 3)), 0
    if plan == "many":
        return rng.choice((4, 4, 5, 5, 6)), 0
    main = rng.choice((2, 3) if level == 0 else (2, 3, 4, 5))
    return main, rng.randint(0, min(2, 6 - main)) if level else 0


def _looks(
    rng: random.Random, plan: str, main: int, more: int, background: Background
) -> list[tuple[str, str]]:
    """The (name, colour) of each thing."""
    if plan == "same":
        first = _look(rng, background, 0.5)
        looks = [first] * main
        if first[1] and rng.random() < 0.5:  # the same shape in other colours
            second = _look(rng, background, 1.0)[1]
            looks = [(first[0], rng.choice((first[1], second))) for _ in range(main)]
        looks += [_look(rng, background, 0.4) for _ in range(more)]
        rng.shuffle(looks)
        return looks
    shapes = rng.choice((0.15, 0.4, 0.4, 0.85)) if main > 1 else 0.3
    looks = []
    while len(looks) < main:
        # Things that are alike ask for more careful looking: some, not many.
        look = _look(rng, background, shapes)
        if look not in looks or rng.random() < 0.3:
            looks.append(look)
    return looks


_NAMES = tuple(KINDS)


def _look(rng: random.Random, background: Background, shapes: float) -> tuple[str, str]:
    """One (name, colour) that stands out; `shapes` is the probability of a shape."""
    if rng.random() < shapes:
        while True:
            colour = rng.choice(COLOURS)
            if (
                colour != background.colour
                and contrast(_TONES[colour], background) > _SHAPE_CONTRAST
            ):
                return rng.choice(SHAPES), colour
    for _ in range(12):
        name = rng.choice(_NAMES)
        if contrast(_TONES[KINDS[name].tone], background) > _OBJECT_CONTRAST:
            return name, ""
    return "robot", ""


def _place(
    rng: random.Random, split: Split, level: int, plan: str, looks: list[tuple[str, str]],
    word: Word | None, background: Background, shrink: int,
) -> tuple[Thing, ...] | None:  # fmt: skip
    """Sizes and places that keep things apart and inside; None if they do not fit."""
    small, big = (60, 100) if plan == "one" else _SIZES[level]
    crowd = len(looks) + (2 if word else 0)
    big = max(small + 4, big - 4 * max(0, crowd - 3) - 2 * shrink)
    angles = angles_of_split(split, 25)
    things: list[Thing] = []
    for name, colour in looks:
        for _ in range(30):
            size = rng.randint(small, big)
            room = 0.48 * size
            x, y = rng.uniform(room, SIZE - room), rng.uniform(room, SIZE - room)
            apart = all(
                (x - other.x) ** 2 + (y - other.y) ** 2 > (0.46 * (size + other.size)) ** 2
                for other in things
            )
            if apart and not (word and _meets(word, x, y, 0.45 * size)):
                break
        else:
            return None
        if colour:
            rgb, art = _contrasting(rng, split, colour, background), ("", "")
        else:
            light = rng.randint(86, 104)
            rgb: RGB = tuple(light + rng.randint(-5, 5) for _ in range(3))  # pyright: ignore[reportAssignmentType]
            art = rng.choice(SOURCES), rng.choice(KINDS[name].codepoints)
        angle = rng.choice(angles)
        things.append(Thing(name, colour, rgb, art, x, y, size, angle, rng.random() < 0.5))
    return tuple(things)


def _contrasting(rng: random.Random, split: Split, colour: str, background: Background) -> RGB:
    """The shade of a colour, out of four, that stands out most."""
    return max((shade(rng, split, colour) for _ in range(4)), key=lambda c: contrast(c, background))


def _meets(word: Word, x: float, y: float, radius: float) -> bool:
    wide, high = word.half_width + 3 + radius, 0.62 * word.size + radius
    return abs(x - word.x) < wide and abs(y - word.y) < high


# --- the word -----------------------------------------------------------------------------------


def _word(
    rng: random.Random, split: Split, level: int, background: Background, *, alone: bool,
    spelling: bool,
) -> Word:  # fmt: skip
    text = _spelt(rng) if spelling else _text(rng, split)
    fonts = FONTS[split] + (MORE_FONTS if spelling else ())
    case = rng.random()
    text = text.upper() if case < 0.5 else text.capitalize() if case < 0.7 else text
    low, high = (
        ((26, 40), (20, 36), (17, 34))[level] if alone else ((22, 28), (18, 27), (17, 26))[level]
    )
    fits = int(104 / (0.72 * max(1.5, len(text))))
    size = rng.randint(min(low, fits), min(high, fits))
    panel = None
    if rng.random() < (0.25 if background.style == "plain" else 0.65):
        panel = rng.choice(((255, 255, 255), (245, 240, 225), (25, 25, 30), muted(rng, split)))
    behind = Background("plain", "", panel, panel, 0, 8, 0) if panel else background
    colour, rgb = _ink(rng, split, behind)
    word = Word(text, rng.choice(fonts), size, colour, rgb, panel, 0, 0)
    x = rng.uniform(min(56, word.half_width + 4), max(56, SIZE - 4 - word.half_width))
    y = rng.uniform(0.7 * size, SIZE - 0.7 * size)
    return Word(text, word.font, size, colour, rgb, panel, x, y)


def _text(rng: random.Random, split: Split) -> str:
    draw = rng.random()
    if draw < 0.66:
        return rng.choice(words_of_split(split))
    if draw < 0.86:
        # Strings of letters keep the model from guessing words by their looks.
        text = "".join(rng.choice(LETTERS) for _ in range(rng.choice((2, 3, 3, 4))))
        return rng.choice(words_of_split(split)) if text in _other_words(split) else text
    return "".join(rng.choice("0123456789") for _ in range(rng.choice((1, 2, 2, 3, 4))))


def _spelt(rng: random.Random) -> str:
    """What training prints to practise spelling."""
    draw = rng.random()
    if draw < 0.70:
        while (text := made_up_word(rng)) in _other_words("train"):
            pass
        return text
    return rng.choice(words_of_split("train")) if draw < 0.88 else made_up_number(rng)


def _ink(rng: random.Random, split: Split, behind: Background) -> tuple[str, RGB]:
    """A colour for letters that reads well; the name is empty for the last resort."""
    for _ in range(10):
        colour = rng.choice(("black", "white")) if rng.random() < 0.4 else rng.choice(COLOURS)
        rgb = shade(rng, split, colour)
        if contrast(rgb, behind) > 230 and brightness_step(rgb, behind) > 60:
            return colour, rgb
    dark, light = (10, 10, 10), (250, 250, 250)
    return "", dark if contrast(dark, behind) > contrast(light, behind) else light


@functools.cache
def _other_words(split: Split) -> frozenset[str]:
    return frozenset(w for other in SPLITS if other != split for w in words_of_split(other))
