"""Export: what is in the graphs, that verification notices a single wrong weight, bad options."""

import argparse
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import golden
from exported import bundle, case, checkpoint, small_model
from fake_runner import tiny_config
from mmmamba_edge.bundle import read_manifest, verify_files, write_manifest
from mmmamba_edge.config import Config, RopeScaling, StackConfig
from mmmamba_edge.distill.scratch import from_scratch
from mmmamba_edge.errors import CheckFailed, UserError
from mmmamba_edge.export import command, verify
from mmmamba_edge.export.reference import read_streamed
from mmmamba_edge.export.source import context_limit
from mmmamba_edge.export.to_onnx import DIALECTS, export_onnx
from mmmamba_edge.export.weights import Weights
from mmmamba_edge.model.checkpoints import load_model, open_checkpoint, save_model
from mmmamba_edge.quant.codes import Codes, quantize_int4, quantize_int8, take_rows, unpack_blocks
from mmmamba_edge.quant.schemes import SCHEMES, WIDE, kept_because
from mmmamba_edge.runtimes.onnxruntime_runner import OnnxRuntimeRunner
from mmmamba_edge.runtimes.torch_runner import TorchRunner

DIALECT_NAMES = ("com.microsoft", "standard")


def initializers(folder: Path, graph: str) -> dict[str, np.ndarray]:
    """Every weight of a graph, read from the files."""
    model = onnx.load(folder / f"{graph}.onnx")
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def operators(folder: Path, graph: str) -> set[tuple[str, str]]:
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    return {(node.domain, node.op_type) for node in model.graph.node}


# --- what is in a bundle -------------------------------------------------------------------------


def test_the_two_dialects_are_two():
    """Anti-vacuity: both pass the goldens, by different operators."""
    fused = operators(bundle("release_plain", "hybrid"), "decoder")
    plain = operators(bundle("release_plain", "hybrid", ops="standard"), "decoder")
    ours = {op for domain, op in fused if domain == "com.microsoft"}
    assert ours >= {"LinearAttention", "QuickGelu", "GroupQueryAttention"}
    assert {domain for domain, _ in plain} == {""}
    assert {op for _, op in plain} >= {"LinearAttention", "CausalConvWithState", "Attention"}


@pytest.mark.parametrize("quant", SCHEMES)
def test_plain_onnx_passes_the_checker(quant):
    folder = bundle("small", "hybrid", quant, "standard")
    for name in ("vision", "embed", "decoder"):
        onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)


@pytest.mark.parametrize("ops", DIALECT_NAMES)
def test_names_are_the_contract(ops):
    folder = bundle("release_plain", "hybrid", ops=ops)
    found = {}
    for name in ("vision", "embed", "decoder"):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        for side in (graph.input, graph.output):
            for value in side:
                dims = value.type.tensor_type.shape.dim
                found[value.name] = [d.dim_param or d.dim_value for d in dims]
    kinds = read_manifest(folder).model.layer_types
    expected = {
        "pixel_values": ["tiles", 3, 56, 56],
        "vision_embeds": ["tiles", 4, 64],
        "input_ids": [1, "tokens"],
        "inputs_embeds": [1, "tokens", 64],
        "logits_to_keep": [1],
        "past_length": [1],
        "logits": [1, "kept", 151],
    }
    for i, kind in enumerate(kinds):
        shapes = {"key": [1, 2, 256, 16], "value": [1, 2, 256, 16]}
        if kind == "mamba2":
            shapes = {"conv": [1, 128, 1], "ssm": [1, 4, 16, 16]}
        for side in ("past", "present"):
            expected |= {f"{side}_state.{i}.{name}": s for name, s in shapes.items()}
    assert found == expected
    linear = onnx.load(bundle("release_plain", "linear") / "decoder.onnx", load_external_data=False)
    assert "past_length" not in [value.name for value in linear.graph.input]


def test_dead_weights_are_dropped():
    folder = bundle("release_plain", "linear")
    stored = sum(
        array.size
        for graph in ("vision", "embed", "decoder")
        for name, array in initializers(folder, graph).items()
        if not name.startswith("constant.")
    )
    source = open_checkpoint(checkpoint("release_plain", "linear"))
    size = {name: source.get(name).numel() for name in source.names()}
    hidden = source.config.hidden_size
    dead = size["language_model.model.tok_embeddings.weight"] + 2 * hidden  # class, position 0
    assert stored == sum(size.values()) - dead


def test_weights_are_laid_out_for_mapping(monkeypatch, tmp_path):
    monkeypatch.setattr("mmmamba_edge.export.graph_writer.LARGE", 1 << 15)
    export_onnx(checkpoint("small", "linear"), tmp_path / "out")
    offsets = []
    for name in ("vision", "embed", "decoder"):
        graph = onnx.load(tmp_path / f"out/{name}.onnx", load_external_data=False).graph
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                entry = {e.key: e.value for e in tensor.external_data}
                offset, length = int(entry["offset"]), int(entry["length"])
                assert offset % (4096 if length >= 1 << 15 else 64) == 0, tensor.name
                offsets.append((entry["location"], offset, length))
    assert {location for location, *_ in offsets} == {"vision.bin", "embed.bin", "decoder.bin"}
    for location in {location for location, *_ in offsets}:  # none overlaps another
        parts = sorted((o, n) for at, o, n in offsets if at == location)
        assert all(a + n <= b for (a, n), (b, _) in zip(parts, parts[1:], strict=False))


def test_same_checkpoint_gives_same_bytes(tmp_path):
    for name in "ab":
        export_onnx(checkpoint("release_plain", "hybrid"), tmp_path / name, quant="int8")
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_tokenizer_files_come_along(tmp_path):
    model = golden.model("release_plain", "linear")
    (tmp_path / "tokenizer.json").write_text("{}")
    folder = save_model(model, tmp_path / "m", extra_files=[tmp_path / "tokenizer.json"])
    manifest = export_onnx(folder, tmp_path / "out")
    assert manifest.tokenizer == ("tokenizer.json",)
    assert (tmp_path / "out/tokenizer/tokenizer.json").read_text() == "{}"
    runner = OnnxRuntimeRunner(tmp_path / "out", threads=1)
    assert runner.tokenizer_dir == tmp_path / "out/tokenizer"


def test_figures_are_in_the_manifest():
    for part, quant, keys in (
        ("release_plain", "none", {"float32"}),
        ("small", "int8", {"exact", "shipped", "float32"}),
    ):
        folder = bundle(part, "hybrid", quant)
        verify_files(folder, hashes=True)
        figures = dict(read_manifest(folder).verification)
        assert ("accuracy" in figures) == (quant != "none")
        figures.pop("accuracy", None)
        assert figures["prompts"] == 4 and figures["pictures"] == 2
        assert set(figures) - {"prompts", "positions", "pictures"} == keys
        for key in keys:
            assert set(figures[key]) == {
                "sqnr_db", "worst_sqnr_db", "max_abs", "mean_kld", "top1", "worst_state_sqnr_db",
            }  # fmt: skip


# --- int8 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ops", DIALECT_NAMES)
@pytest.mark.parametrize("variant", ["linear", "hybrid"])
def test_int8_stays_close_to_float32(variant, ops):
    """Measured 36 dB with 8-bit activations, 38 without (small model); the goal is 30."""
    figures = read_manifest(bundle("small", variant, "int8", ops)).verification
    assert figures["exact"]["worst_sqnr_db"] >= 90
    assert figures["float32"]["sqnr_db"] >= 30
    assert figures["float32"]["mean_kld"] < 1e-3
    runner = OnnxRuntimeRunner(bundle("small", variant, "int8", ops), threads=1)
    model = load_model(checkpoint("small", variant))
    ids = np.random.default_rng(5).integers(8, 300, 50)
    logits, _ = runner.read_all(ids)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)[None])[0].numpy()
    assert verify.sqnr_db(logits, expected) >= 30
    assert verify.sqnr_db(logits, expected) < 60, "it is quantised"


@pytest.mark.parametrize("variant", ["linear", "hybrid", "teacher"])
def test_int8_goldens_compute_what_their_codes_say(variant):
    """Badly conditioned: int8 leaves 15 to 23 dB of them, yet the graph is right to 90."""
    figures = read_manifest(bundle("release_plain", variant, "int8")).verification
    assert figures["exact"]["worst_sqnr_db"] >= 85
    assert figures["float32"]["sqnr_db"] >= 13


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("ops", DIALECT_NAMES)
def test_bundle_holds_the_canonical_codes(ops, quant):
    """P4: bit for bit what quantize_int8 or _int4 makes of it, rows stacked or reordered."""
    folder = bundle("small", "hybrid", quant, ops)
    source = open_checkpoint(checkpoint("small", "hybrid"))

    def codes(*names: str) -> Codes:
        matrix = np.concatenate([source.get(name).numpy() for name in names])
        wide = quant == "int8" or any(name in WIDE for name in names)
        return quantize_int8(matrix) if wide else quantize_int4(matrix, 32)

    def stored(graph: str, name: str, columns: int) -> Codes:
        arrays = initializers(folder, graph)
        data, scales = arrays[f"{name}.codes"], arrays[f"{name}.scales"]
        bits = 4 if scales.ndim == 2 and scales.shape[1] == columns // 32 else 8
        if ops == "com.microsoft":
            # 8 bits repeat a row's scale for each block: columns / 64 or less
            return unpack_blocks(data, scales, columns, bits)
        if bits == 4:
            return Codes(data.astype(np.int8), scales, 4)
        if data.shape[1] != columns:
            data = data.T
        return Codes(data, scales.reshape(-1, 1))

    prefix = "embedding_model.encoder.0.attention."
    names = [f"{prefix}{p}_proj.weight" for p in "vkqg"]
    assert stored("decoder", f"{prefix}vkqg", 128).digest() == codes(*names).digest()
    head = codes("language_model.output.weight")
    assert stored("decoder", "head", 128).digest() == head.digest()
    table = codes("embedding_model.llm_text_embeddings.weight")
    assert stored("embed", "embedding", 128).digest() == table.digest()
    proj = codes("embedding_model.pixel_shuffle_proj.0.weight")
    assert stored("vision", "mlp.0", 512).digest() == proj.digest()
    # attention: rows packed per kv head [q, q, k, v] become all q, all k, all v
    prefix = "embedding_model.encoder.1.attention."
    row = np.arange(256).reshape(2, 4, 32)
    order = np.concatenate([row[:, :2].ravel(), row[:, 2].ravel(), row[:, 3].ravel()])
    packed = take_rows(codes(f"{prefix}wqkv.weight"), order)
    assert isinstance(packed, Codes)
    assert stored("decoder", f"{prefix}qkv", 128).digest() == packed.digest()


def test_delicate_weights_stay_float32():
    arrays = initializers(bundle("small", "linear", "int8"), "decoder")
    model = small_model("linear")
    prefix = "embedding_model.encoder.0.attention."
    dt = arrays[f"{prefix}dt.weight"]
    assert np.array_equal(dt.T, model.get_parameter(f"{prefix}in_proj.weight").detach().numpy())
    kinds = {name: array.dtype for name, array in arrays.items() if not name.startswith("constant")}
    for end in (
        "conv1d.tap0",
        "conv1d.tap1",
        "conv1d.bias",
        "dt_bias",
        ".a",
        "g_norm.weight",
        "ffn_norm.weight",
    ):
        assert {kind for name, kind in kinds.items() if name.endswith(end)} == {np.dtype("f4")}, end
    assert kept_because(f"{prefix}in_proj.weight") and not kept_because(f"{prefix}o_proj.weight")
    assert {str(k) for n, k in kinds.items() if n.endswith(".codes")} == {"uint8"}


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = golden.model("release_plain", "linear")
    name = "language_model.model.layers.0.feed_forward.w2.weight"
    with torch.no_grad():
        model.get_parameter(name)[5, 5] = torch.nan
    folder = save_model(model, tmp_path / "m")
    with pytest.raises(UserError, match=f"{name}: row 5 holds NaN or infinity"):
        export_onnx(folder, tmp_path / "out", quant="int8")
    with pytest.raises(CheckFailed, match="float32 graph against PyTorch: sqnr_db is nan"):
        export_onnx(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# --- verification notices ------------------------------------------------------------------------


def test_every_weight_of_the_bundle_counts(tmp_path):
    """1 % of noise in any single weight of any graph is noticed."""
    source = bundle("release_plain", "hybrid")
    manifest = read_manifest(source)
    prompts = list(verify.make_prompts(manifest.model, manifest.max_context))
    weights = Weights(open_checkpoint(checkpoint("release_plain", "hybrid")), SCHEMES["none"])
    wanted = read_streamed(weights, [(p.ids, p.pixels) for p in prompts])
    good = verify.compare(OnnxRuntimeRunner(source, threads=1), prompts, wanted)
    assert min(good[name] for name in verify._ALL) > verify.EXACT_DB
    rng = np.random.default_rng(0)
    tried = 0
    for graph in ("vision", "embed", "decoder"):
        whole = onnx.load(source / f"{graph}.onnx")
        for tensor in whole.graph.initializer:
            array = onnx.numpy_helper.to_array(tensor)
            if tensor.name.startswith("constant."):
                continue
            copy = onnx.ModelProto()
            copy.CopyFrom(whole)
            spoilt = next(t for t in copy.graph.initializer if t.name == tensor.name)
            noise = rng.standard_normal(array.shape).astype(np.float32)
            spoilt.raw_data = (array * (1 + 0.01 * noise)).astype(np.float32).tobytes()
            twin = Path(shutil.copytree(source, tmp_path / f"{tried}"))
            onnx.save(copy, twin / f"{graph}.onnx")
            write_manifest(twin, replace(manifest, files={}))
            found = verify.compare(OnnxRuntimeRunner(twin, threads=1), prompts[1:3], wanted[1:3])
            assert not all(found[name] >= verify.EXACT_DB for name in verify._ALL), tensor.name
            tried += 1
    assert tried > 40


@pytest.mark.parametrize("quant", SCHEMES)
@pytest.mark.parametrize("name", ["A_log_bias", "w2.weight"])
def test_a_wrong_weight_fails_the_export_and_leaves_nothing(tmp_path, monkeypatch, name, quant):
    right = Weights.tensor

    def wrong(self: Weights, asked: str) -> np.ndarray:
        tensor = right(self, asked)
        if asked.endswith(name) and ".0." in asked and verifying is False:
            tensor = tensor + 0.02 * np.abs(tensor).max()
        return tensor

    verifying = False
    real = verify.read_streamed

    def honest(*args):
        nonlocal verifying
        verifying = True
        return real(*args)

    monkeypatch.setattr(Weights, "tensor", wrong)
    monkeypatch.setattr(Weights, "_rows", lambda self, asked, rows: wrong(self, asked)[rows])
    monkeypatch.setattr(verify, "read_streamed", honest)
    source = open_checkpoint(checkpoint("release_plain", "linear"))
    with pytest.raises(CheckFailed, match=r"verification failed: .*below 75 .*Nothing was written"):
        export_onnx(source, tmp_path / "out", quant=quant)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variant", ["teacher", "linear", "hybrid"])
@pytest.mark.parametrize("part", ["release", "release_plain"])
def test_reading_layer_by_layer_is_the_model(part, variant):
    """The reference of verification: the same logits and states, pictures and all."""
    file = open_checkpoint(checkpoint(part, variant))
    manifest_context = 16 if part == "release" else 256
    prompts = list(verify.make_prompts(file.config, manifest_context))
    pairs = [(p.ids, p.pixels) for p in prompts]
    model = load_model(file)
    runner = TorchRunner(model, model_id="", max_context=manifest_context)
    for (ids, tiles), found in zip(
        pairs, read_streamed(Weights(file, SCHEMES["none"]), pairs), strict=True
    ):
        with torch.inference_mode():
            pixels = None if tiles is None else torch.from_numpy(tiles)
            want = model(torch.from_numpy(ids)[None], pixels)[0].numpy()
        np.testing.assert_allclose(found.logits, want, rtol=0, atol=2e-4)
        states = runner.prefill(ids, tiles)[1].arrays()
        assert states.keys() == found.state.keys()
        for name, array in states.items():
            np.testing.assert_allclose(found.state[name], array, rtol=1e-4, atol=1e-4)


def test_prompts_are_cut_only_where_they_may_be():
    config = read_manifest(bundle("release_plain", "linear")).model
    prompts = list(verify.make_prompts(config, None))
    assert [len(p.ids) for p in prompts] == [1, 37, 5 + 4 + 9, 3 + 8 + 14]
    assert prompts[3].cuts() == [1, 2, 3, 7, *range(11, 25)]
    ids, pixels = prompts[3].part(3, 7)
    assert (ids == config.img_context_token_id).all()
    assert prompts[3].pixels is not None and pixels is not None
    assert np.array_equal(pixels, prompts[3].pixels[:1])
    assert prompts[3].part(0, 3)[1] is None
    assert [len(p.ids) for p in verify.make_prompts(config, 18)] == [1, 17, 18]


@pytest.mark.parametrize("ops", DIALECT_NAMES)
def test_caches_in_half_precision(tmp_path, ops):
    source = checkpoint("small", "hybrid")
    half = export_onnx(source, tmp_path / "half", ops=ops, max_context=256, cache="float16")
    full = export_onnx(source, tmp_path / "full", ops=ops, max_context=256)
    cache = 2 * 2 * 256 * 32  # keys and values of 2 heads
    assert full.state_bytes - half.state_bytes == 2 * cache
    kinds = {t.name.rpartition(".")[2]: t.dtype for t in half.state}
    assert kinds == {"key": "float16", "value": "float16", "conv": "float32", "ssm": "float32"}
    # Worse than float32 only by the rounding of keys and values, and no worse than that.
    assert 70 < half.verification["float32"]["sqnr_db"] < full.verification["float32"]["sqnr_db"]
    # And with keys and values in float32 the same graph is exact.
    assert half.verification["exact"]["worst_sqnr_db"] > verify.EXACT_DB

    runner = OnnxRuntimeRunner(tmp_path / "half")
    ids = np.arange(20, 60)
    whole, _ = runner.prefill(ids)
    whole = whole.copy()
    logits, state = runner.prefill(ids[:30])
    again = runner.load_state(state.arrays(), state.tokens)  # by way of the neutral float32
    for token in ids[30:]:
        logits, again = runner.step(int(token), again)
    np.testing.assert_allclose(logits, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("ops", DIALECT_NAMES)
@pytest.mark.parametrize("quant", ["fp16", "int4"])
def test_quantised_with_caches_in_half_precision(tmp_path, ops, quant):
    made = export_onnx(
        checkpoint("small", "hybrid"), tmp_path / "half", quant=quant, ops=ops, max_context=256,
        cache="float16", accuracy=False,
    )  # fmt: skip
    assert made.verification["exact"]["worst_sqnr_db"] > verify.EXACT_DB
    assert 35 < made.verification["shipped"]["sqnr_db"] < made.verification["exact"]["sqnr_db"]


def test_half_precision_caches_need_a_cache(tmp_path):
    with pytest.raises(UserError, match="--cache: this model has no attention layer"):
        export_onnx(checkpoint("small", "linear"), tmp_path / "out", cache="float16")
    with pytest.raises(UserError, match="--cache int4: known are float32, float16"):
        export_onnx(checkpoint("small", "hybrid"), tmp_path / "out", cache="int4")


# --- bad options, bad models ---------------------------------------------------------------------


def config_with(
    scaling: RopeScaling | None, variant: str = "hybrid", positions: int = 64
) -> Config:
    types = ("mamba2", "mamba2") if variant == "linear" else ("mamba2", "attention")
    half = StackConfig(64, 96, 4, 2, 1e-5, 10000.0, positions, types, scaling)
    return Config(embedding=half, llm=half, vocab_size=50, image_size=56)


@pytest.mark.parametrize(
    "scaling, positions, asked, expected",
    [
        (None, 64, None, 64),
        (None, 32768, None, 4096),
        (None, 64, 1000, 1000),
        (RopeScaling("linear", 4.0), 64, None, 256),
        (RopeScaling("dynamic", 2.0), 64, None, 64),
        (RopeScaling("dynamic", 2.0), 64, 40, 40),
    ],
)
def test_context_limit(scaling, positions, asked, expected):
    assert context_limit(config_with(scaling, positions=positions), asked) == expected


def test_context_limits_that_cannot_be():
    with pytest.raises(UserError, match="--max-context 65: .* dynamic NTK beyond 64 tokens"):
        context_limit(config_with(RopeScaling("dynamic", 2.0)), 65)
    with pytest.raises(UserError, match="--max-context: this model has no attention layer"):
        context_limit(config_with(None, "linear"), 65)
    with pytest.raises(UserError, match="--max-context 0: expected a whole number above 0"):
        context_limit(config_with(None), 0)
    assert context_limit(config_with(None, "linear"), None) is None


@pytest.mark.parametrize(
    "options, message",
    [
        ({"quant": "int3"}, "quant 'int3': known are none, fp16, int8, int4"),
        ({"quant": "int4", "group_size": 48}, "--group-size 48: expected one of 32, 64, 128"),
        ({"quant": "int8", "group_size": 32}, "--group-size 32: only --quant int4 has groups"),
        ({"ops": "ai.magic"}, "ops 'ai.magic': known are com.microsoft, standard"),
    ],
)
def test_unknown_options(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export_onnx(checkpoint("release_plain", "linear"), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_post_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="pixel_shuffle_loc 'post' .* run it in PyTorch"):
        export_onnx(golden.ROOT / "linear/final", tmp_path / "out")


def test_heads_that_the_fused_attention_does_not_take(tmp_path):
    torch.manual_seed(0)
    model = from_scratch(tiny_config(hybrid=True))  # heads of 8
    folder = save_model(model, tmp_path / "m")
    with pytest.raises(UserError, match="attention heads of 8: .* export with --ops standard"):
        export_onnx(folder, tmp_path / "out")
    export_onnx(folder, tmp_path / "out", ops="standard")


@pytest.mark.parametrize("ops", DIALECT_NAMES)
def test_widths_below_a_block_are_padded(tmp_path, ops):
    torch.manual_seed(0)
    folder = save_model(from_scratch(tiny_config()), tmp_path / "m")  # 16 wide
    figures = export_onnx(folder, tmp_path / "out", quant="int8", ops=ops).verification
    assert figures["exact"]["worst_sqnr_db"] >= 90 and figures["float32"]["sqnr_db"] >= 30


def test_interrupted_export_leaves_nothing(tmp_path):
    def stop(what: str, done: int = 0, total: int = 0) -> None:
        if what.startswith("verifying"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_onnx(checkpoint("release_plain", "linear"), tmp_path / "out", report=stop)
    assert list(tmp_path.iterdir()) == []


def test_missing_checkpoint_and_unwritable_output(tmp_path):
    with pytest.raises(UserError, match="nothing/config.json: not found"):
        export_onnx(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "file").write_text("")
    lines = []
    with pytest.raises(UserError, match=r"file/out: cannot be written \("):
        export_onnx(
            checkpoint("release_plain", "linear"), tmp_path / "file/out", report=lines.append
        )
    assert lines == [], "before any work"


# --- the verb ------------------------------------------------------------------------------------


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


def test_choices_are_the_tables():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert tuple(choices["quant"] or ()) == tuple(SCHEMES)
    assert tuple(choices["ops"] or ()) == tuple(DIALECTS)
    for name, dialect in DIALECTS.items():
        assert dialect.name == name


def test_export_command(tmp_path, capsys):
    source, out = str(checkpoint("release_plain", "hybrid")), tmp_path / "out"
    args = ("--to", "onnx", "--out", str(out), "--max-context", "32")
    assert command.run(parse(source, *args)) == 0
    text, progress = capsys.readouterr()
    assert re.search(r"out: [\d,]+ bytes; state [\d,]+ bytes for 32 tokens\n", text)
    assert re.search(r"as shipped, against PyTorch on the float32 weights: \d+\.\d dB", text)
    assert "verifying against PyTorch\n" in progress
    assert command.run(parse(source, *args, "--json")) == 0  # replaces the bundle
    printed = json.loads(capsys.readouterr().out)
    manifest = read_manifest(out)
    assert printed["verification"] == manifest.verification and printed["max_context"] == 32
    assert printed["model_id"] == manifest.model_id


def test_released_layout_exports_the_same_bundle(tmp_path):
    """One model, two files' layouts: same identity, same bytes."""
    folder = golden.ROOT / "release_plain/linear/final"
    assert open_checkpoint(folder).layout == "released"
    export_onnx(folder, tmp_path / "out")
    other = bundle("release_plain", "linear")
    for name in ("decoder.bin", "decoder.onnx", "embed.bin", "vision.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (other / name).read_bytes()
    assert read_manifest(tmp_path / "out").model_id == read_manifest(other).model_id


def test_step_is_one_pass_of_the_same_graph():
    """Prefill and decode share the decoder: one set of weights in memory."""
    manifest = read_manifest(bundle("release_plain", "linear"))
    assert sorted(manifest.graphs) == ["decoder", "embed", "vision"]
    ids, _ = case("release_plain", "text_only")
    runner = OnnxRuntimeRunner(bundle("release_plain", "linear"), threads=1)
    logits, state = runner.prefill(ids[:-1])
    before = runner._decoder
    runner.step(int(ids[-1]), state)
    assert runner._decoder is before


# --- ORT format ----------------------------------------------------------------------------------


def test_ort_format(tmp_path):
    source = checkpoint("small", "hybrid")
    export_onnx(source, tmp_path / "onnx", quant="int4", max_context=256)
    manifest = export_onnx(source, tmp_path / "ort", quant="int4", max_context=256, ort=True)
    files = {f.name for f in (tmp_path / "ort").iterdir()}
    assert files == {
        "vision.ort", "embed.ort", "decoder.ort", "required_operators.config", "manifest.json",
        "accuracy.json",
    }  # fmt: skip
    assert set(manifest.files) == files - {"manifest.json"}
    verify_files(tmp_path / "ort", read_manifest(tmp_path / "ort"), hashes=True)

    near, far = (OnnxRuntimeRunner(tmp_path / name) for name in ("onnx", "ort"))
    ids = np.arange(20, 60)
    want, _ = near.prefill(ids)
    got, _ = far.prefill(ids)
    assert np.array_equal(got, want)

    listed = (tmp_path / "ort/required_operators.config").read_text()
    assert str(tmp_path) not in listed
    needed = {op for name in ("vision", "embed", "decoder")
              for domain, op in operators(tmp_path / "onnx", name)
              if domain == "com.microsoft"}  # fmt: skip
    for op in needed:
        assert re.search(rf"com\.microsoft;1;.*\b{op}\b", listed), op


def test_ort_format_ends_at_two_gib(tmp_path, monkeypatch):
    monkeypatch.setattr("mmmamba_edge.export.ort_format.LIMIT", 10_000)
    with pytest.raises(UserError, match="--ort: .*onnx has .* bytes with its weights; .* 2 GiB"):
        export_onnx(checkpoint("small", "linear"), tmp_path / "out", ort=True)
    assert list(tmp_path.iterdir()) == []


def test_ort_graphs_that_answer_otherwise_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mmmamba_edge.export.ort_format.EXACT_DB", 250.0)
    with pytest.raises(CheckFailed, match="the .ort graphs are .* dB from the .onnx graphs"):
        export_onnx(checkpoint("small", "linear"), tmp_path / "out", ort=True)
    assert list(tmp_path.iterdir()) == []
