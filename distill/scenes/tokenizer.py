"""Train the small tokenizer of the scenes task: byte-level BPE, 1024 tokens, case kept.

It is trained on questions and answers without the words to read: those stay in small pieces, so
that reading can spell words it never saw.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mmmamba_edge.distill.scenes import smalltalk
from mmmamba_edge.distill.scenes.phrasing import noun
from mmmamba_edge.distill.scenes.questions import ask
from mmmamba_edge.distill.scenes.sample import sample_scene
from mmmamba_edge.distill.scenes.scene import scene_rng
from mmmamba_edge.distill.scenes.vocabulary import COLOURS, KINDS, SHAPES
from mmmamba_edge.errors import UserError
from mmmamba_edge.whole import new_file

VOCAB_SIZE = 1024
SPECIAL = (
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>",
)  # fmt: skip
UNK, BOS, PAD, IM_START, IM_END, IMG, IMG_END, IMG_CONTEXT = range(8)

_SCENES = 4000


def train_tokenizer() -> Tokenizer:
    """Train it; the same on every machine."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    size = tokenizer.get_vocab_size()
    assert size == VOCAB_SIZE, size
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a tokenizer.json and check that it is this task's.

    Raises:
        UserError: not a tokenizer, or its special tokens have other ids.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{path}: not a tokenizer.json ({error})") from error
    for i, text in enumerate(SPECIAL):
        if tokenizer.token_to_id(text) != i:
            raise UserError(
                f"{path}: {text} is {tokenizer.token_to_id(text)}, not {i}; make one with "
                "`python -m mmmamba_edge.distill.scenes.tokenizer`"
            )
    return tokenizer


def _corpus() -> Iterator[str]:
    for index in range(_SCENES):
        rng = scene_rng(0, "train", index)
        scene = sample_scene(rng, "train", 2)
        for question in ask(rng, scene, 6):
            yield question.question
            if question.type != "reading" and not (scene.word and question.type == "caption"):
                yield question.answer
    # Every name often enough to become a token, with a space before it and at the start.
    names = [*KINDS, *SHAPES, *COLOURS]
    for name in names:
        for text in (noun(name), f"the {name}", f"{name}", f"is the {name} there", noun(name)):
            yield from [text] * 40
        if name not in COLOURS:
            yield from [noun(name, "", 2)] * 60
    rng = random.Random(0)
    for phrasings, answer in (*smalltalk.TALK, *smalltalk.UNKNOWN, *smalltalk.NO_PICTURE):
        yield from [answer] * 60
        for phrasing in phrasings:
            yield phrasing
            yield phrasing[0].upper() + phrasing[1:] + rng.choice("?!. ")
    yield from ["user", "assistant", "\n"] * 200


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmmamba_edge.distill.scenes.tokenizer",
        description="Train the scenes task's tokenizer (a few seconds).",
        epilog="example: python -m mmmamba_edge.distill.scenes.tokenizer --out tokenizer.json",
    )
    parser.add_argument("--out", type=Path, required=True, help="tokenizer.json to write")
    args = parser.parse_args(argv)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with new_file(args.out) as part:
            train_tokenizer().save(str(part))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
