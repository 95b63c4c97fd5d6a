"""`mmmamba-edge eval` on benchmarks: asked of the embedded model, killed, gone on with, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmark_files import (
    gqa_row,
    pope_row,
    write_gqa,
    write_json,
    write_mme,
    write_mmvet,
    write_pope,
)
from fake_runner import IMAGE, FakeRunner, write_tokenizer
from mmmamba_edge.bundle import DEFAULT_BUNDLE
from mmmamba_edge.cli import main
from mmmamba_edge.dialogue import SAMPLES
from mmmamba_edge.errors import UserError
from mmmamba_edge.evaluation.answers_file import AnswersFile, Given
from mmmamba_edge.evaluation.asking import ask, open_model, tile_limit
from mmmamba_edge.evaluation.task import load_task

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "distill/checkpoints/default"
SHOWN = {  # what the sample pictures show; scenes that the embedded model knows
    "panda": "panda", "dog-and-car": "dog", "three-apples": "apple", "rocket-and-star": "rocket",
    "cat-above-ball": "cat", "circle-and-square": "circle",
}  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """POPE's files about the sample pictures: what is there, what is not, and in `popular` lies."""
    folder = tmp_path_factory.mktemp("scenes") / "pope"
    there, absent = [], []
    for number, (picture, thing) in enumerate(SHOWN.items(), start=1):
        row = pope_row(number, "yes", f"{picture}.png")
        there.append({**row, "text": f"Is there a {thing} in the image?"})
        absent.append({**row, "text": "Is there a bicycle in the image?", "label": "no"})
    lies = [{**row, "label": "no"} for row in there]
    write_pope(folder, random=there, popular=lies, adversarial=absent)
    for picture in SHOWN:
        shutil.copy(SAMPLES / f"{picture}.png", folder / "val2014")
    return folder


def evaluate(*words):
    """The arguments of `eval` on the embedded model, in its own words."""
    return ["eval", str(DEFAULT_BUNDLE), "--suffix", "", *map(str, words)]


def test_the_embedded_model_on_scenes_in_popes_format(scenes, tmp_path, capsys):
    """Right about all that is there and about what is not, wrong where the files lie."""
    out = tmp_path / "answers.jsonl"
    assert main(evaluate("--task", "pope", "--data", scenes, "--out", out, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    values = {(line["part"], line["metric"]): line["value"] for line in report["scores"]}
    assert values["random", "F1"] == 100  # all there, all yes
    assert values["popular", "accuracy"] == 0 and values["popular", "precision"] == 0
    assert values["adversarial", "accuracy"] == 100 and values["adversarial", "F1"] is None
    assert values["mean of 2 splits", "F1"] == 50  # of 100 and 0; adversarial has no F1
    assert report["answers"] == 18 and report["cut"] == 0
    head, *lines = map(json.loads, out.read_text().splitlines())
    assert head["task"] == "pope" and head["max_tiles"] == 1 and head["runtime"] == "onnxruntime"
    assert lines[0] == {"id": "random/1", "answer": "yes", "end": "stop"}


def test_a_killed_run_goes_on(scenes, tmp_path, capsys):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    words = evaluate("--task", "pope", "--data", scenes)
    assert main([*words, "--out", str(whole)]) == 0
    table = capsys.readouterr().out

    process = subprocess.Popen(
        [sys.executable, "-m", "mmmamba_edge", *words, "--out", str(killed)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    give_up = time.monotonic() + 60
    while not killed.exists() or killed.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = killed.read_text().rpartition("\n")[0].split("\n")
    assert 4 <= len(before) < 19
    with killed.open("a") as file:
        file.write('{"id": "adversarial/6", "answ')  # a line that a kill cut

    assert main([*words, "--out", str(killed)]) == 0
    captured = capsys.readouterr()
    assert captured.out == table
    assert f"{len(before) - 1} of 18 answers are there" in captured.err
    assert killed.read_text() == whole.read_text()


def test_a_limit_may_grow(scenes, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    words = evaluate("--task", "pope", "--data", scenes, "--out", out)
    assert main([*words, "--limit", "1"]) == 0
    assert len(out.read_text().splitlines()) == 1 + 3  # one of each split
    assert main([*words, "--limit", "2", "--json"]) == 0
    assert len(out.read_text().splitlines()) == 1 + 6
    assert main([*words, "--limit", "1", "--json"]) == 0  # fewer: those alone are counted
    reports = [json.loads(ln) for ln in capsys.readouterr().out.splitlines() if ln.startswith("{")]
    assert [report["answers"] for report in reports] == [6, 3]


def test_what_changed_is_named(scenes, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    words = evaluate("--task", "pope", "--data", scenes, "--limit", "1", "--out", out)
    assert main(words) == 0

    def refused(*words):
        before = out.read_bytes()
        capsys.readouterr()
        assert main([*map(str, words)]) == 2
        assert out.read_bytes() == before
        return capsys.readouterr().err

    assert "answers.jsonl: suffix is '' there and ' Hm?' in this run; choose another --out" in (
        refused(*words, "--suffix", " Hm?")
    )
    assert "max_tiles is 1 there and 2 in this run" in refused(*words, "--max-tiles", "2")
    other = write_mme(tmp_path / "mme")
    assert "task is 'pope' there and 'mme' in this run" in (
        refused(*evaluate("--task", "mme", "--data", other, "--out", out))
    )
    fewer = tmp_path / "fewer"
    shutil.copytree(scenes, fewer)
    rows = (fewer / "coco_pope_random.json").read_text().splitlines()
    (fewer / "coco_pope_random.json").write_text(rows[0])
    assert "questions is '" in refused(*evaluate("--task", "pope", "--data", fewer, "--out", out))
    bundle = tmp_path / "bundle"
    shutil.copytree(DEFAULT_BUNDLE, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    write_json(bundle / "manifest.json", {**manifest, "producer": "another export"})
    assert "bundle is '" in refused("eval", bundle, *words[2:])
    manifest["quant"] = "int9"
    write_json(bundle / "manifest.json", manifest)
    assert (
        f"quant is '{json.loads(out.read_text().splitlines()[0])['quant']}' there and 'int9'"
        in (refused("eval", bundle, *words[2:]))
    )


def test_a_checkpoint_answers_as_its_bundle_does(tmp_path, capsys):
    pytest.importorskip("torch")
    folder = write_gqa(tmp_path / "gqa", {"1": gqa_row("Is there a panda?", "yes", "verify")})
    shutil.copy(SAMPLES / "panda.png", folder / "images/n161313.jpg")
    for model in (DEFAULT_BUNDLE, CHECKPOINT):
        words = ["--task", "gqa", "--data", str(folder), "--suffix", "", "--json"]
        assert main(["eval", str(model), *words]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["scores"][0]["value"] == 100
        assert (report["runtime"], report["bundle"] is None) == (
            ("torch", True) if model == CHECKPOINT else ("onnxruntime", False)
        )


def test_mmvet_makes_no_score(tmp_path, capsys):
    folder = write_mmvet(tmp_path / "mm-vet", ["What is in the picture?", "Is there a car?"])
    shutil.copy(SAMPLES / "panda.png", folder / "images/v1_0.png")
    shutil.copy(SAMPLES / "panda.png", folder / "images/v1_1.png")
    out = tmp_path / "mine.jsonl"
    words = ["eval", str(DEFAULT_BUNDLE), "--task", "mmvet", "--data", str(folder)]
    assert main([*words, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "no score is made here" in captured.err
    answers = json.loads((tmp_path / "mine.json").read_text())
    assert set(answers) == {"v1_0", "v1_1"}
    assert "panda" in answers["v1_0"] and answers["v1_1"] == "no"
    assert main(words) == 2
    assert "--task mmvet needs --out NAME.jsonl; the judge's file will be NAME.json" in (
        capsys.readouterr().err
    )


def test_a_picture_that_cannot_be_read_keeps_what_there_is(scenes, tmp_path, capsys):
    folder = tmp_path / "pope"
    shutil.copytree(scenes, folder)
    (folder / "val2014/dog-and-car.png").write_bytes(b"GIF?")
    out = tmp_path / "answers.jsonl"
    words = evaluate("--task", "pope", "--data", folder, "--out", out)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "coco_pope_random.json: line 2: " in err and "dog-and-car.png: not a picture" in err
    assert len(out.read_text().splitlines()) == 1 + 1
    shutil.copy(SAMPLES / "dog-and-car.png", folder / "val2014")
    assert main(words) == 0


def test_ctrl_c_says_what_is_kept(scenes, tmp_path, capsys, monkeypatch):
    def stop(task, runner, answers, **settings):
        answers.add("random/1", Given("yes", "stop"))
        raise KeyboardInterrupt

    monkeypatch.setattr("mmmamba_edge.evaluation.command.ask", stop)
    out = tmp_path / "a.jsonl"
    assert main(evaluate("--task", "pope", "--data", scenes, "--out", out)) == 130
    assert f"{out}: answers kept so far: 1; the same command goes on" in capsys.readouterr().err


def test_wrong_use(tmp_path, capsys):
    def refused(*words):
        assert main(["eval", str(DEFAULT_BUNDLE), *map(str, words)]) == 2
        return capsys.readouterr().err

    assert "--task gqa needs --data, the folder of its files" in refused("--task", "gqa")
    assert "--out: not for --task scenes" in refused("--task", "scenes", "--out", "a.jsonl")
    assert "--max-tiles: not for --task easy-vqa" in refused(
        "--task", "easy-vqa", "--max-tiles", "1"
    )
    assert "--limit 0: expected a whole number above 0" in refused("--task", "gqa", "--limit", "0")
    folder = write_pope(tmp_path / "pope")
    assert "--max-tiles 0: this model takes 1 at least" in refused(
        "--task", "pope", "--data", folder, "--max-tiles", "0"
    )
    assert not list(tmp_path.glob("*.jsonl"))


# --- the answers file -----------------------------------------------------------------------------

ASKED = {"task": "pope", "model_id": "m"}
IDS = frozenset({"1", "2"})


def test_answers_are_on_disk_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    with AnswersFile(path, ASKED, IDS) as answers:
        answers.add("1", Given("grün\nja", "stop"))
        assert json.loads(path.read_text(encoding="utf-8").splitlines()[1])["answer"] == "grün\nja"
        with pytest.raises(UserError, match=r"a\.jsonl: another run is writing it"):
            AnswersFile(path, ASKED, IDS)
    with AnswersFile(path, ASKED, IDS) as answers:
        assert answers.given == {"1": Given("grün\nja", "stop")}


def test_other_peoples_files_stay_as_they_are(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ("my notes", "my\nnotes\n", '{"id": 1}\n', "[]\n"):
        path.write_text(text)
        with pytest.raises(UserError, match="not an answers file of `eval`; choose another --out"):
            AnswersFile(path, ASKED, IDS)
        assert path.read_text() == text


def test_damaged_lines_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    with AnswersFile(path, ASKED, IDS) as answers:
        answers.add("1", Given("yes", "stop"))
    good = path.read_text()
    path.write_text(good + '{"id": "2"}\n')
    with pytest.raises(UserError, match="line 3 is damaged; remove it, and its question"):
        AnswersFile(path, ASKED, IDS)
    path.write_text(good + '{"id": "9", "answer": "no", "end": "stop"}\n')
    with pytest.raises(UserError, match="line 3: id '9' is no question of this task"):
        AnswersFile(path, ASKED, IDS)
    path.write_text(good.replace('"pope"', '"pope", "more": 1'))
    with pytest.raises(UserError, match="more is 1 there and None in this run"):
        AnswersFile(path, ASKED, IDS)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        AnswersFile(tmp_path / "x/a.jsonl", ASKED, IDS)


# --- asking ---------------------------------------------------------------------------------------


def test_a_picture_is_read_once(tmp_path):
    """Six questions about one picture: its tokens are read with the first only."""
    rows = [pope_row(number, "yes") for number in range(1, 7)]
    task = load_task("pope", write_pope(tmp_path / "pope", random=rows))
    runner = FakeRunner(write_tokenizer(tmp_path / "tokenizer"))
    done = []
    with AnswersFile(None, {}, frozenset()) as answers:
        ask(task, runner, answers, max_tiles=1, report=lambda *told: done.append(told))
    assert done == [("answers", n, 8) for n in range(9)]
    assert sum(IMAGE in call for call in runner.calls) == 1


def test_tiles_as_asked_or_as_the_model_allows():
    runner = FakeRunner()
    assert runner.config.max_dynamic_patch == 4
    assert tile_limit(runner, None) == 4 and tile_limit(runner, 9) == 9


def test_open_model_knows_a_checkpoint(tmp_path):
    pytest.importorskip("torch")
    assert type(open_model(CHECKPOINT)).__name__ == "TorchRunner"
    with pytest.raises(UserError, match="no such folder; a bundle is a folder"):
        open_model(tmp_path / "x")
