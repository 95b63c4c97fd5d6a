"""What the pictures can show: object kinds, shapes, colours, words, and how each is split.

Nothing here needs the artwork. Train, validation and test share the kinds, the shapes and the
colour names; they differ in shades, poses, words and fonts (see the `*_of_split` functions).
"""

import colorsys
import functools
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Kind:
    """One kind of object.

    Attributes:
        name: singular, as in questions and answers.
        category: animal, fruit, food, vehicle, plant or object.
        codepoints: emoji that show it; each exists in both art sources.
        tone: colour name of the artwork's outer parts; such a background would hide it.
        colour: colour to answer with, where every artwork of the kind agrees; else empty.
    """

    name: str
    category: str
    codepoints: tuple[str, ...]
    tone: str
    colour: str = ""

    @property
    def plural(self) -> str:
        """`two {plural}`."""
        return _PLURALS.get(self.name) or self.name + ("es" if self.name.endswith("x") else "s")

    @property
    def article(self) -> str:
        """`a` or `an`."""
        return "an" if self.name[0] in "aeiou" and self.name != "unicorn" else "a"


_PLURALS = {
    "fish": "fish", "butterfly": "butterflies", "strawberry": "strawberries",
    "cactus": "cactuses", "bus": "buses", "fox": "foxes", "octopus": "octopuses",
}  # fmt: skip

# name, category, codepoints, tone, colour ("-": none)
_KINDS = """
dog animal 1f436,1f415 brown -
cat animal 1f431,1f408 orange -
rabbit animal 1f430,1f407 white -
fox animal 1f98a orange orange
bear animal 1f43b brown brown
panda animal 1f43c white -
lion animal 1f981 orange -
cow animal 1f42e,1f404 gray -
pig animal 1f437,1f416 pink pink
frog animal 1f438 green green
monkey animal 1f435,1f412 brown brown
chicken animal 1f414 white -
penguin animal 1f427 black -
owl animal 1f989 brown brown
bee animal 1f41d yellow -
butterfly animal 1f98b red -
snail animal 1f40c brown -
turtle animal 1f422 green green
fish animal 1f420,1f41f blue -
octopus animal 1f419 red -
elephant animal 1f418 gray gray
horse animal 1f434,1f40e brown brown
crab animal 1f980 red -
duck animal 1f986 gray -
apple fruit 1f34e red red
banana fruit 1f34c yellow yellow
strawberry fruit 1f353 red red
lemon fruit 1f34b yellow yellow
watermelon fruit 1f349 red -
pineapple fruit 1f34d orange -
pear fruit 1f350 green green
carrot food 1f955 orange orange
mushroom food 1f344 red -
pizza food 1f355 orange -
burger food 1f354 brown -
cake food 1f370,1f382 orange -
donut food 1f369 brown brown
cookie food 1f36a brown brown
car vehicle 1f697,1f698 red -
bus vehicle 1f68c gray -
truck vehicle 1f69a yellow -
bicycle vehicle 1f6b2 gray -
train vehicle 1f682 black -
plane vehicle 2708-fe0f blue -
rocket vehicle 1f680 gray -
boat vehicle 26f5 orange -
helicopter vehicle 1f681 orange -
ball object 26bd blue -
book object 1f4d5 red red
key object 1f511 yellow yellow
clock object 23f0,1f552 red -
umbrella object 2614,2602-fe0f purple -
phone object 1f4f1 black -
guitar object 1f3b8 red -
bell object 1f514 yellow yellow
chair object 1fa91 brown brown
hat object 1f3a9 black black
shoe object 1f45f blue -
crown object 1f451 yellow yellow
house object 1f3e0 orange -
robot object 1f916 gray -
cup object 2615 white -
tree plant 1f333 green green
flower plant 1f33b,1f339 red -
cactus plant 1f335 green green
"""

KINDS: dict[str, Kind] = {
    name: Kind(name, category, tuple(points.split(",")), tone, "" if colour == "-" else colour)
    for name, category, points, tone, colour in (row.split() for row in _KINDS.split("\n") if row)
}
CATEGORIES: dict[str, tuple[str, ...]] = {
    category: tuple(k.name for k in KINDS.values() if k.category in members)
    for category, members in {
        "animal": ("animal",), "fruit": ("fruit",), "food": ("fruit", "food"),
        "vehicle": ("vehicle",), "plant": ("plant",),
    }.items()
}  # fmt: skip
CATEGORY_PLURALS = {"animal": "animals", "fruit": "fruits", "vehicle": "vehicles"}
SOURCES = ("fluent", "noto")

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond")

# --- colours ------------------------------------------------------------------------------------

# name -> (hue from, to) in degrees, (saturation from, to), (value from, to). Neighbours are kept
# apart by unused hues. Each hue range (value range where any hue goes) is cut into 8 slices, which
# the splits share out.
_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-8, 6), (0.82, 1.0), (0.72, 0.95)),
    "orange": ((24, 36), (0.85, 1.0), (0.92, 1.0)),
    "yellow": ((50, 60), (0.70, 1.0), (0.92, 1.0)),
    "green": ((100, 146), (0.60, 1.0), (0.45, 0.80)),
    "blue": ((206, 236), (0.70, 1.0), (0.62, 1.0)),
    "purple": ((266, 288), (0.55, 0.95), (0.45, 0.75)),
    "pink": ((318, 346), (0.35, 0.60), (0.95, 1.0)),
    "brown": ((14, 32), (0.60, 0.85), (0.38, 0.54)),
    "black": ((0, 360), (0.0, 0.15), (0.0, 0.14)),
    "gray": ((0, 360), (0.0, 0.05), (0.42, 0.64)),
    "white": ((0, 360), (0.0, 0.03), (0.90, 1.0)),
}
COLOURS = tuple(_RANGES)
SLICES: dict[Split, tuple[int, ...]] = {"train": (0, 1, 3, 4, 6, 7), "val": (5,), "test": (2,)}


def colour_rgb(
    name: str, split: Split, slot: float, saturation: float, value: float
) -> tuple[int, int, int]:
    """A shade of a named colour that no other split uses.

    Args:
        name: one of `COLOURS`.
        split: chooses the slices of the hue range (of the value range for black, gray and white).
        slot, saturation, value: uniform draws in [0, 1).
    """
    hue, sat, val = _RANGES[name]
    slices = SLICES[split]
    place = slot * len(slices)
    # Not up to a slice's edges: rounding to 8 bits must not cross them.
    sliced = (slices[int(place)] + 0.2 + 0.6 * (place % 1.0)) / 8
    if hue[1] - hue[0] == 360:
        h, v = value * 360, val[0] + sliced * (val[1] - val[0])
    else:
        h, v = hue[0] + sliced * (hue[1] - hue[0]), val[0] + value * (val[1] - val[0])
    rgb = colorsys.hsv_to_rgb(h / 360 % 1.0, sat[0] + saturation * (sat[1] - sat[0]), v)
    return tuple(round(255 * c) for c in rgb)  # pyright: ignore[reportReturnType]


def slice_of(name: str, rgb: tuple[int, int, int]) -> float:
    """Where a shade lies in its colour's sliced range, in slices (0..8), to check splits with."""
    hue, _, val = _RANGES[name]
    h, _, v = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
    if hue[1] - hue[0] == 360:
        return 8 * (v - val[0]) / (val[1] - val[0])
    h = (h * 360 - hue[0] + 180) % 360 + hue[0] - 180
    return 8 * (h - hue[0]) / (hue[1] - hue[0])


# --- words to read ------------------------------------------------------------------------------

_TRAIN_WORDS = """
at be by do go he hi if in is it me my no of ok on or so to up us we act add age aid aim air all
and any arm art ask bad bag bar bed big bit box boy buy can cap city cold come cook cool copy cut
dad day deal dear desk die dig dish door down draw drink drop dry due each ear east eat edge end
even exit eye face fact fair fall fan far farm fast fat fee feel few fill film find fine fire fit
fix flag flat floor fly food foot for fork free fresh from full fun game gas get gift girl give
glad glass go gold good grass green grow guest gym hair half hall hand hard head heat help hero
high hill hint hold home hope hot hour how hug ice idea inn iron job join joke jump just keep kid
kind king kiss knee lady lake land last law leaf left less life light like line lion list live
lock log long look lost love low lunch mad magic main make man map mark meal meet menu mild milk
mind mix moon more move mud music nail name near neck new next nice nine north note now oil old
one open our out over own pack page park part path pay peace pen pet pick pink plan play plus pool
post pull push put quick quiet quiz race radio rain read red rest rice rich ride ring road rock
room rope run sad safe sail sale salt sand save sea seat see sell send set shop show sing six size
skin sky slow small snow soap soft song soon soup south space spoon star start stay step stop
sugar sun table take talk tall taxi tea team tell ten tent test thank that them then thin this tie
time tip today tool top town toy try turn two use van very view visit vote wait walk wall want
warm wash water way web week well west wet what when white who why wide wife win wind wine wish
wood word work world year yes yet you young zero zoo zone
"""
_VAL_WORDS = """
am an as ago bus busy cafe cake card club data date ever exam fish hat hotel item jam joy key kit
large lemon maze mouse nest never only paper plum quit river rose sign sofa sport story tax tree
tube under unit vase wave wolf yard
"""
_TEST_WORDS = """
ad ox pi bee best blue bone cash clean cream cup dance dog echo enter fox gate happy hen house ink
jeans jet kite lamp learn mail net night nut oak order owl party pizza quest rent rug shoe smile
son tiger tour urban vet voice wheel wing yoga zip
"""


@functools.cache
def words_of_split(split: Split) -> tuple[str, ...]:
    """Lower-case words of 2 to 5 letters that only this split prints."""
    text = {"train": _TRAIN_WORDS, "val": _VAL_WORDS, "test": _TEST_WORDS}[split]
    return tuple(sorted({word for word in text.split() if 2 <= len(word) <= 5}))


# --- fonts --------------------------------------------------------------------------------------

# split -> font files, by family: no family is in two splits, nor is a copy of another's outlines.
FONTS: dict[Split, tuple[str, ...]] = {
    "train": (
        "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSerif-Bold.ttf",
        "Lato-Regular.ttf", "Lato-Bold.ttf", "Roboto-Medium.ttf", "RobotoCondensed-Bold.ttf",
        "OpenSans-Semibold.ttf", "OpenSans-Bold.ttf", "Dosis-Bold.otf", "Cabin-Bold.otf",
        "Caladea-Bold.ttf", "Caladea-Regular.ttf", "Inconsolata.otf",
    ),
    "val": ("Cantarell-Bold.otf", "Hack-Bold.ttf"),
    "test": ("LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf", "LiberationSerif-Bold.ttf"),
}  # fmt: skip

# More for training: what it prints to practise spelling (spelling.py) has these fonts too.
MORE_FONTS: tuple[str, ...] = (
    "Inter-Medium.otf", "Inter-Bold.otf", "Karla-Regular.otf", "Karla-Bold.otf", "Tuffy.ttf",
    "Tuffy_Bold.ttf", "Manrope-SemiBold.ttf", "Sora-SemiBold.otf", "ClearSans-Bold.ttf",
    "Play-Bold.ttf", "Junction.otf", "AveriaSansGWF-Bold.ttf", "NationalPark-Heavy.otf",
    "LeagueSpartan-Bold.otf", "YanoneKaffeesatz-Bold.otf", "Quicksand-Bold.ttf",
    "Comfortaa-Bold.ttf", "ComicNeue-Bold.otf", "JetBrainsMono-Bold.ttf", "LeagueMono-Bold.otf",
    "Anonymous Pro B.ttf", "Courier Prime Bold.otf", "RobotoSlab-Bold.otf", "GenBasB.ttf",
    "EBGaramond12-Bold.otf", "Vollkorn-Bold.ttf", "OldStandard-Bold.ttf", "Yrsa-Bold.ttf",
    "Arapey-Black.otf", "Quattrocento-Regular.otf", "Prociono.otf", "GoudyBookletter1911.otf",
)  # fmt: skip

# --- poses and patterns -------------------------------------------------------------------------

_RESIDUES: dict[Split, tuple[int, ...]] = {"train": (0, 1, 2), "val": (3,), "test": (4,)}


@functools.cache
def angles_of_split(split: Split, limit: int) -> tuple[int, ...]:
    """Whole degrees in -limit..limit that only this split rotates by (0 is in train)."""
    return tuple(a for a in range(-limit, limit + 1) if a % 5 in _RESIDUES[split])


@functools.cache
def periods_of_split(split: Split) -> tuple[int, ...]:
    """Pixel periods of stripes and checks that only this split uses."""
    return tuple(p for p in range(8, 33) if p % 5 in _RESIDUES[split])


@functools.cache
def shares_of_split(split: Split) -> tuple[float, ...]:
    """How much white, gray or black is mixed into muted tones, that only this split uses."""
    return tuple(p / 100 for p in range(35, 85) if p % 5 in _RESIDUES[split])
