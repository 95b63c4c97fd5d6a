"""How far students are from their teacher on held-out text.

    python -m mmmamba_edge.distill.text.evaluate --teacher smollm2 --student linear=LINEAR \
        --student hybrid=HYBRID --tokens text/tokens --out results/

All models read the same windows. Written are `results.json`, `table.md` (by source, with bootstrap
intervals over windows) and `samples.md` (greedy answers of each).
"""

import argparse
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmmamba_edge.distill.batches import Batch
from mmmamba_edge.distill.losses import head_logits
from mmmamba_edge.distill.reading import read
from mmmamba_edge.distill.text_source import PackedTokens, open_tokens
from mmmamba_edge.errors import UserError
from mmmamba_edge.model.checkpoints import load_model, open_checkpoint
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.model.device import require_device
from mmmamba_edge.prompt import Text, get_template
from mmmamba_edge.status import StatusLine
from mmmamba_edge.tokenizer import Tokenizer, load_tokenizer
from mmmamba_edge.whole import new_file

PIECE = 512  # tokens whose logits are held at a time
RESAMPLES = 1000
OPENINGS = (
    "The kernel keeps a list of all open files, and",
    "In the beginning",
    "To install the package, first",
    "A government that does not answer to its people",
)
QUESTIONS = ("What is the capital of France?", "Explain what a text editor is, in two sentences.")

# Sums over the predicted tokens of a window, in the order of the columns measured below.
MEASURES = ("tokens", "teacher_nll", "student_nll", "kl", "agree")


def windows(
    tokens: PackedTokens, length: int, most: int, without: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """At most `most` windows (n, length) of each source that has one, evenly over its tokens."""
    if unknown := set(without) - set(tokens.files):
        raise UserError(
            f"--without {', '.join(sorted(unknown))}: {tokens.folder} has {', '.join(tokens.files)}"
        )
    found = {}
    for name, ids in tokens.files.items():
        if name in without:
            continue
        there = len(ids) // length
        if count := min(there, most):
            starts = [i * there // count * length for i in range(count)]
            found[name] = np.stack([ids[start : start + length] for start in starts])
    if not found:
        raise UserError(f"{tokens.folder}: no source has {length} tokens; lower --length")
    return found


@torch.no_grad()
def measure(
    teacher: MMMamba, students: Mapping[str, MMMamba], ids: np.ndarray, rows: int = 8
) -> dict[str, np.ndarray]:
    """What each student and its teacher make of windows.

    Args:
        teacher, students: on one device; their dtype is computed in.
        ids: (n, length).
        rows: read at once.

    Returns:
        For each student (n, 5): sums over a window of `MEASURES`, NLL and KL in nats.
    """
    sums = {name: [] for name in students}
    for start in range(0, len(ids), rows):
        part = torch.from_numpy(ids[start : start + rows].astype(np.int64))
        count, length = part.shape
        lengths, weights = torch.full((count,), length), torch.ones(count, length)
        batch = Batch(part, lengths, weights, dense=True).to(_device(teacher))
        theirs = read(teacher, batch)
        for name, student in students.items():
            ours = read(student, batch)
            sums[name] += [
                _window(teacher, student, theirs[i], ours[i], batch.ids[i]) for i in range(count)
            ]
    return {name: np.array(lines, np.float64) for name, lines in sums.items()}


def _window(
    teacher: MMMamba, student: MMMamba, theirs: Tensor, ours: Tensor, ids: Tensor
) -> list[float]:
    heads = [model.language_model.output.weight for model in (teacher, student)]
    total = torch.zeros(len(MEASURES), dtype=torch.float64, device=ids.device)
    for start in range(0, len(ids) - 1, PIECE):
        place = slice(start, min(start + PIECE, len(ids) - 1))
        target = ids[1:][place, None]
        p, q = (
            torch.log_softmax(head_logits(hidden[place], head, len(head)), dim=-1)
            for hidden, head in zip((theirs, ours), heads, strict=True)
        )
        kl = (p.exp() * (p - q)).sum(-1)
        agree = (p.argmax(-1) == q.argmax(-1)).double()
        parts = (-p.gather(1, target), -q.gather(1, target), kl, agree)
        counted = [torch.full_like(total[0], len(target)), *(x.double().sum() for x in parts)]
        total += torch.stack(counted)
    return total.tolist()


def _device(model: MMMamba) -> torch.device:
    return model.language_model.output.weight.device


def summary(sums: np.ndarray, seed: int = 0) -> dict[str, list[float]]:
    """Figures of (n, 5) window sums, each [value, low, high]: a 95 % interval over windows."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(sums), (RESAMPLES, len(sums)))
    values = _figures(sums.sum(0))
    spread = _figures(sums[picks].sum(1).T)
    return {
        name: [float(value), *(float(x) for x in np.percentile(spread[name], (2.5, 97.5)))]
        for name, value in values.items()
    }


def _figures(total: np.ndarray) -> dict[str, np.ndarray]:
    tokens, theirs, ours, kl, agree = total
    return {
        "teacher_perplexity": np.exp(theirs / tokens), "perplexity": np.exp(ours / tokens),
        "ratio": np.exp((ours - theirs) / tokens), "kl": kl / tokens, "agreement": agree / tokens,
    }  # fmt: skip


def evaluate(
    teacher: MMMamba, students: Mapping[str, MMMamba], by_source: Mapping[str, np.ndarray]
) -> dict:
    """All figures: student -> "all" or source -> figure -> [value, low, high], and "windows"."""
    status, found = StatusLine(), {}
    for i, (source, ids) in enumerate(by_source.items()):
        status("windows", i, len(by_source), source)
        for name, sums in measure(teacher, students, ids).items():
            found.setdefault(name, {})[source] = sums
    status.close(keep=False)
    results = {}
    for name, sums in found.items():
        everything = {"all": np.concatenate(list(sums.values())), **sums}
        results[name] = {
            source: {"windows": len(rows), **summary(rows)} for source, rows in everything.items()
        }
    return results


def table(results: Mapping[str, dict]) -> str:
    """Markdown, a row for each student and source."""
    lines = [
        "| student | text | windows | teacher's perplexity | perplexity | ratio | KL | agreement |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, by_source in results.items():
        for source, x in by_source.items():
            ratio, kl, agree = x["ratio"], x["kl"], [100 * v for v in x["agreement"]]
            lines.append(
                f"| {name} | {source} | {x['windows']} | {x['teacher_perplexity'][0]:.2f} | "
                f"{x['perplexity'][0]:.2f} | {ratio[0]:.3f} ({ratio[1]:.3f}-{ratio[2]:.3f}) | "
                f"{kl[0]:.3f} ({kl[1]:.3f}-{kl[2]:.3f}) | "
                f"{agree[0]:.1f} ({agree[1]:.1f}-{agree[2]:.1f}) |"
            )
    return "\n".join(lines) + "\n"


# --- samples --------------------------------------------------------------------------------------


def samples(models: Mapping[str, MMMamba], tokenizer: Tokenizer, most: int) -> str:
    """Markdown: what each model says after the same openings, greedily."""
    lines = []
    for text, ids, stop in _prompts(next(iter(models.values())), tokenizer):
        lines.append(f"### {text}\n")
        for name, model in models.items():
            said = tokenizer.decode(greedy(model, ids, most, stop))
            lines.append(f"- **{name}**: {' '.join(said.split())}")
        lines.append("")
    return "\n".join(lines)


def _prompts(model: MMMamba, tokenizer: Tokenizer) -> list[tuple[str, list[int], set[int]]]:
    stop = {model.config.eos_token_id}
    found = [(text, tokenizer.encode([Text(text)]).tolist(), stop) for text in OPENINGS]
    template = get_template(model.config.template)
    for question in QUESTIONS:
        turn = [
            *template.opening(), *template.user_turn(question, tokens_per_tile=1),
            *template.assistant_prefix,
        ]  # fmt: skip
        found.append((question, tokenizer.encode(turn).tolist(), stop))
    return found


@torch.no_grad()
def greedy(model: MMMamba, ids: list[int], most: int, stop: set[int]) -> list[int]:
    """The likeliest tokens that follow, one after the other."""
    said: list[int] = []
    state = model.new_state(1, max_context=len(ids) + most)
    logits, state = model.prefill(torch.tensor([ids], device=_device(model)), state)
    while len(said) < most:
        token = int(logits[0, : model.config.img_context_token_id - 2].argmax())
        if token in stop:
            break
        said.append(token)
        logits, state = model.step(torch.tensor([token], device=_device(model)), state)
    return said


# --- the command line -----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mmmamba_edge.distill.text.evaluate",
        description="Perplexity of students and their teacher, KL and agreement on held-out text.",
        epilog="example: python -m mmmamba_edge.distill.text.evaluate --teacher smollm2 --tokens "
        "text/tokens --student linear=runs/linear/stage3/checkpoint --out results",
    )
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--student", action="append", required=True, metavar="NAME=FOLDER", help="may be repeated"
    )
    parser.add_argument("--tokens", type=Path, required=True, help="folder of text.corpus")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window (2048)")
    parser.add_argument("--windows", type=int, default=64, help="of each source at most (64)")
    parser.add_argument(
        "--without", action="append", default=[], metavar="SOURCE", help="leave it out (repeatable)"
    )
    parser.add_argument("--sample-tokens", type=int, default=60, help="0: no samples")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder; its results are replaced")
    args = parser.parse_args(argv)
    try:
        _run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    require_device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    folders = {"teacher": args.teacher}
    for pair in args.student:
        name, equals, folder = pair.partition("=")
        if not equals or name in ("", "teacher"):
            raise UserError(f"--student {pair}: expected NAME=FOLDER, NAME other than teacher")
        folders[name] = Path(folder)
    vocab = open_checkpoint(args.teacher).config.vocab_size
    tokens = open_tokens(args.tokens, args.split, vocab)
    by_source = windows(tokens, args.length, args.windows, args.without)
    models = {name: load_model(folder, args.device, dtype) for name, folder in folders.items()}
    students = {name: model for name, model in models.items() if name != "teacher"}
    results = evaluate(models["teacher"], students, by_source)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "split": args.split, "without": args.without, "length": args.length,
        "windows": args.windows, "device": args.device, "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "students": {name: str(folder) for name, folder in folders.items()},
    }  # fmt: skip
    texts = {
        "results.json": json.dumps({**facts, "results": results}, indent=1) + "\n",
        "table.md": table(results),
    }
    if args.sample_tokens:
        tokenizer = load_tokenizer(args.teacher)
        texts["samples.md"] = samples(models, tokenizer, args.sample_tokens)
    for name, text in texts.items():
        with new_file(args.out / name) as part:
            part.write_text(text, encoding="utf-8")
    print(texts["table.md"])


if __name__ == "__main__":
    sys.exit(main())
