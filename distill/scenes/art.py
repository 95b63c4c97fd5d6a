"""Build the art folder that pictures are composed from, out of registry packages.

    DIR/art.json                            sources, versions, licences, hashes
    DIR/sprites/{fluent,noto}/{codepoint}.png   64 px RGBA
    DIR/fonts/*.ttf|otf
    DIR/easy_vqa/{train,test}.{npz,json}    images (n, 64, 64, 3) uint8; [question, answer, image]

Nothing is taken from a package but what the vocabulary names. See NOTICE.md for the licences.
"""

import argparse
import functools
import hashlib
import io
import json
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from mmmamba_edge.distill.packages import call, debian_archive, npm_archive, pypi_archive
from mmmamba_edge.distill.scenes.vocabulary import FONTS, KINDS, MORE_FONTS, SOURCES
from mmmamba_edge.errors import UserError
from mmmamba_edge.whole import new_folder

SPRITE_SIZE = 64
NPM = {
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0", "package/assets/{}.webp", "MIT"),
    "noto": (
        "emoji-datasource-google", "16.0.0", "package/img/google/64/{}.png",
        "MIT (data), Apache-2.0 (artwork, Noto Emoji)",
    ),
}  # fmt: skip
DEBIAN = {
    "fonts-dejavu-core": ("2.37", "Bitstream Vera, changes public domain"),
    "fonts-lato": ("2.0", "OFL-1.1"),
    "fonts-roboto-unhinted": ("0~20170802", "Apache-2.0"),
    "fonts-open-sans": ("1.11", "Apache-2.0"),
    "fonts-dosis": ("1.7", "OFL-1.1"),
    "fonts-cabin": ("1.5", "OFL-1.1"),
    "fonts-crosextra-caladea": ("20200211", "OFL-1.1"),
    "fonts-inconsolata": ("001.010", "OFL-1.0"),
    "fonts-inter": ("4.0~beta7+ds", "OFL-1.1, Apache-2.0"),
    "fonts-karla": ("20201218", "OFL-1.1"),
    "fonts-tuffy": ("20120614", "public domain"),
    "fonts-manrope": ("4.504+git20201211", "OFL-1.1"),
    "fonts-sora": ("0+git20201221+ds", "OFL-1.1"),
    "fonts-clear-sans": ("1.00", "Apache-2.0"),
    "fonts-play": ("1.002+20150307.1", "OFL-1.1"),
    "fonts-junction": ("20110525.18de841", "OFL-1.1"),
    "fonts-averia-sans-gwf": ("1.00", "OFL-1.1"),
    "fonts-national-park": ("0.0~20220205", "OFL-1.1"),
    "fonts-league-spartan": ("2.210", "OFL-1.1"),
    "fonts-yanone-kaffeesatz": ("2.0+git20211102+ds", "OFL-1.1"),
    "fonts-quicksand": ("0.2016", "OFL-1.1"),
    "fonts-comfortaa": ("3.001", "OFL-1.1"),
    "fonts-comic-neue": ("2.51", "OFL-1.1"),
    "fonts-jetbrains-mono": ("2.242+ds", "Apache-2.0"),
    "fonts-league-mono": ("2.300+ds", "OFL-1.1"),
    "fonts-anonymous-pro": ("1.003", "OFL-1.1"),
    "fonts-courier-prime": ("0+git20190115", "OFL-1.1"),
    "fonts-roboto-slab": ("1.100263+20170512", "Apache-2.0"),
    "fonts-sil-gentium-basic": ("1.102", "OFL-1.1"),
    "fonts-ebgaramond": ("0.016+git20210310.42d4f9f2", "OFL-1.1"),
    "fonts-vollkorn": ("4.105", "OFL-1.1"),
    "fonts-oldstandard": ("2.2really", "OFL-1.0"),
    "fonts-yrsa-rasa": ("2.005", "OFL-1.1"),
    "fonts-arapey": ("0+git20200408", "OFL-1.1"),
    "fonts-quattrocento": ("1.1", "OFL-1.1"),
    "fonts-prociono": ("2.3", "public domain"),
    "fonts-goudybookletter": ("2010.07.03", "public domain"),
    "fonts-cantarell": ("0.303.1", "OFL-1.1"),
    "fonts-hack": ("3.003", "MIT, Bitstream Vera"),
    # Not fonts-liberation: Debian 12's is version 1, which is GPL-2.
    "fonts-liberation2": ("2.1.5", "OFL-1.1"),
}
_FONT_FILES = frozenset(MORE_FONTS).union(*FONTS.values())
EASY_VQA = ("easy-vqa", "1.0", "MIT")


@dataclass
class Art:
    """Artwork in memory.

    Attributes:
        sprites: (source, codepoint) -> RGBA picture, `SPRITE_SIZE` px square.
        font_files: file name -> path (empty: Pillow's own font, in tests).
    """

    sprites: dict[tuple[str, str], Image.Image]
    font_files: dict[str, Path]
    folder: Path | None = None
    _fonts: dict[tuple[str, int], ImageFont.FreeTypeFont | ImageFont.ImageFont] = field(
        default_factory=dict
    )

    def font(self, name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
        """The font at a size in px."""
        key = (name, size)
        if key not in self._fonts:
            path = self.font_files.get(name)
            if path is None and self.font_files:
                raise UserError(f"{self.folder}: no font {name}; build the art folder again")
            self._fonts[key] = (
                ImageFont.truetype(str(path), size) if path else ImageFont.load_default(size)
            )
        return self._fonts[key]


@functools.cache
def load_art(folder: Path) -> Art:
    """Open a folder that `build` made.

    Raises:
        UserError: not an art folder, or one made for another vocabulary.
    """
    folder = Path(folder)
    if not (folder / "art.json").is_file():
        raise UserError(
            f"{folder}/art.json: not found; build the folder with "
            "`python -m mmmamba_edge.distill.scenes.art --out DIR`"
        )
    sprites = {}
    for source in SOURCES:
        for point in _codepoints():
            path = folder / "sprites" / source / f"{point}.png"
            try:
                sprites[source, point] = Image.open(path).convert("RGBA")
            except OSError as error:
                raise UserError(f"{path}: {error}; build the art folder again") from error
    fonts = {path.name: path for path in sorted((folder / "fonts").iterdir())}
    return Art(sprites, fonts, folder)


def build(out: Path, packages: Path | None = None) -> None:
    """Write the art folder.

    Args:
        out: folder to make; an existing one is replaced once the new one is complete.
        packages: folder with downloaded archives (.tgz, .deb, .whl); what it lacks is downloaded.
    """
    with new_folder(out, _not_art) as folder, tempfile.TemporaryDirectory() as scratch:
        record = _unpack(folder, packages, Path(scratch))
        missing = _FONT_FILES - {path.name for path in (folder / "fonts").iterdir()}
        if missing:
            raise UserError(f"no package holds the font {sorted(missing)[0]}")
        files = {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        art = {
            "format": 1,
            "sources": record,
            "kinds": {kind.name: list(kind.codepoints) for kind in KINDS.values()},
            "fonts": {**FONTS, "spelling": MORE_FONTS},
            "sha256": files,
        }
        (folder / "art.json").write_text(json.dumps(art, indent=1) + "\n")


def _unpack(folder: Path, packages: Path | None, stock: Path) -> dict[str, dict[str, str]]:
    """Sprites, fonts and easy-vqa into `folder`; returns where they are from."""
    record: dict[str, dict[str, str]] = {}
    for source, (name, version, member, licence) in NPM.items():
        archive = npm_archive(name, version, packages, stock)
        _sprites(archive, member, folder / "sprites" / source)
        record[source] = _entry(name, version, licence, archive)
    for name, (version, licence) in DEBIAN.items():
        archive = debian_archive(name, version, packages, stock)
        if _fonts(archive, folder / "fonts"):
            record[name] = _entry(name, version, licence, archive)
    archive = pypi_archive(*EASY_VQA[:2], packages, stock)
    _easy_vqa(archive, folder / "easy_vqa")
    record["easy_vqa"] = _entry(*EASY_VQA, archive)
    return record


def _not_art(folder: Path) -> str:
    parts = {"art.json", "sprites", "fonts", "easy_vqa"}
    more = sorted({path.name for path in folder.iterdir()} - parts)
    return f"holds {more[0]}, which is no artwork" if more else ""


def _codepoints() -> list[str]:
    return [point for kind in KINDS.values() for point in kind.codepoints]


def _entry(name: str, version: str, licence: str, archive: Path) -> dict[str, str]:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return {"package": name, "version": version, "licence": licence, "sha256": digest}


# --- taking what is needed out of them ------------------------------------------------------------


def _sprites(archive: Path, member: str, out: Path) -> None:
    wanted = {member.format(point): point for point in _codepoints()}
    out.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for entry in tar:
            point = wanted.pop(entry.name, None)
            if point is None:
                continue
            file = tar.extractfile(entry)
            assert file is not None
            picture = _trimmed(Image.open(io.BytesIO(file.read())).convert("RGBA"))
            picture.save(out / f"{point}.png", optimize=True)
    if wanted:
        raise UserError(f"{archive}: holds no {sorted(wanted)[0]}")


def _trimmed(picture: Image.Image) -> Image.Image:
    """Cut to the visible part, centred in a square: an object's size then means the same in both
    sources."""
    box = picture.getchannel("A").point([0] * 25 + [255] * 231).getbbox()
    assert box is not None
    side = max(box[2] - box[0], box[3] - box[1])
    left, top = (box[0] + box[2] - side) // 2, (box[1] + box[3] - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.LANCZOS)


def _fonts(archive: Path, out: Path) -> bool:
    """Unpack the named font files of a .deb; says whether there were any."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        call(["dpkg-deb", "-x", str(archive.resolve()), scratch], Path(scratch))
        found = [path for path in Path(scratch).rglob("*.?tf") if path.name in _FONT_FILES]
        for path in found:
            shutil.copyfile(path, out / path.name)
    return bool(found)


def _easy_vqa(archive: Path, out: Path) -> None:
    out.mkdir(parents=True)
    with zipfile.ZipFile(archive) as wheel:
        for split in ("train", "test"):
            root = f"easy_vqa/data/{split}"
            questions = json.loads(wheel.read(f"{root}/questions.json"))
            numbers = sorted({number for _, _, number in questions})
            images = np.stack([_png(wheel.read(f"{root}/images/{n}.png")) for n in numbers])
            place = {number: i for i, number in enumerate(numbers)}
            rows: Iterable = [[q, a, place[n]] for q, a, n in questions]
            np.savez_compressed(out / f"{split}.npz", images=images)
            (out / f"{split}.json").write_text(json.dumps(rows))


def _png(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmmamba_edge.distill.scenes.art",
        description="Build the art folder for the scenes task from registry packages "
        "(npm, apt-get, pip and dpkg-deb are used).",
        epilog="example: python -m mmmamba_edge.distill.scenes.art --out cache/art",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--packages", type=Path, help="folder of already downloaded archives")
    args = parser.parse_args(argv)
    try:
        build(args.out, args.packages)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"wrote {args.out} ({size / 2**20:.1f} MiB)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
