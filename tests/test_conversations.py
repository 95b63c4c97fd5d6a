"""Training rows: what is read of a conversation, in which order, and what becomes of bad ones."""

import json
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from fake_runner import SPECIAL, FakeRunner, tiny_config, write_tokenizer
from mmmamba_edge import Session
from mmmamba_edge.distill import conversation_source, conversations
from mmmamba_edge.distill.batches import Share, Source
from mmmamba_edge.distill.conversation_source import ConversationSource
from mmmamba_edge.distill.conversation_tokens import pixels, tokenize
from mmmamba_edge.distill.conversations import BadRow, RowFile, parse_row, read_meta
from mmmamba_edge.distill.permutation import Permutation
from mmmamba_edge.distill.workers import Workers
from mmmamba_edge.errors import UserError
from mmmamba_edge.image import image_tiles
from mmmamba_edge.prompt import TEMPLATES, Turn, get_template, render
from mmmamba_edge.tokenizer import load_tokenizer

CONFIG = tiny_config()
INTERNLM2 = get_template("internlm2-chat")
END = SPECIAL.index("<|im_end|>")
ROWS, WINDOW = 4, 3  # of the sources tested here: global batches of 4 rows, windows of 3 batches


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def talk(*values, image=None):
    """A row."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]
    return {"conversations": turns} | ({} if image is None else {"image": image})


def parsed(row, root=Path("pictures")):
    return parse_row(json.dumps(row).encode(), Path("rows.jsonl"), 7, root)


def picture(path, width=40, height=30, **settings):
    """A picture of stripes, so that turned and cut ones differ."""
    levels = np.add.outer(np.arange(height) * 5, np.arange(width) * 3) % 256
    Image.fromarray(levels.astype(np.uint8)).convert("RGB").save(path, **settings)
    return path


def write_rows(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_meta(folder, rows, **entry):
    """A meta file of one dataset."""
    write_rows(folder / "rows.jsonl", rows)
    entry = {"root": "pictures", "annotation": "rows.jsonl"} | entry
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "meta.json").write_text(json.dumps({"talks": entry}))
    return folder / "meta.json"


# --- permutation --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_a_permutation_holds_every_number_once(n):
    for seed in (0, 1):
        assert sorted(Permutation(n, seed)) == list(range(n))


def test_a_permutation_is_the_same_everywhere_and_another_for_another_seed():
    assert list(Permutation(10, 0)) == [5, 4, 2, 7, 0, 8, 6, 9, 1, 3]
    assert list(Permutation(10, (0, 1))) == [3, 0, 8, 5, 7, 2, 1, 9, 6, 4]
    assert Permutation(1_701_560, 7)[123456] == 1139300
    assert len({tuple(Permutation(1000, seed)) for seed in range(-5, 5)}) == 10


def test_a_permutation_of_many_is_shuffled():
    order = Permutation(10**12, 3)
    first = np.array([order[i] for i in range(1000)])
    assert first.min() >= 0 and first.max() < 10**12 == len(order)
    assert abs(first.mean() / 10**12 - 0.5) < 0.04  # 4 standard deviations
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.13


def test_a_permutation_ends():
    with pytest.raises(IndexError, match="place 3 of a permutation of 3"):
        Permutation(3, 0)[3]
    with pytest.raises(IndexError):
        Permutation(3, 0)[-1]
    with pytest.raises(ValueError, match="permutation of 0; expected at least 1"):
        Permutation(0, 0)


# --- meta file ----------------------------------------------------------------------------------


def test_a_meta_file(tmp_path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "meta.json").write_text(
        json.dumps(
            {
                "one": {"root": "", "annotation": "a.jsonl", "repeat_time": 0.5, "length": 3},
                "two": {"root": str(tmp_path), "annotation": str(tmp_path / "a.jsonl")},
            }
        )
    )
    one, two = read_meta(tmp_path / "meta.json")
    assert (one.name, two.name) == ("one", "two")
    assert one.root == two.root == tmp_path and one.annotation == two.annotation
    assert (one.repeat_time, one.length, two.repeat_time, two.length) == (0.5, 3, 1, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "meta.json: cannot be read as JSON"),
        ("[" * 100_000, "meta.json: cannot be read as JSON"),
        ("[]", "meta.json: no datasets"),
        ("{}", "meta.json: no datasets"),
        ('{"x": 3}', "meta.json: x: no 'root'"),
        ('{"x": {"root": ""}}', "meta.json: x: no 'annotation'"),
        ('{"x": {"root": "gone", "annotation": "meta.json"}}', "x: root .*gone is not a folder"),
        ('{"x": {"root": "", "annotation": "gone"}}', "x: annotation .*gone is not a file"),
        *(
            (
                f'{{"x": {{"root": "", "annotation": "meta.json", "repeat_time": {value}}}}}',
                f"x: repeat_time is {shown}; expected a number above 0",
            )
            for value, shown in [("0", 0), ("-1", -1), ('"2"', "'2'"), ("true", True)]
            + [("NaN", "nan"), ("Infinity", "inf")]
        ),
    ],
)
def test_a_bad_meta_file(tmp_path, text, message):
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_meta(tmp_path / "meta.json")


def test_no_meta_file(tmp_path):
    with pytest.raises(UserError, match="meta.json: cannot be read as JSON .*No such file"):
        read_meta(tmp_path / "meta.json")


def test_what_a_meta_file_asks_for_in_vain_is_said(tmp_path, caplog, tokenizer):
    meta = write_meta(tmp_path, [talk("a", "b")] * 2, length=5, data_augment=True, colour="red")
    ConversationSource(meta, tokenizer, CONFIG, cache=tmp_path / "cache")
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "talks: unknown key colour; ignored" in said
    assert "data_augment is not done" in said
    assert "talks has length 5, but" in said and "rows.jsonl has 2 rows" in said


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", r"not JSON \("),
        ("[" * 100_000, r"not JSON \("),
        (b"\xff\xfe", r"not JSON \('utf-8' codec"),
        ("[1]", "unknown shape: list; expected an object"),
        ("{}", "no conversations"),
        ({"conversations": "hello"}, "no conversations"),
        ({"conversations": []}, "no conversations"),
        ({"conversations": [{"value": "a"}, "b"]}, "the value of turn 2 is not text"),
        (talk("a", 3), "the value of turn 2 is not text"),
        (talk("a", None), "the value of turn 2 is not text"),
        (talk("a"), "1 turns; expected a question and an answer in turn"),
        (talk("a", "b", "c"), "3 turns"),
        ({"conversations": [{"from": "system", "value": "s"}]}, "0 turns"),
        (talk("a", "b", image=3), "unknown shape: image is neither a name nor a list"),
        (talk("a", "b", image=["x", 3]), "unknown shape: image is neither a name nor a list"),
        (talk("<image> a", "b"), "placeholders do not fit: 1 <image> for 0"),
        (talk("<image> a", "b", image=["x", "y"]), "placeholders do not fit: 1 <image> for 2"),
        (talk("<image>", "b", "<image>", "c", image="x"), "placeholders do not fit: 2 <image> for"),
    ],
)
def test_a_bad_row(line, reason):
    data = line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else None
    with pytest.raises(BadRow, match=rf"^rows\.jsonl:7: {reason}") as caught:
        parse_row(data or json.dumps(line).encode(), Path("rows.jsonl"), 7, Path("root"))
    assert (caught.value.file, caught.value.line) == (Path("rows.jsonl"), 7)


def test_turns_go_by_order_whatever_they_say_they_are_from():
    row = parsed({"id": 3, "conversations": [{"from": "gpt", "value": x} for x in "abcd"]})
    assert row.turns == (("a", "b"), ("c", "d")) and row.system is None and row.images == ()


def test_a_system_turn_in_front_is_the_system_message():
    row = talk("a", "b")
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    assert parsed(row).system == "Be brief."
    assert parsed(row).turns == (("a", "b"),)


@pytest.mark.parametrize("image", [None, "", []])
def test_no_image(image):
    assert parsed(talk("a", "b") | {"image": image}).images == ()


def test_images_stand_where_the_placeholders_are():
    row = parsed(talk("See <image>", "b", "<image> and <image>", "d", image=["x", "s/y", "z"]))
    assert row.images == (Path("pictures/x"), Path("pictures/s/y"), Path("pictures/z"))
    assert row.turns[1] == ("<image> and <image>", "d")


def test_images_without_placeholders_come_first():
    assert parsed(talk("a", "b", "c", "d", image="x")).turns == (("<image>\na", "b"), ("c", "d"))
    assert parsed(talk("a", "b", image=["x", "y"])).turns[0][0] == "<image>\n<image>\na"


def test_a_placeholder_in_an_answer_is_text():
    assert parsed(talk("a", "the mark <image>")).turns == (("a", "the mark <image>"),)
    assert parsed(talk("a", "<image>", image="x")).turns == (("<image>\na", "<image>"),)


# --- a file of rows -----------------------------------------------------------------------------


def test_rows_of_a_file_and_their_line_numbers(tmp_path):
    row = talk("Grüße", "b")
    lines = ["", json.dumps(row, ensure_ascii=False), " \t\r", "{", "", json.dumps(talk("c", "d"))]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + "\n".join(lines[1:]).encode()
    )  # a BOM, no newline at the end
    rows = RowFile(path, tmp_path, tmp_path / "i.npy")
    assert len(rows) == 3
    assert (rows[0].line, rows[0].turns) == (1, (("Grüße", "b"),))
    with pytest.raises(BadRow, match=r"rows\.jsonl:3: not JSON"):
        rows[1]
    assert (rows[2].line, rows[2].turns) == (5, (("c", "d"),))
    with pytest.raises(IndexError):
        rows[3]
    assert not len(RowFile(write_rows(path, ["", " "]), tmp_path, tmp_path / "i.npy"))


def test_an_index_is_made_once(tmp_path, monkeypatch):
    path, index = write_rows(tmp_path / "rows.jsonl", [talk("a", "b")]), tmp_path / "i.npy"
    RowFile(path, tmp_path, index)
    with monkeypatch.context() as patch:
        patch.setattr(conversations, "_scan", None)
        assert RowFile(path, tmp_path, index)[0].turns == (("a", "b"),)
    write_rows(path, [talk("a", "b"), talk("c", "d")])
    assert RowFile(path, tmp_path, index)[1].turns == (("c", "d"),)
    for damage in (b"", index.read_bytes()[:90], b"x" * 300):
        index.write_bytes(damage)
        assert len(RowFile(path, tmp_path, index)) == 2
    np.save(index, np.zeros(3, np.uint64))
    assert len(RowFile(path, tmp_path, index)) == 2


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: cannot be read \(No such file"):
        RowFile(tmp_path / "gone.jsonl", tmp_path, tmp_path / "i.npy")
    rows = RowFile(write_rows(tmp_path / "r", [talk("a", "b")]), tmp_path, tmp_path / "i.npy")
    rows.path.unlink()
    with pytest.raises(UserError, match="r: cannot be read"):
        rows[0]


def test_the_index_of_many_rows_takes_little_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n" * 200_000)
    tracemalloc.start()
    rows = RowFile(path, tmp_path, tmp_path / "i.npy")
    made = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    assert len(RowFile(path, tmp_path, tmp_path / "i.npy")) == 200_000
    reopened = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert isinstance(rows._index.base, np.memmap) or isinstance(rows._index, np.memmap)
    assert made < 8e6  # 16 bytes a row, while it grows; a list of the offsets alone has 8e6
    assert reopened < 1e5


# --- tokens -------------------------------------------------------------------------------------


def test_tokens_are_those_of_a_chat(tmp_path, tokenizer):
    """Every id that a model reads in a conversation of these words, in order."""
    picture(tmp_path / "a.png", 60, 30)
    picture(tmp_path / "b.png")
    talked = talk("What <image>?", "A cat.", "And <image>?", "No <|im_end|>.", "Sure?", "Yes")
    row = parsed(talked | {"image": ["a.png", "b.png"]}, tmp_path)
    # Each picture may have its share of the tiles.
    tokens = tokenize(row, tokenizer, INTERNLM2, CONFIG, max_tiles=4)

    runner = FakeRunner(tokenizer.source.parent)
    session, read, answers = Session(runner), [], []
    for (question, answer), pictures in zip(row.turns, [["a.png"], ["b.png"], []], strict=True):
        said = tokenizer.encode_text(answer)
        runner.script = [*said, END]
        runner.calls.clear()
        runner.steps.clear()
        "".join(session.ask(question, [tmp_path / p for p in pictures], max_tiles=2))
        answers += [False] * len(runner.calls[0]) + [True] * len(runner.steps)
        read += runner.calls[0] + runner.steps
    assert tokens.ids.tolist() == [*read, END]
    # The marks that end answers are the model's own, though chat reads them with the next question.
    marks = [i for i, token in enumerate(tokens.ids) if token == END and answers[i - 1]]
    assert len(marks) == 3
    assert np.flatnonzero(tokens.answer).tolist() == sorted(
        [*np.flatnonzero(answers).tolist(), *marks]
    )
    assert tokens.ids.dtype == np.int64 and tokens.answer.dtype == np.bool_


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_tokens_are_the_rendered_conversation(name, system, tmp_path, tokenizer):
    template = get_template(name)
    picture(tmp_path / "a.png", 28, 56)
    row = parsed(talk("<image>\nQ", "A", "Q2", "<s>B", image="a.png"), tmp_path)
    tokens = tokenize(replace(row, system=system), tokenizer, template, CONFIG)
    turns = [Turn("<image>\nQ", (3,), "A"), Turn("Q2", (), "<s>B")]
    prompt = render(template, turns, system=system, tokens_per_tile=CONFIG.tokens_per_tile)
    assert tokens.ids.tolist() == tokenizer.encode(prompt).tolist()
    said = tokenizer.decode(tokens.ids[tokens.answer], skip_special=False)
    assert said == "".join(answer + (template.end or "") for answer in ("A", "<s>B"))
    assert tokens.images == ((tmp_path / "a.png", 3),)
    assert tokens.where == "rows.jsonl:7"


def test_a_prompt_is_what_chat_reads_even_if_the_answer_would_join_it(tmp_path):
    letters = sorted(ByteLevel.alphabet())
    words = {w: i for i, w in enumerate([*SPECIAL, *letters, "ĊĊ", "is"])}
    built = Tokenizer(BPE(words, [("Ċ", "Ċ"), ("i", "s")]))
    built.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    built.add_special_tokens(list(SPECIAL))
    built.save(str(tmp_path / "tokenizer.json"))
    write_tokenizer(tmp_path / "decoder")  # only its decoder is wanted
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["decoder"] = json.loads((tmp_path / "decoder/tokenizer.json").read_text())["decoder"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    merging = load_tokenizer(tmp_path)
    for answer in ("\nthis", "this"):
        tokens = tokenize(parsed(talk("Q", answer)), merging, INTERNLM2, CONFIG)
        asked = render(INTERNLM2, [Turn("Q")], tokens_per_tile=4)
        prompt = merging.encode(asked).tolist()
        assert tokens.ids[: len(prompt)].tolist() == prompt
        assert tokens.answer.tolist() == [i >= len(prompt) for i in range(len(tokens.ids))]
        assert merging.decode(tokens.ids[tokens.answer]) == answer


def test_text_only(tokenizer):
    tokens = tokenize(parsed(talk("Q", "")), tokenizer, INTERNLM2, CONFIG)
    assert tokens.images == () and pixels(tokens, CONFIG) is None
    assert tokens.answer.sum() == 1  # an empty answer is ended, too


@pytest.mark.parametrize("kind", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(28, 28), (100, 29), (29, 100), (500, 40)])
def test_tiles_are_planned_from_the_header(kind, orientation, size, tmp_path, tokenizer):
    """29 x 100 pixels are cut into four tiles, 100 x 29 into three: turning must be seen."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(tmp_path / f"a.{kind}", *size, exif=exif)
    row = parsed(talk("Q", "A", image=f"a.{kind}"), tmp_path)
    for config in (CONFIG, replace(CONFIG, use_thumbnail=False, min_dynamic_patch=2)):
        tokens = tokenize(row, tokenizer, INTERNLM2, config, max_tiles=6)
        tiles = pixels(tokens, config, max_tiles=6)
        assert tokens.images[0][1] == len(tiles)
        assert (tokens.ids == CONFIG.img_context_token_id).sum() == 4 * len(tiles)
        assert np.array_equal(tiles, image_tiles(tmp_path / f"a.{kind}", config, max_tiles=6))


def test_planning_does_not_decode(tmp_path, tokenizer, monkeypatch):
    picture(tmp_path / "a.png")
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append(image))
    row = parsed(talk("Q", "A", image="a.png"), tmp_path)
    assert tokenize(row, tokenizer, INTERNLM2, CONFIG).images
    assert not decoded


@pytest.mark.parametrize(("pictures", "tiles"), [(1, 13), (2, 7), (3, 5), (7, 1), (20, 1)])
def test_pictures_share_the_tiles(pictures, tiles, tmp_path, tokenizer):
    picture(tmp_path / "a.png", 120, 90)  # of 4:3: as many tiles as there may be
    row = parsed(talk("Q", "A", image=["a.png"] * pictures), tmp_path)
    tokens = tokenize(row, tokenizer, INTERNLM2, CONFIG)
    limit = max(1, 12 // pictures)
    alone = image_tiles(tmp_path / "a.png", CONFIG, max_tiles=limit)
    assert len(alone) <= tiles
    assert tokens.images == ((tmp_path / "a.png", len(alone)),) * pictures
    assert np.array_equal(pixels(tokens, CONFIG), np.concatenate([alone] * pictures))


def test_rows_that_cannot_be_tokenised(tmp_path, tokenizer):
    (tmp_path / "notes.png").write_text("milk, eggs")
    (tmp_path / "empty.png").touch()
    (tmp_path / "huge.ppm").write_bytes(b"P6 20000 20000 255\n")

    def check(row, reason, **settings):
        with pytest.raises(BadRow, match=rf"^rows\.jsonl:7: {reason}"):
            tokenize(parsed(row, tmp_path), tokenizer, INTERNLM2, CONFIG, **settings)

    check(talk("a", "b", image="gone.png"), r"image missing \(.*gone\.png\)")
    for name in ("notes.png", "empty.png"):
        check(talk("a", "b", image=name), rf"unreadable image \(.*{name}: not a picture")
    check(talk("a", "b", image="."), r"unreadable image \(.*[Ii]s a directory")
    check(talk("a", "b", image="nul\0.png"), r"unreadable image \(.*null")
    check(
        talk("a", "b", image="huge.ppm"), r"unreadable image \(.*huge\.ppm: .*more than 256 megap"
    )
    check(talk("a", "b\ud800"), r"prompt: not UTF-8 \(U\+D800")
    length = len(tokenize(parsed(talk("a", "b")), tokenizer, INTERNLM2, CONFIG).ids)
    tokenize(parsed(talk("a", "b")), tokenizer, INTERNLM2, CONFIG, max_length=length)
    check(talk("a", "bc"), rf"too long \({length + 1} tokens > {length}\)", max_length=length)


def test_a_picture_that_changed_after_planning(tmp_path, tokenizer):
    picture(tmp_path / "a.png", 28, 28)
    row = parsed(talk("Q", "A", image="a.png"), tmp_path)
    tokens = tokenize(row, tokenizer, INTERNLM2, CONFIG)
    picture(tmp_path / "a.png", 56, 28)
    with pytest.raises(UserError, match=r"a\.png: 3 tiles; its header promised 1"):
        pixels(tokens, CONFIG)


# --- the source ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """21 rows: with no, one and two pictures; one damaged picture, and three bad rows."""
    folder = tmp_path_factory.mktemp("talks")
    (folder / "pictures").mkdir()
    for name, size in {"a": (28, 28), "b": (60, 30), "c": (30, 90)}.items():
        picture(folder / f"pictures/{name}.png", *size)
    data = picture(folder / "whole.png", 200, 200).read_bytes()
    (folder / "pictures/cut.png").write_bytes(data[: len(data) // 2])
    rows = [talk(f"Row {i}" + "." * (i * 7 % 40), f"yes {i}") for i in range(17)]
    for i, image in {
        1: "a.png",
        4: "b.png",
        6: ["a.png", "c.png"],
        9: "c.png",
        11: "cut.png",
    }.items():
        rows[i]["image"] = image
    rows.insert(3, "{")
    rows.insert(8, talk("a", "b", image="gone.png"))
    rows.append(talk("long" * 500, "b"))
    write_meta(folder, [*rows, talk("Row last", "yes")])
    return folder


@pytest.fixture
def source(folder, tokenizer):
    """A function: a source of `folder`, with other settings where they are given."""

    def build(meta=folder / "meta.json", config=CONFIG, **settings):
        settings = {"cache": folder / "cache", "window": WINDOW, "max_length": 1000} | settings
        return ConversationSource(meta, tokenizer, config, **settings)

    return build


def take(source, count, position=None, **share):
    """The first steps, the iterator closed behind them."""
    steps = source.steps(position, Share(**({"rows": ROWS, "micro_rows": 2} | share)))
    try:
        return list(islice(steps, count))
    finally:
        steps.close()


def rows_of(steps):
    """Each row of the steps: its real ids and its weights."""
    return [
        (tuple(ids[:length].tolist()), tuple(weights[:length].tolist()))
        for step in steps
        for batch in step.micro
        for ids, weights, length in zip(batch.ids, batch.weights, batch.lengths, strict=True)
    ]


def assert_same(steps, others):
    """Equal in everything, bit for bit."""
    assert len(steps) == len(others)
    for step, other in zip(steps, others, strict=True):
        assert step.position == other.position and step.skipped == other.skipped
        assert len(step.micro) == len(other.micro)
        for a, b in zip(step.micro, other.micro, strict=True):
            for name in ("ids", "lengths", "weights", "pixel_values"):
                x, y = getattr(a, name), getattr(b, name)
                assert (x is None) == (y is None) and (x is None or torch.equal(x, y)), name


def test_batches_are_what_the_trainer_expects(source):
    built: Source = source()
    for step in take(built, 6):
        assert [len(batch.ids) for batch in step.micro] == [2, 2]
        assert json.loads(json.dumps(step.position)) == step.position
        for batch in step.micro:
            assert batch.ids.dtype == batch.lengths.dtype == torch.int64
            assert batch.weights.dtype == torch.float32
            assert batch.ids.shape == batch.weights.shape == (2, int(batch.lengths.max()))
            assert int(batch.lengths.min()) >= 1
            padding = torch.arange(batch.ids.shape[1]) >= batch.lengths[:, None]
            assert not batch.weights[padding].any() and not batch.ids[padding].any()
            images = int((batch.ids == CONFIG.img_context_token_id).sum())
            if batch.pixel_values is None:
                assert not images
            else:
                assert batch.pixel_values.dtype == torch.float32
                assert batch.pixel_values.shape == (images // 4, 3, 28, 28)


def test_pixels_are_in_reading_order(source, folder, tokenizer):
    step = take(source(), 6)
    for batch in (batch for s in step for batch in s.micro if batch.pixel_values is not None):
        expected = []
        for ids in batch.ids:
            number = int(
                tokenizer.decode(ids.tolist()).split("Row ")[1].split(".")[0].split("a")[0]
            )
            names = {1: "a", 4: "b", 6: "ac", 9: "c"}.get(number, "")
            limit = 12 // max(len(names), 1)
            expected += [
                image_tiles(folder / f"pictures/{name}.png", CONFIG, max_tiles=limit)
                for name in names
            ]
        assert np.array_equal(batch.pixel_values, np.concatenate(expected))


def test_weights_of_all_positions_or_of_those_before_answers(source, tokenizer):
    for ids, weights in rows_of(take(source(), 6)):
        assert set(weights) == ({0} if len(ids) == 1 else {1})
    for ids, weights in rows_of(take(source(positions="answers"), 6)):
        after = [token for token, weight in zip(ids[1:], weights, strict=False) if weight]
        if len(ids) > 1:
            assert after[-1] == END and tokenizer.decode(after).startswith("yes")
            assert weights[-1] == 0


def test_every_epoch_reads_every_good_row_once(source, tmp_path):
    rows = [talk(f"Row {i}", "yes") for i in range(24)]
    steps = take(source(write_meta(tmp_path, rows), cache=tmp_path), 24)
    epochs = [rows_of(steps[i : i + 6]) for i in range(0, 24, 6)]  # two windows each
    assert all(len(set(epoch)) == 24 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert steps[5].position == {"epoch": 0, "row": 24, "window": 2, "batch": 0}


def test_an_order_is_fixed_by_its_seed(source):
    assert_same(take(source(threads=1), 7), take(source(threads=4), 7))
    assert rows_of(take(source(), 7)) != rows_of(take(source(seed=1), 7))


def test_rows_of_a_window_are_sorted_by_length_and_its_batches_are_not(source):
    windows = []
    steps = take(source(), 4 * WINDOW)
    for start in range(0, len(steps), WINDOW):
        lengths = [
            [int(n) for batch in step.micro for n in batch.lengths if n > 1]
            for step in steps[start : start + WINDOW]
        ]
        assert all(batch == sorted(batch) for batch in lengths)
        batches = sorted(lengths, key=lambda batch: batch[0])
        assert all(a[-1] <= b[0] for a, b in zip(batches, batches[1:], strict=False))
        windows.append(tuple(batches.index(batch) for batch in lengths))
    assert len(set(windows)) > 1


@pytest.mark.parametrize(("world", "micro_rows"), [(2, 1), (2, 2), (4, 1)])
def test_more_processes_read_the_same_global_batches(source, world, micro_rows):
    alone = take(source(), 8)
    shares = [
        take(source(), 8, rank=rank, world=world, micro_rows=micro_rows) for rank in range(world)
    ]
    for step, *parts in zip(alone, *shares, strict=True):
        assert Counter(rows_of([step])) == Counter(rows_of(parts))
        assert sum(b.weights.sum() for b in step.micro) == sum(
            b.weights.sum() for part in parts for b in part.micro
        )
        assert {len(part.micro) for part in parts} == {ROWS // world // micro_rows}
        assert all(part.position == step.position for part in parts)
        by_length = [rows_of([part]) for part in parts]
        assert [row for rows in zip(*by_length, strict=True) for row in rows] == rows_of([step])
        said = [reason for part in parts for reason in part.skipped]
        assert sorted(said) == sorted(step.skipped)


def test_it_goes_on_from_every_position(source):
    whole = take(source(), 11)
    for done in range(1, 11):
        position = json.loads(json.dumps(whole[done - 1].position))
        assert_same(take(source(), 11 - done, position), whole[done:])


def test_it_goes_on_with_other_processes(source):
    whole = take(source(), 8)
    for done in (2, 3, 4):
        position = whole[done - 1].position
        parts = [take(source(), 8 - done, position, rank=r, world=2) for r in range(2)]
        for step, *shares in zip(whole[done:], *parts, strict=True):
            assert Counter(rows_of([step])) == Counter(rows_of(shares))


def test_bad_rows_are_said_once_and_left_out(source, folder):
    steps = take(source(), 3 * WINDOW)
    windows = [steps[i : i + WINDOW] for i in range(0, len(steps), WINDOW)]
    planned = [r for step in steps for r in step.skipped if "cut.png" not in r]
    epoch = 21  # 18 good rows, so 36 in three windows of 12: two epochs
    assert steps[-1].position["row"] == epoch
    assert len(planned) == len(set(planned)) * 2 == 6
    for window in windows:  # with the first step of the window that met them
        assert not [r for step in window[1:] for r in step.skipped if "cut.png" not in r]
    file = (folder / "rows.jsonl").resolve()
    assert {r.split(" ")[0] + r.split(" ")[1] for r in planned} == {
        f"{file}:4:not", f"{file}:9:image", f"{file}:20:too"
    }  # fmt: skip


def test_a_damaged_picture_keeps_the_processes_in_step(source, folder):
    ranks = [take(source(), 9, rank=rank, world=2, micro_rows=1) for rank in range(2)]
    said = [r for steps in ranks for step in steps for r in step.skipped if "cut.png" in r]
    assert len(said) == 2  # two epochs
    file = (folder / "rows.jsonl").resolve()
    assert said[0].startswith(f"{file}:14: unreadable image ({folder}/pictures/cut.png: the pic")
    empty = []
    for pair in zip(*ranks, strict=True):
        assert len(pair[0].micro) == len(pair[1].micro) == 2
        assert pair[0].position == pair[1].position
        empty += [b for step in pair for b in step.micro if not b.weights.any()]
    assert len(empty) == 2
    for batch in empty:
        assert batch.ids.tolist() == [[0]] and batch.lengths.tolist() == [1]
        assert batch.pixel_values is None


def test_padding_is_never_an_image_token(source, tokenizer, monkeypatch):
    monkeypatch.setattr(conversation_source, "check_tokenizer", lambda *_: None)
    for batch in take(source(config=replace(CONFIG, img_context_token_id=0)), 1)[0].micro:
        padding = torch.arange(batch.ids.shape[1]) >= batch.lengths[:, None]
        assert (batch.ids[padding] == 1).all()


@pytest.mark.parametrize(
    ("repeat", "counts"),
    [(1, {1: 8}), (3, {3: 8}), (0.5, {1: 4}), (1.5, {1: 4, 2: 4}), (0.001, {1: 1})],
)
def test_repeats(source, tmp_path, repeat, counts):
    rows = [talk(f"Row {i}", "yes") for i in range(8)]
    built = source(write_meta(tmp_path, rows, repeat_time=repeat), cache=tmp_path, window=1)
    for steps in (take(built, built.total, rows=1), take(built, 2 * built.total, rows=1)):
        read = Counter(Counter(rows_of(steps[-built.total :])).values())
        assert read == counts  # the same rows in every epoch
    assert built.total == sum(times * rows for times, rows in counts.items())


def test_several_datasets(source, tmp_path):
    entries = {}
    for name, count in {"a": 5, "b": 2, "c": 3}.items():
        write_rows(tmp_path / f"{name}.jsonl", [talk(f"{name}{i}", "yes") for i in range(count)])
        entries[name] = {
            "root": "",
            "annotation": f"{name}.jsonl",
            "repeat_time": 1 + (name == "b"),
        }
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    built = source(tmp_path / "meta.json", cache=tmp_path / "new/cache", window=1)
    assert built.total == 12
    assert sorted(Counter(rows_of(take(built, 12, rows=1))).values()) == [1] * 8 + [2] * 2
    assert len(list((tmp_path / "new/cache").iterdir())) == 3


def test_a_window_may_be_longer_than_many_epochs(source, tmp_path):
    built = source(write_meta(tmp_path, [talk("a", "b"), "{"]), cache=tmp_path)
    steps = take(built, 3)
    assert len(steps[0].skipped) >= 10
    assert steps[-1].position["epoch"] >= 11


def test_no_good_row_at_all(source, tmp_path):
    built = source(write_meta(tmp_path, ["{", talk("a", "b", image="x")] * 5), cache=tmp_path)
    with pytest.raises(
        UserError, match=r"meta\.json: no row can be used; the last is .*rows.jsonl"
    ):
        take(built, 1)
    with pytest.raises(UserError, match="no row can be used"):  # the rest of an epoch is no epoch
        take(built, 1, {"epoch": 0, "row": 4, "window": 1, "batch": 0})


def test_a_file_without_rows(source, tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl: no rows; expected a JSON object a line"):
        source(write_meta(tmp_path, ["", ""]), cache=tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window: 0; expected a whole number from 1 up"),
        ({"threads": 1.5}, "threads: 1.5; expected"),
        ({"max_tiles": 0}, "max_tiles: 0; expected"),
        ({"max_length": True}, "max_length: True; expected"),
        ({"positions": "none"}, r"positions: 'none'; expected one of \('all', 'answers'\)"),
        ({"config": replace(CONFIG, pixel_shuffle_loc="post")}, "'post' cannot be trained"),
        ({"config": replace(CONFIG, img_context_token_id=9)}, "<IMG_CONTEXT> has id 5"),
        ({"config": replace(CONFIG, template="none")}, "template: unknown name 'none'"),
        ({"cache": Path(__file__) / "cache"}, "cache: cannot be made"),
    ],
)
def test_bad_settings(source, settings, message):
    with pytest.raises(UserError, match=message):
        source(**settings)


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ({"rows": 3, "world": 2}, "batch of 3 rows, process 0 of 2: expected rows that the number"),
        ({"rank": 2, "world": 2}, "process 2 of 2"),
        ({"rank": -1}, "process -1 of 1"),
        ({"micro_rows": 0}, "micro_rows: 0; expected"),
        ({"rows": 0}, "rows: 0; expected"),
    ],
)
def test_a_bad_share_is_refused_at_once(source, share, message):
    with pytest.raises(UserError, match=message):
        source().steps(None, Share(**({"rows": ROWS, "micro_rows": 2} | share)))


@pytest.mark.parametrize(
    "change", [{"row": 22}, {"batch": WINDOW}, {"epoch": -1}, {"window": "1"}, {"row": None}]
)
def test_a_position_of_other_data_is_refused_at_once(source, change):
    position = {"epoch": 0, "row": 1, "window": 1, "batch": 0} | change
    with pytest.raises(UserError, match="position .*: not one in 21 rows and windows of 3 batches"):
        source().steps(position, Share(ROWS, 2))


# --- threads ------------------------------------------------------------------------------------


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def ours():
    return [thread for thread in threading.enumerate() if thread.name == "conversations"]


@pytest.mark.parametrize("part", ["tokenize", "pixels"])
def test_an_error_in_a_thread_is_raised_where_batches_are_read(source, monkeypatch, part):
    def broken(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(conversation_source, part, broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        take(source(), 6)
    wait_for(lambda: not ours())


def test_threads_end_when_the_iterator_is_let_go(source):
    wait_for(lambda: not ours())  # those of tests before this one
    steps = source().steps(None, Share(ROWS, 2))
    assert not ours()  # none before they are needed
    next(steps)
    assert len(ours()) == 3
    del steps
    wait_for(lambda: not ours())


def test_nobody_waits_for_threads_that_have_ended():
    workers, started, go_on = Workers(1), threading.Event(), threading.Event()
    running = workers.submit(lambda: (started.set(), go_on.wait(10)))
    waiting = workers.submit(int)
    started.wait(10)
    workers.close()
    go_on.set()
    assert running.result(10)
    for future in (waiting, workers.submit(int)):
        with pytest.raises(CancelledError):
            future.result(10)


def test_little_is_decoded_and_planned_ahead(source, monkeypatch):
    decoded, planned = [], []
    real_pixels, real_tokens = conversation_source.pixels, conversation_source.tokenize
    monkeypatch.setattr(
        conversation_source, "pixels", lambda *a, **k: (decoded.append(1), real_pixels(*a, **k))[1]
    )
    monkeypatch.setattr(
        conversation_source,
        "tokenize",
        lambda *a, **k: (planned.append(1), real_tokens(*a, **k))[1],
    )
    steps = source().steps(None, Share(ROWS, 2))
    next(steps)
    wait_for(lambda: len(decoded) == 2 * ROWS)
    time.sleep(0.3)
    assert len(decoded) == 2 * ROWS  # this step and the next
    assert len(planned) <= 2 * ROWS * WINDOW + 8  # this window and the next, with their bad rows
    steps.close()


def test_an_iterator_that_is_never_closed_does_not_keep_the_interpreter(folder, tokenizer):
    """While a window is planned that takes minutes, a program ends at once."""
    program = f"""
import atexit, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from fake_runner import tiny_config
from mmmamba_edge.distill import conversation_source
from mmmamba_edge.distill.batches import Share
from mmmamba_edge.tokenizer import load_tokenizer

quick, calls = conversation_source.tokenize, []
def slow_in_the_second_window(*args, **settings):
    calls.append(1)
    time.sleep(0.02 if len(calls) > 600 else 0)
    return quick(*args, **settings)
conversation_source.tokenize = slow_in_the_second_window

source = conversation_source.ConversationSource(
    {str(folder / "meta.json")!r}, load_tokenizer({str(tokenizer.source.parent)!r}), tiny_config(),
    cache={str(folder / "cache")!r}, window=125, max_length=1000)
steps = source.steps(None, Share(rows=4, micro_rows=2))
next(steps)
while len(calls) < 610:
    time.sleep(0.01)
began = time.monotonic()
atexit.register(lambda: print(time.monotonic() - began))
sys.exit(3)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3, done.stderr
    assert float(done.stdout) < 3
