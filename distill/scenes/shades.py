"""Tones to draw with, and how well they stand out against a background."""

import random

from mmmamba_edge.distill.scenes.scene import RGB, Background
from mmmamba_edge.distill.scenes.vocabulary import COLOURS, Split, colour_rgb, shares_of_split


def muted(rng: random.Random, split: Split) -> RGB:
    """A tone between a named shade and white, gray or black."""
    base = shade(rng, split, rng.choice(COLOURS))
    to = rng.choice((255, 245, 225, 128, 40))
    share = rng.choice(shares_of_split(split))
    return tuple(round(c + (to - c) * share) for c in base)  # pyright: ignore[reportReturnType]


def shade(rng: random.Random, split: Split, colour: str) -> RGB:
    """A random shade of a named colour."""
    return colour_rgb(colour, split, rng.random(), rng.random(), rng.random())


def distance(a: RGB, b: RGB) -> float:
    """How different two tones look: a common weighting of RGB, 0 to 765."""
    red = (a[0] + b[0]) / 2
    dr, dg, db = a[0] - b[0], a[1] - b[1], a[2] - b[2]
    return ((2 + red / 256) * dr * dr + 4 * dg * dg + (2 + (255 - red) / 256) * db * db) ** 0.5


def contrast(rgb: RGB, background: Background) -> float:
    """Smallest difference of a tone to any the background has (all between its two)."""
    a, b = background.rgb, background.other
    if a == b:
        return distance(rgb, a)
    return min(
        distance(rgb, tuple(round(p + (q - p) * t) for p, q in zip(a, b, strict=True)))  # pyright: ignore[reportArgumentType]
        for t in (0.0, 0.33, 0.67, 1.0)
    )


def brightness_step(rgb: RGB, background: Background) -> float:
    """Smallest difference in brightness (0 to 255) to the background's: what reading needs."""
    return min(abs(_luma(rgb) - _luma(tone)) for tone in (background.rgb, background.other))


def _luma(rgb: RGB) -> float:
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
