"""Packed text as training data: every window once an epoch, the same on every machine."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from mmmamba_edge.distill.batches import Share
from mmmamba_edge.distill.text_source import TextSource, open_tokens
from mmmamba_edge.errors import UserError

LENGTH = 8
SIZES = {"long": 8 * 9 + 3, "short": 8 * 2, "tiny": 8 + 1, "none": 5}


def write_tokens(folder, sizes=SIZES, split="train", vocab_size=40):
    """Token files whose numbers tell the source and the place."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    for number, (name, size) in enumerate(sizes.items()):
        np.save(folder / split / f"{name}.npy", np.arange(size, dtype=np.uint16) + 1000 * number)
    facts = {"vocab_size": vocab_size, "sources": {name: {split: n} for name, n in sizes.items()}}
    (folder / "tokens.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def source(tmp_path):
    return TextSource(open_tokens(write_tokens(tmp_path), "train", 40), LENGTH, seed=3)


def windows(source, steps, share=None, position=None):
    share = share or Share(3, 2)
    ids = [b.ids for step in islice(source.steps(position, share), steps) for b in step.micro]
    return torch.cat(ids)


def test_windows_are_pieces_of_one_source_and_none_comes_twice_in_an_epoch(source):
    # A window of each file but the tiny and the short is spare, for the cut to move.
    assert len(source) == 8 + 1 + 1
    epoch = windows(source, 10, Share(1, 1))
    assert (epoch.diff(dim=1) == 1).all()
    tokens = epoch.flatten().tolist()
    assert len(set(tokens)) == len(tokens)
    assert {n // 1000 for n in tokens} == {0, 1, 2}


def test_epochs_differ_in_order_and_cuts(source):
    both = windows(source, 20, Share(1, 1))
    first, second = both[:10, 0].tolist(), both[10:, 0].tolist()
    assert first != second and sorted(first) != sorted(second)


def test_batches_are_dense_and_the_same_for_any_micro_batch_and_process(source):
    whole = windows(source, 4, Share(4, 4))
    assert torch.equal(whole, windows(source, 4, Share(4, 1)))
    halves = [windows(source, 4, Share(4, 2, rank, 2)) for rank in (0, 1)]
    assert torch.equal(whole.view(4, 4, -1)[:, 0::2].flatten(0, 1), halves[0])
    assert torch.equal(whole.view(4, 4, -1)[:, 1::2].flatten(0, 1), halves[1])
    batch = next(source.steps(None, Share(4, 4))).micro[0]
    assert batch.dense and batch.ids.dtype == torch.int64 and batch.tokens == 4 * LENGTH
    assert (batch.weights == 1).all() and batch.to("cpu").dense


def test_a_position_goes_on_where_it_was(source):
    position = list(islice(source.steps(None, Share(3, 3)), 5))[-1].position
    on = windows(source, 4, Share(3, 3), json.loads(json.dumps(position)))
    assert torch.equal(on, windows(source, 9, Share(3, 3))[15:])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "tokens.json").unlink(), "text.corpus"),
        (lambda folder: (folder / "train/long.npy").unlink(), "long.npy"),
        (lambda folder: (folder / "train/long.npy").write_bytes(b"no array"), "pack the corpus"),
    ],
)
def test_bad_folders(tmp_path, spoil, message):
    spoil(write_tokens(tmp_path))
    with pytest.raises(UserError, match=message):
        open_tokens(tmp_path, "train", 40)


def test_a_tokenizer_of_another_model_and_too_long_windows(tmp_path):
    folder = write_tokens(tmp_path, vocab_size=41)
    with pytest.raises(UserError, match="41 tokens, the model has 40"):
        open_tokens(folder, "train", 40)
    with pytest.raises(UserError, match="no source has 500 tokens"):
        TextSource(open_tokens(folder, "train", 41), 500, seed=0)
