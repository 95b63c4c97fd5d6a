"""Stage 3: the whole student learns the teacher's next-token distributions (spec 6.3)."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmmamba_edge.distill.batches import Batch
from mmmamba_edge.distill.engine import Engine
from mmmamba_edge.distill.losses import TopK, logits_kl, teacher_topk, topk_kl
from mmmamba_edge.distill.reading import read, weighted
from mmmamba_edge.distill.student import assemble
from mmmamba_edge.model.decoder import MMMamba
from mmmamba_edge.model.mixer import Mamba2Mixer
from mmmamba_edge.model.recompute import Recompute
from mmmamba_edge.whole import new_file


class StudentReader(nn.Module):
    """The free-running student and its distance from the teacher."""

    def __init__(self, student: MMMamba, tau: float, compiled: bool = False) -> None:
        super().__init__()
        self.student, self.tau, self.compiled = student, tau, compiled

    def forward(self, batch: Batch, teacher: Tensor | TopK, teacher_head: Tensor) -> Tensor:
        """KL summed over tokens by weight.

        Args:
            batch: on the device.
            teacher: normed hidden states (tokens, hidden) at the batch's weighted positions, or its
                likeliest tokens there.
            teacher_head: (vocab, hidden).
        """
        hidden, weights = weighted(read(self.student, batch), batch)
        head = self.student.language_model.output.weight
        if isinstance(teacher, TopK):
            return topk_kl(hidden, head, teacher, weights, tau=self.tau)
        return logits_kl(
            hidden, head, teacher, teacher_head, weights, tau=self.tau, compiled=self.compiled
        )


class LogitMatching:
    """A stage that trains mixers through the whole student.

    Args:
        teacher: all attention, frozen. The student shares its other modules.
        mixers: to train, by layer; the layers that are missing stay attention.
        engine: where it runs.
        tau: temperature of both distributions.
        recompute: what the backward pass computes again rather than keeps.
        cache: keeps the teacher's answers on disk; None computes them anew every time.
        compiled: torch.compile both models' layers, and the KL's pieces.
    """

    def __init__(
        self, teacher: MMMamba, mixers: Mapping[int, Mamba2Mixer], engine: Engine,
        *, tau: float = 1.0, recompute: Recompute = "nothing", cache: "TeacherCache | None" = None,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        self.teacher, self.mixers, self.engine = teacher, mixers, engine
        self._tau, self._cache = tau, cache
        student = assemble(teacher, mixers)
        student.recompute(recompute)
        for layer in [*student.layers, *teacher.layers] if compiled else ():
            engine.compile(layer)
        self.units = [engine.wrap(StudentReader(student, tau, compiled))]

    def backward(self, batch: Batch, factor: Tensor | float) -> Tensor:
        """Gradients of one micro-batch are added up; returns its share of the loss.

        Args as in `LayerMatching.backward`.
        """
        loss = self._distance(batch) * factor
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """The sum over tokens, nothing learnt."""
        return self._distance(batch)

    def _distance(self, batch: Batch) -> Tensor:
        with self.engine.autocast():
            return self.units[0](batch, self._teach(batch), self._head)

    @torch.no_grad()
    def _teach(self, batch: Batch) -> Tensor | TopK:
        if self._cache and (known := self._cache.get(batch)):
            return known
        hidden, _ = weighted(read(self.teacher, batch), batch)
        if self._cache is None:
            return hidden
        return self._cache.put(
            batch, teacher_topk(hidden, self._head, self._cache.k, tau=self._tau)
        )

    @property
    def _head(self) -> Tensor:
        return self.teacher.language_model.output.weight


class TeacherCache:
    """A teacher's k likeliest tokens on disk, a file for each micro-batch.

    It serves runs that read the same micro-batches: another student, another seed of the mixers, a
    repeated run. Of a token it keeps 6 k bytes.

    Args:
        folder: where; made if missing.
        k: tokens kept at each position.
        teacher: identifies teacher and temperature; another one's files are not read.
    """

    def __init__(self, folder: Path, k: int, teacher: str) -> None:
        self.folder, self.k, self._teacher = folder, k, teacher
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, batch: Batch) -> TopK | None:
        """What is kept for a batch, on its device."""
        path = self._path(batch)
        if not path.is_file():
            return None
        tensors = load_file(path, device=str(batch.ids.device))
        return TopK(tensors["indices"].long(), tensors["logprobs"].float())

    def put(self, batch: Batch, answers: TopK) -> TopK:
        """Keep a batch's, and give back what `get` will give."""
        # float16: log-probabilities down to e^-11 keep three digits; bfloat16 would keep two.
        logprobs = answers.logprobs.clamp(min=-60000).half()
        tensors = {"indices": answers.indices.int(), "logprobs": logprobs}
        with new_file(self._path(batch)) as part:
            save_file(tensors, part)
        return TopK(answers.indices, logprobs.float())

    def _path(self, batch: Batch) -> Path:
        digest = hashlib.sha256(f"{self._teacher} {self.k}".encode())
        tensors = [batch.ids, batch.lengths, batch.weights]
        if (pixels := batch.pixel_values) is not None:
            # Not all of them come back from the device: a sample and the sum tell pictures apart.
            flat = pixels.flatten()
            tensors += [flat[:: max(1, len(flat) // 4096)], flat.double().sum()[None]]
        for tensor in tensors:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return self.folder / f"{digest.hexdigest()[:40]}.safetensors"
