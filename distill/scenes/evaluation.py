"""Questions to measure a model with: `iter_eval` on new scenes, `easy_vqa_test` from outside."""

from collections.abc import Iterator

import numpy as np

from mmmamba_edge.distill.scenes.art import Art
from mmmamba_edge.distill.scenes.phrasing import Question
from mmmamba_edge.distill.scenes.questions import TYPES, ask_type, with_chance
from mmmamba_edge.distill.scenes.render import render
from mmmamba_edge.distill.scenes.rows import easy_vqa_test
from mmmamba_edge.distill.scenes.sample import sample_scene
from mmmamba_edge.distill.scenes.scene import scene_rng
from mmmamba_edge.distill.scenes.vocabulary import Split

__all__ = ["easy_vqa_test", "iter_eval"]


def iter_eval(
    split: Split, count: int, art: Art, seed: int = 0
) -> Iterator[tuple[np.ndarray, list[Question]]]:
    """Pictures of the full task, each with one question of every type it allows.

    Args:
        split: usually val or test.
        count: how many pictures.
        art: sprites and fonts.
        seed: other than the training's; chance levels are over these very questions.

    Yields:
        (112, 112, 3) uint8, and questions with `chance` filled in.
    """
    rows = []
    for index in range(count):
        rng = scene_rng(seed + 1_000_003, split, index)
        scene = sample_scene(rng, split, 2)
        rows.append((scene, [q for kind in TYPES if (q := ask_type(rng, scene, kind))]))
    known = iter(with_chance(q for _, asked in rows for q in asked))
    for scene, asked in rows:
        yield render(scene, art), [next(known) for _ in asked]
