"""Questions answered with text: the printed word, and captions."""

import random

from mmmamba_edge.distill.scenes.phrasing import Question, coin, listing, noun
from mmmamba_edge.distill.scenes.scene import Scene

_READ = (
    "what does it say", "read the word", "what is written", "what word is it", "what is the word",
    "what does the text say", "read the text", "what is written in the picture", "can you read it",
    "what does the sign say", "which word do you see", "what is the text", "what is written here",
    "what word is this", "what word is in the picture",
)  # fmt: skip
_READ_NUMBER = ("what number is it", "read the number", "which number do you see", *_READ)


def reading(rng: random.Random, scene: Scene) -> Question | None:
    """The printed word in capitals, or one of its letters.

    Capitals are single tokens, one a letter: so any word can be spelled.
    """
    if scene.word is None:
        if rng.random() < 0.9:
            return None
        return Question("reading", "reading-none", rng.choice(_READ), "there is no word")
    text = scene.word.text.upper()
    number = text.isdigit()
    if not number and rng.random() < 0.2:
        last = coin(rng)
        phrase = f"what is the {'last' if last else 'first'} letter"
        return Question("reading", "reading-letter", phrase, text[-1 if last else 0])
    phrase = rng.choice(_READ_NUMBER if number else _READ)
    return Question("reading", "reading-number" if number else "reading-word", phrase, text)


_DESCRIBE = (
    "describe the picture", "describe the image", "describe this", "tell me what you see",
    "give me a caption", "caption this", "describe what you see", "what do you see in the picture",
)  # fmt: skip
_DESCRIBE_MANY = (
    "what is in the picture", "what do you see", "what is in the image", "what can you see",
    "what does the picture show", "what things are in the picture",
)  # fmt: skip
_GROUNDS = {"stripes": "striped", "checks": "checked"}


def caption(rng: random.Random, scene: Scene) -> Question | None:
    """One sentence on all there is."""
    # Where there is one thing, "what is in the picture" asks for its name.
    one = len(scene.things) == 1 and not scene.word
    text = rng.choice(_DESCRIBE if one else _DESCRIBE + _DESCRIBE_MANY)
    return Question("caption", "caption", text, describe(scene))


def describe(scene: Scene) -> str:
    """The things from left to right, the word, the background."""
    groups: dict[tuple[str, str], int] = {}
    for thing in sorted(scene.things, key=lambda thing: thing.x):
        groups[thing.name, thing.colour] = groups.get((thing.name, thing.colour), 0) + 1
    parts = [noun(name, colour, n) for (name, colour), n in groups.items()]
    if scene.word:
        kind = "number" if scene.word.text.isdigit() else "word"
        parts.append(f"the {kind} {scene.word.text.upper()}")
    ground = scene.background.colour or _GROUNDS.get(scene.background.style, "")
    return listing(parts) + (f" on {noun('background', ground)}" if ground else "") + "."
