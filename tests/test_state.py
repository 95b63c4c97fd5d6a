"""Session files: exact, private, atomic, and picky about what they read."""

import json
import os
import stat
import struct
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from fake_runner import FakeRunner
from mmmamba_edge.errors import UserError
from mmmamba_edge.state import (
    SESSION,
    Record,
    load_session,
    save_session,
    write_tensors,
)

IDS = np.array([7, 8, 9, 10], np.int64)


@pytest.fixture
def runner():
    return FakeRunner()


def record_of(runner, state, **changes):
    record = Record(runner.model_id, runner.quant, "plain", state.tokens, {"left": 3})
    return replace(record, **changes)


@pytest.fixture
def saved(runner, tmp_path):
    """A session file, and the state in it."""
    _, state = runner.prefill(IDS)
    path = tmp_path / "talk.safetensors"
    save_session(path, record_of(runner, state), state, {"more": np.arange(5, dtype=np.float32)})
    return path, state


@pytest.mark.parametrize("max_context", [None, 32])
def test_a_session_file_gives_back_every_bit(max_context, tmp_path):
    runner = FakeRunner(max_context=max_context)
    _, state = runner.prefill(IDS)
    record = record_of(runner, state, system="你好")
    extra = {"seen": np.array([1, 0, 1], np.uint8)}
    save_session(tmp_path / "s", record, state, extra)
    found, twin, more = load_session(tmp_path / "s", runner)
    assert found == record and twin.tokens == state.tokens
    np.testing.assert_array_equal(more["seen"], extra["seen"])
    assert sorted(twin.arrays()) == sorted(state.arrays())
    for name, array in state.arrays().items():
        np.testing.assert_array_equal(twin.arrays()[name], array, err_msg=name)
    logits, _ = runner.step(11, state)
    wanted = logits.copy()
    np.testing.assert_array_equal(runner.step(11, twin)[0], wanted)


def test_a_state_that_has_read_nothing(tmp_path):
    runner = FakeRunner(max_context=8)  # its keys have no entries: arrays of no bytes
    save_session(tmp_path / "s", record_of(runner, runner.new_state()), runner.new_state(), {})
    assert load_session(tmp_path / "s", runner)[1].tokens == 0


def test_the_file_is_plain_safetensors_and_private(saved):
    path, state = saved
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with safe_open(path, framework="numpy") as file:
        assert {f"state.{name}" for name in state.arrays()} | {"more"} == set(file.keys())
        assert file.metadata()["kind"] == SESSION
    header = struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert header % 8 == 0


def test_a_session_file_does_not_grow_with_the_conversation(runner, tmp_path):
    sizes = []
    for count in (4, 400):
        _, state = runner.prefill(np.arange(10, 10 + count, dtype=np.int64))
        save_session(tmp_path / "s", record_of(runner, state, tokens=1000), state, {})
        sizes.append((tmp_path / "s").stat().st_size)
    assert sizes[0] == sizes[1]


def test_an_existing_file_becomes_private_and_a_link_stays_a_link(runner, tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save_session(tmp_path / "link", record_of(runner, runner.new_state()), runner.new_state(), {})
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o600
    load_session(tmp_path / "link", runner)


def test_a_failed_write_leaves_the_old_file_and_no_other(saved, runner, monkeypatch):
    path, state = saved
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"talk.safetensors: cannot be written \(No space left"):
        save_session(path, record_of(runner, state), state, {})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_folder_that_is_not_there(runner, tmp_path):
    with pytest.raises(UserError, match=r"missing/s: cannot be written \(No such file"):
        save_session(tmp_path / "missing" / "s", record_of(runner, runner.new_state()),
                     runner.new_state(), {})  # fmt: skip


def test_a_folder_in_the_place_of_the_file(runner, tmp_path):
    with pytest.raises(UserError, match="exists and is not a file"):
        save_session(tmp_path, record_of(runner, runner.new_state()), runner.new_state(), {})
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused_and_both_are_named(saved):
    other = FakeRunner(model_id="b" * 64)
    with pytest.raises(UserError, match="held with model a{64}, and the model here is b{64}"):
        load_session(saved[0], other)
    with pytest.raises(UserError, match="held with model"):
        load_session(saved[0], other, allow_other_quant=True)


def test_another_quantisation_only_when_asked(saved):
    path, state = saved
    other = FakeRunner(quant="int4")
    with pytest.raises(UserError, match="'none' weights .* these are 'int4'.*--allow-other-quant"):
        load_session(path, other)
    assert load_session(path, other, allow_other_quant=True)[1].tokens == state.tokens


def test_a_state_of_other_shapes_names_the_file_and_the_array(runner, tmp_path):
    state = runner.new_state()
    state.held["0.ssm"] = np.zeros((2, 8, 9), np.float32)
    save_session(tmp_path / "s", record_of(runner, state), state, {})
    with pytest.raises(UserError, match=r"s: state: 0.ssm has shape \(2, 8, 9\)"):
        load_session(tmp_path / "s", runner)


def test_a_newer_format(saved, runner):
    path, _ = saved
    path.write_bytes(path.read_bytes().replace(b'"version": "1"', b'"version": "3"'))
    with pytest.raises(UserError, match="session format 3; this release reads formats 1 and 2"):
        load_session(path, runner)


def test_a_truncated_file(saved, runner):
    path, _ = saved
    whole = path.read_bytes()
    for size in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a mmmamba-edge session, or a truncated one"):
            load_session(path, runner)


def test_a_flipped_bit_anywhere_is_noticed(saved, runner):
    path, _ = saved
    whole = path.read_bytes()
    start = whole.index(b'"record"')
    for place in (start + 30, len(whole) - 1, len(whole) - 300):
        spoiled = bytearray(whole)
        spoiled[place] ^= 1
        path.write_bytes(spoiled)
        with pytest.raises(UserError, match="talk.safetensors: (damaged|not a)"):
            load_session(path, runner)


def test_files_that_are_no_session(runner, tmp_path):
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "weights")
    with pytest.raises(UserError, match="not a file of kind 'mmmamba-edge session'"):
        load_session(tmp_path / "weights", runner)
    with pytest.raises(UserError, match="nothing: not found"):
        load_session(tmp_path / "nothing", runner)
    with pytest.raises(UserError, match="not a mmmamba-edge session"):
        load_session(tmp_path, runner)
    write_tensors(tmp_path / "odd", SESSION, {}, {"record": json.dumps({"model_id": "x"})})
    with pytest.raises(UserError, match="not a session file, or a damaged one"):
        load_session(tmp_path / "odd", runner)
