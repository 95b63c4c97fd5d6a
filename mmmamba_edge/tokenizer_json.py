"""A fast `tokenizer.json`, applied so that no text can produce an added token.

The `tokenizers` library encodes. Decoding is done here, token by token: a token is a fixed run of
bytes whatever stands beside it, so of the file's decoder only the rules are needed.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mmmamba_edge.errors import UserError


class JsonVocabulary:
    """The vocabulary and rules of one `tokenizer.json`.

    Attributes:
        added: (name, special) of each added token, by id.
        size: the highest id, plus one.
        unknown_id: of the token for unknown characters; None where there is none.
        leading_spaces: how many spaces encoding puts before a text.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; UserError where it is damaged or of a kind not supported."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            self._read(data)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except BaseException as error:
            # The tokenizers library raises bare Exception; its panics are not even that.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            detail = str(error) or type(error).__name__
            raise UserError(f"{path}: damaged ({detail}); fetch it again") from error

    def _read(self, data: dict[str, Any]) -> None:
        model, vocab = data["model"], data["model"]["vocab"]
        for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(affix):  # then a token's bytes would depend on its neighbours
                raise UserError(f"{affix} {model[affix]!r} is not supported; expected none")
        self.added = {int(t["id"]): (str(t["content"]), bool(t["special"])) for t in _added(data)}
        if isinstance(vocab, dict):  # BPE, WordPiece, WordLevel
            self._pieces = {int(i): str(piece) for piece, i in vocab.items()}
            self.unknown_id = vocab.get(model.get("unk_token"))
        else:  # Unigram: (piece, score) in the order of ids
            self._pieces = {i: str(piece) for i, (piece, _) in enumerate(vocab)}
            self.unknown_id = model.get("unk_id")
        self.size = max(*self._pieces, *self.added, -1) + 1
        self._bytes_of, self.leading_spaces = _decoding(data.get("decoder"))
        self._first = _text_tokenizer(data)
        # 'first' asks for a space before the very first text only: later ones need another rule
        later = copy.deepcopy(data)
        changed = [
            m for m in _parts(later.get("pre_tokenizer")) if m.get("prepend_scheme") == "first"
        ]
        for metaspace in changed:
            metaspace["prepend_scheme"] = "never"
        self._later = _text_tokenizer(later) if changed else self._first

    def text_ids(self, text: str, first: bool) -> list[int]:
        """Ids of plain text; `first`: it begins the prompt."""
        tokenizer = self._first if first else self._later
        return tokenizer.encode(text, add_special_tokens=False).ids

    def piece_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; none for an id without a token."""
        piece = self._pieces.get(token_id)
        return b"" if piece is None else self._bytes_of(piece)

    def begins_with(self, token_id: int) -> bool:
        """Whether the file's own rules put this token before every text."""
        return self._first.encode("").ids[:1] == [token_id]


def _added(data: dict[str, Any]) -> list[dict[str, Any]]:
    return data.get("added_tokens") or []


def _text_tokenizer(data: dict[str, Any]) -> Tokenizer:
    """The file's tokenizer with every name an added token has read as plain characters.

    Runs of spaces that were added as tokens stay: they are ordinary text.
    """
    added = [{**token, "special": not token["content"].isspace()} for token in _added(data)]
    model = {**data["model"], "dropout": None} if data["model"].get("dropout") else data["model"]
    plain = {**data, "added_tokens": added, "model": model, "truncation": None, "padding": None}
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.encode_special_tokens = True  # that is: as text
    return tokenizer


# --- decoding -----------------------------------------------------------------------------------


def _decoding(decoder: dict[str, Any] | None) -> tuple[Callable[[str], bytes], int]:
    """How a piece becomes bytes, and how many spaces are taken from the front of a text."""
    space, byte_pieces, leading = " ", False, 0
    for part in _parts(decoder):
        match part:
            case {"type": "ByteLevel"}:
                return _byte_level, 0
            case {"type": "Metaspace", "replacement": str(space)}:
                leading = 0 if part.get("prepend_scheme", "always") == "never" else 1
            case {"type": "Replace", "pattern": {"String": str(space)}, "content": " "}:
                pass
            case {"type": "ByteFallback"}:
                byte_pieces = True
            case {"type": "Strip", "content": " ", "start": int(leading), "stop": 0}:
                pass
            case {"type": "Fuse"}:
                pass
            case _:
                raise UserError(
                    f"decoder {part.get('type')} is not supported; expected ByteLevel, or "
                    "Metaspace or Replace with ByteFallback"
                )
    if space == " ":
        raise UserError("no decoder; expected ByteLevel, or Metaspace or Replace with ByteFallback")

    def piece_bytes(piece: str) -> bytes:
        if byte_pieces and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)):
            return bytes([int(byte[1], 16)])
        return piece.replace(space, " ").encode("utf-8")

    return piece_bytes, leading


def _parts(rule: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The rules of a sequence, or the one rule."""
    if rule and rule.get("type") == "Sequence":
        for part in rule.get("decoders") or rule.get("pretokenizers") or []:
            yield from _parts(part)
    elif rule:
        yield rule


# Byte-level vocabularies write printable bytes as themselves, the others from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + n): b for n, b in enumerate(_OTHERS)}


def _byte_level(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF[letter] for letter in piece)
    except KeyError:  # a token added as plain text
        return piece.encode("utf-8")
