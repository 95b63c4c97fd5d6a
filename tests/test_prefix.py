"""Prefix snapshots: never the wrong one, never more than the limit, and the same answers."""

import os
import stat

import numpy as np
import pytest

from fake_runner import IMAGE, FakeRunner
from mmmamba_edge.errors import UserError
from mmmamba_edge.prefix import PrefixCache, prefix_key
from mmmamba_edge.state import SESSION, read_tensors

IDS = np.array([7, 8, 9, 10], np.int64)


@pytest.fixture
def runner():
    return FakeRunner()


def prompt(*pictures, question=(30, 31)):
    """Ids of an opening of 3 tokens, pictures of so many tiles, and a question."""
    ids = [1, 2, 3]
    for tiles in pictures:
        ids += [11, *[IMAGE] * (4 * tiles), 12]
    return np.array([*ids, *question], np.int64)


def pixels(*seeds):
    """One tile for each seed."""
    rng = [np.random.default_rng(seed) for seed in seeds]
    return np.stack([r.standard_normal((3, 28, 28)) for r in rng]).astype(np.float32)


def read(cache, runner, ids, images=None):
    """Prefill through the cache: the logits, what was reused, what the runner had to read."""
    runner.ids_read = 0
    logits, state, reused = cache.prefill(runner, ids, images, opening=3)
    assert state.tokens == len(ids) and reused + runner.ids_read == len(ids)
    return logits.copy(), reused


@pytest.mark.parametrize("max_context", [None, 64])
def test_another_question_about_the_same_picture_reads_only_the_question(max_context):
    runner = FakeRunner(max_context=max_context)
    cache, tiles = PrefixCache(), pixels(1, 2, 3)
    ids, other = prompt(2, 1), prompt(2, 1, question=(40, 41, 42))
    logits, reused = read(cache, runner, ids, tiles)
    assert reused == 0
    np.testing.assert_array_equal(logits, runner.prefill(ids, tiles)[0])
    logits, reused = read(cache, runner, other, tiles)
    assert reused == len(other) - 4  # all but </img> and the question
    np.testing.assert_array_equal(
        logits, FakeRunner(max_context=max_context).prefill(other, tiles)[0]
    )


def test_what_is_shared_is_reused_and_no_more(runner):
    cache = PrefixCache()
    read(cache, runner, prompt(1, 1), pixels(1, 2))
    assert read(cache, runner, prompt(1, 1), pixels(1, 9))[1] == 3 + 5  # the first picture
    assert read(cache, runner, prompt(1, 1), pixels(9, 2))[1] == 3  # the opening
    assert read(cache, runner, prompt(2), pixels(1, 2))[1] == 3
    assert read(cache, runner, prompt(), None)[1] == 3
    other = prompt()
    other[0] = 99
    assert read(cache, runner, other, None)[1] == 0
    assert read(cache, FakeRunner(model_id="b" * 64), prompt(), None)[1] == 0


def test_without_an_opening_there_is_nothing_to_keep(runner):
    cache = PrefixCache()
    _, state, reused = cache.prefill(runner, IDS)
    assert (state.tokens, reused, len(cache)) == (4, 0, 0)


def test_progress_counts_the_whole_prompt(runner):
    told, ids = [], prompt(2, 1)
    PrefixCache().prefill(
        runner, ids, pixels(1, 2, 3), opening=3, progress=lambda done, of: told.append((done, of))
    )
    assert told[-1] == (len(ids), len(ids))
    assert told == sorted(told) and {of for _, of in told} == {len(ids)}


def test_a_snapshot_that_does_not_fit_is_read_anew(runner, caplog):
    cache = PrefixCache()
    key = prefix_key(runner, "", prompt()[:3])
    state = runner.new_state()
    state.held["0.ssm"] = np.zeros((1, 1, 1), np.float32)
    cache.put(key, state)
    assert read(cache, runner, prompt())[1] == 0
    assert "0.ssm has shape" in caplog.text


def test_keys_cover_model_quant_history_ids_and_pixels(runner):
    pixels = np.zeros((1, 3, 4, 4), np.float32)
    other_pixels = pixels.copy()
    other_pixels[0, 2, 3, 3] = 1e-6
    keys = [
        prefix_key(runner, "", IDS),
        prefix_key(FakeRunner(model_id="b" * 64), "", IDS),
        prefix_key(FakeRunner(quant="int8"), "", IDS),
        prefix_key(runner, "0" * 64, IDS),
        prefix_key(runner, "", IDS[:-1]),
        prefix_key(runner, "", IDS, pixels),
        prefix_key(runner, "", IDS, other_pixels),
        prefix_key(runner, "", IDS, pixels.reshape(1, 3, 2, 8)),
    ]
    assert len(set(keys)) == len(keys)
    assert prefix_key(runner, "", IDS.copy(), pixels.copy()) == keys[5]


def test_a_snapshot_is_a_copy(runner):
    cache = PrefixCache()
    _, state = runner.prefill(IDS)
    before = state.copy()
    cache.put("k", state)
    runner.step(3, state)
    snapshot = cache.get("k")
    assert snapshot is not None and snapshot.tokens == len(IDS)
    for name, array in before.arrays().items():
        np.testing.assert_array_equal(snapshot.arrays[name], array)


def test_the_least_lately_used_goes_first_and_the_limit_holds(runner):
    size = runner.new_state().nbytes
    cache = PrefixCache(max_bytes=2 * size)
    cache.put("a", runner.new_state())
    cache.put("b", runner.new_state())
    cache.get("a")
    cache.put("c", runner.new_state())
    assert cache.get("b") is None and cache.get("a") and cache.get("c")
    assert cache.nbytes == 2 * size and len(cache) == 2


def test_a_state_larger_than_the_limit_is_not_kept(runner):
    cache = PrefixCache(max_bytes=100)
    cache.put("a", runner.new_state())
    assert len(cache) == 0 and cache.get("a") is None


def test_snapshots_outlive_the_process_in_a_folder(runner, tmp_path):
    folder = tmp_path / "snapshots"
    _, state = runner.prefill(IDS)
    PrefixCache(folder=folder).put("k", state)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "prefix-k.safetensors").stat().st_mode) == 0o600
    snapshot = PrefixCache(folder=folder).get("k")
    assert snapshot is not None and snapshot.tokens == len(IDS)
    np.testing.assert_array_equal(snapshot.arrays["0.ssm"], state.held["0.ssm"])
    (folder / "prefix-k.safetensors").write_bytes(b"spoiled")
    assert PrefixCache(folder=folder).get("k") is None


def test_the_folder_keeps_to_the_limit_too(runner, tmp_path):
    _, state = runner.prefill(IDS)
    probe = PrefixCache(folder=tmp_path / "probe")
    probe.put("k", state)
    size = (tmp_path / "probe" / "prefix-k.safetensors").stat().st_size
    cache = PrefixCache(max_bytes=2 * size + size // 2, folder=tmp_path / "f")
    (tmp_path / "f").mkdir()
    (tmp_path / "f/photos.safetensors").write_bytes(b"not the cache's")
    for time, key in enumerate("abc"):
        cache.put(key, state)
        os.utime(tmp_path / "f" / f"prefix-{key}.safetensors", (time, time))
    cache.put("d", state)
    names = sorted(p.name for p in (tmp_path / "f").iterdir())
    assert names == ["photos.safetensors", "prefix-c.safetensors", "prefix-d.safetensors"]


def test_what_was_read_from_the_folder_lately_stays_in_it(runner, tmp_path):
    _, state = runner.prefill(IDS)
    cache = PrefixCache(folder=tmp_path)
    for time, key in enumerate("ab"):
        cache.put(key, state)
        os.utime(tmp_path / f"prefix-{key}.safetensors", (time, time))
    size = (tmp_path / "prefix-a.safetensors").stat().st_size
    later = PrefixCache(max_bytes=2 * size + size // 2, folder=tmp_path)
    assert later.get("a") is not None
    later.put("c", state)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["prefix-a", "prefix-c"]


def test_an_unwritable_folder_costs_a_warning_not_the_answer(runner, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = PrefixCache(folder=tmp_path / "file")
    cache.put("k", runner.new_state())
    assert cache.get("k") is not None
    assert "prefix snapshots are kept in memory only" in caplog.text


def test_a_snapshot_is_no_session(runner, tmp_path):
    PrefixCache(folder=tmp_path).put("k", runner.new_state())
    with pytest.raises(UserError, match="not a file of kind 'mmmamba-edge session'"):
        read_tensors(tmp_path / "prefix-k.safetensors", SESSION)
