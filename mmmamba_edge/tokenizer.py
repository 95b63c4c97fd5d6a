"""Words to token ids and back, from a checkpoint's own tokenizer files.

    tokenizer = load_tokenizer("checkpoint/")
    ids = tokenizer.encode(template.opening() + template.user_turn("Hi", tokens_per_tile=256))
    tokenizer.decode(answer_ids)

Two kinds of file are read: `tokenizer.json` (preferred) and the sentencepiece `tokenizer.model` of
InternLM2 (spec 1.2). Neither needs code from the checkpoint, nor the sentencepiece package.

Added tokens (`<|im_end|>`, `<IMG_CONTEXT>`, ...) come from `Special` segments only: in text, which
people wrote, their names are plain characters.
"""

import codecs
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mmmamba_edge.config import Config
from mmmamba_edge.errors import UserError
from mmmamba_edge.prompt import (
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    Bos,
    Segment,
    Special,
    Text,
    check_unicode,
    get_template,
)
from mmmamba_edge.sentencepiece_bpe import SentencePieceVocabulary
from mmmamba_edge.tokenizer_json import JsonVocabulary
from mmmamba_edge.whole import new_file

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class _Vocabulary(Protocol):
    """What a kind of tokenizer file offers."""

    added: dict[int, tuple[str, bool]]
    size: int
    leading_spaces: int

    @property
    def unknown_id(self) -> int | None: ...
    def text_ids(self, text: str, first: bool) -> list[int]: ...
    def piece_bytes(self, token_id: int) -> bytes: ...
    def begins_with(self, token_id: int) -> bool: ...


@dataclass(frozen=True)
class AddedToken:
    """A token with a name, outside ordinary text; `special` ones are left out of decoded text."""

    name: str
    special: bool


class Tokenizer:
    """A loaded tokenizer.

    Attributes:
        source: the file it came from.
        added_tokens: the tokens with names, by id.
        vocab_size: the highest id, plus one.
        bos_id: what a `Bos` segment becomes; None: nothing.
        eos_ids: the tokenizer's own end-of-text tokens (a template adds its turn marks).
    """

    def __init__(
        self,
        source: Path,
        vocabulary: _Vocabulary,
        added_tokens: Mapping[int, AddedToken],
        bos_id: int | None,
        eos_ids: tuple[int, ...],
    ) -> None:
        self.source = source
        self.added_tokens = added_tokens
        self.vocab_size = max([vocabulary.size, *(token_id + 1 for token_id in added_tokens)])
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self._vocabulary = vocabulary
        self._id_of = {added.name: token_id for token_id, added in added_tokens.items()}

    @property
    def unknown_id(self) -> int | None:
        """What stands for text that the vocabulary cannot say; None where it can say all."""
        return self._vocabulary.unknown_id

    def has_token(self, token: str) -> bool:
        """Whether there is an added token of that name."""
        return token in self._id_of

    def token_id(self, token: str) -> int:
        """The id of an added token, by name; UserError where there is none of that name."""
        if token in self._id_of:
            return self._id_of[token]
        raise UserError(
            f"{self.source}: has no token {token!r}; use the files that came with the model"
        )

    def encode(self, prompt: Iterable[Segment]) -> NDArray[np.int64]:
        """The ids of a prompt, (tokens,) int64."""
        ids: list[int] = []
        first = True
        for segment in prompt:
            match segment:
                case Bos():
                    ids += [] if self.bos_id is None else [self.bos_id]
                    continue
                case Special(token, count):
                    ids += [self.token_id(token)] * count
                case Text(text):
                    ids += self.encode_text(text, first=first)
            first = False
        return np.array(ids, dtype=np.int64)

    def encode_text(self, text: str, *, first: bool = True) -> list[int]:
        """The ids of plain text; names of added tokens in it are plain characters.

        Args:
            first: whether the text begins the prompt (some tokenizers put a space there only).
        """
        check_unicode(text)
        ids = self._vocabulary.text_ids(text, first)
        # Both kinds of tokenizer are set up so that this cannot happen; some vocabularies (whole
        # words, unigram) hold the names as ordinary entries, though.
        for token_id in self.added_tokens.keys() & set(ids):
            name = self.added_tokens[token_id].name
            if token_id != self._vocabulary.unknown_id and not name.isspace():
                raise UserError(
                    f"prompt: {name!r} in the text cannot be told from the model's own mark of "
                    "that name; write it differently"
                )
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.push(token_id) for token_id in ids] + [stream.flush()])

    def stream(self, *, skip_special: bool = True) -> "TextStream":
        """A decoder for one token at a time."""
        return TextStream(self, skip_special)


class TextStream:
    """Decodes token by token: bounded work each, and never half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._added = tokenizer.added_tokens
        self._vocabulary = tokenizer._vocabulary
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces = self._vocabulary.leading_spaces

    def push(self, token_id: int) -> str:
        """The text that is certain once this token is known; often "" inside a character."""
        added = self._added.get(int(token_id))
        if added is not None and not added.name.isspace():
            hidden = self._skip_special and added.special
            return self.flush() + ("" if hidden else added.name)
        data = added.name.encode() if added else self._vocabulary.piece_bytes(int(token_id))
        if self._spaces and data:
            stripped = data.lstrip(b" ")
            taken = min(len(data) - len(stripped), self._spaces)
            self._spaces = 0 if stripped else self._spaces - taken
            data = data[taken:]
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end of a text (a character cut short becomes U+FFFD)."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._spaces = self._vocabulary.leading_spaces
        return rest


# --- files --------------------------------------------------------------------------------------


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint or bundle folder.

    Raises:
        UserError: no tokenizer files there, or one is damaged or of a kind not supported.
    """
    folder = Path(folder)
    fast, slow = folder / "tokenizer.json", folder / "tokenizer.model"
    source = fast if fast.is_file() else slow
    if not source.is_file():
        raise UserError(
            f"{folder}: no tokenizer.json and no tokenizer.model; "
            "put the tokenizer files that came with the model there"
        )
    files = _SmallFiles(folder)
    if source == fast:
        vocabulary: _Vocabulary = JsonVocabulary(fast)
        added = files.added | _named(vocabulary)
    else:
        vocabulary = SentencePieceVocabulary(slow, reserved=files.added)
        added = _named(vocabulary) | files.added  # the small files rename spare pieces
    ids = {token.name: token_id for token_id, token in added.items()}
    bos_id = ids.get(files.bos or "")
    if bos_id is not None and files.add_bos is None:
        bos_id = bos_id if vocabulary.begins_with(bos_id) else None
    elif not files.add_bos:
        bos_id = None
    eos_ids = (ids[files.eos],) if files.eos in ids else ()
    return Tokenizer(source, vocabulary, added, bos_id, eos_ids)


def check_tokenizer(tokenizer: Tokenizer, config: Config) -> None:
    """Refuse a tokenizer that is not this model's.

    Raises:
        UserError: more tokens than the model has, no token for an image or a turn, or an image
            token with another id than the model's.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{tokenizer.source}: {tokenizer.vocab_size} tokens, but the model has "
            f"{config.vocab_size}; use the tokenizer files that came with the model"
        )
    template = get_template(config.template)
    first = template.first.token if isinstance(template.first, Special) else None
    for token in (IMG_START, IMG_END, first, template.start, template.end):
        if token is not None:
            tokenizer.token_id(token)
    found = tokenizer.token_id(IMG_CONTEXT)
    if found != config.img_context_token_id:
        raise UserError(
            f"{tokenizer.source}: {IMG_CONTEXT} has id {found}, but the model expects "
            f"{config.img_context_token_id}; use the tokenizer files that came with the model"
        )


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The tokenizer's files that are in a folder."""
    return [file for name in TOKENIZER_FILES if (file := Path(folder) / name).is_file()]


def save_tokenizer_files(source: str | Path, target: str | Path) -> list[str]:
    """Copy the tokenizer files of one folder into another; returns their names."""
    names = [file.name for file in tokenizer_files(source)]
    for name in names:
        with new_file(Path(target) / name) as part:
            shutil.copyfile(Path(source) / name, part)
    return names


class _SmallFiles:
    """What the JSON files beside the vocabulary say: added tokens, first and last token."""

    def __init__(self, folder: Path) -> None:
        config = _read_json(folder / "tokenizer_config.json")
        special = _read_json(folder / "special_tokens_map.json")
        names = {"bos_token": "<s>", "eos_token": "</s>", **config, **special}
        self.bos, self.eos = _name(names["bos_token"]), _name(names["eos_token"])
        self.add_bos: bool | None = config.get("add_bos_token")  # None: not said
        self.added: dict[int, AddedToken] = {}
        try:
            for name, token_id in _read_json(folder / "added_tokens.json").items():
                self.added[int(token_id)] = AddedToken(name, True)
            for token_id, token in config.get("added_tokens_decoder", {}).items():
                self.added[int(token_id)] = AddedToken(token["content"], token.get("special", True))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{folder}: the added tokens in added_tokens.json or tokenizer_config.json are "
                f"damaged ({error!r}); fetch both again"
            ) from error


def _named(vocabulary: _Vocabulary) -> dict[int, AddedToken]:
    return {token_id: AddedToken(*token) for token_id, token in vocabulary.added.items()}


def _name(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object; fetch it again")
    return data
