"""Text that is on every machine: the reference pages inside Python (`help("CALLS")` shows one).

Real English, about 110,000 tokens of a common vocabulary, under the PSF licence. One half of the
topics calibrates, the other is what accuracy is measured on; they never meet.
"""

import hashlib
from collections.abc import Iterator
from typing import Literal

Split = Literal["calibration", "evaluation"]


def topics(split: Split) -> Iterator[tuple[str, str]]:
    """(name, text) of the topics of a half, in order of name."""
    from pydoc_data.topics import topics as pages

    wanted = 0 if split == "calibration" else 1
    for name in sorted(pages):
        if hashlib.sha256(name.encode()).digest()[0] % 2 == wanted:
            yield name, pages[name].strip()
