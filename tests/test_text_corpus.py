"""The text corpus: what extraction leaves, what is held out, and how it is packed and resumed."""

import gzip
import io
import json
import lzma
import tarfile

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mmmamba_edge.distill.text import corpus
from mmmamba_edge.distill.text.corpus import SPLITS, chosen, gather, split_of, tokenize
from mmmamba_edge.distill.text.extract import documents
from mmmamba_edge.distill.text.sources import SOURCES, Source
from mmmamba_edge.errors import UserError


@pytest.mark.parametrize(
    ("reader", "source", "text"),
    [
        (
            "html",
            "<html><head><title>No</title></head><body><div class='navheader'>Next</div><h1>A &amp;"
            " B</h1><p>One\n  line <b>bold</b>.<p>Two<ul><li>x<li>y</ul><pre>a\n  b</pre>"
            "<script>bad()</script></body></html>",
            "A & B\n\nOne line bold.\n\nTwo\n\nx\ny\n\na\n  b",
        ),
        (
            "rst",
            ".. _label:\n\nTitle\n=====\n\nSee :ref:`the part <part>` and ``code``\n"
            "of `it <x>`_::\n\n"
            "   $ run\n\n.. note:: Be\n   careful.\n",
            "Title\n\nSee the part and `code` of it:\n\n   $ run\n\nBe careful.",
        ),
        ("pod", "=head1 NAME\n\nB<perl> E<lt> C<x> L<here|perlre>\n", "NAME\n\nperl < x here"),
        (
            "man",
            '.\\" comment\n.SH NAME\nls \\- list\n.PP\n.BR cp (1)\nand \\fIthat\\fP\n',
            "NAME\n\nls - list\n\ncp(1)\nand that",
        ),
        (
            "dictionary",
            'Abbey \\Ab"bey\\, n.\n   A {monastery}\n   of monks.\n   [1913 Webster]\n\n'
            "Abbot, n.\n   He.",
            "Abbey, n.\nA monastery of monks.\n\nAbbot, n.\nHe.",
        ),
        (
            "wordnet",
            "  1 licence\n00021 04 n 02 follow_up 0 sequel 1 001 @ 1 n 0000 | what comes next  \n",
            "follow up, sequel: what comes next",
        ),
        ("fortunes", "One.\n%\nTwo.\n%\n", "One.\n\nTwo."),
        ("markdown", "# A\n\nsee [this](http://x) _now_\nand on", "# A\n\nsee this now and on"),
        ("play", "licence\n*** START OF THIS BOOK ***\nAct I\n\nEnd of Project Gutenberg", "Act I"),
    ],
)
def test_markup_goes_and_text_stays(reader, source, text):
    assert documents(reader, source.encode()) == [text]


def prose(number, words=60):
    rng = np.random.default_rng(number)
    letters = rng.integers(97, 123, (words, 5))
    return " ".join("".join(map(chr, word)) for word in letters)


def test_repeated_paragraphs_short_documents_and_other_scripts_go():
    licence, texts = "This licence is said in every file. " * 3, [prose(1), prose(2)]
    found = chosen([*(f"{licence}\n\n{text}" for text in texts), texts[0], "short", "ы" * 400])
    assert len(found) == 2
    assert sum(licence in text for text in found) == 1
    assert all(any(text in document for document in found) for text in texts)


def test_a_share_is_chosen_by_hash_and_splits_stay():
    texts = [prose(n) for n in range(400)]
    all_, some = chosen(texts), chosen(texts, 0.4)
    assert len(all_) == 400 and 110 < len(some) < 210 and set(some) < set(all_)
    counts = {split: sum(split_of(text) == split for text in texts) for split in SPLITS}
    assert counts["train"] > 370 and counts["test"] >= 1 and sum(counts.values()) == 400
    # What is chosen says nothing about what is held out.
    assert any(split_of(text) != "train" for text in some)


SOURCE = Source("book", "pypi", "book", "1", "MIT", r"/texts/.*\.txt(\.gz)?$", "plain")


def make_package(folder, count=300):
    folder.mkdir()
    with tarfile.open(folder / "book-1.tar.gz", "w:gz") as tar:
        for n in range(count):
            data = prose(n).encode()
            name = f"book-1/texts/{n}.txt"
            if n % 2:
                name, data = name + ".gz", gzip.compress(data)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


def make_tokenizer(path):
    words = {"<|endoftext|>": 0, **{chr(97 + i): i + 1 for i in range(26)}, "Ġ": 27}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    return path


def test_a_corpus_is_gathered_packed_and_gone_on_with(tmp_path, monkeypatch):
    packages, out = make_package(tmp_path / "packages"), tmp_path / "text"
    gather(out, packages, [SOURCE])
    record = json.loads((out / "corpus.json").read_text())["sources"]["book"]
    assert record["documents"] == 300 and record["licence"] == "MIT" and len(record["sha256"]) == 64
    with lzma.open(out / "documents/book.jsonl.xz", "rt") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    assert sorted(texts) == sorted(prose(n) for n in range(300))
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json")
    tokenize(out, tokenizer)
    counts = json.loads((out / "tokens/tokens.json").read_text())["sources"]["book"]
    for split in SPLITS:
        ids = np.load(out / "tokens" / split / "book.npy", allow_pickle=False)
        mine = [text for text in texts if split_of(text) == split]
        assert ids.dtype == np.uint16 and len(ids) == counts[split]
        assert (ids == 0).sum() == len(mine) and len(ids) == sum(len(text) + 1 for text in mine)
    # What is there is not made again.
    monkeypatch.setattr(corpus, "_read", None)
    monkeypatch.setattr(corpus, "_pack", None)
    gather(out, packages, [SOURCE])
    tokenize(out, tokenizer)


def test_names_of_special_tokens_in_text_are_plain_words(tmp_path):
    packages, out = tmp_path / "packages", tmp_path / "text"
    packages.mkdir()
    with tarfile.open(packages / "book-1.tar.gz", "w:gz") as tar:
        data = f"{prose(1)} <|endoftext|> {prose(2)}".encode()
        info = tarfile.TarInfo("book-1/texts/a.txt")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    gather(out, packages, [SOURCE])
    tokenize(out, make_tokenizer(tmp_path / "tokenizer.json"))
    found = [np.load(out / "tokens" / split / "book.npy") for split in SPLITS]
    assert sum((ids == 0).sum() for ids in found) == 1  # the one after the document


def test_errors_name_what_is_wrong(tmp_path, capsys):
    packages = make_package(tmp_path / "packages", 2)
    nothing = Source("book", "pypi", "book", "1", "MIT", r"\.rst$", "rst")
    with pytest.raises(UserError, match=r"no text in its 0 files"):
        gather(tmp_path / "out", packages, [nothing])
    with pytest.raises(UserError, match="gather the documents first"):
        tokenize(tmp_path / "empty", make_tokenizer(tmp_path / "tokenizer.json"))
    gather(tmp_path / "text", packages, [SOURCE])
    tokenize(tmp_path / "text", tmp_path / "tokenizer.json")
    other = tmp_path / "other.json"
    other.write_text((tmp_path / "tokenizer.json").read_text() + "\n")
    with pytest.raises(UserError, match="another tokenizer"):
        tokenize(tmp_path / "text", other)


def test_every_source_has_a_name_of_its_own_and_a_licence():
    assert len({source.name for source in SOURCES}) == len(SOURCES)
    assert all(source.licence and source.version and 0 < source.share <= 1 for source in SOURCES)
