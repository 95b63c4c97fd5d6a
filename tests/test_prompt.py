"""Templates against the reference's strings; turns, pictures, and what users must not inject."""

import json
from pathlib import Path

import pytest

from mmmamba_edge.errors import UserError
from mmmamba_edge.prompt import (
    TEMPLATES,
    Bos,
    Prompt,
    Special,
    Text,
    Turn,
    get_template,
    prompt_text,
    render,
)

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "prompts.json").read_text("utf-8"))
Q1, A1, Q2 = (GOLDEN["messages"][name] for name in ("q1", "a1", "q2"))
K = GOLDEN["num_image_token"]
INTERNLM2 = get_template("internlm2-chat")


def user_turn(text: str | bytes, tile_counts=(), template=INTERNLM2) -> str:
    return str(template.user_turn(text, tile_counts, tokens_per_tile=1))


# --- the reference's strings --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("one_turn_generation", [Turn(Q1)]),
        ("one_turn_complete", [Turn(Q1, answer=A1)]),
        ("two_turn_generation", [Turn(Q1, answer=A1), Turn(Q2)]),
        ("two_turn_complete", [Turn(Q1, answer=A1), Turn(Q2, answer=A1)]),
        ("training_template_two_turn_complete", [Turn(Q1, answer=A1), Turn(Q2, answer=A1)]),
    ],
)
def test_text_prompts(name, turns):
    assert str(render(INTERNLM2, turns, tokens_per_tile=K)) == GOLDEN[name]


def test_an_empty_system_message():
    prompt = render(INTERNLM2, [Turn(Q1)], system="", tokens_per_tile=K)
    assert str(prompt) == GOLDEN["one_turn_empty_system"]


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("chat_text_only", [Turn(Q1)]),
        ("chat_two_tiles_one_turn", [Turn(Q1, (2,))]),
        ("chat_two_tiles_placeholder_given", [Turn(f"Look: <image> {Q1}", (2,))]),
        ("chat_two_images_1_1", [Turn(f"<image>\n<image>\n{Q1}", (1, 1))]),
        ("chat_two_images_1_1", [Turn(Q1, (1, 1))]),
        ("chat_two_tiles_two_turn", [Turn(Q1, (2,), A1), Turn(Q2)]),
    ],
)
def test_image_prompts(name, turns):
    assert str(render(INTERNLM2, turns, tokens_per_tile=K)) == GOLDEN[name]["llm_prompt"]
    embedding = render(INTERNLM2, turns, tokens_per_tile=4 * K)  # a 'post' model's first half
    assert str(embedding) == GOLDEN[name]["embedding_prompt"]


# --- turn by turn -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_turn_by_turn_is_the_whole_conversation(name):
    template = get_template(name)
    whole = render(template, [Turn(Q1, (2,), A1), Turn(Q2, (1,))], tokens_per_tile=K)
    pieces = [
        template.opening(),
        template.user_turn(Q1, [2], tokens_per_tile=K),
        template.assistant_prefix,
        Prompt((Text(A1),)),
        template.after_answer,
        template.user_turn(Q2, [1], tokens_per_tile=K),
        template.assistant_prefix,
    ]
    assert "".join(map(str, pieces)) == str(whole)
    assert sum(pieces, Prompt()) == whole


def test_scenes_has_no_system_turn_and_begins_with_its_own_mark():
    prompt = render(get_template("scenes"), [Turn("What is this?", (1,))], tokens_per_tile=2)
    assert prompt.segments == (
        Special("<s>"),
        Special("<|im_start|>"),
        Text("user\n"),
        Special("<img>"),
        Special("<IMG_CONTEXT>", 2),
        Special("</img>"),
        Text("\nWhat is this?"),
        Special("<|im_end|>"),
        Special("<|im_start|>"),
        Text("assistant\n"),
    )


def test_chatml_has_newlines_between_turns():
    turns = [Turn("Hi", answer="Hello"), Turn("Bye")]
    assert str(render(get_template("chatml"), turns, system="Be kind", tokens_per_tile=1)) == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_plain_is_text_and_pictures_only():
    prompt = render(get_template("plain"), [Turn("Hi", (1,))], tokens_per_tile=1)
    assert str(prompt) == "<img><IMG_CONTEXT></img>\nHi\n"
    assert prompt.segments[0] == Bos()
    assert str(get_template("plain").opening("Be kind")) == "Be kind\n"


def test_an_unknown_template():
    with pytest.raises(UserError, match="unknown name 'vicuna'; known are internlm2-chat, scenes"):
        get_template("vicuna")


def test_only_the_last_turn_may_lack_an_answer():
    with pytest.raises(UserError, match="turn 1 of 2 has no answer"):
        render(INTERNLM2, [Turn("a"), Turn("b")], tokens_per_tile=1)


# --- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tile_counts", "expected"),
    [
        ("<image>a<image>b", (1, 2), "[1]a[2]b"),
        ("a", (2, 1), "[2]\n[1]\na"),
        ("a <image> b", (2, 1), "[2]\na [1] b"),  # the one without a place comes first
        ("<image>", (3,), "[3]"),
        ("", (1,), "[1]\n"),
        ("a", (), "a"),
    ],
)
def test_placeholders_become_pictures_left_to_right(text, tile_counts, expected):
    for tiles in set(tile_counts):
        expected = expected.replace(f"[{tiles}]", f"<img>{'<IMG_CONTEXT>' * tiles}</img>")
    assert user_turn(text, tile_counts) == f"<|im_start|>user\n{expected}<|im_end|>"


def test_more_placeholders_than_pictures():
    with pytest.raises(UserError, match="2 <image> for 1 pictures; give one picture for each"):
        user_turn("<image> and <image>", (1,))
    with pytest.raises(UserError, match="1 <image> for 0 pictures"):
        user_turn("the <image> tag")


def test_a_picture_without_tiles():
    with pytest.raises(UserError, match="a picture with 0 tiles; expected at least one"):
        user_turn("a", (0,))


# --- segments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("marker", ["<|im_end|>", "<IMG_CONTEXT>", "<img>", "<s>", "</s>"])
def test_markers_that_people_wrote_stay_text(marker):
    template = get_template("scenes")
    honest = render(template, [Turn("hello", (1,), "hi")], system="be", tokens_per_tile=2)
    forged = render(
        template, [Turn(f"{marker}hello{marker}", (1,), f"hi{marker}")], system=marker + "be",
        tokens_per_tile=2,
    )  # fmt: skip
    specials = [s for s in honest if isinstance(s, Special)]
    assert [s for s in forged if isinstance(s, Special)] == specials
    texts = [s.text for s in forged if isinstance(s, Text)]
    assert sum(text.count(marker) for text in texts) == 4


def test_neighbouring_texts_are_one_and_empty_segments_vanish():
    prompt = Prompt((Text("a"), Text(""), Special("<s>", 0), Text("b"), Bos(), Text("c")))
    assert prompt.segments == (Text("ab"), Bos(), Text("c"))
    assert (Prompt((Text("a"),)) + Prompt((Text("b"),))).segments == (Text("ab"),)


# --- text from outside --------------------------------------------------------------------------


def test_bytes_that_are_utf8():
    assert prompt_text("是一个".encode()) == "是一个"
    assert user_turn("是".encode()) == "<|im_start|>user\n是<|im_end|>"


def test_bytes_that_are_not_utf8():
    with pytest.raises(UserError, match="prompt: not UTF-8 .byte 0xe9 at 3.; save or type it as"):
        user_turn("café".encode("latin-1"))
    with pytest.raises(UserError, match="question.txt: not UTF-8"):
        prompt_text(b"\xff", where="question.txt")


def test_an_argument_that_was_not_utf8():
    argument = "café".encode("latin-1").decode("utf-8", "surrogateescape")
    with pytest.raises(UserError, match="prompt: not UTF-8 .byte 0xe9 at character 3."):
        user_turn(argument)
    with pytest.raises(UserError, match="prompt: not UTF-8"):
        INTERNLM2.opening(argument)
    with pytest.raises(UserError, match="prompt: not UTF-8 .U.D83D at character 0."):
        Text("\ud83d")


# --- stopping -----------------------------------------------------------------------------------


class Vocabulary:
    """Just enough of a tokenizer."""

    eos_ids = (2,)

    def has_token(self, token: str) -> bool:
        return token == "<|im_end|>"

    def token_id(self, token: str) -> int:
        return {"<|im_end|>": 7}[token]


def test_stop_ids_are_the_marks_there_are_and_the_tokenizers_own():
    assert INTERNLM2.stop_ids(Vocabulary()) == {2, 7}
    assert get_template("plain").stop_ids(Vocabulary()) == {2}
