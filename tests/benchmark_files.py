"""Small folders in the published formats of the benchmarks, with pictures of one colour."""

import json
from pathlib import Path

from PIL import Image


def picture(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (28, 28), colour).save(path)
    return path


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def pope_row(number: int, label: str, image: str = "COCO_val2014_000000000001.jpg") -> dict:
    text = "Is there a dog in the image?"
    return {"question_id": number, "image": image, "text": text, "label": label}


def write_pope(folder: Path, **splits: list[dict]) -> Path:
    """Splits not given get one question."""
    for split in ("random", "popular", "adversarial"):
        rows = splits.get(split, [pope_row(1, "yes")])
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"coco_pope_{split}.json").write_text(lines, encoding="utf-8")
    picture(folder / "val2014/COCO_val2014_000000000001.jpg")
    return folder


def write_mme(folder: Path) -> Path:
    """Two pictures of existence, beside their questions; one of artwork and of code, apart."""
    for name in ("000000000001", "000000000002"):
        picture(folder / f"existence/{name}.jpg")
        (folder / f"existence/{name}.txt").write_text(
            "Is there a dog in this image? Please answer yes or no.\tYes\n"
            "Is there a car in this image? Please answer yes or no.\tNo\n"
        )
    for subtask, name in (("artwork", "10002.jpg"), ("code_reasoning", "0001.png")):
        picture(folder / subtask / "images" / name)
        text = folder / subtask / "questions_answers_YN" / f"{name[:-4]}.txt"
        text.parent.mkdir(parents=True)
        text.write_text("Is it old? Please answer yes or no.\tYes\nIs it new?\tNo")
    return folder


def gqa_row(question: str, answer: str, structural: str = "query") -> dict:
    types = {"structural": structural, "semantic": "attr", "detailed": "color"}
    return {
        "question": question, "imageId": "n161313", "answer": answer, "isBalanced": True,
        "types": types, "fullAnswer": "", "semantic": [], "groups": {"global": None, "local": ""},
    }  # fmt: skip


def write_gqa(folder: Path, rows: dict[str, dict]) -> Path:
    write_json(folder / "testdev_balanced_questions.json", rows)
    picture(folder / "images/n161313.jpg")
    return folder


def textvqa_row(number: int, question: str, answers: list[str]) -> dict:
    return {
        "question_id": number, "question": question, "image_id": "003a8ae2ef43b901",
        "image_classes": ["Sign"], "answers": answers, "set_name": "val",
    }  # fmt: skip


def write_textvqa(folder: Path, rows: list[dict]) -> Path:
    outer = {"dataset_type": "val", "dataset_version": "0.5.1", "data": rows}
    write_json(folder / "TextVQA_0.5.1_val.json", outer)
    picture(folder / "train_images/003a8ae2ef43b901.jpg")
    return folder


def scienceqa_problem(choices: list[str], answer: int, hint: str = "", image="image.png") -> dict:
    return {
        "question": "Which animal is it?", "choices": choices, "answer": answer, "hint": hint,
        "image": image, "task": "closed choice", "grade": "grade2", "subject": "natural science",
        "split": "test", "lecture": "", "solution": "",
    }  # fmt: skip


def write_scienceqa(folder: Path, problems: dict[str, dict], test: list[str]) -> Path:
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": [], "val": [], "test": test})
    for id in test:
        if problems[id]["image"]:
            picture(folder / f"images/test/{id}/image.png")
    return folder


def write_mmvet(folder: Path, questions: list[str]) -> Path:
    rows = {}
    for number, question in enumerate(questions):
        name = f"v1_{number}.png"
        picture(folder / "images" / name)
        rows[f"v1_{number}"] = {
            "imagename": name, "question": question, "answer": "x<OR>y", "imagesource": "-",
            "capability": ["rec"],
        }  # fmt: skip
    write_json(folder / "mm-vet.json", rows)
    return folder
