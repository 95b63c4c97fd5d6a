"""What a question is, and the words for what a scene shows."""

import random
from dataclasses import dataclass

from mmmamba_edge.distill.scenes.scene import Thing
from mmmamba_edge.distill.scenes.vocabulary import KINDS, SHAPES


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        type: existence, naming, colour, count, relation, place, reading, caption, talk,
            unknown or easy-vqa.
        form: finer than type; all questions of a form share their possible answers.
        chance: accuracy of always giving the form's most frequent answer; NaN until known.
        target: what it asks about, to tell repetitions.
    """

    type: str
    form: str
    question: str
    answer: str
    chance: float = float("nan")
    target: str = ""


def yes_no(type_: str, form: str, text: str, yes: bool, target: str = "") -> Question:
    """A question with the answer yes or no."""
    return Question(type_, form, text, "yes" if yes else "no", target=target)


def pick(rng: random.Random, templates: tuple[str, ...], **parts: str) -> str:
    """One of the phrasings, filled in."""
    return rng.choice(templates).format(**parts)


def coin(rng: random.Random) -> bool:
    """True half of the time."""
    return rng.random() < 0.5


COUNT_WORDS = ("no", "one", "two", "three", "four", "five", "six")


def noun(name: str, colour: str = "", count: int = 1) -> str:
    """`a dog`, `an orange star`, `two red circles`."""
    phrase = plural(name) if count > 1 else name
    if colour:
        phrase = f"{colour} {phrase}"
    if count > 1:
        return f"{COUNT_WORDS[count]} {phrase}"
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(name: str) -> str:
    """`dogs`, `circles`."""
    return KINDS[name].plural if name in KINDS else name + "s"


def named(thing: Thing) -> str:
    """A thing in words: `a dog`, `a red circle`."""
    return noun(thing.name, thing.colour)


def listing(parts: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def absent_name(rng: random.Random, names: set[str]) -> str:
    """A kind or shape that is not among `names`; half of the time akin to one that is."""
    pool = list(KINDS) if rng.random() < 0.8 else list(SHAPES)
    if names and coin(rng):
        like = rng.choice(sorted(names))
        if like in SHAPES:
            pool = list(SHAPES)
        else:
            pool = [name for name in KINDS if KINDS[name].category == KINDS[like].category]
    while True:
        name = rng.choice(pool)
        if name not in names:
            return name
        pool = [*pool, *KINDS]
