"""Words to learn spelling from: made up, of 2 to 7 letters, so that none is worth knowing by heart.

A model that only ever sees dictionary words of five letters recognises them and drops a letter of
any other. Training's second part prints these (`sample_scene(..., spelling=True)`).
"""

import random

LETTERS = "abcdefghijklmnopqrstuvwxyz"
_VOWELS = "aeiou"
_LENGTHS = {2: 6, 3: 12, 4: 20, 5: 34, 6: 16, 7: 12}


def made_up_word(rng: random.Random) -> str:
    """Random letters, syllables, or a few letters over and over; now and then one is doubled.

    Repetition is what a reader loses count in.
    """
    length = rng.choices(list(_LENGTHS), list(_LENGTHS.values()))[0]
    draw = rng.random()
    if draw < 0.45:
        letters = [rng.choice(LETTERS) for _ in range(length)]
    elif draw < 0.85:
        vowel = rng.random() < 0.4
        letters = []
        for _ in range(length):
            letters.append(rng.choice(_VOWELS if vowel else LETTERS))
            vowel = not vowel if rng.random() < 0.8 else vowel
    else:
        few = rng.sample(LETTERS, rng.choice((2, 3)))
        letters = [rng.choice(few) for _ in range(length)]
    if rng.random() < 0.2:
        place = rng.randrange(length - 1)
        letters[place + 1] = letters[place]
    return "".join(letters)


def made_up_number(rng: random.Random) -> str:
    """1 to 6 digits."""
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 6)))
