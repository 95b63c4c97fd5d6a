"""The benchmarks: their formats read, their prompts, and scores that were worked out by hand."""

import json

import pytest

from benchmark_files import (
    gqa_row,
    picture,
    pope_row,
    scienceqa_problem,
    textvqa_row,
    write_gqa,
    write_json,
    write_mme,
    write_mmvet,
    write_pope,
    write_scienceqa,
    write_textvqa,
)
from mmmamba_edge.errors import UserError
from mmmamba_edge.evaluation.mme import yes_or_no
from mmmamba_edge.evaluation.pope import says_yes
from mmmamba_edge.evaluation.scienceqa import chosen
from mmmamba_edge.evaluation.task import TASKS, format_lines, load_task
from mmmamba_edge.evaluation.vqa_words import processed, vqa_accuracy


def figures(lines):
    """(part, metric) -> value to a tenth."""
    return {(ln.part, ln.metric): ln.value and round(ln.value, 1) for ln in lines}


# --- POPE -----------------------------------------------------------------------------------------


@pytest.fixture
def pope(tmp_path):
    labels = ["yes", "yes", "no", "no", "yes"]
    return load_task(
        "pope",
        write_pope(
            tmp_path / "pope",
            random=[pope_row(i, label) for i, label in enumerate(labels, 1)],
            popular=[pope_row(1, "yes"), pope_row(2, "no")],
            adversarial=[pope_row(1, "yes"), pope_row(2, "no")],
        ),
    )


def test_pope_asks_as_the_spec_says(pope):
    assert [sample.id for sample in pope.samples][:6] == [
        "random/1", "random/2", "random/3", "random/4", "random/5", "popular/1",
    ]  # fmt: skip
    first = pope.samples[0]
    assert first.prompt == (
        "Is there a dog in the image?\nAnswer the question using a single word or phrase."
    )
    assert first.max_new_tokens == 100
    assert first.image.name == "COCO_val2014_000000000001.jpg"


def test_pope_score(pope):
    """random: 2 true, 1 false positive; 1 true, 1 false negative. adversarial: always no."""
    answers = {
        "random/1": "Yes",  # yes: true positive
        "random/2": "No, there is not.",  # yes: false negative
        "random/3": "yes",  # no: false positive
        "random/4": "There is no dog.",  # no: true negative
        "random/5": "Yes. No doubt.",  # yes: only the first sentence counts: true positive
        "popular/1": "Yes", "popular/2": "No",
        "adversarial/1": "no", "adversarial/2": "no",
    }  # fmt: skip
    lines = pope.score(answers)
    assert figures(lines) == {
        ("random", "accuracy"): 60.0,  # 3 of 5
        ("random", "precision"): 66.7,  # 2 of 3
        ("random", "recall"): 66.7,  # 2 of 3
        ("random", "F1"): 66.7,  # 2 * 2 / (3 + 3)
        ("random", "yes ratio"): 60.0,  # 3 of 5
        ("popular", "accuracy"): 100.0, ("popular", "precision"): 100.0,
        ("popular", "recall"): 100.0, ("popular", "F1"): 100.0, ("popular", "yes ratio"): 50.0,
        ("adversarial", "accuracy"): 50.0,
        ("adversarial", "precision"): None,  # nothing was said to be there
        ("adversarial", "recall"): 0.0, ("adversarial", "F1"): 0.0,
        ("adversarial", "yes ratio"): 0.0,
        ("mean of 3 splits", "F1"): 55.6,  # (66.67 + 100 + 0) / 3
    }  # fmt: skip
    accuracy = lines[0]
    # Wilson, 3 of 5: centre (0.6 + 0.38416) / 1.76832, spread sqrt(0.048 + 0.038416) * 1.96 / ...
    assert (round(accuracy.low, 1), round(accuracy.high, 1)) == (23.1, 88.2)
    assert "| random | precision | 66.7 % | 20.8 to 93.9 | 3 |" in format_lines(lines)
    assert "| adversarial | precision | - |  | 0 |" in format_lines(lines)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("no", False), ("No", False), ("No,", False), ("It is not", False), ("Yes", True),
        ("NO", True), ("none", True), ("", True), ("nothing. no", True),
    ],
)  # fmt: skip
def test_pope_reads_answers_as_its_authors_do(answer, yes):
    """Odd where it is odd: NO and an empty answer count as yes."""
    assert says_yes(answer) is yes


# --- MME ------------------------------------------------------------------------------------------


def test_mme_score(tmp_path):
    """existence 75 + 50, artwork 0, code_reasoning 100 + 100."""
    task = load_task("mme", write_mme(tmp_path / "mme"))
    assert len(task.samples) == 8
    assert task.samples[0].prompt == (
        "Is there a dog in this image? Please answer yes or no."
        "Answer the question using a single word or phrase."
    )
    answers = {
        "existence/000000000001/1": "Yes", "existence/000000000001/2": "No.",
        "existence/000000000002/1": "yes, there is", "existence/000000000002/2": "Yes",
        "artwork/10002/1": "Perhaps", "artwork/10002/2": "yes and no",
        "code_reasoning/0001/1": "YES", "code_reasoning/0001/2": "no",
    }  # fmt: skip
    assert set(answers) == {sample.id for sample in task.samples}
    assert figures(task.score(answers)) == {
        ("existence", "accuracy"): 75.0,  # 3 of 4
        ("existence", "accuracy+"): 50.0,  # the first picture of two
        ("existence", "points"): 125.0,
        ("artwork", "accuracy"): 0.0, ("artwork", "accuracy+"): 0.0, ("artwork", "points"): 0.0,
        ("perception, 2 of 10 subtasks", "points"): 125.0,
        ("code_reasoning", "accuracy"): 100.0, ("code_reasoning", "accuracy+"): 100.0,
        ("code_reasoning", "points"): 200.0,
        ("cognition, 1 of 4 subtasks", "points"): 200.0,
    }  # fmt: skip


def test_mme_within_its_outer_folder_and_half_a_picture(tmp_path):
    write_mme(tmp_path / "MME_Benchmark_release_version/MME_Benchmark")
    task = load_task("mme", tmp_path / "MME_Benchmark_release_version").first(1)
    assert [sample.part for sample in task.samples] == ["existence", "artwork", "code_reasoning"]
    lines = figures(task.score({sample.id: "Yes" for sample in task.samples}))
    assert lines["existence", "accuracy"] == 100 and lines["existence", "accuracy+"] is None


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "yes"), ("yes.", "yes"), ("No, it isn't", "no"), ("No-one", "no"), ("", ""),
        ("yes or no", ""), ("Nothing", ""),
    ],
)  # fmt: skip
def test_mme_reads_answers(answer, read):
    assert yes_or_no(answer) == read


# --- GQA ------------------------------------------------------------------------------------------


def test_gqa_score(tmp_path):
    """Open: 1 of 2; binary: 1 of 1; together 2 of 3."""
    rows = {
        "201307251": gqa_row("Is it overcast?", "no", "verify"),
        "201640614": gqa_row("Who is wearing the dress?", "woman"),
        "202225914": gqa_row("What colour is it?", "light blue"),
    }
    task = load_task("gqa", write_gqa(tmp_path / "gqa", rows))
    assert task.samples[0].prompt == (
        "Is it overcast? Answer the question using a single word or phrase."
    )
    assert task.samples[0].max_new_tokens == 10
    answers = {"201307251": "No.", "201640614": "a woman", "202225914": "Light blue"}
    assert figures(task.score(answers)) == {
        ("all", "accuracy"): 66.7, ("open", "accuracy"): 50.0, ("binary", "accuracy"): 100.0,
    }  # fmt: skip


# --- TextVQA --------------------------------------------------------------------------------------


def test_textvqa_score(tmp_path):
    """0.9, 0.3 and 0: mean 0.4."""
    rows = [
        # Three of ten said it: for each of them two others (2/3), for the seven three (1).
        textvqa_row(34602, "what does it say?", ["stop"] * 3 + ["halt"] * 7),
        # One said it: 0 for him, 1/3 for each of nine.
        textvqa_row(34603, "how many?", ["two"] + ["none"] * 9),
        textvqa_row(34604, "what brand?", ["nokia"] * 10),
    ]
    task = load_task("textvqa", write_textvqa(tmp_path / "textvqa", rows))
    assert task.samples[0].prompt == (
        "what does it say?\nAnswer the question using a single word or phrase."
    )
    answers = {"34602": "The Stop!", "34603": "2", "34604": "nokias"}
    (line,) = task.score(answers)
    assert line.value == pytest.approx(100 * (0.9 + 0.3 + 0) / 3) and line.n == 3


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_vqa_accuracy_by_the_number_who_agree(same, accuracy):
    people = ["dell"] * same + ["hp"] * (10 - same)
    assert vqa_accuracy("Dell", people) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The Coca-Cola", "coca cola"),  # a hyphen between letters turns into a space
        ("coca - cola", "coca cola"),  # beside a space it is taken out
        ("1,000", "1000"),
        ("3.5 oz.", "3.5 oz"),
        ("zero", "0"), ("none", "0"), ("ten", "10"), ("eleven", "eleven"),
        ("dont", "don't"), ("couldntve", "couldntve"), ("couldnt've", "couldn't've"),
        ("thats", "that's"), ("that's", "that 's"),  # the original's own disagreement
        ("an apple and a pear?", "apple and pear"),
        ("12:30", "12:30"), ("a\nb", "b"),
    ],
)  # fmt: skip
def test_answers_are_processed_as_by_the_server(text, form):
    assert processed(text) == form


# --- ScienceQA ------------------------------------------------------------------------------------


def test_scienceqa_score(tmp_path):
    """Only test questions with a picture; 2 of 3 right."""
    problems = {
        "4": scienceqa_problem(["cat", "dog"], 1, "Look at it."),
        "5": scienceqa_problem(["cat", "dog"], 0, image=None),
        "6": scienceqa_problem(["cat", "dog", "cow"], 2),
        "7": scienceqa_problem(["cat", "dog"], 0),
        "8": scienceqa_problem(["cat", "dog"], 0),
    }
    folder = write_scienceqa(tmp_path / "scienceqa", problems, ["4", "5", "6", "7"])
    task = load_task("scienceqa", folder)
    assert [sample.id for sample in task.samples] == ["4", "6", "7"]
    ask = "\nAnswer with the option's letter from the given choices directly."
    assert task.samples[0].prompt == f"Look at it.\nWhich animal is it?\nA. cat\nB. dog{ask}"
    assert task.samples[1].prompt == f"Which animal is it?\nA. cat\nB. dog\nC. cow{ask}"
    (line,) = task.score({"4": "B", "6": "It is a cow.", "7": "B."})
    assert line.value == pytest.approx(200 / 3) and line.n == 3


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(C) cow", "C"), ("The answer is B: dog", "B"), ("dog", "B"),
        ("A or B", ""), ("b", ""), ("E", ""), ("", ""), ("a dog or a cow", ""),
        ("A dog", "A"),  # the letter comes first, as in VLMEvalKit
    ],
)  # fmt: skip
def test_which_option_an_answer_names(answer, letter):
    assert chosen(answer, ["cat", "dog", "cow"]) == letter


# --- MM-Vet ---------------------------------------------------------------------------------------


def test_mmvet_writes_what_the_judge_takes(tmp_path):
    task = load_task("mmvet", write_mmvet(tmp_path / "mm-vet", ["What is x?", "Who?"]))
    assert [sample.prompt for sample in task.samples] == ["What is x?", "Who?"]
    answers = {"v1_0": "−1 “or” 5", "v1_1": "nobody"}
    assert task.score(answers) == [] and task.write_for_judge is not None
    task.write_for_judge(answers, tmp_path / "mine.json")
    assert json.loads((tmp_path / "mine.json").read_text(encoding="utf-8")) == answers


# --- what all have in common ----------------------------------------------------------------------


def test_suffix_and_images_are_the_callers(tmp_path, pope):
    folder = write_pope(tmp_path / "pope")
    elsewhere = tmp_path / "coco"
    (folder / "val2014").rename(elsewhere)
    task = load_task("pope", folder, elsewhere, suffix=" Yes or no?")
    assert task.samples[0].prompt == "Is there a dog in the image? Yes or no?"
    assert task.samples[0].image.parent == elsewhere
    assert task.fingerprint() != load_task("pope", folder, elsewhere).fingerprint()


def test_the_first_of_each_part(pope):
    assert [sample.id for sample in pope.first(1).samples] == [
        "random/1", "popular/1", "adversarial/1",
    ]  # fmt: skip


def bad(folder, task="pope", images=None):
    with pytest.raises(UserError) as caught:
        load_task(task, folder, images)
    return str(caught.value).replace(str(folder), "FOLDER")


def test_bad_pope_rows(tmp_path):
    folder = tmp_path / "pope"
    file = "FOLDER/coco_pope_random.json"
    good = pope_row(1, "yes")

    def with_second(row):
        write_pope(folder, random=[good, row])
        return bad(folder)

    assert with_second({**good, "question_id": 2, "label": "maybe"}) == (
        f'{file}: line 2: label is "maybe"; expected yes or no'
    )
    assert with_second({"question_id": 2, "image": good["image"], "label": "no"}) == (
        f"{file}: line 2: no field 'text'; the file is another or damaged"
    )
    assert with_second({**good, "question_id": "2"}) == (
        f'{file}: line 2: question_id is "2"; expected a whole number'
    )
    assert with_second({**good, "question_id": 2, "text": " "}) == (
        f'{file}: line 2: text is " "; expected text'
    )
    assert with_second(pope_row(2, "no", "COCO_val2014_2.jpg")) == (
        f"{file}: line 2: image: there is no FOLDER/val2014/COCO_val2014_2.jpg; --images takes the "
        "folder that has it"
    )
    assert with_second(good) == f"{file}: line 2: its id random/1 is that of {file}: line 1 too"
    (folder / "coco_pope_random.json").write_text('{"question_id": 1,\n')
    assert bad(folder).startswith(f"{file}: line 1: not JSON (")
    (folder / "coco_pope_random.json").write_text("[1]\n")
    assert bad(folder) == f"{file}: line 1: expected a JSON object"
    (folder / "coco_pope_random.json").write_bytes(b'{"text": "caf\xe9"}\n')
    assert bad(folder) == f"{file}: not UTF-8 (byte 13); download it again"
    (folder / "coco_pope_random.json").unlink()
    assert bad(folder) == f"{file}: not found; --data takes the folder that has it"


def test_bad_mme_files(tmp_path):
    folder = write_mme(tmp_path / "mme")
    file = folder / "existence/000000000001.txt"
    name = "FOLDER/existence/000000000001.txt"
    file.write_text("Is it?\tYes\n")
    assert bad(folder, "mme") == f"{name}: expected two questions about its picture, found 1"
    file.write_text("Is it? Yes\nOr not?\tNo\n")
    assert bad(folder, "mme") == f"{name}: line 1: expected a question, a tab, and Yes or No"
    file.write_text("Is it?\tYes\nOr not?\tNever\n")
    assert bad(folder, "mme") == f'{name}: line 2: answer is "Never"; expected yes or no'
    file.with_suffix(".jpg").unlink()
    assert "no picture for it: there is no FOLDER/existence/000000000001{.jpg" in bad(folder, "mme")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no subtask of MME in it; expected folders with .txt files: existence" in bad(
        empty, "mme"
    )


def test_bad_rows_of_the_others(tmp_path):
    gqa = write_gqa(tmp_path / "gqa", {"7": gqa_row("Is it?", "yes")})
    rows = {"7": {**gqa_row("Is it?", "yes"), "types": {}}}
    write_json(gqa / "testdev_balanced_questions.json", rows)
    assert "questions.json: 7: types: no field 'structural'" in bad(gqa, "gqa")
    write_json(gqa / "testdev_balanced_questions.json", {"7": 3})
    assert bad(gqa, "gqa") == "FOLDER/testdev_balanced_questions.json: 7: expected an object"
    write_json(gqa / "testdev_balanced_questions.json", {})
    assert bad(gqa, "gqa") == "FOLDER: no questions in it"

    textvqa = write_textvqa(tmp_path / "textvqa", [textvqa_row(1, "what?", ["a"] * 9)])
    assert bad(textvqa, "textvqa") == (
        'FOLDER/TextVQA_0.5.1_val.json: data, row 1: answers is ["a", "a", "a", "a", "a", "a", '
        '"a", "a", "a"]; expected 10 texts'
    )
    write_textvqa(textvqa, [3])
    assert "data, row 1: no field 'question_id'" in bad(textvqa, "textvqa")

    science = tmp_path / "science"
    write_scienceqa(science, {"1": scienceqa_problem(["a", "b"], 2)}, ["1"])
    assert bad(science, "scienceqa") == (
        "FOLDER/problems.json: 1: answer is 2; expected the index of a choice, 0 to 1"
    )
    write_scienceqa(science, {"1": scienceqa_problem(["a"], 0)}, ["1"])
    assert 'choices is ["a"]; expected a list of 2 to 26 texts' in bad(science, "scienceqa")
    write_json(science / "pid_splits.json", {"test": ["9"]})
    assert bad(science, "scienceqa") == (
        "FOLDER/pid_splits.json: test: '9' is not in FOLDER/problems.json"
    )

    mmvet = write_mmvet(tmp_path / "mm-vet", ["Why?"])
    (mmvet / "images/v1_0.png").unlink()
    assert "mm-vet.json: v1_0: imagename: there is no FOLDER/images/v1_0.png" in bad(mmvet, "mmvet")


def test_folders_and_names_that_are_not_there(tmp_path):
    assert bad(tmp_path / "x") == "FOLDER: no such folder; --data takes the folder of pope's files"
    with pytest.raises(UserError, match="--images takes the folder of the pictures"):
        load_task("pope", write_pope(tmp_path / "pope"), tmp_path / "x")
    with pytest.raises(UserError, match=f"task 'pop': known are {', '.join(TASKS)}"):
        load_task("pop", tmp_path)


def test_hidden_files_are_no_questions(tmp_path):
    folder = write_mme(tmp_path / "mme")
    picture(folder / "existence/._000000000001.jpg")
    (folder / "existence/._000000000001.txt").write_bytes(b"\0\5\x16\7")  # macOS leaves such
    assert len(load_task("mme", folder).samples) == 8
