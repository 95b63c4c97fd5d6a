"""Text that is on every machine: the reference pages inside Python (`help("CALLS")` shows one).

Real English, about 110,000 tokens of a common vocabulary, under the PSF licence. One half of the
topics calibrates, the other is what accuracy is measured on; they never meet.
"""

import hashlib
from collections.abc import Iterator
from typing import Literal

from mmmamba_edge.tokenizer import Tokenizer

Split = Literal["calibration", "evaluation"]

UNKNOWN = 0.2  # share of unknown tokens from which a tokenizer cannot say a text
SPELLING = 2.0  # characters a token; below, a tokenizer spells the text out


def topics(split: Split) -> Iterator[tuple[str, str]]:
    """(name, text) of the topics of a half, in order of name."""
    from pydoc_data.topics import topics as pages

    wanted = 0 if split == "calibration" else 1
    for name in sorted(pages):
        if hashlib.sha256(name.encode()).digest()[0] % 2 == wanted:
            yield name, pages[name].strip()


def foreign(tokenizer: Tokenizer, text: str) -> str:
    """Why a text is not what this tokenizer was made for; empty if it is."""
    ids = tokenizer.encode_text(text)
    unknown = sum(i == tokenizer.unknown_id for i in ids) / max(len(ids), 1)
    if unknown > UNKNOWN:
        return f"{unknown:.0%} of its tokens are unknown to this model's tokenizer"
    if len(text) < SPELLING * len(ids):
        spelt = f"{len(text) / len(ids):.1f} characters a token"
        return f"this model's tokenizer spells it out ({spelt})"
    return ""
