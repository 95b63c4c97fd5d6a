"""A conversation: each turn reads only what is new, for the state remembers the rest.

A session keeps no transcript. What the model remembers is the state, of fixed size, and a session
file is that state and a few ids. So a session *is* its last answer: the position it has reached.
"""

import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmmamba_edge.answer import Answer, Stats
from mmmamba_edge.errors import UserError
from mmmamba_edge.generate import Generation, Position, check_limit
from mmmamba_edge.image import image_tiles
from mmmamba_edge.prefix import PrefixCache
from mmmamba_edge.prompt import get_template
from mmmamba_edge.resting import RestingState, put_by
from mmmamba_edge.runtimes.base import Progress, Runner
from mmmamba_edge.sampling import Sampler
from mmmamba_edge.state import Record, Tensors, load_session, save_session
from mmmamba_edge.tokenizer import Tokenizer, check_tokenizer, load_tokenizer

Picture = str | Path | bytes | Image.Image
MAX_NEW_TOKENS = 512  # of an answer, where the caller names no limit


class Session:
    """A conversation with a model.

    Args:
        runner: the model, with its tokenizer files.
        system: the system message; None: the template's own, if it has one; "": an empty one.
        template: name of the prompt template; None: the one in the model's config.
        prefix_cache: reuse what a first turn begins with (system message, pictures) where it was
            read before; None: always read.

    Raises:
        UserError: the model has no tokenizer files or not its own, or the template is unknown.

    Example:
        session = Session(runner)
        for text in session.ask("What is this?", images=["a.png"]):
            print(text, end="", flush=True)
        session.save("talk.safetensors")
    """

    def __init__(
        self,
        runner: Runner,
        *,
        system: str | None = None,
        template: str | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        self.runner = runner
        self.system = system
        self.template = get_template(template or runner.config.template)
        self.prefix_cache = prefix_cache
        self._tokenizer = _tokenizer_of(runner)
        self._stop_ids = self.template.stop_ids(self._tokenizer)
        self._answer: Answer | None = None  # the last one; None: nothing was asked yet

    def ask(
        self,
        text: str,
        images: Sequence[Picture] = (),
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_tiles: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Answer:
        """Read a question with its pictures, and answer it piece by piece.

        The question has been read when this returns; the answer is made while it is iterated. If
        reading fails or is interrupted, the session is what it was before. An earlier answer that
        was left in the midst stays in the conversation as far as it got.

        Args:
            text: the question.
            images: its pictures: each takes the place of one `<image>` in the text, or comes first.
            max_new_tokens: tokens of the answer at most.
            max_tiles: tiles of a picture at most; None: as the model's config says.
            temperature, top_p, top_k, repetition_penalty, seed: see `Sampler`.
            progress: called while the question is read, with (tokens done, tokens in all).

        Returns:
            An iterator of text; no piece splits a character, and stop tokens are not in it.

        Raises:
            UserError: a bad picture, prompt or setting, or more tokens than a hybrid has room for.
        """
        start = time.perf_counter()
        sampler = Sampler(temperature, top_p, top_k, repetition_penalty, seed)
        check_limit(max_new_tokens)
        if not text.strip() and not images:
            raise UserError("the prompt is empty: ask something, or give a picture")
        tiles = [image_tiles(image, self.runner.config, max_tiles=max_tiles) for image in images]
        ids, opening = self._turn_ids(text, [len(picture) for picture in tiles])
        self._check_room(len(ids))
        sampler.see(ids)

        before = self._answer
        state = before.position.wake(self.runner) if before else None
        kept = state.copy() if state else None  # prefill uses the given one up
        try:
            pixels = np.concatenate(tiles) if tiles else None
            reused = 0
            if before is not None:
                logits, state = self.runner.prefill(ids, pixels, state, progress=progress)
            elif self.prefix_cache is None:
                logits, state = self.runner.prefill(ids, pixels, progress=progress)
            else:
                logits, state, reused = self.prefix_cache.prefill(
                    self.runner, ids, pixels, opening=opening, progress=progress
                )
            position = Position(state, np.array(logits))  # the runner may use its buffer again
            stats = Stats(
                turn=before.stats.turn + 1 if before else 1,
                prompt_tokens=len(ids),
                reused_tokens=reused,
                context_tokens=state.tokens,
                state_bytes=state.nbytes,
                prefill_s=time.perf_counter() - start,
            )
            generation = Generation(self.runner, position, sampler, max_new_tokens, self._stop_ids)
            self._answer = Answer(generation, self._tokenizer, stats)
        except BaseException:
            if before is not None and kept is not None and self._answer is before:
                before.position.state = kept
            raise
        if before is not None:
            before.close()
        return self._answer

    def resume(self, max_new_tokens: int | None = None) -> Answer:
        """Go on with the last answer where it was cut by its limit, by Ctrl-C, or by `save`.

        Args:
            max_new_tokens: further tokens at most; None: what is left of the answer's own limit,
                or 512 where nothing is.

        Raises:
            UserError: there is no answer to go on with.
        """
        answer = self._answer
        if answer is None or answer.reason in ("stop", "context"):
            raise UserError("there is no unfinished answer to go on with; ask something")
        answer.extend(max_new_tokens or answer.generation.left or MAX_NEW_TOKENS)
        return answer

    @property
    def stats(self) -> Stats:
        """What the last turn took, up to now."""
        return Stats() if self._answer is None else self._answer.stats

    def fork(self) -> Self:
        """An independent session that stands where this one does, in the midst of an answer too."""
        twin = type(self)(
            self.runner,
            system=self.system,
            template=self.template.name,
            prefix_cache=self.prefix_cache,
        )
        twin._answer = None if self._answer is None else self._answer.copy()
        return twin

    def rest(self, precision: str = "int16") -> None:
        """Put the state by in half its memory; whatever reads on wakes it.

        Args:
            precision: "int16" (a scale for each row) or "float16"; "float32" changes nothing.

        Raises:
            UserError: a head of this model remembers longer than the precision can follow, or the
                state is beyond it; the session is what it was.
        """
        if self._answer is None or precision == "float32":
            return
        position = self._answer.position
        if not isinstance(position.state, RestingState):
            position.state = put_by(self.runner, position.state, precision)

    def reset(self) -> None:
        """Forget everything but the system message."""
        if self._answer is not None:
            self._answer.close()
        self._answer = None

    # --- files -----------------------------------------------------------------------------------

    def save(self, path: str | Path, precision: str = "float32") -> None:
        """Write the conversation to a file (safetensors, mode 0600), whole or not at all.

        In the midst of an answer too: `Session.load(...).resume()` goes on with the same tokens.

        Args:
            path: the file.
            precision: of the state in it: "float32", exact; "int16" or "float16", half the size.

        Raises:
            UserError: the file cannot be written, or the state is beyond the precision.
        """
        answer = self._answer
        extra: Tensors = {}
        if answer is not None:
            extra = {"sampler.seen": answer.generation.sampler.seen.astype(np.uint8)}
            if answer.position.pending is None:
                extra["logits"] = answer.position.logits
        record = Record(
            model_id=self.runner.model_id,
            quant=self.runner.quant,
            template=self.template.name,
            system=self.system,
            tokens=0 if answer is None else answer.position.state.tokens,
            answer=None if answer is None else answer.to_dict(),
        )
        state = self.runner.new_state() if answer is None else answer.position.state
        save_session(path, record, state, extra, precision)

    @classmethod
    def load(
        cls,
        path: str | Path,
        runner: Runner,
        *,
        allow_other_quant: bool = False,
        prefix_cache: PrefixCache | None = None,
    ) -> Self:
        """A session that goes on from a file of `save`, exactly as the saved one would.

        Raises:
            UserError: see `load_session`.
        """
        record, state, extra = load_session(path, runner, allow_other_quant=allow_other_quant)
        session = cls(
            runner, system=record.system, template=record.template, prefix_cache=prefix_cache
        )
        if record.answer is not None:
            seen = extra.get("sampler.seen", np.zeros(0, np.uint8))
            logits = extra.get("logits", np.zeros(runner.config.vocab_size, np.float32))
            try:
                session._answer = Answer.from_dict(
                    record.answer, runner, session._tokenizer, Position(state, logits),
                    seen.astype(np.bool_), session._stop_ids,
                )  # fmt: skip
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}: a damaged session file ({error!r})") from error
        return session

    # --- parts -----------------------------------------------------------------------------------

    def _turn_ids(self, text: str, tile_counts: list[int]) -> tuple[NDArray[np.int64], int]:
        """The ids to read, and how many of them every conversation of this kind begins with."""
        template = self.template
        turn = template.user_turn(
            text, tile_counts, tokens_per_tile=self.runner.config.tokens_per_tile
        )
        encode, answer = self._tokenizer.encode, self._answer
        if answer is None:
            opening = list(encode(template.opening(self.system)))
            ids = list(encode(template.opening(self.system) + turn + template.assistant_prefix))
            # Where two texts meet they are tokenised together: then nothing ends at the opening.
            return np.array(ids, np.int64), len(opening) if ids[: len(opening)] == opening else 0
        ids = list(encode(template.after_answer + turn + template.assistant_prefix))
        pending = answer.position.pending
        return np.array(ids if pending is None else [pending, *ids], np.int64), 0

    def _check_room(self, count: int) -> None:
        limit = self.runner.max_context
        used = 0 if self._answer is None else self._answer.position.state.tokens
        if limit is not None and used + count > limit:
            raise UserError(
                f"the prompt is {count} tokens long, and {used} of the model's context of {limit} "
                f"are taken: {limit - used} are left. Shorten it, give fewer or smaller pictures "
                "(max_tiles), or begin a new conversation"
            )


def stream(
    runner: Runner,
    prompt: str,
    *,
    images: Sequence[Picture] = (),
    system: str | None = None,
    template: str | None = None,
    prefix_cache: PrefixCache | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    max_tiles: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Answer:
    """One question, one answer, as an iterator of text; see `Session` and `Session.ask`.

    Example:
        for text in stream(runner, "What is this?", images=["a.png"], max_new_tokens=64):
            print(text, end="", flush=True)
    """
    session = Session(runner, system=system, template=template, prefix_cache=prefix_cache)
    return session.ask(
        prompt,
        images,
        max_new_tokens=max_new_tokens,
        max_tiles=max_tiles,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        progress=progress,
    )


def _tokenizer_of(runner: Runner) -> Tokenizer:
    if runner.tokenizer_dir is None:
        raise UserError(
            "this model has no tokenizer files, so it takes token ids only: use runner.prefill and "
            "generate_ids, or put the tokenizer beside the checkpoint and export again"
        )
    times = tuple(f.stat().st_mtime_ns for f in sorted(runner.tokenizer_dir.iterdir()))
    tokenizer = _tokenizer_in(runner.tokenizer_dir, times)
    check_tokenizer(tokenizer, runner.config)
    return tokenizer


@lru_cache(maxsize=1)  # a large vocabulary takes a second to load, a session should take none
def _tokenizer_in(folder: Path, times: tuple[int, ...]) -> Tokenizer:
    return load_tokenizer(folder)
