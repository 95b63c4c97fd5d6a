"""Dense supervision while a model is trained: what does each image token see?

Linear heads read hidden states of the decoder at image positions; they are thrown away with the
run. What they ask for is found in layers below the last, early enough to be written to states.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba_edge.distill.scenes.cells import CLASSES, UNKNOWN
from mmmamba_edge.model.layers import RMSNorm

NOTHING = 0.2  # weight of "nothing here": most cells are empty


class PerceptionHeads(nn.Module):
    """One head for each of some layers.

    Args:
        hidden: width of the decoder.
        layers: how many layers are read.
    """

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        classes = sum(map(len, CLASSES.values()))
        self.heads = nn.ModuleList(
            nn.Sequential(RMSNorm(hidden, 1e-5), nn.Linear(hidden, classes)) for _ in range(layers)
        )

    def forward(self, hidden: list[Tensor], labels: Tensor) -> Tensor:
        """Mean cross-entropy over layers and sorts of label.

        Args:
            hidden: of each layer, (places, hidden).
            labels: (places, 3) uint8, `cells.cell_labels`; UNKNOWN is left out.
        """
        target = labels.long().masked_fill(labels == UNKNOWN, -100)
        sizes = [len(names) for names in CLASSES.values()]
        weights = [torch.ones(n, device=labels.device) for n in sizes]
        for weight in weights:
            weight[:1].fill_(NOTHING)  # a plain assignment copies from the CPU: no CUDA graph then
        losses = []
        for head, states in zip(self.heads, hidden, strict=True):
            for sort, logits in enumerate(head(states).float().split(sizes, dim=-1)):
                losses.append(
                    F.cross_entropy(logits, target[:, sort], weights[sort], ignore_index=-100)
                )
        return torch.stack(losses).mean()
