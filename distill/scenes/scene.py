"""What a picture shows, before it is drawn.

Coordinates are pixels of the 112 x 112 picture, x to the right and y down; a thing's place is its
centre and its size the side of the square it fits into before rotation.
"""

import random
from collections import Counter
from dataclasses import dataclass

from mmmamba_edge.distill.scenes.vocabulary import Split

SIZE = 112
RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Thing:
    """An object (emoji artwork) or a shape.

    Attributes:
        name: a kind of object or a shape.
        colour: the shape's colour name; empty for objects.
        rgb: the shape's shade; for objects the channels' gains in per cent.
        art: (source, codepoint) of an object; two empty strings for shapes.
        angle: degrees, counter-clockwise.
    """

    name: str
    colour: str
    rgb: RGB
    art: tuple[str, str]
    x: float
    y: float
    size: int
    angle: int
    flip: bool

    @property
    def is_shape(self) -> bool:
        """Shapes have a colour, objects do not."""
        return bool(self.colour)


@dataclass(frozen=True)
class Word:
    """The printed word. `colour` is empty where its shade has no clear name; so is `panel`."""

    text: str
    font: str
    size: int
    colour: str
    rgb: RGB
    panel: RGB | None
    x: float
    y: float

    @property
    def half_width(self) -> float:
        """Half of an upper bound of the printed width, in px."""
        return 0.36 * self.size * max(1.5, len(self.text))


@dataclass(frozen=True)
class Background:
    """Two tones in a pattern. `colour` names the tone where it is plain and clearly so.

    style: plain, gradient, stripes, checks, noise, blobs or texture.
    """

    style: str
    colour: str
    rgb: RGB
    other: RGB
    angle: int
    period: int
    seed: int


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows, and the wear a picture may have seen.

    Attributes:
        through: side in px it was once scaled down to; 0: never.
        jpeg: quality it was once saved with; 0: never.
    """

    split: Split
    level: int
    background: Background
    things: tuple[Thing, ...]
    word: Word | None
    through: int = 0
    jpeg: int = 0

    def counts(self) -> Counter[tuple[str, str]]:
        """How many there are of each (name, colour)."""
        return Counter((thing.name, thing.colour) for thing in self.things)


def scene_rng(seed: int, split: Split, index: int) -> random.Random:
    """The source of all draws for one scene; the same on every machine."""
    return random.Random(f"{seed}/{split}/{index}")
