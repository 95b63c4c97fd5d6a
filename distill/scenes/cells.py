"""What each cell of a picture shows: dense labels for training, computed from the scene.

Questions tell a model about one thing at a time. The renderer knows all of them and where they are:
a label for every image token teaches looking many times faster.
"""

import string

import numpy as np

from mmmamba_edge.distill.scenes.scene import SIZE, Scene
from mmmamba_edge.distill.scenes.vocabulary import COLOURS, KINDS, SHAPES

# The classes of each kind of label; 0 is "nothing of this sort here".
CLASSES: dict[str, tuple[str, ...]] = {
    "name": ("", *KINDS, *SHAPES),
    "colour": ("", *COLOURS),
    "letter": ("", *string.ascii_letters, *string.digits),
}
UNKNOWN = 255  # pictures without a scene

Box = tuple[float, float, float, float]  # left, top, right, bottom in px


def cell_labels(scene: Scene, letters: list[tuple[str, Box]], side: int) -> np.ndarray:
    """Labels of side x side cells, in reading order.

    Args:
        scene: what is drawn.
        letters: the printed letters and where they are (`render.letter_boxes`).
        side: cells along an edge: the square root of the image tokens.

    Returns:
        (side * side, 3) uint8: an index into CLASSES' name, colour and letter. Colour is a shape's.
    """
    labels = np.zeros((side, side, len(CLASSES)), np.uint8)
    pitch = SIZE / side
    centres = (np.arange(side) + 0.5) * pitch
    for thing in scene.things:
        covered = np.hypot(centres - thing.x, (centres - thing.y)[:, None]) < 0.42 * thing.size
        covered[_cell(thing.y, pitch, side), _cell(thing.x, pitch, side)] = True
        labels[covered, 0] = CLASSES["name"].index(thing.name)
        labels[covered, 1] = CLASSES["colour"].index(thing.colour)
    for letter, (left, top, right, bottom) in letters:
        wide = (left <= centres) & (centres < right)
        wide[_cell((left + right) / 2, pitch, side)] = True
        high = (top <= centres) & (centres < bottom)
        high[_cell((top + bottom) / 2, pitch, side)] = True
        labels[high[:, None] & wide, 2] = CLASSES["letter"].index(letter)
    return labels.reshape(side * side, -1)


def unknown_cells(side: int) -> np.ndarray:
    """Labels of a picture that has no scene, (side * side, 3) uint8."""
    return np.full((side * side, len(CLASSES)), UNKNOWN, np.uint8)


def _cell(place: float, pitch: float, side: int) -> int:
    return min(max(int(place / pitch), 0), side - 1)
