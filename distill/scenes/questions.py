"""Mixed questions about a scene, and the best blind guess they leave.

Each kind of question is a function from (rng, scene) to a `Question`, or None where the scene does
not allow it (or to keep answers even); the answer follows from the `Scene` alone.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

from mmmamba_edge.distill.scenes import smalltalk
from mmmamba_edge.distill.scenes.appearance import colour, count, existence, naming
from mmmamba_edge.distill.scenes.phrasing import Question
from mmmamba_edge.distill.scenes.places import place, relation
from mmmamba_edge.distill.scenes.scene import Scene
from mmmamba_edge.distill.scenes.wording import caption, reading

Asker = Callable[[random.Random, Scene], Question | None]

ASKERS: dict[str, Asker] = {
    "existence": existence,
    "naming": naming,
    "colour": colour,
    "count": count,
    "relation": relation,
    "place": place,
    "reading": reading,
    "caption": caption,
}
TYPES = tuple(ASKERS)
# How often each is tried; what a scene rarely allows is tried more often.
_WEIGHTS = {
    "existence": 0.6, "naming": 1.2, "colour": 1.4, "count": 1.3, "relation": 3.0, "place": 0.35,
    "reading": 0.25, "caption": 0.3,
}  # fmt: skip
_READING_WEIGHT = 2.0  # where there is a word
_PRACTICE = frozenset(("reading-letter", "reading-none"))  # asked in training, not measured
_TALK, _UNSEEN = 0.005, 0.004  # shares of tries that have nothing to do with the picture


def ask(rng: random.Random, scene: Scene, limit: int) -> list[Question]:
    """Draw up to `limit` different questions, with a little small talk in between.

    Args:
        rng: all randomness comes from here.
        scene: what the picture shows.
        limit: fewer come back where the scene allows no more.
    """
    weights = {**_WEIGHTS, "reading": _READING_WEIGHT} if scene.word else _WEIGHTS
    types, shares = list(weights), list(weights.values())
    found: list[Question] = []
    seen: set[tuple[str, str]] = set()
    for _ in range(6 * limit):
        if len(found) == limit:
            break
        draw = rng.random()
        if draw < _TALK:
            question = small_talk(rng)
        elif draw < _TALK + _UNSEEN:
            question = _from(rng, "unknown", smalltalk.UNSEEN)
        else:
            question = ASKERS[rng.choices(types, shares)[0]](rng, scene)
        if question is None or (question.form, question.target) in seen:
            continue
        seen.add((question.form, question.target))
        found.append(replace(question, question=vary(rng, question.question)))
    # A caption gives most answers away: it usually comes last.
    if rng.random() < 0.8:
        found.sort(key=lambda question: question.type == "caption")
    return found


def ask_type(rng: random.Random, scene: Scene, kind: str) -> Question | None:
    """One question of a type, written with care; None where the scene allows none."""
    unwanted = rng.choice(("yes", "no"))  # keeps the two even
    for _ in range(8):
        question = ASKERS[kind](rng, scene)
        if question and question.answer != unwanted and question.form not in _PRACTICE:
            text = _sentence(question.question) + _mark(question.question)
            return replace(question, question=text)
    return None


def with_chance(questions: Iterable[Question]) -> list[Question]:
    """Fill in `chance`: per form, the share of its most frequent answer in this very list."""
    questions = list(questions)
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.form][question.answer] += 1
    chance = {form: max(tally.values()) / tally.total() for form, tally in answers.items()}
    return [replace(question, chance=chance[question.form]) for question in questions]


def small_talk(rng: random.Random) -> Question:
    """A pair that needs no picture."""
    if rng.random() < 0.85:
        return _from(rng, "talk", smalltalk.TALK)
    return _from(rng, "unknown", smalltalk.UNKNOWN)


def without_picture(rng: random.Random) -> Question:
    """A question about a picture where none was shown."""
    return _from(rng, "unknown", smalltalk.NO_PICTURE)


def vary(rng: random.Random, question: str) -> str:
    """Capitals and punctuation as people type them."""
    if rng.random() < 0.68:
        question += _mark(question)
    return _sentence(question) if rng.random() < 0.7 else question


_ORDERS = frozenset(("describe", "name", "read", "count", "tell", "give", "caption"))


def _mark(question: str) -> str:
    return "." if question.split(" ", 1)[0] in _ORDERS else "?"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _from(rng: random.Random, kind: str, pool: list[tuple[list[str], str]]) -> Question:
    phrasings, answer = rng.choice(pool)
    return Question(kind, kind, rng.choice(phrasings), answer, target=answer)
