"""`bench`: its figures are of the right kind, and add up; speeds are not tested."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from exported import bundle
from mmmamba_edge import bench
from mmmamba_edge.bench import as_text, measure, physical_cores, read_bandwidth
from mmmamba_edge.bundle import DEFAULT_BUNDLE, read_manifest
from mmmamba_edge.cli import main
from mmmamba_edge.manifest import is_cache


@pytest.fixture(scope="module")
def facts():
    return measure(
        DEFAULT_BUNDLE, prompt_tokens=16, new_tokens=20, contexts=[0, 40], tiles=[1], repeat=1
    )


def test_figures_add_up(facts):
    manifest = read_manifest(DEFAULT_BUNDLE)
    assert facts["state_bytes"] == manifest.state_bytes
    assert facts["bundle_bytes"] == sum(file.bytes for file in manifest.files.values())
    decoder = manifest.files["decoder.bin"].bytes + manifest.files["decoder.onnx"].bytes
    assert [row["context"] for row in facts["decode"]] == [0, 40]
    for row in facts["decode"]:
        assert row["bytes_per_token"] == decoder + 2 * manifest.state_bytes
        assert 0 < row["median_s"] <= row["p95_s"]
        assert row["tokens_per_s"] == pytest.approx(1 / row["median_s"])
        assert 0 < row["share_of_bandwidth"] < 20  # a small model lives in the cache
        # Linux counts the two at different moments.
        assert facts["bundle_bytes"] < row["rss_bytes"] <= 1.05 * facts["peak_rss_bytes"]
    (picture,) = facts["pictures"]
    assert picture["tokens"] == manifest.model.tokens_per_tile + 16
    assert facts["text"]["cold_first_token_s"] > facts["open_s"]
    json.dumps(facts)


def test_the_table_names_what_it_measured(facts):
    text = as_text(facts)
    assert re.search(r"linear, int8, \d+ threads of", text)
    assert "after a picture of 1 tile (212 tokens)" in text
    assert re.search(r"\n +40 +[\d,.]+ +[\d.]+ +[\d.]+ +\d+ +\d+% of [\d.]+ GB/s", text)


def test_each_context_goes_on_from_the_one_before(monkeypatch):
    """Contexts are really read, once; decoding leaves no trace in them."""
    read = []
    plain = bench._read_to

    def watched(runner, state, rng, context, say):
        state = plain(runner, state, rng, context, say)
        read.append(state.tokens)
        return state

    monkeypatch.setattr(bench, "_read_to", watched)
    measure(DEFAULT_BUNDLE, prompt_tokens=4, new_tokens=3, contexts=[0, 7, 30], tiles=[], repeat=1)
    assert read == [0, 7, 30]


def test_the_probe_reads_memory():
    assert read_bandwidth(1, rounds=1) > 1e8
    assert 1 <= physical_cores() <= 4096


def test_command(tmp_path, capsys):
    picture = tmp_path / "plot.png"
    args = [
        "bench",
        "--context",
        "0,8",
        "--new-tokens",
        "3",
        "--prompt-tokens",
        "4",
        "--repeat",
        "1",
    ]
    assert main([*args, "--json", "--plot", str(picture)]) == 0
    assert len(json.loads(capsys.readouterr().out)["decode"]) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--context", "8,0"], "--context '8,0': expected rising numbers from 0 on"),
        (["--context", "lots"], "--context 'lots': expected numbers like 0,1024,8192"),
        (["--tiles", "0"], "--tiles '0': expected rising numbers from 1 on"),
        (["--repeat", "0"], "--repeat: expected a whole number above 0"),
    ],
)
def test_bad_options(more, message, capsys):
    assert main(["bench", *more]) == 2
    assert message in capsys.readouterr().err


def test_text_never_asks_for_pixels():
    class Stub:
        config = read_manifest(DEFAULT_BUNDLE).model

    ids = bench._text_ids(Stub(), np.random.default_rng(0), 5000)
    assert not (ids == Stub.config.img_context_token_id).any() and ids.max() < 1024


def test_peak_memory_is_this_process_s_own():
    """Not what the one that started it held: getrusage counts that as well."""
    held = np.ones(300 << 20, np.uint8)
    code = "from mmmamba_edge.bench import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 200 << 20 < held.nbytes


def test_a_cache_is_read_as_far_as_it_is_filled():
    folder = bundle("small", "hybrid")
    manifest = read_manifest(folder)
    caches = sum(tensor.nbytes for tensor in manifest.state if is_cache(tensor.name))
    rest = 2 * (manifest.state_bytes - caches)
    assert manifest.max_context and caches
    assert bench._state_traffic(folder, 0) == rest
    assert bench._state_traffic(folder, manifest.max_context // 2) == rest + caches // 2
