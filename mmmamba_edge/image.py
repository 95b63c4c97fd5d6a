"""Pictures to model inputs: decode, cut into tiles, normalise (spec 7.3). NumPy and Pillow only.

    pixel_values = image_tiles("cat.jpg", config)      # (tiles, 3, height, width) float32

A picture is resized to a grid of square tiles whose shape is closest to its own and cut row by row;
the whole picture in one tile (the thumbnail) comes last where there is more than one.
"""

import logging
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mmmamba_edge.config import IMAGE_MEAN, IMAGE_STD, Config
from mmmamba_edge.errors import UserError

# Only these decoders are tried: Pillow also has some that start other programs (EPS) or are rarely
# exercised, and a picture may come from anywhere.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
SHRINK_PIXELS = 50_000_000  # above this, shrink while decoding: tiles never need so much
REFUSE_PIXELS = 256_000_000  # above this, refuse: Pillow would need more than 1 GB

_log = logging.getLogger(__name__)


def image_tiles(
    source: str | Path | bytes | Image.Image, config: Config, *, max_tiles: int | None = None
) -> NDArray[np.float32]:
    """A picture as the model's `pixel_values`.

    Args:
        source: as for `load_image`.
        config: gives tile size, tile limits and whether there is a thumbnail.
        max_tiles: at most so many tiles, thumbnail not counted; None: as the config says.

    Returns:
        (tiles, 3, image_size, image_size) float32.

    Raises:
        UserError: as `load_image`; or `max_tiles` below what the model needs.
    """
    limit = config.max_dynamic_patch if max_tiles is None else max_tiles
    tiles = tile_image(
        load_image(source),
        tile=config.image_size,
        min_tiles=config.min_dynamic_patch,
        max_tiles=limit,
        use_thumbnail=config.use_thumbnail,
    )
    return normalise(tiles)


def load_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Decode a picture to RGB, upright, at most about 50 megapixels.

    The first frame of an animation is taken. Transparency is laid on white: drawings with an alpha
    channel are made to be seen on a page, and dropping alpha would show whatever colour happens to
    be stored under it. 16-bit greys keep their high byte.

    Args:
        source: a file name, the file's bytes, or a Pillow image (which is not changed).

    Returns:
        A new image of mode RGB.

    Raises:
        UserError: not found, not readable, empty, not an image, truncated, or over 256 megapixels.
    """
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "image")
        with _pillow_contained(name, "cannot be decoded"):
            return _decode(source, name, draft=False)
    if isinstance(source, bytes | bytearray | memoryview):
        return _read(BytesIO(source), "image", len(source))
    if not isinstance(source, str | Path):
        raise UserError(
            f"image: {type(source).__name__} given; expected a file name, bytes or a Pillow image"
        )
    path = Path(source)
    if not path.exists():
        raise UserError(f"{source}: not found; give the name of a picture on this machine")
    if not path.is_file():
        raise UserError(f"{source}: not a file; give the name of a picture")
    try:
        with path.open("rb") as file:
            return _read(file, str(source), path.stat().st_size)
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror or error})") from error


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) that `load_image` will give, from the header alone.

    Raises:
        UserError: not a picture, or too large to decode; FileNotFoundError where there is none.
    """
    with path.open("rb") as file, _pillow_contained(str(path), "not a picture that can be read"):
        image = Image.open(file, formats=_formats())
        width, height = image.size
        if width * height > REFUSE_PIXELS:
            raise _too_large(image, str(path))
        try:  # the base class's method: PNG's own would decode all pixels first
            turned = Image.Image.getexif(image).get(0x0112, 1) in (5, 6, 7, 8)
        except Exception:  # a damaged EXIF block does not spoil the picture
            turned = False
        # Of a TIFF, Pillow gives the size upright.
        return (height, width) if turned and image.format != "TIFF" else (width, height)


def choose_grid(
    width: int, height: int, *, min_tiles: int, max_tiles: int, tile: int
) -> tuple[int, int]:
    """The (columns, rows) whose ratio is closest to width / height (spec 7.3).

    Among grids that are exactly equally close the later (larger) one is taken if the picture has
    more than half of that grid's pixels. Grids of one size are tried with fewer columns first.

    Args:
        width, height: of the picture, in pixels.
        min_tiles, max_tiles: bounds on columns * rows.
        tile: side of a tile, in pixels.
    """
    if not 1 <= min_tiles <= max_tiles:
        raise UserError(
            f"max_tiles: {max_tiles} given; expected at least {max(min_tiles, 1)}, "
            "the fewest tiles this model takes"
        )
    grids = sorted(
        (
            (columns, rows)
            for columns in range(1, max_tiles + 1)
            for rows in range(1, max_tiles // columns + 1)
            if columns * rows >= min_tiles
        ),
        key=lambda grid: (grid[0] * grid[1], grid[0]),
    )
    best, best_distance = grids[0], math.inf
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        enough_pixels = width * height > 0.5 * tile * tile * columns * rows
        if distance < best_distance or (distance == best_distance and enough_pixels):
            best, best_distance = (columns, rows), distance
    return best


def tile_image(
    image: Image.Image, *, tile: int, min_tiles: int, max_tiles: int, use_thumbnail: bool
) -> list[Image.Image]:
    """Cut an RGB image into tiles of `tile` x `tile` pixels, row by row, thumbnail last."""
    columns, rows = choose_grid(
        image.width, image.height, min_tiles=min_tiles, max_tiles=max_tiles, tile=tile
    )
    bicubic = Image.Resampling.BICUBIC
    resized = image.resize((columns * tile, rows * tile), bicubic)  # aspect ratio is not kept
    tiles = [
        resized.crop((column * tile, row * tile, (column + 1) * tile, (row + 1) * tile))
        for row in range(rows)
        for column in range(columns)
    ]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile, tile), bicubic))
    return tiles


def normalise(tiles: Sequence[Image.Image]) -> NDArray[np.float32]:
    """RGB tiles of one size as (tiles, 3, height, width) float32, ImageNet mean and std."""
    levels = np.arange(256, dtype=np.float32)[None, :] / np.float32(255)  # (1, 256)
    mean = np.array(IMAGE_MEAN, dtype=np.float32)[:, None]
    std = np.array(IMAGE_STD, dtype=np.float32)[:, None]
    table = (levels - mean) / std  # (3, 256): a byte has only 256 values
    pixels = np.stack([np.asarray(tile) for tile in tiles])  # (tiles, height, width, 3) uint8
    return np.stack([table[c][pixels[..., c]] for c in range(3)], axis=1)


# --- decoding -----------------------------------------------------------------------------------


def _read(file, name: str, size: int) -> Image.Image:
    if size == 0:
        raise UserError(f"{name}: the file is empty (0 bytes); expected a picture")
    known = _formats()
    what = f"not a picture that can be read; convert it to one of {', '.join(known)}"
    with _pillow_contained(name, what):
        image = Image.open(file, formats=known)
    with _pillow_contained(name, "the picture is truncated or damaged; copy or save it again"):
        return _decode(image, name)


def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()  # before it, Pillow knows none
    return [kind for kind in FORMATS if kind in Image.OPEN]


_pillow_lock = threading.Lock()
_pillow_log = logging.getLogger("PIL")
_pillow_log.addHandler(logging.NullHandler())


@contextmanager
def _pillow_contained(name: str, what: str) -> Iterator[None]:
    """Turn whatever Pillow raises into a UserError, and silence its warnings and log.

    Pillow's own pixel limit is lifted meanwhile, for ours names the size and shrinks first. These
    are process-wide settings: hence the lock, and the restoring.
    """
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        propagate, _pillow_log.propagate = _pillow_log.propagate, False
        try:
            yield
        except UserError:
            raise
        except UnidentifiedImageError as error:
            raise UserError(f"{name}: {what}") from error
        except Exception as error:  # decoders raise almost anything on hostile bytes
            raise UserError(f"{name}: {what} ({str(error) or type(error).__name__})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit
            _pillow_log.propagate = propagate


def _decode(image: Image.Image, name: str, *, draft: bool = True) -> Image.Image:
    width, height = image.size
    if width * height > REFUSE_PIXELS:
        raise _too_large(image, name)
    original = _size(image)
    if draft and (factor := _factor(image)) > 1:
        image.draft("RGB", (width // factor, height // factor))  # JPEG: decodes fewer pixels
    image.load()
    orientation = _orientation(image)
    brightest = image.getextrema()[1] if image.mode == "F" else None
    if isinstance(brightest, float) and brightest <= 1.0:
        image = image.point(lambda grey: grey * 255)  # floats in 0..1, not in 0..255
    factor = _factor(image)
    rgb = _to_rgb(image) if factor == 1 else _shrunk_to_rgb(image, factor)
    if rgb.size != (width, height):
        _log.warning("%s: %s downscaled to %dx%d", name, original, *rgb.size)
    return rgb.transpose(orientation) if orientation is not None else rgb


def _too_large(image: Image.Image, name: str) -> UserError:
    limit = REFUSE_PIXELS // 10**6
    return UserError(f"{name}: {_size(image)} is more than {limit} megapixels; save it smaller")


def _size(image: Image.Image) -> str:
    megapixels = image.width * image.height / 1e6
    return f"{image.width}x{image.height} ({megapixels:.0f} megapixels)"


def _factor(image: Image.Image) -> int:
    return math.ceil(math.sqrt(image.width * image.height / SHRINK_PIXELS))


def _shrunk_to_rgb(image: Image.Image, factor: int) -> Image.Image:
    """Average `factor` x `factor` pixels to one, in strips, so that no second full copy is made."""
    width, height = image.size
    result = Image.new("RGB", (math.ceil(width / factor), math.ceil(height / factor)))
    strip = 64 * factor
    for top in range(0, height, strip):
        part = image.crop((0, top, width, min(top + strip, height)))
        result.paste(_to_rgb(part).reduce(factor), (0, top // factor))
    return result


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit greys; Pillow would clip them to 255
        high_byte = np.clip(np.asarray(image) // 256, 0, 255).astype(np.uint8)
        return Image.fromarray(high_byte).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # Pillow has no direct way from here to RGBA
        image = image.convert("LA")
    coloured = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(coloured, mask=coloured.getchannel("A"))
    return page


# EXIF orientation -> what brings the picture upright (values of the EXIF standard)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block does not spoil the picture
        return None
