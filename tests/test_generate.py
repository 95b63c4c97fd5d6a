"""The decode loop on its own: what it gives, where it leaves the state, what interrupts it."""

import os
import signal
import threading

import numpy as np
import psutil
import pytest

from fake_runner import FakeRunner
from mmmamba_edge.errors import UserError
from mmmamba_edge.generate import generate_ids, interrupts_wait
from mmmamba_edge.sampling import Sampler

PROMPT = np.array([7, 8, 9], np.int64)


def begin(runner, sampler=None, max_new_tokens=10, stop_ids=()):
    logits, state = runner.prefill(PROMPT)
    return generate_ids(runner, logits, state, sampler or Sampler(), max_new_tokens, stop_ids)


def greedy_by_rereading(runner, count):
    """The same ids the slow way: the whole history again for every token."""
    ids = PROMPT.tolist()
    for _ in range(count):
        logits, _ = runner.prefill(np.array(ids, np.int64))
        ids.append(int(np.argmax(logits)))
    return ids[len(PROMPT) :]


def test_an_image_token_is_never_said():
    """Said, it would stand for a picture that is not there, and block the conversation."""
    runner = FakeRunner()
    image = runner.config.img_context_token_id
    logits, state = runner.prefill(PROMPT)
    logits[image] = logits.max() + 100
    ids = list(generate_ids(runner, logits, state, Sampler(), 5))
    assert len(ids) == 5 and image not in ids


@pytest.mark.parametrize("max_context", [None, 64])
def test_it_equals_rereading_the_whole_history(max_context):
    runner = FakeRunner(max_context=max_context)
    ids = list(begin(runner, max_new_tokens=12))
    assert ids == greedy_by_rereading(FakeRunner(max_context=max_context), 12)
    assert len(set(ids)) > 3  # else the comparison would prove little


def test_a_limit_leaves_the_last_token_said_but_not_read():
    runner = FakeRunner()
    answer = begin(runner, max_new_tokens=5)
    ids = list(answer)
    assert answer.reason == "length" and len(ids) == 5
    assert answer.position.pending == ids[-1]
    assert answer.position.state.tokens == runner.ids_read == len(PROMPT) + 4


def test_a_stop_token_is_neither_given_nor_read():
    runner = FakeRunner()
    runner.script = [20, 21, 2]
    answer = begin(runner, stop_ids={2, 3})
    assert list(answer) == [20, 21]
    assert answer.reason == "stop" and answer.position.pending is None
    assert runner.ids_read == len(PROMPT) + 2
    assert list(answer) == []  # an ended answer stays ended


def test_a_stop_token_at_once_is_an_empty_answer():
    runner = FakeRunner()
    runner.script = [2]
    answer = begin(runner, stop_ids={2})
    assert list(answer) == [] and answer.reason == "stop"


def test_leaving_the_loop_early_loses_nothing():
    whole = list(begin(FakeRunner(), max_new_tokens=9))
    answer = begin(FakeRunner(), max_new_tokens=9)
    first = []
    for token in answer:
        first.append(token)
        if len(first) == 4:
            break
    assert first + list(answer) == whole


def test_a_hybrid_ends_the_answer_where_its_context_ends():
    runner = FakeRunner(max_context=6)
    answer = begin(runner, max_new_tokens=50)
    ids = list(answer)
    # The context holds the prompt and three tokens; the fourth is said, and not read.
    assert len(ids) == 4 and answer.reason == "context"
    assert answer.position.state.tokens == 6


def test_an_interrupt_waits_for_the_end_of_the_step():
    runner = FakeRunner()
    whole = list(begin(FakeRunner(), max_new_tokens=8))
    answer = begin(runner, max_new_tokens=8)
    got = [next(answer), next(answer)]
    runner.during_step = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        next(answer)
    runner.during_step = None
    assert answer.position.pending is None  # the step was finished, and counted
    assert answer.position.state.tokens == len(PROMPT) + 2
    assert got + list(answer) == whole
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_the_wait_an_interrupted_step_would_spoil_the_state():
    """The fake runner is as unkind as the test above supposes."""
    runner = FakeRunner()
    _, state = runner.prefill(PROMPT)
    before = state.copy()
    runner.during_step = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        runner.step(20, state)
    assert state.tokens == before.tokens
    assert not np.array_equal(state.held["0.ssm"], before.held["0.ssm"])


def test_other_threads_need_no_wait_and_get_none():
    failures = []

    def body():
        try:
            with interrupts_wait():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert failures == []


def test_an_ignored_interrupt_stays_ignored():
    old = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_wait():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, old)


def test_positions_copy_independently():
    runner = FakeRunner()
    answer = begin(runner, max_new_tokens=4)
    next(answer)
    position = answer.position.copy()
    tokens, logits = position.state.tokens, position.logits.copy()
    list(answer)
    assert position.state.tokens == tokens
    np.testing.assert_array_equal(position.logits, logits)


@pytest.mark.parametrize("bad", [0, -3, 2.5, None])
def test_max_new_tokens_out_of_range(bad):
    with pytest.raises(UserError, match="max_new_tokens is .*; expected a whole number above 0"):
        begin(FakeRunner(), max_new_tokens=bad)


def test_memory_is_the_same_after_100_and_after_20000_tokens():
    runner = FakeRunner(vocab_size=128)
    sampler = Sampler(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
    answer = begin(runner, sampler, max_new_tokens=20_000)
    process = psutil.Process(os.getpid())
    for _ in range(100):
        next(answer)
    memory, state = process.memory_info().rss, answer.position.state.nbytes
    for _ in answer:
        pass
    assert answer.given == 20_000
    assert answer.position.state.nbytes == state
    assert process.memory_info().rss - memory < 2 << 20
