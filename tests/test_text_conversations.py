"""Conversations that a teacher makes up: who is asked what, batched answers, the files."""

import hashlib
import itertools
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

import distilling
from mmmamba_edge.distill.text import conversations as module
from mmmamba_edge.distill.text.conversations import Saying, answers, main, questions, words_of
from mmmamba_edge.distill.text.corpus import SPLITS
from mmmamba_edge.distill.text_source import open_tokens
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import load_model
from mmmamba_edge.whole import working_folder

CHECKPOINT = Path(__file__).parents[1] / "distill/checkpoints/default"  # it can talk
TERMS = [f"z{a}{b}{c}" for a, b, c in itertools.product("bcdfgklmnprst", "aeiou", "bdgklmnprst")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    distilling.make(folder)
    return folder / "teacher"


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "documents").mkdir()
    for split in SPLITS:
        (tmp_path / "tokens" / split).mkdir(parents=True)
    text = (
        "\n".join(f"{term}, other: what it is" for term in TERMS) + "\n12: a number\nx: too short"
    )
    with lzma.open(tmp_path / "documents" / "wordnet.jsonl.xz", "wt") as lines:
        lines.write(json.dumps({"text": text}) + "\n")
    spelt = hashlib.sha256((CHECKPOINT / "tokenizer.json").read_bytes()).hexdigest()
    facts = {"vocab_size": 1024, "separator": 1, "sources": {}, "tokenizer_sha256": spelt}
    (tmp_path / "tokens" / "tokens.json").write_text(json.dumps(facts))
    return tmp_path


def test_no_split_asks_about_anothers_words(corpus):
    words = words_of(corpus)
    assert sum(map(len, words.values())) == len(TERMS)
    assert not set(words["train"]) & (set(words["test"]) | set(words["validation"]))
    asked = list(itertools.islice(questions(words["test"], 3), 200))
    assert asked == list(itertools.islice(questions(words["test"], 3), 200))
    said = " ".join(turn for turns in asked for turn in turns)
    assert sum(word in said.split() for word in words["test"]) > len(words["test"]) / 2
    assert not any(word in said.replace(",", "").split() for word in words["train"])
    assert {len(turns) for turns in asked} == {1, 2}


def test_prompts_of_other_lengths_do_not_disturb_each_other(teacher):
    """Greedily, a batch says what each prompt alone is answered; what does not end is None."""
    model = load_model(teacher, dtype=torch.float32)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(8, 40, n).tolist() for n in (3, 9, 5, 14)]
    how = Saying(top=1, most=12)
    free = answers(model, prompts, frozenset(), how, 0)
    assert free == [None] * 4
    first = {answers(model, [p], frozenset(range(40)), how, 0)[0] == [] for p in prompts}
    assert first == {True}  # everything ends an answer at once
    together = _greedy(model, prompts)
    assert together == [_greedy(model, [prompt])[0] for prompt in prompts]
    assert len({tuple(said) for said in together}) > 1
    stop = frozenset({together[0][4]})
    found = answers(model, prompts, stop, how, 0)
    assert found[0] == together[0][: together[0].index(together[0][4])]


def _greedy(model, prompts, most=13):
    """By whole reads, a token at a time."""
    rows = []
    for prompt in prompts:
        said: list[int] = []
        for _ in range(most):
            with torch.inference_mode():
                logits = model(torch.tensor([[*prompt, *said]]))[0, -1]
                logits[model.config.img_context_token_id] = -torch.inf
            said.append(int(logits.argmax()))
        rows.append(said)
    return rows


def test_they_are_a_source_like_any_other(corpus, monkeypatch, capsys):
    """Killed and gone on with, the files are those of one run; text recipes open them."""
    line = ["--teacher", str(CHECKPOINT), "--corpus", str(corpus), "--count", "12", "--batch", "3"]
    plain, made = module.conversations, []

    def killed(*args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(plain(*args))
        return made[-1]

    monkeypatch.setattr(module, "conversations", killed)
    with pytest.raises(KeyboardInterrupt):
        main([*line, "--most", "40"])
    assert "conversations" not in json.loads((corpus / "tokens/tokens.json").read_text())["sources"]
    monkeypatch.setattr(
        module, "conversations", lambda *args: made.append(plain(*args)) or made[-1]
    )
    assert main([*line, "--most", "40"]) == 0
    counts = json.loads(capsys.readouterr().out)["conversations"]
    assert len(made) == 6  # four batches to train on, one for each held-out split; none twice
    assert [len(rows) <= 3 for rows in made] == [True] * 6
    record = json.loads((corpus / "tokens/tokens.json").read_text())
    assert record["sources"] == {"conversations": counts}
    for split in SPLITS:
        tokens = open_tokens(corpus / "tokens", split, 1024).files["conversations"]
        assert len(tokens) == counts[split]
    train = np.load(corpus / "tokens/train/conversations.npy")
    assert train.tolist() == [i for rows in made[:4] for row in rows for i in (*row, 1)]
    assert not list((corpus / "tokens").glob("*.working"))


@pytest.mark.parametrize("more", [["--count", "0"], ["--most", "-1"]])
def test_numbers_that_cannot_be_are_named(teacher, corpus, more, capsys):
    assert main(["--teacher", str(teacher), "--corpus", str(corpus), *more]) == 2
    assert more[0] in capsys.readouterr().err


def test_batches_of_another_run_are_not_taken(corpus):
    folder = working_folder(corpus / "x", {"seed": 0})
    (folder / "train-00000.npy").write_bytes(b"")
    assert (working_folder(folder, {"seed": 0}) / "train-00000.npy").is_file()
    assert not (working_folder(folder, {"seed": 1}) / "train-00000.npy").exists()


def test_another_tokenizer_and_answers_without_end_are_named(corpus, capsys):
    line = ["--teacher", str(CHECKPOINT), "--corpus", str(corpus), "--count", "3", "--most", "1"]
    assert main(line) == 2
    assert "ended within 1 tokens; raise --most" in capsys.readouterr().err
    note = corpus / "tokens/tokens.json"
    note.write_text(note.read_text().replace('"tokenizer_sha256": "', '"tokenizer_sha256": "0'))
    assert main(line) == 2
    assert "packed with another tokenizer than" in capsys.readouterr().err


def test_a_folder_that_is_no_corpus_is_named(teacher, tmp_path):
    with pytest.raises(UserError, match=r"tokens.json: not found; pack the corpus first"):
        module.make(teacher, tmp_path, 4)
    with pytest.raises(UserError, match=r"wordnet.jsonl.xz: not found"):
        words_of(tmp_path)
