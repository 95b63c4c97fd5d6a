"""What a conversation looks like to the model: templates, turns, image tokens (spec 7.1, 7.2).

A recurrent model reads each piece once, so a template speaks turn by turn and never renders the
history again:

    template.opening()                      once, at the start
    template.user_turn("What is this?", [3], tokens_per_tile=256)
    template.assistant_prefix               the model answers after this
    template.after_answer                   once the answer is complete; then the next user_turn

A prompt is a sequence of segments, not a string. Markers that steer the model are `Special` and are
looked up by name; words that people wrote are `Text` and are never searched for markers. So
nobody can end a turn, or fake a picture, by typing `<|im_end|>` or `<IMG_CONTEXT>`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from mmmamba_edge.errors import UserError

IMAGE_PLACEHOLDER = "<image>"  # where in a question a picture belongs
IMG_START, IMG_CONTEXT, IMG_END = "<img>", "<IMG_CONTEXT>", "</img>"


# --- segments -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bos:
    """The tokenizer's beginning-of-sequence token; nothing where it has none."""

    def __str__(self) -> str:
        return ""  # the templates' strings leave it to the tokenizer


@dataclass(frozen=True)
class Special:
    """The special token of that name, `count` times."""

    token: str
    count: int = 1

    def __str__(self) -> str:
        return self.token * self.count


@dataclass(frozen=True)
class Text:
    """Plain words. Always valid Unicode; never read as a special token."""

    text: str

    def __post_init__(self) -> None:
        check_unicode(self.text)

    def __str__(self) -> str:
        return self.text


Segment = Bos | Special | Text


@dataclass(frozen=True)
class Prompt:
    """Segments in reading order. Neighbouring texts are one: they are tokenised together."""

    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        joined: list[Segment] = []
        for segment in self.segments:
            last = joined[-1] if joined else None
            if isinstance(segment, Text) and isinstance(last, Text):
                joined[-1] = Text(last.text + segment.text)
            elif str(segment) or isinstance(segment, Bos):
                joined.append(segment)
        object.__setattr__(self, "segments", tuple(joined))

    def __add__(self, other: "Prompt") -> "Prompt":
        return Prompt(self.segments + other.segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __str__(self) -> str:
        """As it would be written in one string; for people and tests, never for tokenising."""
        return "".join(map(str, self.segments))


# --- templates ----------------------------------------------------------------------------------


class _Vocabulary(Protocol):
    """What of a tokenizer `Template.stop_ids` needs."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    def has_token(self, token: str) -> bool: ...
    def token_id(self, token: str) -> int: ...


@dataclass(frozen=True)
class Template:
    """How turns are marked. `start` and `end` are special tokens; None: no marks at all."""

    name: str
    start: str | None = "<|im_start|>"
    end: str | None = "<|im_end|>"
    system_role: str = "system\n"
    user_role: str = "user\n"
    assistant_role: str = "assistant\n"
    after_end: str = ""  # plain text between the end of one turn and the start of the next
    first: Segment = Bos()  # what every conversation begins with
    system: str | None = None  # used where the caller gives none; None: no system turn

    def opening(self, system: str | None = None) -> Prompt:
        """What every conversation starts with.

        Args:
            system: the system message; None: the template's own, if it has one; "": an empty one.
        """
        first = Prompt((self.first,))
        message = self.system if system is None else system
        return first if message is None else first + self._turn(self.system_role, (Text(message),))

    def user_turn(
        self, text: str | bytes, tile_counts: Sequence[int] = (), *, tokens_per_tile: int
    ) -> Prompt:
        """A question with its pictures.

        Each `<image>` in the text becomes one picture, left to right. Pictures without one come
        first, a line each.

        Args:
            text: what the user wrote; bytes must be UTF-8.
            tile_counts: how many tiles each picture has, thumbnail included.
            tokens_per_tile: image positions a tile takes: `config.tokens_per_tile`, or
                `config.patches_per_tile` for the embedding half of a 'post' model.

        Raises:
            UserError: more `<image>` than pictures, a picture without tiles, or not valid Unicode.
        """
        text = prompt_text(text)
        missing = len(tile_counts) - text.count(IMAGE_PLACEHOLDER)
        if missing < 0:
            raise UserError(
                f"prompt: {text.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} for "
                f"{len(tile_counts)} pictures; give one picture for each, or leave "
                f"{IMAGE_PLACEHOLDER} out"
            )
        pieces = (f"{IMAGE_PLACEHOLDER}\n" * missing + text).split(IMAGE_PLACEHOLDER)
        body: list[Segment] = [Text(pieces[0])]
        for tiles, piece in zip(tile_counts, pieces[1:], strict=True):
            body += [*image_segments(tiles, tokens_per_tile), Text(piece)]
        return self._turn(self.user_role, tuple(body))

    @property
    def assistant_prefix(self) -> Prompt:
        """What stands between a question and its answer."""
        start = (Special(self.start),) if self.start else ()
        return Prompt((*start, Text(self.assistant_role)))

    @property
    def after_answer(self) -> Prompt:
        """What follows a complete answer, before the next `user_turn`."""
        end = (Special(self.end),) if self.end else ()
        return Prompt((*end, Text(self.after_end)))

    def stop_ids(self, tokenizer: _Vocabulary) -> frozenset[int]:
        """The tokens at which an answer is over: the turn marks and the tokenizer's own."""
        marks = [mark for mark in (self.start, self.end) if mark and tokenizer.has_token(mark)]
        return frozenset([*tokenizer.eos_ids, *map(tokenizer.token_id, marks)])

    def _turn(self, role: str, body: tuple[Segment, ...]) -> Prompt:
        start = (Special(self.start),) if self.start else ()
        return Prompt((*start, Text(role), *body)) + self.after_answer


# A fixed constant of the released models (spec 7.1), part of what they were trained on.
_INTERNVL_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)

TEMPLATES = {
    template.name: template
    for template in (
        Template("internlm2-chat", system=_INTERNVL_SYSTEM),
        Template("scenes", first=Special("<s>")),  # the embedded default: no system message
        Template("chatml", after_end="\n"),
        Template(
            "plain", None, None, system_role="", user_role="", assistant_role="", after_end="\n"
        ),
    )
}


def get_template(name: str) -> Template:
    """The template of that name (a config's `template`); an unknown name lists the known ones."""
    if name not in TEMPLATES:
        raise UserError(f"template: unknown name {name!r}; known are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


# --- whole conversations ------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One exchange. `answer` None: the model is to give it."""

    text: str
    tile_counts: tuple[int, ...] = ()
    answer: str | None = None


def render(
    template: Template, turns: Sequence[Turn], *, system: str | None = None, tokens_per_tile: int
) -> Prompt:
    """A conversation from its start; for training data and tests, chat goes turn by turn.

    Raises:
        UserError: as `Template.user_turn`; or a turn other than the last has no answer.
    """
    prompt = template.opening(system)
    for number, turn in enumerate(turns, 1):
        prompt += template.user_turn(turn.text, turn.tile_counts, tokens_per_tile=tokens_per_tile)
        prompt += template.assistant_prefix
        if turn.answer is not None:
            prompt += Prompt((Text(turn.answer),)) + template.after_answer
        elif number < len(turns):
            raise UserError(
                f"turn {number} of {len(turns)} has no answer; only the last may lack one"
            )
    return prompt


# --- parts --------------------------------------------------------------------------------------


def image_segments(tiles: int, tokens_per_tile: int) -> tuple[Segment, ...]:
    """One picture: `<img>`, its image positions, `</img>` (spec 7.2)."""
    if tiles < 1:
        raise UserError(f"prompt: a picture with {tiles} tiles; expected at least one")
    return (Special(IMG_START), Special(IMG_CONTEXT, tiles * tokens_per_tile), Special(IMG_END))


def prompt_text(source: str | bytes, *, where: str = "prompt") -> str:
    """Text from outside (argument, stdin, file) as checked Unicode.

    Raises:
        UserError: the bytes are not UTF-8; `where` says which input it was.
    """
    if isinstance(source, bytes):
        try:
            return source.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{where}: not UTF-8 (byte 0x{source[error.start]:02x} at {error.start}); "
                "save or type it as UTF-8"
            ) from error
    check_unicode(source, where=where)
    return source


def check_unicode(text: str, *, where: str = "prompt") -> None:
    """Refuse lone surrogates, which is how Python passes on arguments that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"
        raise UserError(
            f"{where}: not UTF-8 ({what} at character {error.start}); save or type it as UTF-8"
        ) from error
