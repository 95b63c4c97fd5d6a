"""Conversations that a teacher makes up, as one more source of a text corpus.

    DIR/tokens/{split}/conversations.npy    uint16, beside the other sources of text.corpus
    DIR/tokens/tokens.json                  names it; `kind = "text"` recipes read it as any other

Packages hold hardly any conversations, and a student that reads none forgets how to answer. So the
teacher is asked about the words of WordNet, in the form of its chat template, and what it says is
kept: its own answers are what it would teach anyway. A word's hash says which split asks about it;
questions about no word are everyone's. Answers that do not end are left out. Finished batches are
on disk: a killed run goes on.
"""

import argparse
import hashlib
import json
import lzma
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmmamba_edge.distill.text.corpus import SPLITS, split_of
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import load_model, open_checkpoint
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.model.device import require_device
from mmmamba_edge.model.recorded_rows import RecordedRows
from mmmamba_edge.prompt import Prompt, get_template
from mmmamba_edge.status import StatusLine
from mmmamba_edge.tokenizer import Tokenizer, load_tokenizer
from mmmamba_edge.whole import new_file, working_folder

NAME = "conversations"
SHARES = {"train": 0.94, "validation": 0.02, "test": 0.04}  # of all conversations
ABOUT_A_WORD = (
    "What is {}?", "What does the word {} mean?", "Explain {} in two sentences.",
    "Use the word {} in a sentence.", "Tell me about {}.", "Give me three facts about {}.",
    "How would you explain {} to a child?", "Write a short story about {}.",
    "Write a poem of four lines about {}.", "Name five things that have to do with {}.",
    "What is the difference between {} and {}?", "Is {} the same as {}?",
    "Write a sentence with {} and {}.", "Why would someone be interested in {}?",
    "Where would one find {}?", "What is the opposite of {}?", "Give me an example of {}.",
    "Write a short email that mentions {}.", "I want to learn about {}. Where do I begin?",
    "Is this true: {} and {} are related?", "Write a title for a book about {}.",
)  # fmt: skip
ABOUT_NOTHING = (
    "Hello!", "Hi, how are you?", "Who are you?", "What can you do?", "Tell me a joke.",
    "Good morning!", "What is your name?", "Can you help me?", "Thank you very much!",
    "What is {n} plus {m}?", "Count from {n} to {m}.", "Which is larger, {n} or {m}?",
    "What is the capital of {place}?", "Where is {place}?", "What do people eat in {place}?",
    "Write a Python function that adds {n} to a number.",
)  # fmt: skip
PLACES = (
    "Italy", "Spain", "Japan", "Egypt", "Brazil", "Canada", "India", "Kenya", "Norway", "Poland",
    "Greece", "Mexico", "China", "Germany", "Australia", "Sweden", "Turkey", "Peru", "Portugal",
    "Austria", "Denmark", "Finland", "Ireland", "Hungary", "Cuba", "Chile", "Morocco", "Vietnam",
)  # fmt: skip
FOLLOWING = (
    "Tell me more.", "Can you say that in fewer words?", "Why?", "Give me an example.", "Thanks!",
    "Are you sure?", "Say it again in other words.", "What else should I know?",
)  # fmt: skip
LOOK = 16  # steps after which it is asked whether all rows have ended: asking waits for the device
PLAIN, AGAIN = 0.15, 0.33  # shares of questions about no word, of conversations with a second turn


@dataclass(frozen=True)
class Saying:
    """How the teacher draws its answers.

    Attributes:
        temperature: of the distribution.
        top: likeliest tokens that may be drawn.
        most: tokens of an answer; longer ones are left out.
    """

    temperature: float = 0.7
    top: int = 50
    most: int = 192


def words_of(corpus: Path) -> dict[str, list[str]]:
    """WordNet's terms by split, from the documents of text.corpus."""
    path = corpus / "documents" / "wordnet.jsonl.xz"
    if not path.is_file():
        raise UserError(
            f"{path}: not found; make it with python -m mmmamba_edge.distill.text.corpus"
        )
    found = {}
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            for entry in json.loads(line)["text"].splitlines():
                term = entry.partition(":")[0].partition(",")[0].strip()
                if 2 < len(term) <= 24 and term.replace(" ", "").replace("-", "").isalpha():
                    found[term] = None
    by_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    for term in found:
        by_split[split_of(term)].append(term)
    return by_split


def questions(words: list[str], seed: int) -> Iterator[list[str]]:
    """The questions of one conversation after another, without end."""
    draw = random.Random(seed)
    while True:
        if draw.random() < PLAIN:
            n = draw.randrange(2, 40)
            asked = draw.choice(ABOUT_NOTHING).format(
                n=n, m=n + draw.randrange(1, 12), place=draw.choice(PLACES)
            )
        else:
            form = draw.choice(ABOUT_A_WORD)
            asked = form.format(*(draw.choice(words) for _ in range(form.count("{}"))))
        yield [asked, draw.choice(FOLLOWING)] if draw.random() < AGAIN else [asked]


@torch.inference_mode()
def answers(
    model: MMMamba, prompts: list[list[int]], stop: frozenset[int], how: Saying, seed: int
) -> list[list[int] | None]:
    """What the model says to each prompt, all read at once; None where it did not end.

    Args:
        model: on any device.
        prompts: token ids.
        stop: ids that end an answer; they are not part of it.
        how: it draws.
        seed: of the draws.
    """
    device = model.language_model.output.weight.device
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    mask = torch.arange(longest) < torch.tensor([[len(prompt)] for prompt in prompts])
    room = longest + how.most + 1
    room += -room % 64  # attention copies a mask whose width is no multiple of 8
    state = model.new_state(len(prompts), max_context=room)
    logits, state = model.prefill(ids.to(device), state, attention_mask=mask.to(device))
    rows = RecordedRows(model, state)
    generator = torch.Generator(device).manual_seed(seed)
    ends = torch.tensor(sorted(stop), device=device)
    said, over = [], torch.zeros(len(prompts), dtype=torch.bool, device=device)
    picture = model.config.img_context_token_id  # no word that anyone may say
    for i in range(how.most + 1):
        logits[:, picture] = -torch.inf
        token = _drawn(logits, how, generator)
        said.append(token)
        over |= torch.isin(token, ends)
        if i % LOOK == 0 and bool(over.all()):
            break
        if i < how.most:
            logits = rows.step(token)
    return [_until(row, stop) for row in torch.stack(said, 1).tolist()]


def _drawn(logits: Tensor, how: Saying, generator: torch.Generator) -> Tensor:
    top, ids = logits.float().topk(min(how.top, logits.shape[-1]), dim=-1)
    place = torch.multinomial((top / how.temperature).softmax(-1), 1, generator=generator)
    return ids.gather(1, place)[:, 0]


def _until(said: list[int], stop: frozenset[int]) -> list[int] | None:
    end = next((i for i, token in enumerate(said) if token in stop), None)
    return None if end is None else said[:end]


def conversations(
    model: MMMamba, tokenizer: Tokenizer, asked: list[list[str]], how: Saying, seed: int
) -> list[list[int]]:
    """Token ids of each conversation whose every answer ended, the last turn's mark included."""
    template = get_template(model.config.template)
    stop, after = template.stop_ids(tokenizer), tokenizer.encode(template.after_answer).tolist()
    rows: list[list[int] | None] = [tokenizer.encode(template.opening()).tolist() for _ in asked]
    for turn in range(max(map(len, asked))):
        going = [i for i, row in enumerate(rows) if row is not None and turn < len(asked[i])]
        prompts = []
        for i in going:
            question: Prompt = template.user_turn(asked[i][turn], tokens_per_tile=1)
            ids = tokenizer.encode(question + template.assistant_prefix).tolist()
            prompts.append([*(rows[i] or []), *ids])
        found = answers(model, prompts, stop, how, seed + turn) if going else []
        for i, prompt, said in zip(going, prompts, found, strict=True):
            rows[i] = None if said is None else [*prompt, *said, *after]
    return [row for row in rows if row is not None]


def make(
    teacher: Path, corpus: Path, count: int, batch: int = 256, device: str = "cpu",
    how: Saying | None = None, seed: int = 0,
) -> dict[str, int]:  # fmt: skip
    """Write the source; returns its tokens by split.

    Args:
        teacher: checkpoint folder with its tokenizer.
        corpus: folder of text.corpus, tokens packed.
        count: conversations asked for, all splits together.
        batch: asked at once.
        device: "cuda" reads in bfloat16.
        how: the teacher draws.
        seed: of questions and answers.
    """
    how = how or Saying()
    record, words = _packed_by(corpus, teacher), words_of(corpus)
    note = corpus / "tokens" / "tokens.json"
    for split in SPLITS:
        if not words[split]:
            raise UserError(f"{corpus}: WordNet's documents have no words for {split}")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tokenizer, model = load_tokenizer(teacher), load_model(teacher, device, dtype)
    facts = {"teacher": open_checkpoint(teacher).weights_id(), "batch": batch, "seed": seed}
    working = working_folder(
        note.parent / f"{NAME}.working", {**facts, "count": count, **asdict(how)}
    )
    status, counts = StatusLine(), {}
    sizes = {split: _batches(max(1, round(count * SHARES[split])), batch) for split in SPLITS}
    done, total = 0, sum(map(len, sizes.values()))
    for split in SPLITS:
        draw = random.Random(f"{seed} {split}")
        ask, parts = questions(words[split], draw.getrandbits(63)), []
        for number, size in enumerate(sizes[split]):
            status("conversations, batch", done, total)
            asked, drawn = [next(ask) for _ in range(size)], draw.getrandbits(62)
            path = working / f"{split}-{number:05}.npy"
            if not path.is_file():
                found = conversations(model, tokenizer, asked, how, drawn)
                row = [token for ids in found for token in (*ids, record["separator"])]
                with new_file(path) as part, part.open("wb") as file:
                    np.save(file, np.array(row, np.uint16))
            parts.append(np.load(path, allow_pickle=False))
            done += 1
        packed = np.concatenate(parts)
        if not len(packed):
            raise UserError(
                f"no answer to {split}'s {sum(sizes[split])} questions ended within {how.most} "
                "tokens; raise --most or --count"
            )
        with new_file(note.parent / split / f"{NAME}.npy") as part, part.open("wb") as file:
            np.save(file, packed)
        counts[split] = len(packed)
    status.close()
    record["sources"][NAME] = counts
    with new_file(note) as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(working)
    return counts


def _packed_by(corpus: Path, teacher: Path) -> dict[str, Any]:
    """What tokens.json says; it must be of the teacher's tokenizer."""
    note = corpus / "tokens" / "tokens.json"
    if not note.is_file():
        raise UserError(f"{note}: not found; pack the corpus first (text.corpus --tokenizer)")
    record = json.loads(note.read_text())
    file = teacher / "tokenizer.json"
    own = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none"
    if record["tokenizer_sha256"] != own:
        raise UserError(f"{note}: packed with another tokenizer than {file}; pack again with that")
    return record


def _batches(count: int, batch: int) -> list[int]:
    return [min(batch, count - start) for start in range(0, count, batch)]


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmmamba_edge.distill.text.conversations",
        description="Let a teacher answer questions, and add what it says to a text corpus.",
        epilog="example: python -m mmmamba_edge.distill.text.conversations --teacher smollm2 "
        "--corpus cache/text --device cuda",
    )
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of text.corpus")
    parser.add_argument("--count", type=int, default=32_768, help="conversations (32,768)")
    parser.add_argument("--batch", type=int, default=256, help="asked at once (256)")
    parser.add_argument("--most", type=int, default=Saying.most, help="tokens of an answer (192)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        require_device(args.device)
        for flag in ("count", "batch", "most"):
            if getattr(args, flag) < 1:
                raise UserError(f"--{flag} {getattr(args, flag)}: expected a number above 0")
        counts = make(
            args.teacher, args.corpus, args.count, args.batch, args.device,
            Saying(most=args.most), args.seed,
        )  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({NAME: counts}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
