"""Block-128 fp8: exact scales on the oracle's inputs, correct rounding, the kernel equal to its reference."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collectivex.runtime import fp8
from collectivex.runtime.fp8 import E4M3FN, E4M3FNUZ, FORMATS
from collectivex.runtime.problem import pattern

BOTH = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))


def representable(format: fp8.Fp8Format) -> list[Fraction]:
    """Every finite non-negative value, from the definition of the format (OCP 8-bit Floating Point
    Specification 1.0 for e4m3fn; e4m3fnuz has exponent bias 8 and no special values but one NaN)."""
    bias = 7 if format is E4M3FN else 8
    values = [Fraction(m, 8) * Fraction(2) ** (1 - bias) for m in range(8)]
    values += [(1 + Fraction(m, 8)) * Fraction(2) ** (e - bias) for e in range(1, 16) for m in range(8)]
    return [v for v in values if v <= Fraction(format.max)]


def rounded(x: Fraction, values: list[Fraction]) -> Fraction:
    """Nearest, ties to the even mantissa (the even index)."""
    at = min(range(len(values)), key=lambda i: (abs(values[i] - abs(x)), i % 2))
    return values[at] if x >= 0 else -values[at]


@BOTH
def test_the_scale_of_the_oracles_inputs_is_a_power_of_two(format):
    """112/448 = 1/4, 120/240 = 1/2: exact under any formula, UE8M0 included."""
    rows = pattern(torch.arange(50), 512, 3, format.amplitude)

    _, scales = fp8.reference_quantise(rows, format)

    assert scales.shape == (50, 4)
    assert scales.unique().tolist() == [format.amplitude / format.max]
    assert format.amplitude / format.max in (0.25, 0.5)


@BOTH
def test_every_integer_rounds_as_the_format_says(format):
    """All of [-A, A], against exact rationals rounded to nearest even."""
    integers = torch.arange(-format.amplitude, format.amplitude + 1)
    rows = torch.zeros(1, 256)
    rows[0, : len(integers)] = integers
    rows[0, 127] = rows[0, 255] = format.amplitude
    scale = Fraction(format.amplitude) / Fraction(format.max)
    values = representable(format)

    back = fp8.round_trip(rows, format)[0]

    wanted = [float(rounded(Fraction(x) / scale, values) * scale) for x in rows[0].tolist()]
    assert back.tolist() == wanted
    assert (back != rows[0]).sum() > 100  # the rounding is exercised
    assert torch.equal(back, back.round())  # and leaves integers


@given(st.lists(st.floats(-1e4, 1e4, width=16), min_size=128, max_size=128))
def test_any_block_is_rounded_to_within_half_a_step(values):
    """|x - q * scale| is at most 1/16 of |x|, or half the smallest step times the scale."""
    x = torch.tensor([values], dtype=torch.bfloat16)

    q, scales = fp8.reference_quantise(x)

    back = fp8.dequantise(q, scales)
    bound = torch.maximum(x.float().abs() / 16, scales * 2.0**-10) * 1.0001
    assert ((back - x.float()).abs() <= bound).all()


def test_zeros_stay_zeros():
    """No division by zero, no NaN, positive scales."""
    q, scales = fp8.reference_quantise(torch.zeros(3, 256, dtype=torch.bfloat16))

    assert (scales > 0).all()
    assert not fp8.dequantise(q, scales).any()


def test_no_rows_give_no_rows():
    """T_r may be 0."""
    q, scales = fp8.quantise(torch.zeros(0, 256, dtype=torch.bfloat16))

    assert (q.shape, scales.shape) == ((0, 256), (0, 2))
    assert fp8.dequantise(q, scales).shape == (0, 256)


@BOTH
def test_on_cpu_quantise_is_its_reference(format):
    """Dtypes and shapes too."""
    x = pattern(torch.arange(9), 384, 1, format.amplitude).to(torch.bfloat16)

    q, scales = fp8.quantise(x, format)

    assert (q.dtype, q.shape, scales.dtype, scales.shape) == (format.dtype, (9, 384), torch.float32, (9, 3))
    assert torch.equal(q.view(torch.uint8), fp8.reference_quantise(x, format)[0].view(torch.uint8))


def test_a_cpu_takes_e4m3fn():
    """Only AMD's gfx94x take the other."""
    assert fp8.format_of(torch.device("cpu")) is E4M3FN
    assert E4M3FNUZ.name == "e4m3fnuz"


def same(x: torch.Tensor) -> None:
    format = fp8.format_of(x.device)
    q, scales = fp8.quantise(x, format)
    q_wanted, scales_wanted = fp8.reference_quantise(x.cpu(), format)
    assert torch.equal(scales.cpu(), scales_wanted)
    assert torch.equal(q.cpu().view(torch.uint8), q_wanted.view(torch.uint8))


@pytest.mark.gpu
def test_the_kernel_is_its_reference_bit_for_bit():
    """On the oracle's inputs, on random ones over many magnitudes, on zeros and on no rows."""
    amplitude = fp8.format_of(torch.device("cuda")).amplitude
    for rows, hidden in ((1, 128), (7, 384), (513, 7168)):
        same(pattern(torch.arange(rows, device="cuda"), hidden, 2, amplitude).to(torch.bfloat16))
        magnitudes = torch.exp(torch.randn(rows, hidden, device="cuda") * 3)
        same((torch.randn(rows, hidden, device="cuda") * magnitudes).to(torch.bfloat16))
    same(torch.zeros(5, 256, dtype=torch.bfloat16, device="cuda"))
    same(torch.zeros(0, 256, dtype=torch.bfloat16, device="cuda"))
