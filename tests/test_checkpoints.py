"""Checkpoints: three layouts round-trip bit for bit; bad files are named with what to do."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import golden
from mmmamba_edge.config import Config, load_config
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import load_model, open_checkpoint, save_checkpoint, save_model
from mmmamba_edge.model.tensor_names import DEAD, released_shapes, training_shapes

FOLDERS = ["release_plain/teacher", "release_plain/linear/final", "release_plain/hybrid/final"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_layouts_round_trip_bit_for_bit(folder, tmp_path):
    source = open_checkpoint(golden.ROOT / folder)
    save_checkpoint(tmp_path / "training", source.config, source.get, shard_bytes=200_000)
    training = open_checkpoint(tmp_path / "training")
    assert len(list((tmp_path / "training").glob("model-*.safetensors"))) > 2
    save_checkpoint(tmp_path / "released", training.config, training.get, layout="released")
    before = load_file(golden.ROOT / folder / "model.safetensors")
    after = load_file(tmp_path / "released/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert training.weights_id() == source.weights_id()
    config = json.loads((golden.ROOT / folder / "config.json").read_text())
    assert json.loads((tmp_path / "released/config.json").read_text()) == config


def test_released_layout_of_the_real_models():
    """Key counts and parameters of the 2.7B checkpoints (spec 1.3, 2, 5.1), from shapes alone."""
    half = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    }  # fmt: skip
    teacher = Config.from_dict(
        {
            "embedding": {**half, "layer_types": ["attention"] * 8},
            "llm": {**half, "layer_types": ["attention"] * 24},
            "vocab_size": 92553,
        }
    )
    hybrid = teacher.with_attention_layers({0, 4, 8, 12, 16, 20, 24, 28})
    for config, keys, parameters in (
        (teacher, 236, 2_606_327_808),
        (teacher.with_attention_layers(set()), 396, 2_741_992_448),
        (hybrid, 356, 2_708_076_288),
    ):
        shapes = released_shapes(config)
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        assert (len(shapes), sum(sizes)) == (keys, parameters)
    assert "attention.wqkv.weight" in " ".join(released_shapes(hybrid))


def test_model_saves_and_loads(tmp_path):
    model = golden.model("release_plain", "hybrid")
    save_model(model, tmp_path / "out", dtype=torch.bfloat16)
    again = load_model(tmp_path / "out", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.bfloat16().float())
    assert open_checkpoint(tmp_path / "out").get(DEAD).count_nonzero() == 0
    assert set(model.state_dict()) == set(training_shapes(model.config)) - {DEAD}


def test_report_lists_every_wrong_tensor(tmp_path):
    shutil.copytree(golden.ROOT / "release_plain/teacher", tmp_path / "bad")
    tensors = load_file(tmp_path / "bad/model.safetensors")
    del tensors["language_model.output.weight"]
    tensors["language_model.model.norm.weight"] = torch.ones(7)
    tensors["stray"] = torch.ones(2)
    save_file(tensors, tmp_path / "bad/model.safetensors")
    with pytest.raises(UserError) as caught:
        open_checkpoint(tmp_path / "bad")
    message = str(caught.value)
    assert "missing: language_model.output.weight (151, 64)" in message
    assert "extra: stray (2,)" in message
    assert (
        "language_model.model.norm.weight expected (64,) from config.json, the file has (7,)"
        in message
    )


def test_truncated_and_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: not found"):
        open_checkpoint(tmp_path / "nowhere")
    shutil.copytree(golden.ROOT / "release_plain/teacher", tmp_path / "bad")
    weights = tmp_path / "bad/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        open_checkpoint(tmp_path / "bad")
    weights.unlink()
    with pytest.raises(
        UserError, match="neither model.safetensors.index.json nor model.safetensors"
    ):
        open_checkpoint(tmp_path / "bad")


def test_failed_save_leaves_nothing(tmp_path):
    source = open_checkpoint(golden.ROOT / "release_plain/teacher")

    def fail(name):
        if "norm" in name:
            raise OSError(28, "No space left on device")
        return source.get(name)

    with pytest.raises(UserError, match="not written .No space left"):
        save_checkpoint(tmp_path / "out", source.config, fail)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        save_checkpoint(tmp_path / "full", source.config, source.get)
    assert (tmp_path / "full/mine.txt").read_text() == "precious"


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    source = open_checkpoint(golden.ROOT / "release_plain/teacher")
    with pytest.raises(UserError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "out", source.config, source.get)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llm_config": {"layers_block_type": ["mha"]}}, "1 entries for 3 layers"),
        (
            {"llm_config": {"layers_block_type": ["mha", "x", "mha"]}},
            "known are 'mha' and 'mamba2'",
        ),
        ({"llm_config": {"rope_scaling": {"type": "yarn", "factor": 2}}}, "rope_scaling"),
        ({"embedding_config": {"use_ls": True}}, "use_ls = True is not supported"),
        ({"embedding_config": {"num_attention_heads": 3}}, "not a multiple of num_attention_heads"),
        ({"force_image_size": 57}, "does not divide into patches"),
    ],
)
def test_bad_config_is_named(change, message, tmp_path):
    data = json.loads((golden.ROOT / "release_plain/teacher/config.json").read_text())
    for key, value in change.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        load_config(tmp_path)


def test_unknown_config_keys(tmp_path):
    """In HF files: a warning, and the key survives a save. In our own form: an error."""
    data = json.loads((golden.ROOT / "release_plain/teacher/config.json").read_text())
    data["llm_config"]["new_feature"] = 3
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="llm_config: unknown key new_feature; ignored, and kept"):
        config = load_config(tmp_path)
    assert config.to_hf() == data
    with pytest.raises(UserError, match="manifest.json model: unknown key colour"):
        Config.from_dict(config.to_dict() | {"colour": 1}, where="manifest.json model")
    with pytest.raises(UserError, match="missing key vocab_size"):
        Config.from_dict({k: v for k, v in config.to_dict().items() if k != "vocab_size"})
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("llm_config", {"num_attention_heads": 0}, "num_attention_heads is 0; expected a whole"),
        ("llm_config", {"vocab_size": "199"}, "vocab_size is '199'; expected a whole number"),
        ("embedding_config", {"patch_size": None}, "patch_size is None; expected a whole number"),
        ("llm_config", {"rms_norm_eps": "x"}, "rms_norm_eps is 'x'; expected a number above 0"),
        (None, {"downsample_ratio": 0}, "downsample_ratio is 0; expected a number above 0"),
    ],
)
def test_a_config_value_that_cannot_be_is_named(section, values, message, tmp_path):
    data = json.loads((golden.ROOT / "release_plain/teacher/config.json").read_text())
    (data[section] if section else data).update(values)
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        load_config(tmp_path)


def test_an_index_that_promises_too_much_is_reported(tmp_path):
    source = open_checkpoint(golden.ROOT / "release_plain/teacher")
    save_checkpoint(tmp_path / "c", source.config, source.get, shard_bytes=200_000)
    index = tmp_path / "c/model.safetensors.index.json"
    data = json.loads(index.read_text())
    name, shard = sorted(data["weight_map"].items())[0]
    kept = {k: v for k, v in load_file(tmp_path / "c" / shard).items() if k != name}
    save_file(kept, tmp_path / "c" / shard)
    with pytest.raises(UserError, match=rf"(?s)missing.*{name}"):
        open_checkpoint(tmp_path / "c")
    index.write_text('{"weight_map": ["model.safetensors"]}')
    with pytest.raises(UserError, match="index.json: not a safetensors index"):
        open_checkpoint(tmp_path / "c")


def test_a_file_of_several_dtypes_loads_in_the_widest(tmp_path):
    source = open_checkpoint(golden.ROOT / "release_plain/linear/final")

    def get(name):
        return source.get(name).bfloat16() if "conv1d" in name else source.get(name)

    save_checkpoint(tmp_path / "mixed", source.config, get)
    model = load_model(tmp_path / "mixed")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
