"""Writes unicode_ranges.inc: the letters and numbers of Unicode, as this Python knows them.

python runtimes/cpp/unicode_ranges.py > runtimes/cpp/unicode_ranges.inc
"""

import sys
import unicodedata
from itertools import groupby


def ranges(category: str) -> list[str]:
    """Runs of code points whose category begins with `category`, as C++ initialisers."""
    codes = [c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c))[0] == category]
    runs = [[c for _, c in run] for _, run in groupby(enumerate(codes), lambda p: p[1] - p[0])]
    return [f"{{0x{run[0]:X}, 0x{run[-1]:X}}}" for run in runs]


def table(name: str, rows: list[str]) -> str:
    """A C++ array, filled up to 100 columns."""
    lines = [""]
    for row in rows:
        if len(lines[-1]) + len(row) + 2 > 96:
            lines.append("")
        lines[-1] += f"{row}, " if lines[-1] else f"    {row}, "
    body = "\n".join(line.rstrip() for line in lines)
    return f"constexpr Range {name}[] = {{\n{body}\n}};"


if __name__ == "__main__":
    print(f"// Unicode {unicodedata.unidata_version}; written by unicode_ranges.py.")
    print(table("LETTERS", ranges("L")))
    print(table("NUMBERS", ranges("N")))
