"""The one integer representation: its rules, and the packing that ONNX Runtime reads."""

import numpy as np
import pytest

from mmmamba_edge.quant.codes import (
    LIMIT,
    MIN_SCALE,
    Codes,
    bfloat16_up,
    group_of,
    pack_blocks,
    quantize_int4,
    quantize_int8,
    stacked,
    take_rows,
    unpack_blocks,
)


def weights(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(rows * 1000 + columns)
    return (rng.standard_normal((rows, columns)) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 0.02, 1.0, 1e4])
def test_int8_codes_keep_the_rules(scale):
    weight = weights(37, 88, scale)
    made = quantize_int8(weight)
    assert made.codes.dtype == np.int8 and made.scale.shape == (37, 1)
    assert np.abs(made.codes.astype(int)).max() <= LIMIT[8]
    assert (made.scale >= MIN_SCALE).all()
    assert not (made.scale.view(np.uint32) & 0xFFFF).any(), "exact in bfloat16"
    assert np.array_equal(made.scale.astype(np.float16).astype(np.float32), made.scale) or scale > 1
    error = np.abs(made.dequantized() - weight)
    assert (error <= made.scale / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("scale", [1e-30, 0.02, 1e4])
def test_int4_codes_keep_the_rules(scale, group):
    weight = weights(37, 256, scale)
    made = quantize_int4(weight, group)
    assert made.bits == 4 and made.group == group and made.scale.shape == (37, 256 // group)
    assert np.abs(made.codes.astype(int)).max() <= LIMIT[4]
    assert (made.scale >= MIN_SCALE).all()
    assert not (made.scale.view(np.uint32) & 0xFFFF).any(), "exact in bfloat16"
    error = np.abs(made.dequantized() - weight).reshape(37, -1, group)
    assert (error <= made.scale[..., None] / 2 * (1 + 1e-6)).all()
    finer = np.square(made.dequantized() - weight).sum()
    if group < 128 and scale == 0.02:
        assert finer < np.square(quantize_int4(weight, 128).dequantized() - weight).sum()


@pytest.mark.parametrize("group", [32, 64])
def test_int4_packing_is_low_half_first_and_reversible(group):
    made = quantize_int4(weights(7, 128), group)
    data, scales = pack_blocks(made, group)
    assert data.shape == (7, 128 // group, group // 2) and data.dtype == np.uint8
    low, high = (data & 15).astype(int) - 8, (data >> 4).astype(int) - 8
    flat = np.stack([low, high], axis=-1).reshape(7, 128)
    assert np.array_equal(flat, made.codes)
    back = unpack_blocks(data, scales, 128, 4)
    assert back.digest() == made.digest() and back.bits == 4


@pytest.mark.parametrize(
    ("columns", "asked", "group"),
    [(2048, 128, 128), (192, 128, 64), (96, 64, 32), (88, 128, None), (64, 32, 32)],
)
def test_a_group_divides_the_columns(columns, asked, group):
    assert group_of(columns, asked) == group


def test_largest_weight_of_a_row_uses_nearly_all_codes():
    made = quantize_int8(weights(200, 64, 0.05))
    largest = np.abs(made.codes.astype(int)).max(axis=1)
    assert largest.min() >= 125  # a scale rounded up in bfloat16 is at most 1/128 too large


def test_zero_rows_and_one_sided_rows():
    weight = np.zeros((3, 4), np.float32)
    weight[1] = [-3, -1, -2, 0]
    weight[2] = [0, 5, 0, 0]
    made = quantize_int8(weight)
    assert made.scale[0, 0] == MIN_SCALE and not made.codes[0].any()
    assert made.codes[1].min() >= -LIMIT[8] and made.codes[2].max() <= LIMIT[8]
    assert np.allclose(made.dequantized(), weight, atol=0.03)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = weights(4, 8)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="row 2 holds NaN or infinity"):
        quantize_int8(weight)


def test_bfloat16_up_is_the_next_one_above():
    x = np.array([1.0, 1.0 + 2**-7, 1.0 + 2**-20, 0.3], np.float32)
    up = bfloat16_up(x)
    assert up[0] == 1 and up[1] == x[1] and up[2] == 1 + 2**-7
    assert ((up >= x) & (up <= x * (1 + 2**-7))).all()


@pytest.mark.parametrize("columns, block", [(64, 64), (88, 64), (88, 16), (256, 64), (5, 16)])
def test_packing_is_reversible_and_pads_with_zero(columns, block):
    made = quantize_int8(weights(7, columns))
    data, scales = pack_blocks(made, block)
    blocks = -(-columns // block)
    assert data.shape == (7, blocks, block) and data.dtype == np.uint8
    assert scales.shape == (7, blocks)
    values = (data.astype(np.float32) - 128) * scales[..., None]  # as MatMulNBits defines it
    flat = values.reshape(7, -1)
    assert np.array_equal(flat[:, :columns], made.dequantized())
    assert not flat[:, columns:].any()
    back = unpack_blocks(data, scales, columns)
    assert np.array_equal(back.codes, made.codes) and np.array_equal(back.scale, made.scale)


def test_stacking_and_reordering_keep_codes():
    a, b = weights(3, 8), weights(5, 8, 7.0)
    together = quantize_int8(np.concatenate([a, b]))
    apart = stacked([quantize_int8(a), quantize_int8(b)])
    assert apart.digest() == together.digest()
    order = np.array([7, 0, 3])
    picked = take_rows(together, order)
    assert isinstance(picked, Codes) and picked.shape == (3, 8)
    assert np.array_equal(picked.dequantized(), together.dequantized()[order])
    assert picked.digest() != together.digest()
