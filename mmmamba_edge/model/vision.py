"""From pixels to image tokens: patch conv, positions, pixel shuffle with its MLP (spec 1.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmamba_edge.config import Config


class VisionEmbeddings(nn.Module):
    """Patches as vectors. `class_embedding` and position 0 exist but are never used."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.hidden_size
        self.patch = config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.patches_per_tile + 1, width))
        self.patch_embedding = nn.Conv2d(3, width, self.patch, stride=self.patch)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(tiles, 3, height, width) -> (tiles, patches, hidden), patches row by row."""
        x = self.patch_embedding(pixel_values)  # (tiles, hidden, rows, cols)
        return x.flatten(2).transpose(1, 2) + self._positions(x.shape[2], x.shape[3]).to(x)

    def _positions(self, rows: int, cols: int) -> Tensor:
        table = self.position_embedding[:, 1:]
        side = round(table.shape[1] ** 0.5)
        if (rows, cols) == (side, side):
            return table
        image = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        image = F.interpolate(image, (rows, cols), mode="bicubic", align_corners=False)
        return image.flatten(2).transpose(1, 2)


def pixel_shuffle(x: Tensor, merge: int) -> Tensor:
    """Merge `merge` x `merge` neighbouring patches into one vector, row-major on both levels.

    (tiles, patches, hidden) -> (tiles, patches / merge^2, hidden * merge^2).
    """
    tiles, patches, width = x.shape
    side = round(patches**0.5)
    x = x.reshape(tiles, side // merge, merge, side // merge, merge, width)
    return x.transpose(2, 3).reshape(tiles, (side // merge) ** 2, merge * merge * width)


def pixel_shuffle_proj(config: Config) -> nn.Sequential:
    """The MLP after pixel shuffle: hidden * merge^2 -> hidden -> hidden, exact GELU between."""
    return nn.Sequential(
        nn.Linear(config.hidden_size * config.shuffle**2, config.hidden_size),
        nn.GELU(),
        nn.Linear(config.hidden_size, config.hidden_size),
    )
