"""Questions on what is there: existence, naming, colour, count."""

import random
from collections.abc import Iterable

from mmmamba_edge.distill.scenes.phrasing import (
    Question,
    absent_name,
    coin,
    named,
    noun,
    pick,
    plural,
    yes_no,
)
from mmmamba_edge.distill.scenes.places import outermost
from mmmamba_edge.distill.scenes.scene import Scene
from mmmamba_edge.distill.scenes.vocabulary import (
    CATEGORIES,
    CATEGORY_PLURALS,
    COLOURS,
    KINDS,
    SHAPES,
)

# --- existence ----------------------------------------------------------------------------------

_EXISTS = (
    "is there {a}", "is there {a} in the picture", "is there {a} in the image", "do you see {a}",
    "can you see {a}", "is {a} in the picture", "does the picture show {a}", "is there {a} here",
    "does the image show {a}", "do you see {a} in the picture",
)  # fmt: skip
_ANY = (
    "are there any {n}", "are there any {n} in the picture", "do you see any {n}",
    "can you see any {n}", "are there {n} in the picture", "is there any {s} in the picture",
)  # fmt: skip
_THIS = ("is this {a}", "is it {a}", "is that {a}")


def existence(rng: random.Random, scene: Scene) -> Question | None:
    """Is it there? Yes and no are even; half of what is not there is akin to what is."""
    draw = rng.random()
    if draw < 0.10:
        return _category_exists(rng, scene)
    if draw < 0.14:
        if scene.word is None and rng.random() < 0.65:
            return None
        text = rng.choice(("is there a word", "is there any text", "is there a word in the picture",
                           "do you see a word", "can you see any text"))  # fmt: skip
        return yes_no("existence", "existence-word", text, scene.word is not None, "word")
    # Many "no" can be asked about a scene, few "yes".
    yes = rng.random() < 0.60
    if draw < 0.36:
        return _coloured_exists(rng, scene, yes)
    names = {thing.name for thing in scene.things}
    yes = yes and bool(names)
    name = rng.choice(sorted(names)) if yes else absent_name(rng, names)
    if len(scene.things) == 1 and scene.word is None and rng.random() < 0.3:
        text = pick(rng, _THIS, a=noun(name))
    elif rng.random() < 0.15:
        text = pick(rng, _ANY, n=plural(name), s=name)
    else:
        text = pick(rng, _EXISTS, a=noun(name))
    return yes_no("existence", "existence-kind", text, yes, name)


def _category_exists(rng: random.Random, scene: Scene) -> Question | None:
    category = rng.choice(("animal", "fruit", "vehicle", "plant"))
    yes = any(thing.name in CATEGORIES[category] for thing in scene.things)
    # Most scenes lack most categories.
    if not yes and rng.random() < 0.83:
        return None
    text = pick(rng, _EXISTS, a=noun(category))
    return yes_no("existence", "existence-category", text, yes, category)


def _coloured_exists(rng: random.Random, scene: Scene, yes: bool) -> Question | None:
    pairs = sorted({(t.name, t.colour) for t in scene.things if t.is_shape})
    if not pairs and rng.random() < 0.85:
        return None
    yes = yes and bool(pairs)
    name, colour = rng.choice(pairs) if yes else _absent_shape(rng, pairs)
    text = pick(rng, _EXISTS, a=noun(name, colour))
    return yes_no("existence", "existence-coloured", text, yes, f"{colour} {name}")


def _absent_shape(rng: random.Random, pairs: list[tuple[str, str]]) -> tuple[str, str]:
    """Often the right shape in another colour, or another shape in the right colour."""
    while True:
        name, colour = rng.choice(SHAPES), rng.choice(COLOURS)
        if pairs and rng.random() < 0.7:
            like = rng.choice(pairs)
            name, colour = (like[0], colour) if coin(rng) else (name, like[1])
        if (name, colour) not in pairs:
            return name, colour


# --- naming -------------------------------------------------------------------------------------

_WHAT = (
    "what is in the picture", "what is this", "what do you see", "what is it", "what can you see",
    "what is in the image", "what does the picture show", "what is shown here", "what is that",
)  # fmt: skip
_ON_SIDE = {
    "left": ("what is on the left", "what do you see on the left", "what is on the left side"),
    "right": ("what is on the right", "what do you see on the right", "what is on the right side"),
    "top": ("what is at the top", "what is on top", "what do you see at the top"),
    "bottom": ("what is at the bottom", "what do you see at the bottom", "what is on the bottom"),
}
_NAME = (
    "name the {c}", "what {c} is it", "which {c} is this", "what {c} is in the picture",
    "which {c} do you see", "what kind of {c} is it", "what {c} is this", "which {c} is it",
)  # fmt: skip
_SHAPE = (
    "what shape is it", "which shape is this", "name the shape", "what shape is in the picture",
    "which shape do you see", "what shape is this",
)  # fmt: skip
_COLOURED_SHAPE = (
    "what shape is {c}", "which shape is {c}", "name the {c} shape", "what {c} shape is there",
    "what is {c}",
)  # fmt: skip


def naming(rng: random.Random, scene: Scene) -> Question | None:
    """What is it? The whole picture, one side, the only animal, the red shape."""
    options: list[tuple[float, str, str, str]] = []  # weight, form, text, answer
    things = scene.things
    if len(things) == 1 and not scene.word:
        options.append((3, "naming-whole", rng.choice(_WHAT), named(things[0])))
    for side, templates in _ON_SIDE.items():
        thing = outermost(scene, side)
        if thing:
            options.append((0.7, "naming-side", rng.choice(templates), named(thing)))
    for category in CATEGORY_PLURALS:
        members = {t.name for t in things if t.name in CATEGORIES[category]}
        if len(members) == 1:
            text = pick(rng, _NAME, c=category)
            options.append((1.5, f"naming-{category}", text, noun(members.pop())))
    shapes = [t for t in things if t.is_shape]
    if shapes:
        tint = rng.choice(shapes).colour
        for name, text in (
            (_only(t.name for t in shapes), rng.choice(_SHAPE)),
            (_only(t.name for t in shapes if t.colour == tint), pick(rng, _COLOURED_SHAPE, c=tint)),
        ):
            if name:
                options.append((0.7, "naming-shape", text, noun(name)))
    if not options:
        return None
    _, form, text, answer = rng.choices(options, [option[0] for option in options])[0]
    return Question("naming", form, text, answer)


def _only(names: Iterable[str]) -> str | None:
    """The one name, if all are the same."""
    found = set(names)
    return found.pop() if len(found) == 1 else None


# --- colour -------------------------------------------------------------------------------------

_BACKGROUND = (
    "what {w} is the background", "which {w} is the background", "what is the background {w}",
    "what is the {w} of the background",
)  # fmt: skip
_WORD_COLOUR = (
    "what {w} is the word", "what {w} is the text", "which {w} are the letters",
    "what {w} is the writing", "what {w} does the word have",
)  # fmt: skip
_COLOUR_OF_ONE = (
    "what {w} is the {n}", "which {w} is the {n}", "what {w} does the {n} have",
    "what is the {w} of the {n}", "tell me the {w} of the {n}",
)  # fmt: skip
_COLOUR_OF_MANY = (
    "what {w} are the {n}", "which {w} are the {n}", "what {w} do the {n} have",
    "what is the {w} of the {n}",
)  # fmt: skip


def colour(rng: random.Random, scene: Scene) -> Question | None:
    """Of shapes, now and then of the background, the word, or an object of fixed colour."""
    spelling = rng.choice(("colour", "color"))
    draw = rng.random()
    if draw < 0.12:
        if not scene.background.colour:
            return None
        text = pick(rng, _BACKGROUND, w=spelling)
        return Question("colour", "colour-background", text, scene.background.colour)
    if draw < 0.20:
        if scene.word is None or not scene.word.colour:
            return None
        text = pick(rng, _WORD_COLOUR, w=spelling)
        return Question("colour", "colour-word", text, scene.word.colour)
    if draw < 0.27:
        names = sorted({t.name for t in scene.things if not t.is_shape and KINDS[t.name].colour})
        if not names:
            return None
        name = rng.choice(names)
        text = pick(rng, _COLOUR_OF_ONE[:2], w=spelling, n=name)
        return Question("colour", "colour-object", text, KINDS[name].colour)
    return _shape_colour(rng, scene, spelling)


def _shape_colour(rng: random.Random, scene: Scene, spelling: str) -> Question | None:
    shapes = [t for t in scene.things if t.is_shape]
    if not shapes:
        return None
    name = rng.choice(shapes).name
    colours = [t.colour for t in shapes if t.name == name]
    if len(set(colours)) != 1:
        return None
    found, many = colours[0], len(colours) > 1
    if rng.random() < 0.22:
        yes = coin(rng)
        asked = found if yes else rng.choice([c for c in COLOURS if c != found])
        text = f"are the {plural(name)} {asked}" if many else f"is the {name} {asked}"
        return yes_no("colour", "colour-yesno", text, yes)
    if many:
        text = pick(rng, _COLOUR_OF_MANY, w=spelling, n=plural(name))
    elif len(scene.things) == 1 and scene.word is None and coin(rng):
        text = rng.choice((f"what {spelling} is it", f"which {spelling} is it"))
    else:
        text = pick(rng, _COLOUR_OF_ONE, w=spelling, n=name)
    return Question("colour", "colour-shape", text, found)


# --- count --------------------------------------------------------------------------------------

_HOW_MANY = (
    "how many {n} are there", "how many {n} do you see", "how many {n} are in the picture",
    "how many {n} can you see", "count the {n}", "how many {n}", "how many {n} are in the image",
)  # fmt: skip
# Keeps the answers to a count even: few things are common, many are rare.
_KEEP_COUNT = (0.11, 0.12, 0.5, 0.8, 1.0, 1.0, 1.0)


def count(rng: random.Random, scene: Scene) -> Question | None:
    """How many of a kind, of a colour, of a category, in all; 0 to 6."""
    things = scene.things
    options: list[tuple[str, str, int]] = []  # form, what, how many
    for name in {t.name: None for t in things}:
        options.append(("count-kind", plural(name), sum(t.name == name for t in things)))
    for (name, tint), n in scene.counts().items():
        if tint:
            options.append(("count-coloured", f"{tint} {plural(name)}", n))
    shapes = [t for t in things if t.is_shape]
    if shapes:
        tint = rng.choice(shapes).colour
        options.append(("count-shapes", f"{tint} shapes", sum(t.colour == tint for t in shapes)))
        options.append(("count-shapes", "shapes", len(shapes)))
    if things and not scene.word:
        options.append(("count-all", rng.choice(("things", "things", "objects")), len(things)))
    for category, many in CATEGORY_PLURALS.items():
        n = sum(t.name in CATEGORIES[category] for t in things)
        if n:
            options.append(("count-category", many, n))
    absent = absent_name(rng, {t.name for t in things})
    options.append(("count-kind", plural(absent), 0))
    form, what, n = rng.choices(options, [_KEEP_COUNT[n] for _, _, n in options])[0]
    if rng.random() > _KEEP_COUNT[n] * 1.6:
        return None
    return Question("count", form, pick(rng, _HOW_MANY, n=what), str(n))
