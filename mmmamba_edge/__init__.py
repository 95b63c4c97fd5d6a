"""mmMamba Edge: multimodal Mamba-2 models, distilled, exported, and run with a fixed-size state.

Every name below is imported when it is first used, so `import mmmamba_edge` needs no torch and no
runtime:

    import mmmamba_edge as mm

    runner = mm.open_bundle("build/linear-int8")
    for text in mm.stream(runner, "What is this?", images=["a.png"], max_new_tokens=64):
        print(text, end="", flush=True)
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmmamba_edge.answer import Answer as Answer
    from mmmamba_edge.answer import Stats as Stats
    from mmmamba_edge.config import Config as Config
    from mmmamba_edge.config import load_config as load_config
    from mmmamba_edge.errors import CheckFailed as CheckFailed
    from mmmamba_edge.errors import UserError as UserError
    from mmmamba_edge.generate import generate_ids as generate_ids
    from mmmamba_edge.image import image_tiles as image_tiles
    from mmmamba_edge.model.checkpoints import load_model as load_model
    from mmmamba_edge.prefix import PrefixCache as PrefixCache
    from mmmamba_edge.runtimes import open_bundle as open_bundle
    from mmmamba_edge.sampling import Sampler as Sampler
    from mmmamba_edge.session import Session as Session
    from mmmamba_edge.session import stream as stream
    from mmmamba_edge.tokenizer import load_tokenizer as load_tokenizer

_HOME = {
    "Answer": "mmmamba_edge.answer",
    "CheckFailed": "mmmamba_edge.errors",
    "Config": "mmmamba_edge.config",
    "PrefixCache": "mmmamba_edge.prefix",
    "Sampler": "mmmamba_edge.sampling",
    "Session": "mmmamba_edge.session",
    "Stats": "mmmamba_edge.answer",
    "UserError": "mmmamba_edge.errors",
    "generate_ids": "mmmamba_edge.generate",
    "image_tiles": "mmmamba_edge.image",
    "load_config": "mmmamba_edge.config",
    "load_model": "mmmamba_edge.model.checkpoints",
    "load_tokenizer": "mmmamba_edge.tokenizer",
    "open_bundle": "mmmamba_edge.runtimes",
    "stream": "mmmamba_edge.session",
}

__all__ = [*_HOME, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]

try:
    __version__ = version("mmmamba-edge")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
