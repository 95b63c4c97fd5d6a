"""The sample pictures that ship with the package, composed at 448 px from the artwork's originals.

    python -m mmmamba_edge.distill.scenes.samples --out mmmamba_edge/assets/samples

Larger than the scenes of the training set and laid out by hand, so that chat starts from pictures
the way people have them. Artwork: Fluent Emoji 3D (MIT); see NOTICE.md beside this file.
"""

import argparse
import io
import math
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mmmamba_edge.distill.scenes.art import NPM, npm_archive
from mmmamba_edge.distill.scenes.vocabulary import KINDS

SIDE = 448


@dataclass(frozen=True)
class Piece:
    """One thing: a kind of object, its centre and side in px, counter-clockwise degrees."""

    kind: str
    x: int
    y: int
    side: int
    angle: int = 0


@dataclass(frozen=True)
class Sample:
    """A picture: background colour, objects, (shape, colour, box) and (word, x, y, px)."""

    background: str
    pieces: tuple[Piece, ...] = ()
    shapes: tuple[tuple[str, str, tuple[int, int, int, int]], ...] = ()
    word: tuple[str, int, int, int] | None = None


SAMPLES = {
    "dog-and-car": Sample("#cfe8ff", (Piece("dog", 120, 250, 190), Piece("car", 330, 250, 190))),
    "three-apples": Sample(
        "#fff3c4",
        (
            Piece("apple", 110, 130, 150),
            Piece("apple", 330, 170, 150, 15),
            Piece("apple", 210, 330, 150, -10),
        ),
    ),
    "panda": Sample("#bfe3c0", (Piece("panda", 224, 224, 330),)),
    "circle-and-square": Sample(
        "#f4f4f4",
        shapes=(
            ("circle", "#d6281f", (50, 60, 210, 220)),
            ("square", "#1f57d6", (240, 230, 400, 390)),
        ),
    ),
    "word-stop": Sample("#ffe9e4", word=("STOP", 224, 224, 120)),
    "cat-above-ball": Sample(
        "#e8dcff", (Piece("cat", 224, 120, 180), Piece("ball", 224, 335, 160))
    ),
    "fruit": Sample(
        "#d8f0ff",
        (
            Piece("banana", 110, 120, 160),
            Piece("strawberry", 330, 120, 150),
            Piece("pineapple", 224, 320, 200),
        ),
    ),
    "rocket-and-star": Sample(
        "#22305c", (Piece("rocket", 150, 250, 230),), (("star", "#f7d417", (280, 60, 420, 200)),)
    ),
}  # fmt: skip


def build_samples(out: Path, packages: Path | None = None) -> None:
    """Write every sample as OUT/NAME.png.

    Args:
        out: folder.
        packages: folder with downloaded archives; what it lacks is downloaded.
    """
    out.mkdir(parents=True, exist_ok=True)
    name, version, member, _ = NPM["fluent"]
    with tempfile.TemporaryDirectory() as scratch:
        archive = npm_archive(name, version, packages, Path(scratch))
        with tarfile.open(archive) as tar:
            for file, sample in SAMPLES.items():
                picture = _compose(sample, tar, member)
                picture.quantize(160, dither=Image.Dither.NONE).save(
                    out / f"{file}.png", optimize=True
                )


def _compose(sample: Sample, tar: tarfile.TarFile, member: str) -> Image.Image:
    canvas = Image.new("RGB", (SIDE, SIDE), sample.background)
    for piece in sample.pieces:
        file = tar.extractfile(member.format(KINDS[piece.kind].codepoints[0]))
        assert file is not None
        art = Image.open(io.BytesIO(file.read())).convert("RGBA")
        art = art.crop(art.getbbox())
        scale = piece.side / max(art.size)
        art = art.resize((round(art.width * scale), round(art.height * scale)))
        art = art.rotate(piece.angle, Image.Resampling.BICUBIC, expand=True)
        canvas.paste(art, (piece.x - art.width // 2, piece.y - art.height // 2), art)
    draw = ImageDraw.Draw(canvas)
    for shape, colour, (left, top, right, bottom) in sample.shapes:
        if shape == "circle":
            draw.ellipse((left, top, right, bottom), fill=colour)
        elif shape == "square":
            draw.rectangle((left, top, right, bottom), fill=colour)
        else:
            centre, radius = ((left + right) / 2, (top + bottom) / 2), (right - left) / 2
            draw.polygon(_star(*centre, radius), fill=colour)
    if sample.word:
        text, x, y, px = sample.word
        draw.text((x, y), text, "#1d2b4f", ImageFont.load_default(px), anchor="mm")
    return canvas


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Ten corners, the first one up."""
    return [
        (
            x + radius * (1 if i % 2 == 0 else 0.42) * math.sin(math.pi * i / 5),
            y - radius * (1 if i % 2 == 0 else 0.42) * math.cos(math.pi * i / 5),
        )
        for i in range(10)
    ]


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmmamba_edge.distill.scenes.samples", description="Compose the samples."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNGs")
    parser.add_argument("--packages", type=Path, help="folder with downloaded archives")
    args = parser.parse_args(argv)
    build_samples(args.out, args.packages)
    print(f"wrote {len(SAMPLES)} pictures to {args.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
