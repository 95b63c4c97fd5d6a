"""Conversations: what is read, and how often; what an interrupt, a limit or a file does to them."""

import os
import signal

import numpy as np
import psutil
import pytest
from PIL import Image

import mmmamba_edge as mm
from fake_runner import IMAGE, FakeRunner, write_tokenizer
from mmmamba_edge.errors import UserError
from mmmamba_edge.prefix import PrefixCache
from mmmamba_edge.prompt import get_template
from mmmamba_edge.session import Session, stream
from mmmamba_edge.tokenizer import load_tokenizer

END = 4  # <|im_end|>
SAMPLED = {"temperature": 1.5, "top_p": 0.97, "top_k": 300, "repetition_penalty": 2.0, "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(folder):
    """Makes fake runners, all of the same weights unless told otherwise."""
    return lambda **options: FakeRunner(folder, **options)


@pytest.fixture
def encode(folder):
    tokenizer = load_tokenizer(folder)
    return lambda prompt: tokenizer.encode(prompt).tolist()


def picture(seed, size=(28, 28)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def position(session):
    assert session._answer is not None
    return session._answer.position


def states_equal(one, other):
    a, b = position(one), position(other)
    assert a.pending == b.pending and a.state.tokens == b.state.tokens
    for name, array in a.state.arrays().items():
        np.testing.assert_array_equal(array, b.state.arrays()[name], err_msg=name)


# --- what is read --------------------------------------------------------------------------------


def test_the_first_turn_is_the_template_s_prompt(make, encode):
    runner, template = make(), get_template("internlm2-chat")
    "".join(Session(runner).ask("Hello", max_new_tokens=2))
    wanted = template.opening() + template.user_turn("Hello", tokens_per_tile=4)
    assert runner.calls == [encode(wanted + template.assistant_prefix)]


def test_a_later_turn_reads_the_end_of_the_answer_once_and_only_what_is_new(make, encode):
    runner, template = make(), get_template("internlm2-chat")
    session = Session(runner)
    runner.script = [300, 301, END]
    assert "".join(session.ask("One")) == " word300 word301"
    runner.script = [302, END]
    assert "".join(session.ask("Two")) == " word302"
    turn = template.user_turn("Two", tokens_per_tile=4) + template.assistant_prefix
    assert runner.calls[1] == [END, *encode(turn)]
    assert runner.steps == [300, 301, 302]
    assert runner.ids_read == session.stats.context_tokens


@pytest.mark.parametrize("end", ["limit", "break", "interrupt"])
def test_a_cut_answer_is_read_to_the_last_word_that_was_said(make, encode, end):
    runner, template = make(), get_template("internlm2-chat")
    session = Session(runner)
    runner.script = [300, 301, 302, 303]
    answer = session.ask("One", max_new_tokens=3 if end == "limit" else 100)
    said = [next(answer), next(answer), next(answer)]
    if end == "limit":
        assert list(answer) == [] and answer.reason == "length"
    if end == "interrupt":
        runner.during_step = lambda: signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            next(answer)
        runner.during_step = None
    assert "".join(said) == " word300 word301 word302"
    session.ask("Two", max_new_tokens=1)
    turn = encode(template.user_turn("Two", tokens_per_tile=4) + template.assistant_prefix)
    # 302 was read by the interrupted step; otherwise it comes before the end mark: once either way.
    pending = [] if end == "interrupt" else [302]
    assert runner.steps == [300, 301] + ([302] if end == "interrupt" else [])
    assert runner.calls[1] == [*pending, END, *turn]
    assert list(answer) == []  # the old answer is over


def test_many_turns_never_read_anything_twice(make):
    runner = make()
    session, total = Session(runner), 0
    for turn in range(6):
        runner.calls.clear()
        text = "".join(session.ask(f"question {turn}", max_new_tokens=7, **SAMPLED))
        assert text
        total += len(runner.calls[0])
        assert runner.ids_read == session.stats.context_tokens
        assert session.stats.turn == turn + 1
    assert runner.ids_read == total + len(runner.steps)


def test_turn_by_turn_gives_the_state_of_one_long_reading(make):
    runner = make()
    session = Session(runner)
    for turn in range(3):
        list(session.ask(f"question {turn}", [picture(turn)], max_new_tokens=4))
    fresh = make()
    ids = []
    for i, call in enumerate(runner.calls):
        ids += call
        ids += runner.steps[3 * i : 3 * i + 3]  # the fourth is pending, and in the next call
    pixels = np.concatenate([mm.image_tiles(picture(i), runner.config) for i in range(3)])
    _, state = fresh.prefill(np.array(ids, np.int64), pixels)
    for name, array in position(session).state.arrays().items():
        np.testing.assert_array_equal(array, state.arrays()[name], err_msg=name)


def test_pictures_count_and_their_order_and_place_too(make):
    a, b = picture(1), picture(2, (56, 28))

    def answer(text, images):
        return "".join(stream(make(), text, images=images, max_new_tokens=6))

    answers = [
        answer("What?", [a, b]),
        answer("What?", [b, a]),
        answer("What?", [a]),
        answer("Left <image> right <image>?", [a, b]),
        answer("What?", []),
    ]
    assert len(set(answers)) == len(answers)
    assert answers[0] == answer("What?", [a, b])


def test_every_picture_gets_its_tiles(make):
    runner = make()
    session = Session(runner)
    session.ask("Both?", [picture(1, (56, 28)), picture(2)])
    assert runner.calls[0].count(IMAGE) == 4 * (2 + 1) + 4  # two tiles and a thumbnail; one tile
    session.ask("Both?", [picture(1, (56, 28)), picture(2)], max_tiles=1)
    assert runner.calls[1].count(IMAGE) == 4 + 4


def test_a_system_message_is_read_first(make, encode):
    template = get_template("internlm2-chat")
    for system in ("Be brief.", ""):
        runner = make()
        Session(runner, system=system).ask("Hi")
        opening = encode(template.opening(system))
        assert runner.calls[0][: len(opening)] == opening


# --- text ----------------------------------------------------------------------------------------


def test_no_piece_splits_a_character_and_no_stop_token_shows(make, folder):
    runner = make()
    wanted = "é😀 你好"
    runner.script = [*load_tokenizer(folder).encode_text(wanted), END]
    pieces = list(Session(runner).ask("Hi"))
    assert "".join(pieces) == wanted and all(pieces)
    assert "�" not in "".join(pieces) and len(pieces) > 3


def test_a_character_that_never_ends_is_shown_as_one_mark_at_the_end(make, folder):
    ids = load_tokenizer(folder).encode_text("a😀")
    runner = make()
    runner.script = [*ids[:-1], END]
    assert list(Session(runner).ask("Hi")) == ["a", "�"]


def test_an_answer_cut_within_a_character_goes_on_with_the_whole_character(make, folder, tmp_path):
    ids = load_tokenizer(folder).encode_text("a😀b")
    runner = make()
    session = Session(runner)
    runner.script = list(ids[:3])
    assert list(session.ask("Hi", max_new_tokens=3)) == ["a"]
    session.save(tmp_path / "s")
    for again in (session.fork(), session, Session.load(tmp_path / "s", runner)):
        runner.script = [*ids[3:], END]
        assert list(again.resume()) == ["😀", "b"]


# --- interrupts and errors -----------------------------------------------------------------------


@pytest.mark.parametrize("turns_before", [0, 2])
@pytest.mark.parametrize("cache", [False, True])
def test_an_interrupt_while_reading_restores_the_session(make, turns_before, cache):
    runner = make()
    session = Session(runner, prefix_cache=PrefixCache() if cache else None)
    twin = Session(make(), prefix_cache=PrefixCache() if cache else None)
    for turn in range(turns_before):
        for each in (session, twin):
            list(each.ask(f"question {turn}", max_new_tokens=3, **SAMPLED))

    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    before = runner.ids_read
    with pytest.raises(KeyboardInterrupt):
        session.ask("a long question " * 10, [picture(1)], progress=interrupt)
    assert runner.ids_read > before  # it was in the midst of it
    assert session.stats.turn == turns_before
    for each in (session, twin):
        list(each.ask("another", [picture(2)], max_new_tokens=5, **SAMPLED))
    states_equal(session, twin)


def test_an_interrupted_question_leaves_an_unfinished_answer_unfinished(make):
    def start():
        session = Session(make())
        return session, [next(session.ask("One", max_new_tokens=6))]

    def interrupt(done, total):
        raise KeyboardInterrupt

    (session, said), (twin, wanted) = start(), start()
    with pytest.raises(KeyboardInterrupt):
        session.ask("Two", progress=interrupt)
    assert said + list(session.resume()) == wanted + list(twin.resume())
    states_equal(session, twin)


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_read(make):
    runner = make(max_context=160)
    session = Session(runner, system="s")
    text = "".join(session.ask("Hi", max_new_tokens=4))
    read = runner.ids_read
    with pytest.raises(
        UserError,
        match=r"prompt is \d+ tokens long, and \d+ of the model's context of 160 are taken: \d+ are"
        " left. Shorten it, .*begin a new conversation",
    ):
        session.ask("word " * 60)
    assert runner.ids_read == read and text
    list(session.ask("Hi again", max_new_tokens=4))  # there is room for this
    twin = Session(make(max_context=160), system="s")
    list(twin.ask("Hi", max_new_tokens=4))
    list(twin.ask("Hi again", max_new_tokens=4))
    states_equal(session, twin)


def test_a_full_context_ends_the_answer(make):
    runner = make(max_context=80)
    answer = Session(runner, system="s").ask("Hi", max_new_tokens=500)
    assert "".join(answer) and answer.reason == "context"
    assert answer.position.state.tokens == 80


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"text": ""}, "the prompt is empty"),
        ({"text": "  \n"}, "the prompt is empty"),
        ({"text": "caf\udce9"}, r"prompt: not UTF-8 \(byte 0xe9 at character 3\)"),
        ({"text": "What is <image>?"}, "1 <image> for 0 pictures"),
        ({"text": "Hi", "images": ["no/such.png"]}, "no/such.png: not found"),
        ({"text": "Hi", "images": [picture(1)], "max_tiles": 0}, "max_tiles: 0 given"),
        ({"text": "Hi", "temperature": -1}, "temperature is -1"),
        ({"text": "Hi", "max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_bad_questions_leave_the_session_alone(make, call, message):
    runner = make()
    session = Session(runner)
    with pytest.raises(UserError, match=message):
        session.ask(**call)
    assert runner.ids_read == 0 and session.stats.turn == 0


def test_bad_models_and_templates(make, folder, tmp_path):
    with pytest.raises(UserError, match="no tokenizer files, so it takes token ids only"):
        Session(FakeRunner(None))
    with pytest.raises(UserError, match="template: unknown name 'x'"):
        Session(make(), template="x")
    with pytest.raises(UserError, match="1024 tokens, but the model has 600"):
        Session(FakeRunner(folder, vocab_size=600))


# --- resume, fork, reset -------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_resuming_a_cut_answer_gives_what_one_long_answer_would(make, sampling):
    whole = "".join(Session(make()).ask("Hi", max_new_tokens=12, **sampling))
    session = Session(make())
    text = "".join(session.ask("Hi", max_new_tokens=5, **sampling))
    text += "".join(session.resume(7))
    assert text == whole
    assert session.stats.generated_tokens == 12


def test_only_unfinished_answers_resume(make):
    runner = make()
    session = Session(runner)
    with pytest.raises(UserError, match="no unfinished answer"):
        session.resume()
    runner.script = [300, END]
    list(session.ask("Hi"))
    with pytest.raises(UserError, match="no unfinished answer"):
        session.resume()


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_a_fork_goes_on_alike_and_alone(make, sampling):
    session = Session(make())
    answer = session.ask("Hi", max_new_tokens=10, **sampling)
    start = [next(answer) for _ in range(4)]
    twin = session.fork()
    rest = list(twin.resume())
    assert rest == list(answer) and len(start) == 4
    list(twin.ask("Something else", max_new_tokens=5))
    before = session.fork()
    list(twin.ask("And more", max_new_tokens=5))
    states_equal(session, before)


@pytest.mark.parametrize("interrupt", [False, True])
def test_sessions_on_one_runner_do_not_disturb_each_other(make, interrupt):
    """The runner has one logits buffer for all of them."""
    alone = "".join(Session(make()).ask("One", max_new_tokens=8))
    runner = make()
    session, other = Session(runner), Session(runner)
    answer, said = session.ask("One", max_new_tokens=8), ""
    if interrupt:
        said = next(answer)
        runner.during_step = lambda: signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            next(answer)
        runner.during_step = None
    list(other.ask("Something else", max_new_tokens=3))
    assert said + "".join(answer) == alone


def test_the_penalty_counts_the_prompt(make):
    runner = make()
    session = Session(runner)
    answer = session.ask("One", max_new_tokens=3, repetition_penalty=1.2)
    assert set(np.flatnonzero(answer.generation.sampler.seen)) == set(runner.calls[0])


def test_a_fork_of_an_unasked_session(make):
    twin = Session(make(), system="s").fork()
    assert twin.stats.turn == 0 and "".join(twin.ask("Hi", max_new_tokens=2))


def test_reset_begins_anew(make):
    session = Session(make(), system="s")
    first = "".join(session.ask("Hi", max_new_tokens=5))
    "".join(session.ask("More", max_new_tokens=5))
    session.reset()
    assert session.stats.turn == 0
    assert "".join(session.ask("Hi", max_new_tokens=5)) == first


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_context", [None, 400])
@pytest.mark.parametrize("sampling", [{}, SAMPLED])
@pytest.mark.parametrize("said", [0, 1, 4, 9])
def test_saved_and_loaded_it_goes_on_exactly(make, tmp_path, sampling, said, max_context):
    session = Session(make(max_context=max_context), system="s")
    list(session.ask("One", [picture(1)], max_new_tokens=6, **sampling))
    answer = session.ask("Two", max_new_tokens=9, **sampling)
    for _ in range(said):
        next(answer)
    session.save(tmp_path / "s")
    twin = Session.load(tmp_path / "s", make(max_context=max_context))
    states_equal(session, twin)
    assert list(answer) == (list(twin.resume()) if said < 9 else [])
    for each in (session, twin):
        list(each.ask("Three", [picture(2)], max_new_tokens=6, **sampling))
    states_equal(session, twin)
    np.testing.assert_array_equal(position(session).logits, position(twin).logits)
    assert session.stats.context_tokens == twin.stats.context_tokens


def test_after_an_interrupt_it_saves_and_goes_on_exactly(make, tmp_path):
    runner = make()
    session = Session(runner)
    answer = session.ask("One", max_new_tokens=9, **SAMPLED)
    next(answer)
    runner.during_step = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        next(answer)
    runner.during_step = None
    session.save(tmp_path / "s")
    twin = Session.load(tmp_path / "s", make())
    assert list(twin.resume()) == list(answer)
    states_equal(session, twin)


def test_an_unasked_session_saves_too(make, tmp_path):
    Session(make(), system="s").save(tmp_path / "s")
    twin = Session.load(tmp_path / "s", make())
    assert twin.system == "s" and twin.stats.turn == 0
    assert "".join(twin.ask("Hi", max_new_tokens=3)) == "".join(
        Session(make(), system="s").ask("Hi", max_new_tokens=3)
    )


def test_the_file_says_which_template_it_was_written_in(make, tmp_path):
    session = Session(make(), template="chatml")
    list(session.ask("Hi", max_new_tokens=2))
    session.save(tmp_path / "s")
    assert Session.load(tmp_path / "s", make()).template.name == "chatml"


def test_other_models_and_quantisations(make, tmp_path):
    session = Session(make())
    list(session.ask("Hi", max_new_tokens=2))
    session.save(tmp_path / "s")
    with pytest.raises(UserError, match="held with model a{64}, and the model here is b{64}"):
        Session.load(tmp_path / "s", make(model_id="b" * 64))
    with pytest.raises(UserError, match="allow_other_quant=True"):
        Session.load(tmp_path / "s", make(quant="int8"))
    twin = Session.load(tmp_path / "s", make(quant="int8"), allow_other_quant=True)
    assert "".join(twin.ask("More", max_new_tokens=3))


# --- prefix snapshots ----------------------------------------------------------------------------


def test_another_question_about_the_same_picture_does_not_read_it_again(make):
    runner, cache = make(), PrefixCache()
    plain = make()
    image = picture(3, (56, 28))
    for question in ("What is it?", "How many?"):
        runner.ids_read = 0
        session = Session(runner, prefix_cache=cache)
        text = "".join(session.ask(question, [image], max_new_tokens=6))
        assert text == "".join(Session(plain).ask(question, [image], max_new_tokens=6))
        stats = session.stats
        assert stats.prompt_tokens + stats.steps - stats.reused_tokens == runner.ids_read
    assert stats.reused_tokens > 12 and runner.ids_read < 80


def test_later_turns_take_nothing_from_the_cache(make):
    runner, cache = make(), PrefixCache()
    session = Session(runner, prefix_cache=cache)
    list(session.ask("Hi", max_new_tokens=3))
    kept = len(cache)
    list(session.ask("Hi", [picture(1)], max_new_tokens=3))
    assert session.stats.reused_tokens == 0 and len(cache) == kept


# --- figures, memory, surface --------------------------------------------------------------------


def test_stats(make):
    session = Session(make())
    assert session.stats.turn == 0 and session.stats.tokens_per_s == 0
    answer = session.ask("Hi", max_new_tokens=5)
    stats = session.stats
    assert stats.prompt_tokens == stats.context_tokens > 0 and stats.generated_tokens == 0
    list(answer)
    assert (stats.generated_tokens, stats.steps) == (5, 4)
    assert stats.state_bytes == session.runner.new_state().nbytes
    assert 0 < stats.prefill_s <= stats.first_token_s
    assert stats.decode_s > 0 and stats.tokens_per_s == 4 / stats.decode_s
    assert stats.prefill_tokens_per_s == stats.prompt_tokens / stats.prefill_s


def test_memory_is_the_same_after_100_and_after_20000_tokens(folder):
    runner = FakeRunner(folder)
    runner.log_steps = False
    answer = Session(runner).ask("Go on", max_new_tokens=20_000, temperature=2.0)
    answer.generation.stop_ids = frozenset()
    process = psutil.Process(os.getpid())
    for _ in range(100):
        next(answer)
    memory, state = process.memory_info().rss, answer.position.state.nbytes
    for _ in answer:
        pass
    assert answer.stats.generated_tokens == 20_000
    assert answer.position.state.nbytes == state
    assert process.memory_info().rss - memory < 2 << 20


def test_the_public_names(make):
    assert mm.Session is Session and mm.stream is stream and mm.UserError is UserError
    assert {"open_bundle", "load_model", "Config", "load_config", "Sampler"} <= set(dir(mm))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mm.nonsense
    pieces = mm.stream(make(), "What is this?", images=[picture(1)], max_new_tokens=4, seed=0)
    assert "".join(pieces)
