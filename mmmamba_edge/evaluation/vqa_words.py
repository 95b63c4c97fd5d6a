"""The VQA accuracy, and the answer processing of the EvalAI server, which TextVQA is scored with.

Rules and their order: MMF's `EvalAIAnswerProcessor`. Its oddities count, for figures are compared
with figures that were made by it: a full stop goes unless a digit follows, other punctuation turns
into a space unless the text has it beside one, "thats" becomes "that's" but "that's" "that 's".
"""

import re
from collections.abc import Sequence

PEOPLE = 10  # answers to each question

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(n) for n, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")

# Each is also known with any one of its apostrophes missing, and only so.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
    mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
    what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""
_CONTRACTED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the other way round in the original


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """How far an answer is the one that people gave, 0 to 1.

    For each of the people: a third for each of the *others* who said the same, one at most; then
    the mean (Antol et al. 2015, leave-one-out as the evaluation server does it).

    Args:
        answer: what the model said.
        people: the ten answers.
    """
    said, known = processed(answer), [processed(one) for one in people]
    same = known.count(said)
    points = [min(1.0, (same - (one == said)) / 3) for one in known]
    return sum(points) / len(points)


def processed(text: str) -> str:
    """An answer in the form in which answers are compared."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = strip_punctuation(" ".join(text.split()))
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in _ARTICLES)


def strip_punctuation(text: str) -> str:
    """Without punctuation: taken out where it stands beside a space, else replaced by one."""
    numbers = re.search(r"\d,\d", text) is not None  # 1,000: then nothing becomes a space
    out = text
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside or numbers else " ")
    return re.sub(r"\.(?!\d)", "", out)
