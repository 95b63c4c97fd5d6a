"""A bundle or checkpoint behind VLMEvalKit's model interface; decoding is greedy."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from vlmeval.dataset import DATASET_MODALITY, DATASET_TYPE
from vlmeval.vlm.base import BaseModel

from mmmamba_edge.errors import UserError
from mmmamba_edge.evaluation.asking import open_model, tile_limit
from mmmamba_edge.image import load_image
from mmmamba_edge.prefix import PrefixCache
from mmmamba_edge.prompt import IMAGE_PLACEHOLDER
from mmmamba_edge.session import Session
from vlmeval_mmmamba_edge.prompts import has_prompt, prompt_text

MMMU_TILES = 12  # its pictures are small print; they are also enlarged twofold

Message = Sequence[Mapping[str, str]]


class MMMambaEdge(BaseModel):
    """A model of VLMEvalKit.

    Args:
        model_path: a bundle folder, a .pte or a checkpoint folder.
        runtime, threads, provider: as for `mmmamba_edge.open_bundle`; "auto" knows checkpoints too.
        max_new_tokens: of an answer at most.
        max_tiles: of a picture; None: 12 for MMMU, else 6, or fewer where the model was made for
            fewer.
    """

    INTERLEAVE = True
    INSTALL_REQ = False
    allowed_types = ["text", "image"]

    def __init__(
        self, model_path: str, runtime: str = "auto", threads: int | None = None,
        provider: str = "cpu", max_new_tokens: int = 1024, max_tiles: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.runner = open_model(Path(model_path), runtime, threads, provider)
        self.max_new_tokens = max_new_tokens
        self.max_tiles = max_tiles
        self._seen = PrefixCache()  # several questions about one picture read it once

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """Whether mmMamba's published figures were made with other words than VLMEvalKit's."""
        return (
            dataset is not None
            and DATASET_MODALITY(dataset) == "IMAGE"
            and has_prompt(dataset, DATASET_TYPE(dataset))
        )

    def build_prompt(self, line: Mapping[str, Any], dataset: str) -> list[dict[str, str]]:
        """The message for a row of a dataset with a custom prompt."""
        text = prompt_text(line, dataset, DATASET_TYPE(dataset))
        pictures = [{"type": "image", "value": path} for path in self.dump_image(line, dataset)]
        return [*pictures, {"type": "text", "value": text}]

    def generate_inner(self, message: Message, dataset: str | None = None) -> str:
        """The answer to a message.

        Args:
            message: parts {"type": "image", "value": path} and {"type": "text", "value": text}.
            dataset: its name, which decides how pictures are cut.

        Raises:
            UserError: a part of another type, or a picture that cannot be read.
        """
        for part in message:
            if part["type"] not in self.allowed_types:
                raise UserError(f"message: type {part['type']!r}; known are text and image")
        pictures: list[str | Image.Image] = [p["value"] for p in message if p["type"] == "image"]
        texts = [part["value"] for part in message if part["type"] == "text"]
        limit = self.max_tiles
        if dataset is not None and dataset.startswith("MMMU"):
            if pictures:
                pictures[0] = _twice_as_large(load_image(pictures[0]))
            most = self.runner.config.max_dynamic_patch
            limit = min(MMMU_TILES, most) if limit is None else limit
        session = Session(self.runner, prefix_cache=self._seen)
        answer = session.ask(
            _with_places("\n".join(texts), len(pictures)),
            pictures,
            max_new_tokens=self.max_new_tokens,
            max_tiles=tile_limit(self.runner, limit),
        )
        return "".join(answer).strip()


def _with_places(text: str, count: int) -> str:
    """The text with a place for each picture: its own where they match, else InternVL's."""
    if text.count(IMAGE_PLACEHOLDER) == count:
        return text
    text = text.replace(IMAGE_PLACEHOLDER, "")
    if count == 1:
        return f"{IMAGE_PLACEHOLDER}\n{text}"
    places = [f"Image-{number}: {IMAGE_PLACEHOLDER}\n" for number in range(1, count + 1)]
    return "".join(places) + text


def _twice_as_large(image: Image.Image) -> Image.Image:
    return image.resize((2 * image.width, 2 * image.height), Image.Resampling.BILINEAR)
