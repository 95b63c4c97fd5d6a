"""The VLMEvalKit adapter, on a stand-in for the few names of VLMEvalKit that it uses.

VLMEvalKit is not on PyPI and brings some seventy packages. What stands in here has its interface as
of 2026-08 (commit e8e78f05): the base class, two functions on datasets, the table of models.
"""

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fake_runner import IMAGE, FakeRunner, write_tokenizer
from mmmamba_edge.bundle import DEFAULT_BUNDLE
from mmmamba_edge.dialogue import SAMPLES
from mmmamba_edge.errors import UserError

ADAPTER = Path(__file__).parents[1] / "adapters/vlmevalkit"
KINDS = {"MME": "Y/N", "POPE": "Y/N", "HallusionBench": "Y/N", "TextVQA_VAL": "VQA", "MMVet": "VQA"}


class BaseModel:
    """What vlmeval.vlm.base.BaseModel does with the methods that we implement."""

    def set_dump_image(self, dump):
        self.dump_image_func = dump

    def dump_image(self, line, dataset):
        return self.dump_image_func(line)

    def generate(self, message, dataset=None):
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)


@pytest.fixture
def adapter(monkeypatch):
    """The package, with VLMEvalKit stood in for."""
    names = {
        "vlmeval": {},
        "vlmeval.vlm": {"BaseModel": BaseModel},
        "vlmeval.vlm.base": {"BaseModel": BaseModel},
        "vlmeval.config": {"supported_VLM": {}},
        "vlmeval.dataset": {
            "DATASET_TYPE": lambda name: KINDS.get(name, "MCQ"),
            "DATASET_MODALITY": lambda name: "VIDEO" if "Video" in name else "IMAGE",
        },
    }
    for name, members in names.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        outer, _, own = name.rpartition(".")
        if outer:
            setattr(sys.modules[outer], own, module)
    monkeypatch.syspath_prepend(str(ADAPTER))
    yield importlib.import_module("vlmeval_mmmamba_edge")
    for name in [name for name in sys.modules if name.startswith("vlmeval_mmmamba_edge")]:
        del sys.modules[name]


def message(*parts):
    """Paths of pictures and texts, as VLMEvalKit hands them over."""
    return [
        {"type": "image" if str(part).endswith(".png") else "text", "value": str(part)}
        for part in parts
    ]


@pytest.fixture
def model(adapter):
    return adapter.MMMambaEdge(str(DEFAULT_BUNDLE), max_new_tokens=48)


def test_it_sees(model):
    panda = SAMPLES / "panda.png"
    assert "panda" in model.generate(message(panda, "What is in the picture?"))
    assert model.generate(message(panda, "Is there a car?"), dataset="MME") == "no"
    assert model.generate(message("hello")) != ""


def test_a_checkpoint_serves_as_well(adapter):
    pytest.importorskip("torch")
    checkpoint = Path(__file__).parents[1] / "distill/checkpoints/default"
    model = adapter.MMMambaEdge(str(checkpoint))
    assert model.generate(message(SAMPLES / "panda.png", "Is there a panda?")) == "yes"


def test_it_is_known_by_class_and_by_name(adapter):
    assert sys.modules["vlmeval.vlm"].MMMambaEdge is adapter.MMMambaEdge
    adapter.register("mine", str(DEFAULT_BUNDLE), threads=1)
    model = sys.modules["vlmeval.config"].supported_VLM["mine"]()
    assert model.max_new_tokens == 1024 and model.runner.quant


def test_prompts_are_those_of_the_published_figures(model):
    model.set_dump_image(lambda line: ["a.png"])
    assert model.use_custom_prompt("MME") and model.use_custom_prompt("ScienceQA_TEST")
    for other in (None, "HallusionBench", "MMBench-Video"):
        assert not model.use_custom_prompt(other)

    def text(dataset, **line):
        picture, words = model.build_prompt(line, dataset)
        assert picture == {"type": "image", "value": "a.png"}
        return words["value"]

    word = "Answer the question using a single word or phrase."
    assert text("MME", question="Is it?") == f"Is it?{word}"
    assert text("POPE", question="Is it? Please answer yes or no.") == f"Is it?\n{word}"
    assert text("TextVQA_VAL", question="what?") == f"what?\n{word}"
    assert text("MMVet", question="Why?") == "Why?"
    nan = float("nan")
    ask = "\nAnswer with the option's letter from the given choices directly."
    assert text("ScienceQA_TEST", question="Which?", hint=nan, A="cat", B=2, C=nan) == (
        f"Which?\nA. cat\nB. 2{ask}"
    )
    assert text("MMBench_DEV_EN", question="Which?", hint="Look.", A="cat", B="dog") == (
        f"Look.\nWhich?\nA. cat\nB. dog{ask}"
    )
    assert text("MMBench_DEV_CN", question="哪个？", A="猫", B="狗").endswith(
        "\nB. 狗\n请直接回答选项字母。"
    )


@pytest.fixture
def fake(adapter, tmp_path, monkeypatch):
    """A model on the fake runner, and what each question's prompt was."""
    runner = FakeRunner(write_tokenizer(tmp_path / "tokenizer"))
    model_module = sys.modules["vlmeval_mmmamba_edge.model"]
    monkeypatch.setattr(model_module, "open_model", lambda *where: runner)
    model = adapter.MMMambaEdge("x", max_new_tokens=2)
    asked = []

    class Session(model_module.Session):
        def ask(self, text, images, **settings):
            asked.append((text, images, settings))
            return super().ask(text, images, **settings)

    monkeypatch.setattr(model_module, "Session", Session)
    return model, asked


def test_places_of_pictures(fake, tmp_path):
    model, asked = fake
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        Image.new("RGB", (28, 28)).save(path)
    a, b = paths
    model.generate(message("one", a, "two"))
    model.generate(message(a, b, "differ?"))
    model.generate(message(a, b, "<image> or <image>?"))
    model.generate(message("none"))
    assert [text for text, _, _ in asked] == [
        "<image>\none\ntwo",
        "Image-1: <image>\nImage-2: <image>\ndiffer?",
        "<image> or <image>?",
        "none",
    ]
    assert [len(images) for _, images, _ in asked] == [1, 2, 2, 0]


def test_mmmu_pictures_are_enlarged(fake, tmp_path):
    """The fake model was made for 4 tiles; 12 are the most it would be given otherwise."""
    model, asked = fake
    path = tmp_path / "a.png"
    Image.fromarray(np.arange(28 * 28 * 3, dtype=np.uint8).reshape(28, 28, 3)).save(path)
    model.generate(message(path, "what?"), dataset="MMMU_DEV_VAL")
    model.generate(message(path, "what?"), dataset="MMBench_DEV_EN")
    (_, large, settings), (_, plain, others) = asked
    assert large[0].size == (56, 56) and plain == [str(path)]
    assert settings["max_tiles"] == others["max_tiles"] == 4
    assert sum(IMAGE in call for call in model.runner.calls) == 2


def test_other_parts_are_refused(model):
    with pytest.raises(UserError, match="message: type 'video'; known are text and image"):
        model.generate_inner([{"type": "video", "value": "a.mp4"}])


def test_the_command_runs_run_py(tmp_path):
    """`python -m vlmeval_mmmamba_edge run.py ARGS`: the class is known before run.py begins."""
    kit = tmp_path / "kit"
    (kit / "vlmeval/vlm").mkdir(parents=True)
    (kit / "vlmeval/__init__.py").touch()
    (kit / "vlmeval/vlm/__init__.py").touch()
    (kit / "vlmeval/vlm/base.py").write_text("class BaseModel: pass\n")
    (kit / "vlmeval/config.py").write_text("supported_VLM = {}\n")
    (kit / "vlmeval/dataset.py").write_text("DATASET_TYPE = DATASET_MODALITY = None\n")
    (kit / "beside.py").write_text("")
    (kit / "run.py").write_text(
        "import sys, beside, vlmeval.vlm\nprint(vlmeval.vlm.MMMambaEdge.__name__, sys.argv[1:])\n"
    )
    where = [str(kit), str(ADAPTER), str(ADAPTER.parents[1])]

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", "vlmeval_mmmamba_edge", *words],
            env={"PYTHONPATH": ":".join(where), "PATH": os.environ["PATH"]},
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip

    assert run(str(kit / "run.py"), "--config", "a.json").stdout == (
        "MMMambaEdge ['--config', 'a.json']\n"
    )
    assert "usage: python -m vlmeval_mmmamba_edge" in run("--config").stderr
