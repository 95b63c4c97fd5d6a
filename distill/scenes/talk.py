"""Scenes as conversations on disk, in the InternVL layout: what `quantize --calibration` reads.

    python -m mmmamba_edge.distill.scenes.talk --art cache/art --count 200 --out cache/talk
    mmmamba-edge quantize build/checkpoint --scheme int4 --calibration cache/talk/talk.jsonl ...

One picture a row, asked all questions that it allows. Test scenes are not to be had.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from PIL import Image

from mmmamba_edge.distill.scenes.art import load_art
from mmmamba_edge.distill.scenes.evaluation import iter_eval
from mmmamba_edge.distill.scenes.vocabulary import Split
from mmmamba_edge.errors import UserError
from mmmamba_edge.status import StatusLine
from mmmamba_edge.whole import new_folder


def write_talk(out: Path, art: Path, split: Split, count: int, seed: int = 0) -> None:
    """Write `out`/talk.jsonl and its pictures; `out` must not exist.

    Args:
        out: folder.
        art: made by scenes.art.
        split: whose scenes; test is for `check`, never for training.
        count: pictures.
        seed: other scenes for another number.
    """
    status = StatusLine()
    with new_folder(out) as folder, (folder / "talk.jsonl").open("w", encoding="utf-8") as file:
        for number, (image, questions) in enumerate(iter_eval(split, count, load_art(art), seed)):
            name = f"{number:06}.png"
            Image.fromarray(image).save(folder / name)
            talk = []
            for i, asked in enumerate(questions):
                text = asked.question if i else f"<image>\n{asked.question}"
                talk += [
                    {"from": "human", "value": text},
                    {"from": "gpt", "value": asked.answer},
                ]
            file.write(json.dumps({"image": name, "conversations": talk}) + "\n")
            status("pictures", number + 1, count)
    status.close()


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmmamba_edge.distill.scenes.talk",
        description="Write scenes as conversations in the InternVL layout.",
        epilog="example: python -m mmmamba_edge.distill.scenes.talk --art cache/art --count 200 "
        "--out cache/talk",
    )
    parser.add_argument("--art", type=Path, required=True, help="folder made by scenes.art")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--split", choices=get_args(Split), default="train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        write_talk(args.out, args.art, args.split, args.count, args.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
