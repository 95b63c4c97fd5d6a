"""The scenes task: pictures, answers, splits, tokens, shards and scores. No artwork is needed."""

import hashlib
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import mmmamba_edge.distill
from mmmamba_edge.distill.recipe import read_recipe
from mmmamba_edge.distill.scenes import dataset, smalltalk
from mmmamba_edge.distill.scenes.art import Art, load_art
from mmmamba_edge.distill.scenes.art import main as art_main
from mmmamba_edge.distill.scenes.cells import CLASSES, cell_labels
from mmmamba_edge.distill.scenes.dataset import SceneCache, Spec, easy_vqa_test, iter_eval
from mmmamba_edge.distill.scenes.phrasing import Question
from mmmamba_edge.distill.scenes.questions import TYPES, ask, ask_type, with_chance
from mmmamba_edge.distill.scenes.render import letter_boxes, render
from mmmamba_edge.distill.scenes.rows import encode_turns, make_row
from mmmamba_edge.distill.scenes.sample import combination_split, level_at, sample_scene
from mmmamba_edge.distill.scenes.scene import Background, Scene, Thing, Word, scene_rng
from mmmamba_edge.distill.scenes.score import (
    caption_f1,
    correctness,
    format_table,
    score,
    score_batch,
    wilson,
)
from mmmamba_edge.distill.scenes.tokenizer import (
    IM_END,
    IMG_CONTEXT,
    PAD,
    SPECIAL,
    load_tokenizer,
    train_tokenizer,
)
from mmmamba_edge.distill.scenes.tokenizer import main as tokenizer_main
from mmmamba_edge.distill.scenes.vocabulary import (
    COLOURS,
    FONTS,
    KINDS,
    MORE_FONTS,
    SHAPES,
    SPLITS,
    angles_of_split,
    periods_of_split,
    shares_of_split,
    slice_of,
    words_of_split,
)
from mmmamba_edge.distill.scratch import from_scratch
from mmmamba_edge.errors import UserError
from scene_art import make_art

SPEC = Spec("train", 0, 2, 0, 192, 49, "")


@pytest.fixture(scope="session")
def art_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_art(tmp_path_factory.mktemp("art"))


@pytest.fixture(scope="session")
def art(art_folder: Path) -> Art:
    return load_art(art_folder)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    assert tokenizer_main(["--out", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_file)


def scenes(split, count, level=2, seed=11):
    for index in range(count):
        rng = scene_rng(seed, split, index)
        yield rng, sample_scene(rng, split, level)


def test_a_word_that_leaves_no_room_is_alone():
    """This seed puts a big word in the middle: nothing fits beside it, however small."""
    scene = sample_scene(random.Random(109008), "train", 0)
    assert scene.word and scene.word.text == "CM"
    assert scene.things == ()


# --- answers, computed again ----------------------------------------------------------------------


class Reader:
    """Answers questions from a Scene by brute force, sharing no code with the generator."""

    singular = {name: name for name in (*KINDS, *SHAPES)} | {
        **{name + "s": name for name in (*KINDS, *SHAPES)},
        "butterflies": "butterfly", "strawberries": "strawberry", "foxes": "fox",
        "buses": "bus", "octopuses": "octopus", "cactuses": "cactus",
    }  # fmt: skip
    category = {
        "animal": {"animal"}, "fruit": {"fruit"}, "vehicle": {"vehicle"}, "plant": {"plant"},
    }  # fmt: skip

    def __init__(self, scene: Scene):
        self.scene = scene

    def matching(self, phrase: str) -> list[Thing]:
        """The things that `red circles`, `dog`, `red shapes`, `animals` or `things` may mean."""
        words = re.findall(r"[a-z]+", phrase.lower())
        found = list(self.scene.things)
        for word in words:
            if word in COLOURS:
                found = [t for t in found if t.colour == word]
            elif word in self.singular:
                found = [t for t in found if t.name == self.singular[word]]
            elif word in ("shape", "shapes"):
                found = [t for t in found if t.name in SHAPES]
            elif word.rstrip("s") in self.category:
                wanted = self.category[word.rstrip("s")]
                found = [t for t in found if t.name in KINDS and KINDS[t.name].category in wanted]
        return found

    def check(self, question: Question) -> bool:
        """Whether the answer is right; KeyError for a form this reader does not know."""
        text = question.question.lower().rstrip("?.")
        answer = question.answer
        return getattr(self, "_" + question.form.split("-")[0])(question.form, text, answer)

    def _existence(self, form, text, answer):
        if form == "existence-word":
            return (answer == "yes") == (self.scene.word is not None)
        return (answer == "yes") == bool(self.matching(text))

    def _count(self, form, text, answer):
        return int(answer) == len(self.matching(text))

    def _colour(self, form, text, answer):
        if form == "colour-background":
            return answer == self.scene.background.colour
        if form == "colour-word":
            return self.scene.word is not None and answer == self.scene.word.colour
        if form == "colour-object":
            return all(KINDS[t.name].colour == answer for t in self.matching(text))
        asked = next((c for c in COLOURS if c in text.split()), None)
        plain = self.matching(" ".join(w for w in text.split() if w not in COLOURS))
        colours = {t.colour for t in plain}
        if asked:
            return len(colours) == 1 and (answer == "yes") == (asked in colours)
        return colours == {answer}

    def _naming(self, form, text, answer):
        named = self.matching(answer)
        if form == "naming-whole":
            return len(self.scene.things) == 1 and len(named) == 1
        if form == "naming-side":
            key = {
                "left": lambda t: t.x, "right": lambda t: -t.x,
                "top": lambda t: t.y, "bottom": lambda t: -t.y,
            }[re.findall("left|right|top|bottom", text)[0]]  # fmt: skip
            first = min(self.scene.things, key=key)
            others = [t for t in self.scene.things if t is not first]
            return first in named and all(key(t) - key(first) >= 20 for t in others)
        wanted = "shape" if form == "naming-shape" else form.split("-")[1]
        colour = next((c for c in COLOURS if c in text.split()), "")
        return {t.name for t in self.matching(f"{colour} {wanted}")} == {t.name for t in named}

    def _relation(self, form, text, answer):
        if form == "relation-what":
            one, other = self.matching(answer), self.matching(text)
            side = re.findall("left|right|above|over|below|under", text)[0]
            return len(other) == 1 and any(self._is(t, side, other[0]) for t in one)
        colours, names = "|".join(COLOURS), "|".join((*KINDS, *SHAPES))
        phrases = [m.group() for m in re.finditer(rf"\b(?:(?:{colours}) )?(?:{names})\b", text)]
        assert len(phrases) == 2, (text, phrases)
        one, other = (self.matching(p) for p in phrases)
        assert len(one) == len(other) == 1, text
        if "on which side" in text:
            one, other = other, one
        if form == "relation-yesno":
            side = re.findall("left|right|above|over|below|under", text)[0]
            return (answer == "yes") == self._is(one[0], side, other[0])
        return self._is(one[0], answer, other[0])

    @staticmethod
    def _is(one, side, other):
        return {
            "left": other.x - one.x >= 20, "right": one.x - other.x >= 20,
            "above": other.y - one.y >= 20, "over": other.y - one.y >= 20,
            "below": one.y - other.y >= 20, "under": one.y - other.y >= 20,
        }[side]  # fmt: skip

    def _place(self, form, text, answer):
        if answer.startswith("there is no"):
            return not self.matching(answer)
        (thing,) = self.matching(text)
        side = answer.split()[-1]
        if side == "middle":
            return max(abs(thing.x - 56), abs(thing.y - 56)) < 10
        return {
            "left": thing.x < 40, "right": thing.x > 72,
            "top": thing.y < 40, "bottom": thing.y > 72,
        }[side]  # fmt: skip

    def _reading(self, form, text, answer):
        if form == "reading-none":
            return self.scene.word is None
        assert self.scene.word
        printed = self.scene.word.text.upper()
        if form == "reading-letter":
            return answer == printed[-1 if "last" in text else 0]
        return answer == printed

    def _caption(self, form, text, answer):
        numbers = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
        body = answer.rstrip(".").split(" on a")[0]
        told = Counter()
        for part in re.split(r", | and ", body):
            if part.startswith("the "):
                assert self.scene.word and part.endswith(self.scene.word.text.upper())
                continue
            first, *rest = part.split()
            colour = rest[0] if rest[0] in COLOURS else ""
            told[self.singular[rest[-1]], colour] += numbers.get(first, 1)
        return told == Counter((t.name, t.colour) for t in self.scene.things)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_right(split):
    seen = Counter()
    for rng, scene in scenes(split, 400):
        reader = Reader(scene)
        for question in ask(rng, scene, 8):
            if question.type in ("talk", "unknown"):
                continue
            assert reader.check(question), (question, scene)
            seen[question.form] += 1
    assert len(seen) >= 22 and min(seen.values()) >= 5, seen


def test_the_reader_can_fail():
    flip = {"yes": "no", "no": "yes", "left": "right", "right": "left", "above": "below"}
    flip |= {"below": "above", "1": "2", "3": "2"}
    wrong = Counter()
    for rng, scene in scenes("train", 60):
        for question in ask(rng, scene, 8):
            if question.answer in flip and question.type not in ("talk", "unknown"):
                turned = replace(question, answer=flip[question.answer])
                assert not Reader(scene).check(turned), question
                wrong[question.type] += 1
    assert {"existence", "count", "relation", "colour"} <= set(wrong)


def test_chance_is_the_best_blind_guess():
    made = [Question("count", "f", "?", a) for a in "1123"] + [Question("x", "g", "?", "yes")]
    assert [q.chance for q in with_chance(made)] == [0.5] * 4 + [1.0]


def test_yes_and_no_are_even():
    answers = defaultdict(Counter)
    for rng, scene in scenes("train", 1500):
        for question in ask(rng, scene, 8):
            answers[question.type][question.answer] += 1
        one = ask_type(rng, scene, "existence")
        if one:
            answers["measured"][one.answer] += 1
    for kind in ("existence", "relation", "colour", "measured"):
        yes, no = answers[kind]["yes"], answers[kind]["no"]
        assert 0.44 < yes / (yes + no) < 0.56, (kind, yes, no)
    counts = answers["count"]
    assert max(counts.values()) / counts.total() < 0.30
    assert all(counts[str(n)] / counts.total() > 0.05 for n in range(6)), counts


def test_measured_questions_leave_practice_out():
    forms = {
        question.form
        for rng, scene in scenes("test", 300)
        if (question := ask_type(rng, scene, "reading"))
    }
    assert forms == {"reading-word", "reading-number"}


# --- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of", [words_of_split, periods_of_split, shares_of_split, lambda s: angles_of_split(s, 25)]
)
def test_parameters_of_splits_are_disjoint(of):
    sets = [set(of(split)) for split in SPLITS]
    assert all(sets) and sum(map(len, sets)) == len(set.union(*sets))


def test_fonts_of_splits_are_of_other_families():
    fonts = {**FONTS, "train": FONTS["train"] + MORE_FONTS}
    families = [{re.findall("[A-Z][a-z]+", name)[0] for name in fonts[s]} for s in SPLITS]
    assert sum(map(len, families)) == len(set.union(*families))
    # Liberation under its other names.
    assert not families[0] & {"Arimo", "Tinos", "Cousine"}


@pytest.mark.parametrize(
    ("split", "digest"),
    [("train", "dbde099633f12aac"), ("val", "05acee7bdd11fe00"), ("test", "f3e54c1e8f5c02e1")],
)
def test_scenes_and_questions_are_what_scores_were_given_for(split, digest):
    """Published scores are over these very scenes: another digest makes them another task's."""
    found = hashlib.sha256()
    for rng, scene in scenes(split, 200, seed=1_000_003):
        asked = [ask_type(rng, scene, kind) for kind in TYPES]
        found.update(repr((scene, asked, ask(rng, scene, 8))).encode())
    assert found.hexdigest()[:16] == digest


def test_spelling_is_practised_with_words_that_are_nobodys():
    held_out = {word for split in ("val", "test") for word in words_of_split(split)}
    printed, fonts, lengths = set(), set(), Counter()
    for index in range(1500):
        scene = sample_scene(scene_rng(5, "train", index), "train", 2, spelling=True)
        if scene.word:
            fonts.add(scene.word.font)
            if scene.word.text.isalpha():
                printed.add(scene.word.text.lower())
                lengths[len(scene.word.text)] += 1
    assert not printed & held_out
    assert fonts == {*FONTS["train"], *MORE_FONTS}
    assert len(printed) > 300 and len(printed - set(words_of_split("train"))) > 0.7 * len(printed)
    assert set(lengths) == {2, 3, 4, 5, 6, 7} and min(lengths.values()) > 15, lengths


@pytest.mark.parametrize("split", ["val", "test"])
def test_spelling_is_not_for_measuring(split, art_folder, tokenizer_file, tmp_path, capsys):
    args = ["--art", str(art_folder), "--tokenizer", str(tokenizer_file), "--count", "2"]
    out = ["--out", str(tmp_path / "cache"), "--spelling", "--split", split]
    assert dataset.main([*args, *out]) == 2
    assert f"--spelling --split {split}: only the training split" in capsys.readouterr().err


def test_scenes_stay_within_their_split():
    shown = defaultdict(lambda: defaultdict(set))
    for split in SPLITS:
        for _, scene in scenes(split, 700):
            mine = shown[split]
            for thing in scene.things:
                mine["angle"].add(thing.angle)
                if thing.is_shape:
                    mine["shade"].add((thing.colour, int(slice_of(thing.colour, thing.rgb))))
            if scene.background.colour:
                name = scene.background.colour
                mine["shade"].add((name, int(slice_of(name, scene.background.rgb))))
            looks = [(t.name, t.colour) for t in scene.things]
            if len(set(looks)) > 1:
                mine["combination"].add(tuple(sorted(looks)))
                assert combination_split(looks) == split
            if scene.word:
                mine["font"].add(scene.word.font)
                if scene.word.text.isalpha():
                    mine["word"].add(scene.word.text.lower())
    known = {split: set(words_of_split(split)) for split in SPLITS}
    for one in SPLITS:
        for other in SPLITS:
            if one == other:
                continue
            for what in ("angle", "shade", "combination", "font"):
                assert shown[one][what] and not shown[one][what] & shown[other][what], what
            assert not shown[one]["word"] & known[other]
        assert shown[one]["word"] & known[one]


def test_scenes_fit_the_picture():
    for _, scene in scenes("train", 400):
        for thing in scene.things:
            assert 0.45 * thing.size <= min(thing.x, thing.y)
            assert max(thing.x, thing.y) <= 112 - 0.45 * thing.size
        for i, one in enumerate(scene.things):
            for other in scene.things[:i]:
                far = ((one.x - other.x) ** 2 + (one.y - other.y) ** 2) ** 0.5
                assert far > 0.4 * (one.size + other.size)
        assert len(scene.things) <= 6 and (scene.things or scene.word)
    big = [s for _, s in scenes("train", 400) if len(s.things) == 1 and s.things[0].size >= 60]
    assert len(big) > 20


def test_curriculum_grows():
    levels = [
        np.mean([level_at(scene_rng(0, "train", i), at, 1000) for i in range(300)])
        for at in (0, 500, 1000, 10**9)
    ]
    assert levels == sorted(levels) and levels[0] < 0.1 and levels[-1] > 1.7


# --- pictures -------------------------------------------------------------------------------------


def test_render_draws_what_the_scene_says(art):
    ground = Background("plain", "white", (250, 250, 250), (250, 250, 250), 0, 8, 0)
    circle = Thing("circle", "red", (220, 20, 20), ("", ""), 30, 80, 40, 9, False)
    dog = Thing("dog", "", (100, 100, 100), ("noto", "1f436"), 80, 30, 40, 0, True)
    picture = render(Scene("train", 0, ground, (circle, dog), None), art)
    assert picture.shape == (112, 112, 3) and picture.dtype == np.uint8
    assert tuple(picture[80, 30]) == (220, 20, 20) and tuple(picture[5, 5]) == (250, 250, 250)
    assert tuple(picture[30, 80]) == art.sprites["noto", "1f436"].getpixel((8, 8))[:3]
    red = np.abs(picture.astype(int) - (220, 20, 20)).max(-1) < 60
    assert 0.70 < red.sum() / (np.pi * 20**2) < 1.0
    word = Word("STOP", FONTS["test"][0], 24, "black", (0, 0, 0), (255, 255, 0), 56, 56)
    picture = render(Scene("test", 0, ground, (), word), art)
    assert np.all(picture == (255, 255, 0), axis=-1).sum() > 500
    assert np.all(picture == 0, axis=-1).sum() > 50


@pytest.mark.parametrize("wear", [{"through": 80}, {"jpeg": 50}])
def test_wear_changes_a_picture_little(art, wear):
    scene = next(s for _, s in scenes("train", 50) if len(s.things) > 2 and not s.jpeg)
    plain, worn = render(scene, art).astype(int), render(replace(scene, **wear), art).astype(int)
    assert worn.shape == plain.shape and 0.1 < np.abs(worn - plain).mean() < 20


@pytest.mark.parametrize("style", ["gradient", "stripes", "checks", "noise", "blobs", "texture"])
def test_backgrounds_lie_between_their_tones(style, art):
    ground = Background(style, "", (20, 40, 60), (200, 180, 160), 20, 10, 987654321)
    low, high = np.array(ground.rgb) - 1, np.array(ground.other) + 1
    pictures = [render(Scene(split, 2, ground, (), None), art) for split in SPLITS]
    for picture in pictures:
        assert (picture >= low).all() and (picture <= high).all() and picture.std() > 10
    if style in ("noise", "blobs", "texture"):
        assert (pictures[0] != pictures[2]).any()


def test_every_word_fits(art):
    ground = Background("plain", "", (250, 250, 250), (250, 250, 250), 0, 8, 0)
    word = Word("WWMMW", FONTS["train"][0], 40, "black", (0, 0, 0), None, 100, 5)
    dark = render(Scene("train", 0, ground, (), word), art).max(-1) < 100
    assert dark.any() and not dark[:, 0].any() and not dark[:, -1].any() and not dark[0].any()


# --- tokens and rows ------------------------------------------------------------------------------


def test_tokenizer(tokenizer, tokenizer_file):
    assert tokenizer.get_vocab_size() == 1024
    assert [tokenizer.token_to_id(text) for text in SPECIAL] == list(range(8))
    assert train_tokenizer().to_str() == tokenizer.to_str()
    for text in ("Is there a dog?", "naïve Ω 你好 🐶\t\n\r\x00", "  two  spaces ", "STOP 1335"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    for name in (*KINDS, *SHAPES, *COLOURS):
        assert len(tokenizer.encode(f" {name}").ids) <= 2, name
    for split in SPLITS:
        for word in words_of_split(split):
            assert len(tokenizer.encode(word.upper()).ids) == len(word), word


def test_tokenizer_file_of_another_task(tmp_path, tokenizer_file):
    data = tokenizer_file.read_text().replace("<IMG_CONTEXT>", "<OTHER>")
    (tmp_path / "tokenizer.json").write_text(data)
    with pytest.raises(UserError, match="tokenizer.json: <IMG_CONTEXT>"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_rows_are_the_template_and_the_mask_is_the_answers(art, tokenizer):
    turns = [Question("", "", "Is there a dog?", "yes"), Question("", "", "What is it", "a red é")]
    ids, mask = encode_turns(turns, tokenizer, SPEC, 0)
    text = (
        "<s><|im_start|>user\n<img>" + "<IMG_CONTEXT>" * 49 + "</img>\nIs there a dog?<|im_end|>"
        "<|im_start|>assistant\nyes<|im_end|><|im_start|>user\nWhat is it<|im_end|>"
        "<|im_start|>assistant\na red é<|im_end|>"
    )
    whole = tokenizer.encode(text).ids
    assert list(ids) == whole + [PAD] * (192 - len(whole))
    masked = tokenizer.decode(list(ids[mask == 1]), skip_special_tokens=False)
    assert masked == "yes<|im_end|>a red é<|im_end|>"


def test_rows(art, tokenizer):
    rows = [make_row(SPEC, art, tokenizer, index) for index in range(400)]
    again = make_row(SPEC, art, tokenizer, 7)
    assert (again.ids == rows[7].ids).all() and (again.image == rows[7].image).all()
    drawn = [row.ids.tobytes() for row in rows if row.has_image and not row.easy_vqa]
    assert len(drawn) == len(set(drawn))
    for row in rows:
        assert row.ids.shape == row.mask.shape == (192,) and row.image.shape == (112, 112, 3)
        assert (row.ids == IMG_CONTEXT).sum() == (49 if row.has_image else 0)
        assert row.has_image or not row.image.any()
        assert (row.mask[row.ids == PAD] == 0).all()
        text = tokenizer.decode(list(row.ids), skip_special_tokens=False)
        assert tokenizer.encode(text).ids == list(row.ids)
        # An answer and its end are masked in, everything else out.
        answers = re.findall(r"assistant\n(.*?<\|im_end\|>)", text, re.S)
        masked = tokenizer.decode(list(row.ids[row.mask == 1]), skip_special_tokens=False)
        assert masked == "".join(answers) and answers
        ends = np.flatnonzero(row.ids == IM_END)
        assert row.mask[ends].sum() == len(answers)
    assert 0.01 < np.mean([not row.has_image for row in rows]) < 0.08
    assert 0.04 < np.mean([row.easy_vqa for row in rows]) < 0.13
    late = [row for row in rows if row.has_image and row.ids[4] != 5]
    assert late  # a picture in a later turn
    val = [make_row(replace(SPEC, split="val"), art, tokenizer, i) for i in range(60)]
    assert not any(row.easy_vqa for row in val)


def test_a_row_must_hold_a_picture(art, tokenizer):
    turns = [Question("", "", "Is there a dog?", "yes")]
    with pytest.raises(UserError, match="length 40 is too short"):
        encode_turns(turns, tokenizer, replace(SPEC, length=40), 0)


# --- shards ---------------------------------------------------------------------------------------


def test_shards_resume_and_read_back(
    art, art_folder, tokenizer, tokenizer_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(dataset, "SHARD", 16)
    dataset.write_cache(SPEC, art_folder, tokenizer_file, tmp_path, count=20)
    first = (tmp_path / "images-00000.npy").stat().st_mtime_ns
    dataset.write_cache(SPEC, art_folder, tokenizer_file, tmp_path, count=40)
    assert (tmp_path / "images-00000.npy").stat().st_mtime_ns == first
    assert not list(tmp_path.glob("*.partial"))
    cache = SceneCache(tmp_path)
    cache.wait_for(40)
    images, has_image, ids, mask, cells = cache.rows(np.array([3, 17, 39]))
    assert images.shape == (3, 112, 112, 3) and images.dtype == np.uint8
    assert has_image.dtype == bool and ids.dtype == np.int16 and mask.shape == (3, 192)
    for place, index in enumerate((3, 17, 39)):
        row = make_row(SPEC, art, tokenizer, index)
        assert (images[place] == row.image).all() and has_image[place] == row.has_image
        assert (ids[place] == row.ids).all() and (mask[place] == row.mask).all()
        assert (cells[place] == row.cells).all()
    with pytest.raises(UserError, match="too few scenes for 44"):
        cache.wait_for(44)
    with pytest.raises(UserError, match="images-00003.npy: not there"):
        dataset.write_cache(SPEC, art_folder, tokenizer_file, tmp_path, count=48)
        cache.wait_for(64, timeout=0)


def test_cells_say_what_is_drawn_there(art):
    """The labels against the picture: cells with a shape's label hold its colour of paint."""
    seen = {"thing": 0, "letter": 0}
    for _, scene in scenes("train", 150):
        picture = render(scene, art).astype(int)
        boxes = letter_boxes(scene.word, art) if scene.word else []
        cells = cell_labels(scene, boxes, 7).reshape(7, 7, 3)
        names = {CLASSES["name"][i] for i in np.unique(cells[..., 0])} - {""}
        assert names <= {thing.name for thing in scene.things}
        for thing in scene.things:
            row, column = int(thing.y // 16), int(thing.x // 16)
            label = cells[row, column]
            if CLASSES["name"][label[0]] == thing.name and thing.is_shape and not scene.jpeg:
                assert CLASSES["colour"][label[1]] in {t.colour for t in scene.things}
                patch = picture[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
                near = np.abs(patch - np.array(thing.rgb)).max(-1) < 40
                assert near.mean() > 0.15, thing
                seen["thing"] += 1
        if scene.word:
            shown = {CLASSES["letter"][i] for i in np.unique(cells[..., 2])} - {""}
            assert shown and shown <= set(scene.word.text)
            for _, (left, top, right, bottom) in boxes:
                assert 0 <= left < right <= 113 and 0 <= top < bottom <= 113
            seen["letter"] += 1
        else:
            assert not cells[..., 2].any()
    assert seen["thing"] > 50 and seen["letter"] > 20


def test_cells_are_in_the_order_of_image_tokens():
    """Cell i of the labels is image token i of the model: pixel shuffle keeps reading order."""
    config, _, _ = read_recipe(Path(mmmamba_edge.distill.__file__).parent / "recipes/default.toml")
    model = from_scratch(config)
    dark = torch.zeros(1, 3, 112, 112)
    with torch.inference_mode():
        plain = model.image_vectors(dark)
        side = round(config.tokens_per_tile**0.5)
        pitch = 112 // side
        for cell in (0, 1, side, side + 5, side**2 - 1):
            y, x = cell // side * pitch, cell % side * pitch
            bright = dark.clone()
            bright[..., y : y + pitch, x : x + pitch] = 1.0
            changed = (model.image_vectors(bright) - plain).abs().sum(-1).flatten()
            assert changed.nonzero().flatten().tolist() == [cell]


def test_shards_of_other_facts_are_refused(art_folder, tokenizer_file, tmp_path):
    dataset.write_cache(SPEC, art_folder, tokenizer_file, tmp_path, count=2)
    other = replace(SPEC, seed=1, length=128)
    with pytest.raises(UserError, match="cache.json: made with another length, seed"):
        dataset.write_cache(other, art_folder, tokenizer_file, tmp_path, count=2)
    with pytest.raises(UserError, match="--start 5"):
        dataset.write_cache(SPEC, art_folder, tokenizer_file, tmp_path, count=2, start=5)
    path = tmp_path / "images-00000.npy"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="images-00000.npy: not a readable shard"):
        dataset.write_cache(SPEC, art_folder, tokenizer_file, tmp_path, count=2)
    with pytest.raises(UserError, match="not a readable shard"):
        SceneCache(tmp_path).rows(np.array([0]))


def test_command_line(art_folder, tokenizer_file, tmp_path, capsys):
    options = ["--art", str(art_folder), "--tokenizer", str(tokenizer_file), "--count", "3"]
    assert dataset.main([*options, "--out", str(tmp_path / "a"), "--split", "val"]) == 0
    assert "scenes 3/3" in capsys.readouterr().err
    options[1] = str(tmp_path / "none")
    assert dataset.main([*options, "--out", str(tmp_path / "b")]) == 2
    assert "none/art.json: not found" in capsys.readouterr().err
    for main in (dataset.main, art_main, tokenizer_main):
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        assert stop.value.code == 0 and "example: python -m" in capsys.readouterr().out


# --- scores ---------------------------------------------------------------------------------------


def test_scores(art):
    samples = list(iter_eval("test", 60, art))
    again = list(iter_eval("test", 60, art))
    assert all((a[0] == b[0]).all() and a[1] == b[1] for a, b in zip(samples, again, strict=True))
    truth = {(i.tobytes(), q.question): q.answer for i, asked in samples for q in asked}
    right = score(lambda image, question: truth[image.tobytes(), question], samples)
    assert all(line.accuracy == 1.0 for line in right.values())
    assert set(right) >= {"all", "existence", "naming", "colour", "count", "relation", "caption"}
    no = score_batch(lambda batch: ["no"] * len(batch), samples, batch=7, by_form=True)
    assert no["existence-kind"].accuracy == pytest.approx(no["existence-kind"].chance, abs=0.25)
    assert no["naming-side"].accuracy == 0.0 and no["all"].n == right["all"].n
    assert "| existence |" in format_table(right)


@pytest.mark.parametrize(
    ("kind", "want", "given", "points"),
    [
        ("existence", "yes", "Yes, there is a dog.", 1),
        ("existence", "yes", "no", 0),
        ("existence", "no", "nothing", 0),
        ("naming", "a dog", "Dog.", 1),
        ("naming", "a red circle", "a circle", 0),
        ("colour", "gray", "Grey", 1),
        ("count", "3", "three", 1),
        ("count", "0", "zero", 1),
        ("count", "3", "13", 0),
        ("reading", "STOP", "stop", 1),
        ("reading", "STOP", "stops", 0),
        ("relation", "left", "", 0),
    ],
)
def test_correctness(kind, want, given, points):
    assert correctness(Question(kind, kind, "?", want), given) == points


def test_caption_f1():
    want = "a red circle, a dog and two apples on a blue background."
    assert caption_f1(want, "two apples, a red circle and a dog.") == 1
    assert caption_f1(want, "a dog.") == pytest.approx(0.5)
    assert caption_f1(want, "three apples and a blue circle.") == 0
    assert caption_f1("a cat and the word STOP.", "a cat and the word stop.") == 1
    assert caption_f1("a cat.", "") == 0


def test_wilson_interval():
    low, high = wilson(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-3) and high == pytest.approx(0.5962, abs=1e-3)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


def test_easy_vqa(art):
    asked = list(easy_vqa_test(art))
    assert [(q, a) for _, q, a in asked] == [
        ("is there a circle?", "yes"), ("what color is the shape?", "teal"),
    ]  # fmt: skip
    assert asked[0][0].shape == (112, 112, 3)
    with pytest.raises(UserError, match="no easy_vqa"):
        next(easy_vqa_test(Art({}, {})))


# --- art and talk ---------------------------------------------------------------------------------


def test_bad_art_folders(tmp_path):
    with pytest.raises(UserError, match="art.json: not found"):
        load_art(tmp_path)
    (tmp_path / "art.json").write_text("{}")
    with pytest.raises(UserError, match=r"fluent.*\.png"):
        load_art(tmp_path)


def test_small_talk_is_unambiguous():
    tables = (smalltalk.TALK, smalltalk.UNKNOWN, smalltalk.UNSEEN)
    asked = Counter(p for table in tables for phrasings, _ in table for p in phrasings)
    assert [phrase for phrase, n in asked.items() if n > 1] == []
    about = {
        question.question.lower().rstrip("?.")
        for rng, scene in scenes("train", 500)
        for question in ask(rng, scene, 8)
        if question.type not in ("talk", "unknown")
    }
    assert not about & set(asked)
