"""Where things are: geometry that a person would not argue about, and questions on it."""

import random

from mmmamba_edge.distill.scenes.phrasing import Question, absent_name, coin, named, pick, yes_no
from mmmamba_edge.distill.scenes.scene import SIZE, Scene, Thing

CLEAR = 20.0  # px between centres from which left and right, above and below are clear

_AXES = {"left": ("x", 1), "right": ("x", -1), "top": ("y", 1), "bottom": ("y", -1)}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def outermost(scene: Scene, side: str) -> Thing | None:
    """The thing that is clearly the one on a side (left, right, top, bottom) of the picture.

    None where there is a printed word: it might be what is on that side.
    """
    axis, sign = _AXES[side]
    order = sorted(scene.things, key=lambda thing: sign * getattr(thing, axis))
    if not order or scene.word:
        return None
    if sign * (getattr(order[0], axis) - SIZE / 2) > -12:
        return None
    if len(order) > 1 and sign * (getattr(order[1], axis) - getattr(order[0], axis)) < CLEAR:
        return None
    return order[0]


def side_of(one: Thing, other: Thing, vertical: bool) -> str | None:
    """Where `one` is as seen from `other`, along one axis; None unless it is clear."""
    along, across = (one.y - other.y, one.x - other.x)
    if not vertical:
        along, across = across, along
    if abs(along) < CLEAR or abs(along) < 0.8 * abs(across):
        return None
    return (("above", "below") if vertical else ("left", "right"))[along > 0]


def leans(one: Thing, other: Thing, vertical: bool) -> str | None:
    """Like `side_of`, but counts whatever someone might say is on that side."""
    along = one.y - other.y if vertical else one.x - other.x
    if abs(along) < CLEAR / 2:
        return None
    return (("above", "below") if vertical else ("left", "right"))[along > 0]


def place_of(thing: Thing) -> str | None:
    """`on the left`, ..., `in the middle` of the picture; None where two would do."""
    dx, dy = thing.x - SIZE / 2, thing.y - SIZE / 2
    far, near = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if far < 9:
        return "in the middle"
    if far < 18 or near > 0.6 * far:
        return None
    if abs(dx) > abs(dy):
        return "on the right" if dx > 0 else "on the left"
    return "at the bottom" if dy > 0 else "at the top"


def label(scene: Scene, thing: Thing) -> str | None:
    """A name that means this thing alone (`dog`, `circle`, `red circle`), or None."""
    same = [other for other in scene.things if other.name == thing.name]
    if len(same) == 1:
        return thing.name
    if thing.is_shape and sum(other.colour == thing.colour for other in same) == 1:
        return f"{thing.colour} {thing.name}"
    return None


def _labelled(scene: Scene) -> list[tuple[str, Thing]]:
    return [(name, thing) for thing in scene.things if (name := label(scene, thing))]


# --- questions ----------------------------------------------------------------------------------

_SIDES = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_HORIZONTAL = (
    "is the {a} left or right of the {b}", "where is the {a}, left or right of the {b}",
    "is the {a} to the left or to the right of the {b}", "is the {a} right or left of the {b}",
    "is the {a} to the right or to the left of the {b}", "on which side of the {b} is the {a}",
)  # fmt: skip
_VERTICAL = (
    "is the {a} above or below the {b}", "where is the {a}, above or below the {b}",
    "is the {a} over or under the {b}", "is the {a} below or above the {b}",
    "is the {a} under or over the {b}",
)  # fmt: skip
_WHERE = ("where is the {a}", "where is the {a} in the picture", "where do you see the {a}")


def relation(rng: random.Random, scene: Scene) -> Question | None:
    """Left, right, above, below of another thing."""
    labelled = _labelled(scene)
    if len(labelled) < 2:
        return None
    draw = rng.random()
    (a, one), (b, other) = rng.sample(labelled, 2)
    vertical = coin(rng)
    side = side_of(one, other, vertical)
    if side is None:
        return None
    if draw < 0.5:
        yes = coin(rng)
        asked = rng.choice(_SIDES[side if yes else _OPPOSITE[side]])
        return yes_no("relation", "relation-yesno", f"is the {a} {asked} the {b}", yes)
    if draw < 0.84:
        form = "relation-vertical" if vertical else "relation-horizontal"
        text = pick(rng, _VERTICAL if vertical else _HORIZONTAL, a=a, b=b)
        return Question("relation", form, text, side)
    if scene.word or [t for t in scene.things if leans(t, other, vertical) == side] != [one]:
        return None
    text = f"what is {rng.choice(_SIDES[side])} the {b}"
    return Question("relation", "relation-what", text, named(one))


def place(rng: random.Random, scene: Scene) -> Question | None:
    """Where in the picture?"""
    clear = [(name, at) for name, thing in _labelled(scene) if (at := place_of(thing))]
    if rng.random() < (0.12 if clear else 0.02):
        absent = absent_name(rng, {thing.name for thing in scene.things})
        answer = f"there is no {absent}"
        return Question("place", "place", pick(rng, _WHERE, a=absent), answer)
    if not clear:
        return None
    name, answer = rng.choice(clear)
    alone = len(scene.things) == 1 and scene.word is None and coin(rng)
    text = "where is it" if alone else pick(rng, _WHERE, a=name)
    return Question("place", "place", text, answer)
