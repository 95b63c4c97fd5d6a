"""Artwork for tests: nothing to download, no two sprites alike."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from mmmamba_edge.distill.scenes.vocabulary import KINDS, SOURCES


def make_art(folder: Path) -> Path:
    """An art folder with a coloured square for each sprite, and two easy-vqa pictures."""
    (folder / "fonts").mkdir()
    points = [(s, p) for s in SOURCES for kind in KINDS.values() for p in kind.codepoints]
    for i, (source, point) in enumerate(points):
        (folder / "sprites" / source).mkdir(parents=True, exist_ok=True)
        tone = (i * 37 % 256, i * 91 % 256, i * 53 % 256, 255)
        Image.new("RGBA", (16, 16), tone).save(folder / "sprites" / source / f"{point}.png")
    (folder / "easy_vqa").mkdir()
    for split in ("train", "test"):
        images = np.full((2, 64, 64, 3), 200, np.uint8)
        np.savez_compressed(folder / "easy_vqa" / f"{split}.npz", images=images)
        rows = [["is there a circle?", "yes", 0], ["what color is the shape?", "teal", 1]]
        (folder / "easy_vqa" / f"{split}.json").write_text(json.dumps(rows))
    (folder / "art.json").write_text("{}")
    return folder
