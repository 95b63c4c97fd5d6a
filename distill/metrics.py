"""What a run says of itself: a line on the terminal, JSONL beside the progress, TensorBoard."""

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from mmmamba_edge.bench import peak_bytes
from mmmamba_edge.distill.engine import Engine
from mmmamba_edge.status import StatusLine
from mmmamba_edge.whole import new_file


class Metrics:
    """Means since the last line, in this process and over all.

    Args:
        out: folder; `metrics.jsonl` and `tensorboard/` go there, from the main process.
        title: of the line.
        engine: device and processes.
        steps: of the whole stage.
        start: steps done before.
    """

    def __init__(self, out: Path, title: str, engine: Engine, steps: int, start: int) -> None:
        self.engine, self.title, self.steps, self.start = engine, title, steps, start
        self._began = self._tick = time.perf_counter()
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._tokens = 0
        self._file = self._board = self._status = None
        if engine.is_main:
            _forget(out / "metrics.jsonl", start)
            self._file = (out / "metrics.jsonl").open("a", encoding="utf-8")
            self._board = _board(out / "tensorboard")
            self._status = StatusLine(every=0)

    def count(self, loss: Tensor, norm: Tensor, tokens: int) -> None:
        """One step of this process; nothing waits for the device."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._tokens += tokens

    def log(self, step: int, rate: float) -> float:
        """Write a line; returns the mean loss over all processes since the line before."""
        loss = float(self.engine.total(torch.stack(self._losses).mean()))
        norm = float(torch.stack(self._norms).mean())
        tokens = float(self.engine.total(self._tokens))
        now = time.perf_counter()
        speed = tokens / (now - self._tick)
        self._tick, self._tokens = now, 0
        self._losses.clear()
        self._norms.clear()
        memory = _memory(self.engine.device)
        self._write(
            {
                "step": step, "loss": loss, "lr": rate, "grad_norm": norm,
                "tokens_per_s": round(speed, 1), "memory_gib": round(memory, 3),
                "seconds": round(now - self._began, 2),
            }
        )  # fmt: skip
        if self._status:
            more = f"loss {loss:.5g}  lr {rate:.2g}  {speed:,.0f} tokens/s  {memory:.2f} GiB"
            self._status(self.title, step, self.steps, more)
        return loss

    def validation(self, step: int, loss: float) -> None:
        """The loss on held-out rows."""
        self._write({"step": step, "validation_loss": loss})
        self._note(f"{self.title} {step}/{self.steps}  validation loss {loss:.5g}")

    def skipped(self, rows: tuple[str, ...]) -> None:
        """Rows of the data that could not be used, one line each."""
        for row in rows:
            self._write({"skipped": row})
            self._note(f"skipped {row}")

    def close(self) -> None:
        """End the line, close the files."""
        if self._status:
            self._status.close()
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()

    def _write(self, row: dict) -> None:
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._board and "step" in row:
            for key, value in row.items():
                if key != "step":
                    self._board.add_scalar(key, value, row["step"])

    def _note(self, line: str) -> None:
        if self._status:
            self._status.note(line)


def _forget(path: Path, start: int) -> None:
    """Drop what a killed run wrote after its last progress, a torn last line with it."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line).get("step", 0) <= start:
                kept.append(line + "\n")
        except ValueError:
            continue
    with new_file(path) as part:
        part.write_text("".join(kept), encoding="utf-8")


def _board(folder: Path):
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError:  # TensorBoard is for looking at; the JSONL has it all
        return None
    return SummaryWriter(str(folder))


def _memory(device: torch.device) -> float:
    """Peak memory in GiB: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_bytes() / 2**30
