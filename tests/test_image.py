"""Pictures to tiles: the reference's numbers, every kind of file, and every bad one."""

import json
import logging
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mmmamba_edge.config import Config, StackConfig
from mmmamba_edge.errors import UserError
from mmmamba_edge.image import choose_grid, image_tiles, load_image, normalise, tile_image

GOLDENS = Path(__file__).parent / "goldens" / "preprocess"
CASES = json.loads((GOLDENS / "cases.json").read_text())["cases"]
STORED = 2e-6  # the goldens keep six decimals
GRIDS = json.loads((GOLDENS / "grids.json").read_text())["rows"]


def golden_picture(width: int, height: int) -> Image.Image:
    """The picture of the goldens, by its formula."""
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    red = x * 255 // (width - 1) + 0 * y
    green = y * 255 // (height - 1) + 0 * x
    blue = ((x // 9 + y // 7) % 2) * 180 + (x * y // (width + height)) % 60
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def a_config(**changes) -> Config:
    stack = StackConfig(32, 64, 2, 1, 1e-5, 1e4, 64, ("mamba2",))
    return Config(stack, stack, vocab_size=1024, image_size=56, patch_size=14, **changes)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# --- the reference's numbers --------------------------------------------------------------------


@pytest.mark.parametrize("row", GRIDS, ids=lambda row: "x".join(map(str, row)))
def test_grid_is_the_references(row):
    width, height, tile, max_tiles, columns, rows = row
    grid = choose_grid(width, height, min_tiles=1, max_tiles=max_tiles, tile=tile)
    assert grid == (columns, rows)


def _case_name(case) -> str:
    thumbnail = "-thumbnail" if case["use_thumbnail"] else ""
    size = f"{case['width']}x{case['height']}"
    return f"{size}-tile{case['image_size']}-max{case['max_num']}{thumbnail}"


@pytest.mark.parametrize("case", CASES, ids=_case_name)
def test_tiles_are_the_references(case):
    tiles = tile_image(
        golden_picture(case["width"], case["height"]),
        tile=case["image_size"],
        min_tiles=1,
        max_tiles=case["max_num"],
        use_thumbnail=case["use_thumbnail"],
    )
    pixels = normalise(tiles)
    assert pixels.dtype == np.float32
    assert list(pixels.shape) == case["shape"]
    if "point_values" not in case:
        return
    points = np.array([[tile[:, y, x] for y, x in case["points_row_col"]] for tile in pixels])
    np.testing.assert_allclose(points, case["point_values"], atol=STORED)
    flat = pixels.reshape(*pixels.shape[:2], -1).astype(np.float64)
    np.testing.assert_allclose(flat.mean(-1), case["tile_channel_mean"], atol=STORED)
    np.testing.assert_allclose(flat.std(-1, ddof=1), case["tile_channel_std"], atol=STORED)


@pytest.mark.parametrize("size", ["300x200", "37x53", "64x640"])
def test_stored_pictures_follow_the_formula(size):
    stored = load_image(GOLDENS / f"img_{size}.png")
    width, height = map(int, size.split("x"))
    np.testing.assert_array_equal(np.asarray(stored), np.asarray(golden_picture(width, height)))


def test_every_pixel_is_the_references():
    tiles = tile_image(
        load_image(GOLDENS / "img_300x200.png"),
        tile=28, min_tiles=1, max_tiles=6, use_thumbnail=True,
    )  # fmt: skip
    expected = load_file(GOLDENS / "full_300x200_s28_max6.safetensors")["pixel_values"]
    np.testing.assert_allclose(normalise(tiles), expected, atol=1e-6)


# --- grids and tiles ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "grid"), [(300, (1, 1)), (633, (1, 1)), (634, (2, 2)), (950, (2, 2)), (951, (3, 3))]
)
def test_an_exact_tie_goes_by_the_number_of_pixels(side, grid):
    # 1x1, 2x2 and 3x3 all fit a square; n x n is taken above half its pixels: 448 * n / sqrt(2)
    assert choose_grid(side, side, min_tiles=1, max_tiles=12, tile=448) == grid


def test_min_tiles_excludes_small_grids():
    assert choose_grid(100, 100, min_tiles=2, max_tiles=4, tile=448) == (2, 2)
    assert choose_grid(100, 100, min_tiles=3, max_tiles=3, tile=448) == (1, 3)


def test_tiles_are_cut_row_by_row_and_the_thumbnail_is_last():
    image = Image.new("RGB", (30, 20))
    for number in range(6):
        column, row = number % 3, number // 3
        image.paste((number * 40,) * 3, (column * 10, row * 10, column * 10 + 10, row * 10 + 10))
    tiles = tile_image(image, tile=10, min_tiles=1, max_tiles=6, use_thumbnail=True)
    assert len(tiles) == 7
    assert [tile.getpixel((5, 5)) for tile in tiles[:6]] == [(n * 40,) * 3 for n in range(6)]
    assert tiles[6].size == (10, 10)
    assert tiles[6].getpixel((0, 0)) != tiles[6].getpixel((9, 9))


def test_one_tile_has_no_thumbnail():
    image = Image.new("RGB", (10, 10))
    assert len(tile_image(image, tile=10, min_tiles=1, max_tiles=1, use_thumbnail=True)) == 1


def test_image_tiles_follows_the_config():
    picture = golden_picture(300, 200)
    config = a_config(max_dynamic_patch=6, use_thumbnail=True)
    assert image_tiles(picture, config).shape == (7, 3, 56, 56)
    assert image_tiles(picture, config, max_tiles=2).shape == (3, 3, 56, 56)
    assert image_tiles(picture, a_config(max_dynamic_patch=6, use_thumbnail=False)).shape[0] == 6
    direct = normalise(tile_image(picture, tile=56, min_tiles=1, max_tiles=6, use_thumbnail=True))
    np.testing.assert_array_equal(image_tiles(saved(picture, "PNG"), config), direct)


def test_max_tiles_below_the_models_least_is_refused():
    with pytest.raises(UserError, match="max_tiles: 0 given; expected at least 1"):
        image_tiles(golden_picture(30, 20), a_config(), max_tiles=0)
    with pytest.raises(UserError, match="max_tiles: 1 given; expected at least 2"):
        image_tiles(golden_picture(30, 20), a_config(min_dynamic_patch=2), max_tiles=1)


# --- kinds of pictures --------------------------------------------------------------------------


def test_sources_are_a_name_a_path_bytes_or_an_image(tmp_path):
    picture = golden_picture(40, 30)
    path = tmp_path / "一只猫.png"
    picture.save(path)
    for source in (path, str(path), path.read_bytes(), picture):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture))


def test_a_given_image_is_not_changed(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("L", (9000, 6000)).save(path, quality=20)
    with Image.open(path) as lazy:
        small = load_image(lazy)
        assert lazy.size == (9000, 6000) and lazy.mode == "L"
    assert small.size == (4500, 3000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(kind):
    image = load_image(saved(Image.new("RGB", (20, 10), (250, 20, 30)), kind))
    assert image.size == (20, 10)
    np.testing.assert_allclose(np.asarray(image)[5, 5], (250, 20, 30), atol=6)


@pytest.mark.parametrize(
    ("mode", "stored", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("P", 3, None),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (128, 128, 128), (128, 128, 128)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("I;16", 0xABCD, (0xAB,) * 3),
        ("I", 0xABCD, (0xAB,) * 3),
        ("I", 10**6, (255, 255, 255)),
        ("F", 0.5, (127, 127, 127)),
        ("F", 200.0, (200, 200, 200)),
        ("LA", (0, 0), (255, 255, 255)),
        ("La", (0, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("RGBa", (0, 0, 0, 51), (204, 204, 204)),
    ],
)
def test_modes_become_rgb(mode, stored, expected):
    image = Image.new(mode, (4, 3), stored)
    if expected is None:
        image.putpalette([0, 0, 0] * 3 + [9, 8, 7])
        expected = (9, 8, 7)
    rgb = load_image(image)
    assert rgb.mode == "RGB" and rgb.size == (4, 3)
    assert rgb.getpixel((2, 1)) == expected


def test_16_bit_png_keeps_its_high_byte():
    grey = np.array([[0, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    image = load_image(saved(Image.fromarray(grey), "PNG"))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(v,) * 3 for v in (0, 1, 128, 255)]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(kind):
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 200, 100, 50])
    image.putpixel((1, 0), 1)
    rgb = load_image(saved(image, kind, transparency=0))
    assert rgb.getpixel((0, 0)) == (255, 255, 255)
    assert rgb.getpixel((1, 0)) == (200, 100, 50)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (5, 5), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((2, 2)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(kind, orientation):
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste("red", (0, 0, 8, 8))
    upright.paste("blue", (24, 8, 32, 16))
    transpose = Image.Transpose
    stored = {  # what a camera held that way writes
        1: upright,
        2: upright.transpose(transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(transpose.ROTATE_180),
        4: upright.transpose(transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(transpose.TRANSPOSE),
        6: upright.transpose(transpose.ROTATE_90),
        7: upright.transpose(transpose.TRANSVERSE),
        8: upright.transpose(transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    image = load_image(saved(stored, kind, exif=exif, **options))
    assert image.size == (32, 16)
    np.testing.assert_allclose(np.asarray(image)[3, 3], (255, 0, 0), atol=40)
    np.testing.assert_allclose(np.asarray(image)[12, 28], (0, 0, 255), atol=40)


def test_a_damaged_exif_block_does_not_spoil_the_picture():
    data = saved(Image.new("RGB", (8, 8), "green"), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert load_image(data).size == (8, 8)


def test_an_extreme_shape():
    tiles = image_tiles(Image.new("RGB", (20000, 1)), a_config(max_dynamic_patch=12))
    assert tiles.shape == (13, 3, 56, 56)


# --- too large ----------------------------------------------------------------------------------


def test_a_large_jpeg_is_shrunk_and_that_is_said(tmp_path, caplog):
    path = tmp_path / "large.jpg"
    picture = Image.new("L", (12000, 9000), 40)
    picture.paste(200, (6000, 0, 12000, 9000))
    picture.save(path, quality=20)
    with caplog.at_level(logging.WARNING):
        image = load_image(path)
    assert image.size == (6000, 4500)
    assert f"{path}: 12000x9000 (108 megapixels) downscaled to 6000x4500" in caplog.text
    np.testing.assert_allclose(np.asarray(image)[4400, 100], (40, 40, 40), atol=4)
    np.testing.assert_allclose(np.asarray(image)[100, 5900], (200, 200, 200), atol=4)


def test_a_large_png_is_shrunk_and_that_is_said(caplog):
    picture = Image.new("1", (12001, 9001), 1)
    picture.paste(0, (0, 0, 12001, 4500))
    with caplog.at_level(logging.WARNING):
        image = load_image(saved(picture, "PNG", compress_level=1))
    assert image.size == (6001, 4501)
    assert "image: 12001x9001 (108 megapixels) downscaled to 6001x4501" in caplog.text
    assert image.getpixel((6000, 2249)) == (0, 0, 0)
    assert image.getpixel((6000, 2250)) == (255, 255, 255)


def test_shrinking_keeps_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = load_image(saved(Image.new("L", (9000, 6000)), "JPEG", exif=exif, quality=20))
    assert image.size == (3000, 4500)


def test_a_picture_of_usual_size_is_left_alone(caplog):
    assert load_image(Image.new("RGB", (4000, 3000))).size == (4000, 3000)
    assert not caplog.records


def test_a_decompression_bomb_is_refused():
    header = b"P6 20000 20000 255\n"  # 400 megapixels; the pixels are never asked for
    with pytest.raises(
        UserError, match=r"20000x20000 \(400 megapixels\) is more than 256.*smaller"
    ):
        load_image(header)


def test_pillows_own_limit_is_put_back(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12345)
    assert load_image(saved(Image.new("RGB", (200, 200)), "PNG")).size == (200, 200)
    with pytest.raises(UserError):
        load_image(b"not a picture")
    assert Image.MAX_IMAGE_PIXELS == 12345


# --- bad files ----------------------------------------------------------------------------------


def test_not_found(tmp_path):
    with pytest.raises(UserError, match="missing.png: not found"):
        load_image(tmp_path / "missing.png")


def test_a_folder(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: not a file"):
        load_image(tmp_path)


def test_empty(tmp_path):
    path = tmp_path / "empty.png"
    path.touch()
    with pytest.raises(UserError, match=r"empty.png: the file is empty \(0 bytes\)"):
        load_image(path)
    with pytest.raises(UserError, match="image: the file is empty"):
        load_image(b"")


def test_not_an_image(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("milk, eggs, butter\n" * 50)
    with pytest.raises(UserError, match="notes.png: not a picture that can be read; convert.*JPEG"):
        load_image(path)


def test_formats_that_start_other_programs_are_not_tried():
    with pytest.raises(UserError, match="not a picture that can be read"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_truncated(kind, tmp_path):
    data = saved(golden_picture(300, 200), kind)
    path = tmp_path / f"half.{kind.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"half\.\w+: (the picture is truncated|not a picture)"):
        load_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_damaged_bytes_give_a_picture_or_one_clear_error(kind, caplog, capfd):
    data = np.frombuffer(saved(golden_picture(64, 48), kind), np.uint8)
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = data.copy()
        where = random.integers(0, len(data), size=random.integers(1, 9))
        damaged[where // random.choice([1, 20])] = random.integers(0, 256, size=where.shape)
        try:
            assert load_image(damaged.tobytes()).mode == "RGB"
        except UserError:
            refused += 1
    assert refused or kind in ("BMP", "PPM")  # those have hardly anything but pixels
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_a_closed_image():
    image = Image.open(BytesIO(saved(golden_picture(30, 20), "PNG")))
    image.close()
    with pytest.raises(UserError, match="image: cannot be decoded"):
        load_image(image)


def test_another_type():
    with pytest.raises(UserError, match="image: ndarray given; expected a file name, bytes or a"):
        load_image(np.zeros((2, 2, 3)))  # pyright: ignore[reportArgumentType]


def test_no_torch_is_imported():
    modules = "mmmamba_edge.image, mmmamba_edge.prompt, mmmamba_edge.tokenizer"
    check = f"import sys; sys.modules['torch'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_size_is_told_before_any_picture_was_opened(tmp_path):
    """Pillow knows its formats only once it was asked to look for them."""
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    program = (
        "import sys, pathlib; from mmmamba_edge.image import image_size; "
        "print(image_size(pathlib.Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.png")], capture_output=True, text=True
    )
    assert done.stdout.strip() == "(30, 20)", done.stderr
