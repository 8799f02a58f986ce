"""The quantisers: against their description, element by element, and by what has to hold of any of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from dmoe_ops import reference
from dmoe_ops.formats import QUANTIZED, ExpertWeights, empty, scale_shape
from dmoe_ops.quantize import quantize

FORMATS = ["fp8", "int8", "int4"]
LARGEST = dict(fp8=448, int8=127, int4=7)
CODES = np.sort(np.unique(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()))


def drawn(rows, columns, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    return weight.to(dtype)


def whole(weight):
    """The values of a quantised weight without their scales, float64."""
    if weight.dtype != torch.uint8:
        return weight.double().numpy()
    return torch.stack([weight & 15, weight >> 4], -1).flatten(-2).double().numpy() - 8


def block_of(form, r, c, half):
    if form == "fp8":
        return r // half * math.ceil(half / 128) + r % half // 128, c // 128
    return (r,) if form == "int8" else (r, c // 128)


def nearest_fp8(value):
    """The nearest code; of two, that with an even mantissa, which is every second one."""
    distance = np.abs(CODES - abs(value))
    best = np.flatnonzero(distance == distance.min())
    return math.copysign(CODES[best[best % 2 == 0][0] if len(best) > 1 else best[0]], value)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows, columns, halves", [(6, 10, 2), (140, 132, 1), (260, 130, 2)])
def test_every_element_is_the_nearest_of_its_block(form, rows, columns, halves):
    weight = drawn(rows, columns, seed=rows)
    got, scale = quantize(weight, form, halves=halves)
    assert list(scale.shape) == scale_shape(got.dtype, rows, columns, halves)
    largest = {}
    for r in range(rows):
        for c in range(columns):
            block = block_of(form, r, c, rows // halves)
            largest[block] = max(largest.get(block, 0), abs(float(weight[r, c])))
    steps = {block: np.float32(value) / np.float32(LARGEST[form]) for block, value in largest.items()}
    if form == "int4":
        steps = {block: torch.tensor(step).bfloat16().float().numpy() for block, step in steps.items()}
    assert all(scale[block] == float(step or 1) for block, step in steps.items())
    values = whole(got)
    for r in range(0, rows, 3):
        for c in range(columns):
            quotient = float(np.float32(float(weight[r, c])) / (steps[block_of(form, r, c, rows // halves)] or 1))
            want = nearest_fp8(quotient) if form == "fp8" else np.rint(quotient)
            assert values[r, c] == want, (r, c)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMATS),
    rows=st.integers(1, 150),
    columns=st.integers(1, 140).map(lambda n: 2 * n),
    halves=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    power=st.integers(-30, 30),
    seed=st.integers(0, 1000),
)
def test_properties(form, rows, columns, halves, dtype, power, seed):
    weight = drawn(halves * rows, columns, seed, dtype)
    got, scale = quantize(weight, form, halves=halves)
    back = reference.dequantize(got, scale, halves=halves).double()
    # Half a step away at most: of whole numbers, the scale; of fp8, 3 bits behind the first one, or 2 ** -9.
    step = reference.dequantize(
        torch.ones_like(got) if form != "int4" else torch.full_like(got, 0x99), scale, halves=halves
    )
    if form == "fp8":
        allowed = torch.maximum(weight.double().abs() * 2**-4, step.double() * 2**-10)
    else:
        allowed = step.double() / 2
    over = 7 * 2**-8 if form == "int4" else 1e-4  # what the rounded scale takes off the largest
    assert ((back - weight.double()).abs() <= allowed * (1 + 1e-5) + step.double() * over * (weight != 0)).all()
    # Both signs alike, and powers of two make no difference (while the scale has all of its digits).
    minus, same = quantize(-weight, form, halves=halves)
    assert torch.equal(same, scale) and torch.equal(reference.dequantize(minus, same, halves=halves).double(), -back)
    other, moved = quantize(weight.float() * 2.0**power, form, halves=halves)
    if weight.abs().amax(1).min() > 0:
        assert np.array_equal(whole(other), whole(got)) or form == "fp8"
        assert torch.equal(reference.dequantize(other, moved, halves=halves).double(), back * 2.0**power)
    # The largest of a weight becomes the largest of the format.
    if weight.any():
        assert np.abs(whole(got)).max() == LARGEST[form]
    # Stacked weights are quantised one by one.
    pair = quantize(torch.stack([weight, -weight]), form, halves=halves)
    assert torch.equal(pair[0][0].view(torch.uint8), got.view(torch.uint8)) and torch.equal(pair[1][1], same)


def test_a_weight_has_one_part_and_a_layer_is_quantised_by_its_dtype():
    assert scale_shape(torch.float8_e4m3fn, 100, 300) == [1, 3] and scale_shape(torch.float8_e4m3fn, 100, 300, 2) == [
        2,
        3,
    ]
    assert [list(part.shape) for part in empty(torch.ones(100, 300), "fp8")] == [[100, 300], [1, 3]]
    with pytest.raises(ValueError, match="weight must have an even number of columns for int4"):
        empty(torch.ones(2, 5), "int4")
    assert not ExpertWeights(torch.ones(1, 2, 2), torch.ones(1, 2, 1)).quantized
    assert all(ExpertWeights(torch.ones(1, 2, 2).to(dtype), None).quantized for dtype in QUANTIZED)


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_and_the_smallest_numbers(form):
    weight, scale = quantize(torch.zeros(130, 258), form)
    assert (scale == 1).all() and not whole(weight).any()
    for tiny in (1e-45, 1e-43, 3e-43, 1e-40):
        weight, scale = quantize(torch.full((2, 4), tiny), form)
        assert (scale > 0).all() and np.isfinite(whole(weight)).all() and np.abs(whole(weight)).max() <= LARGEST[form]
    weight, scale = quantize(torch.full((2, 4), -3e38), form)
    torch.testing.assert_close(reference.dequantize(weight, scale), torch.full((2, 4), -3e38), rtol=4e-3, atol=0)


@pytest.mark.parametrize(
    "weight, form, more, says",
    [
        (torch.ones(2, 4), "int3", {}, "format must be one of fp8, int8, int4, got 'int3'"),
        (torch.ones(2, 4).int(), "int8", {}, "weight must be float"),
        (torch.ones(4), "int8", {}, "weight must be float"),
        (torch.ones(0, 4), "int8", {}, "weight must be float"),
        (torch.ones(3, 4), "fp8", dict(halves=2), "weight must have rows in halves=2 equal parts"),
        (torch.ones(2, 5), "int4", {}, "weight must have an even number of columns for int4"),
        (torch.full((2, 4), math.nan), "fp8", {}, "weight must be finite in float32"),
        (torch.full((2, 4), 1e300, dtype=torch.float64), "int8", {}, "weight must be finite in float32"),
    ],
)
def test_refused(weight, form, more, says):
    with pytest.raises(ValueError, match=says):
        quantize(weight, form, **more)
