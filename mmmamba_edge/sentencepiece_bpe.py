"""A sentencepiece `tokenizer.model` of the BPE kind, read and applied without sentencepiece.

Text -> normalised (spaces become U+2581, perhaps one in front) -> characters -> the pair whose
union has the best score is merged, leftmost first, until none is left -> ids; what has no piece is
spelt in bytes. There is no word splitting, so a piece may span spaces.

The file is a protobuf `ModelProto`; only the fields named below are looked at.
"""

import heapq
import struct
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmmamba_edge.errors import UserError

SPACE = "\u2581"  # stands for a space inside pieces

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # TrainerSpec.ModelType


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry; its id is its position."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """What of a ModelProto decides the ids."""

    pieces: tuple[Piece, ...]
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    def ids_of_type(self, *types: int) -> list[int]:
        """Ids of the pieces of these types, ascending."""
        return [i for i, piece in enumerate(self.pieces) if piece.type in types]


def read_sentencepiece_model(path: Path) -> SentencePieceModel:
    """Read a `tokenizer.model`.

    Raises:
        UserError: damaged or not a sentencepiece model, not of the BPE kind, or with a normaliser
            other than identity.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        model = _parse(data, path)
    except UserError:
        raise
    except (ValueError, LookupError, struct.error, TypeError) as error:
        hint = (
            "fetch it with git lfs"
            if data.startswith(b"version https://git-lfs")
            else "fetch it again"
        )
        raise UserError(f"{path}: damaged, or not a sentencepiece model; {hint}") from error
    return model


class SentencePieceVocabulary:
    """A `tokenizer.model` at work: text to ids as sentencepiece does, and ids to bytes.

    Attributes:
        added: (name, special) of the pieces that no text matches (`<s>`, `<unk>`, ...), by id.
        size: the highest id, plus one.
        unknown_id: of the piece for unknown characters.
        leading_spaces: how many spaces a text loses when decoded.
    """

    def __init__(self, path: Path, *, reserved: Collection[int] = ()) -> None:
        """Read the file. `reserved`: ids that no text may produce, whatever their type."""
        self._model = model = read_sentencepiece_model(path)
        marks = model.ids_of_type(CONTROL, UNKNOWN)
        self.added = {i: (model.pieces[i].text, True) for i in marks}
        self.size = len(model.pieces)
        self.unknown_id = model.ids_of_type(UNKNOWN)[0]
        self.leading_spaces = int(model.add_dummy_prefix)
        if model.remove_extra_whitespaces:
            self.leading_spaces = sys.maxsize  # none is left at the start by encoding, either
        usable = [
            (i, piece)
            for i, piece in enumerate(model.pieces)
            if piece.type in (NORMAL, USER_DEFINED, UNUSED) and i not in reserved
        ]
        self._ids = {piece.text: i for i, piece in usable}
        self._unused = {piece.text for _, piece in usable if piece.type == UNUSED}
        self._bytes = {
            int(p.text[1:-1], 16): i for i, p in enumerate(model.pieces) if p.type == BYTE
        }
        # user-defined symbols are cut out before anything else, the longest first
        whole: dict[str, list[str]] = {}
        for _, piece in usable:
            if piece.type == USER_DEFINED:
                whole.setdefault(piece.text[0], []).append(piece.text)
        self._whole = {
            first: sorted(texts, key=len, reverse=True) for first, texts in whole.items()
        }

    def begins_with(self, token_id: int) -> bool:
        """Whether this token stands before every text: with this kind of file, `<s>` does."""
        return token_id in self.added

    def piece_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; none for an id without a piece."""
        if not 0 <= token_id < self.size:
            return b""
        piece = self._model.pieces[token_id]
        if piece.type == BYTE:
            return bytes([int(piece.text[1:-1], 16)])
        return piece.text.replace(SPACE, " ").encode("utf-8")

    def text_ids(self, text: str, first: bool = True) -> list[int]:
        """Ids of plain text; this kind treats the first text like any other."""
        ids: list[int] = []
        for piece in self._merge(self._normalise(text)):
            if piece in self._ids:
                ids.append(self._ids[piece])
            elif self._model.byte_fallback:
                ids += [self._bytes[byte] for byte in piece.encode("utf-8")]
            elif not ids or ids[-1] != self.unknown_id:  # a run of unknown characters is one <unk>
                ids.append(self.unknown_id)
        return ids

    def _normalise(self, text: str) -> str:
        model = self._model
        if model.remove_extra_whitespaces:
            text = " ".join(word for word in text.rstrip(" " + SPACE).split(" ") if word)
        if text and model.add_dummy_prefix:
            text = " " + text
        return text.replace(" ", SPACE) if model.escape_whitespaces else text

    def _merge(self, text: str) -> Iterator[str]:
        symbols, frozen = self._symbols(text)
        count = len(symbols)
        before, after = list(range(-1, count - 1)), list(range(1, count + 1))
        queue: list[tuple[float, int, int, str]] = []  # (-score, left, right, union): best first
        parts: dict[str, tuple[str, str]] = {}  # how an unused piece was put together

        def consider(left: int, right: int) -> None:
            if left < 0 or right >= count or frozen[left] or frozen[right]:
                return
            union = symbols[left] + symbols[right]
            if (i := self._ids.get(union)) is not None:
                heapq.heappush(queue, (-self._model.pieces[i].score, left, right, union))
                if union in self._unused:
                    parts[union] = (symbols[left], symbols[right])

        for left in range(count - 1):
            consider(left, left + 1)
        while queue:
            _, left, right, union = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != union:
                continue  # one of the two has been merged since
            symbols[left], symbols[right] = union, ""
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
            consider(before[left], left)
            consider(left, after[left])
        for symbol in symbols:
            if symbol:
                yield from _split_unused(symbol, parts)

    def _symbols(self, text: str) -> tuple[list[str], list[bool]]:
        """Characters and user-defined symbols, and which are symbols (these never merge)."""
        if not self._whole:
            return list(text), [False] * len(text)
        symbols, frozen, position = [], [], 0
        while position < len(text):
            candidates = self._whole.get(text[position], ())
            whole = next((w for w in candidates if text.startswith(w, position)), None)
            symbols.append(whole or text[position])
            frozen.append(whole is not None)
            position += len(symbols[-1])
        return symbols, frozen


def _split_unused(symbol: str, parts: dict[str, tuple[str, str]]) -> Iterator[str]:
    if symbol not in parts:
        yield symbol
        return
    for part in parts[symbol]:
        yield from _split_unused(part, parts)


# --- the file -----------------------------------------------------------------------------------


def _parse(data: bytes, path: Path) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normaliser: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:  # pieces
            fields = dict(_fields(_as_bytes(value)))
            score = struct.unpack("<f", _as_bytes(fields.get(2, bytes(4))))[0]
            kind = fields.get(3, NORMAL)
            pieces.append(Piece(_as_bytes(fields[1]).decode("utf-8"), score, int(kind)))
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
        elif number == 3:
            normaliser = dict(_fields(_as_bytes(value)))
    if not any(piece.type == UNKNOWN for piece in pieces) or not all(p.text for p in pieces):
        raise ValueError("no pieces, or an empty one")
    spelt = {p.text for p in pieces if p.type == BYTE}
    if spelt and spelt != {f"<0x{byte:02X}>" for byte in range(256)}:
        raise ValueError("byte pieces other than <0x00> to <0xFF>")
    kind = _MODEL_TYPES.get(int(trainer.get(3, 1)), "unknown")
    if kind != "bpe":
        raise UserError(
            f"{path}: a sentencepiece model of type {kind}; expected bpe. "
            "Convert it to tokenizer.json and put that beside it"
        )
    if normaliser.get(2):  # precompiled_charsmap
        name = _as_bytes(normaliser.get(1, b"")).decode("utf-8", "replace")
        raise UserError(
            f"{path}: a sentencepiece model with the normaliser {name!r}; expected 'identity'. "
            "Convert it to tokenizer.json and put that beside it"
        )
    if trainer.get(24):  # treat_whitespace_as_suffix
        raise UserError(
            f"{path}: a sentencepiece model with spaces as suffixes; expected prefixes. "
            "Convert it to tokenizer.json and put that beside it"
        )
    return SentencePieceModel(
        pieces=tuple(pieces),
        byte_fallback=bool(trainer.get(35, False)) and bool(spelt),
        add_dummy_prefix=bool(normaliser.get(3, True)),
        remove_extra_whitespaces=bool(normaliser.get(4, True)),
        escape_whitespaces=bool(normaliser.get(5, True)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (field number, value) pairs of a protobuf message: varints as int, all else as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
        else:
            if wire_type == 2:
                size, position = _varint(data, position)
            elif wire_type in (1, 5):
                size = 8 if wire_type == 1 else 4
            else:
                raise ValueError(f"wire type {wire_type}")
            value = data[position : position + size]
            position += size
            if position > len(data):
                raise ValueError("truncated")
        yield number, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("expected bytes")
    return value
