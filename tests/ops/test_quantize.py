"""quantize and dequantize: bit-exact with the reference, a second dequantize in numpy, and bitsandbytes' output."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BLOCK_SIZES, DTYPES, QUANT_TYPES

import qlora
from qlora import _C, ops, reference

GOLDEN = np.load(Path(__file__).parent.parent / "data" / "bitsandbytes_golden.npz")
GOLDEN_NAMES = sorted({key.rsplit(".", 1)[0] for key in GOLDEN.files if "." in key and ":" not in key})


def assert_same(actual, expected):
    for name, a, b in zip(("packed", "absmax", "nested_absmax", "nested_offset"), actual, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", [(1,), (63,), (64, 64), (7, 75), (129, 33), (3, 5, 1100)])
def test_equals_reference(device, quant_type, shape, double_quant):
    weight = torch.randn(shape)
    assert_same(
        ops.quantize(weight, quant_type, 64, double_quant), reference.quantize(weight, quant_type, 64, double_quant)
    )


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_block_size(device, quant_type, block_size):
    weight = torch.randn(3, 4099)
    assert_same(ops.quantize(weight, quant_type, block_size), reference.quantize(weight, quant_type, block_size))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_16_bit_weights_are_quantized_from_their_exact_values(device, quant_type, dtype):
    weight = torch.randn(37, 65).to(dtype)
    assert_same(ops.quantize(weight, quant_type), reference.quantize(weight.float(), quant_type))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (70, 1001)])
def test_quantization_error(device, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    arguments = (weight, *ops.quantize(weight), "nf4", 64)
    actual = ops.quantization_error(*arguments)
    assert torch.allclose(actual, reference.quantization_error(*arguments), rtol=1e-12, atol=0)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_a_tie_takes_the_lower_code(device, quant_type):
    levels = torch.tensor(_C.codebook(quant_type)).sort().values.unique()
    midpoints = (levels[1:] + levels[:-1]) / 2
    weight = torch.cat((midpoints, torch.ones(1)))  # absmax 1: normalised values are the midpoints themselves
    assert_same(ops.quantize(weight, quant_type, 64, False), reference.quantize(weight, quant_type, 64, False))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_dequantize_rounds_once(device, quant_type, dtype, double_quant):
    for shape in ((1, 1), (5, 77), (64, 128)):
        q = ops.quantize(torch.randn(shape), quant_type, 32, double_quant)
        actual = ops.dequantize(*q, shape, quant_type, 32, dtype)
        assert torch.equal(actual, reference.dequantize(*q, shape, quant_type, 32, dtype))


def dequantize_in_numpy(packed, absmax, nested_absmax, nested_offset, count, quant_type, block_size):
    """A third implementation of the format, written only from its description (docs/concepts/format.md)."""
    codes = np.empty(2 * len(packed), np.uint8)
    codes[0::2] = packed // 16
    codes[1::2] = packed % 16
    levels = {
        "int4": np.array([(c - 8) / np.float32(7) for c in range(16)], np.float32),
        "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32)
        / np.float32(12),
        "nf4": GOLDEN["nf4-64-nested.levels"],  # bitsandbytes' own tables, not qlora's
    }[quant_type]
    scale = absmax
    if len(nested_absmax):
        table = GOLDEN["nf4-64-nested.nested_map"]
        scale = table[absmax] * nested_absmax[np.arange(len(absmax)) // 256] + nested_offset[0]
    index = np.arange(count)
    return levels[codes[:count]] * scale[index // block_size].astype(np.float32)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_dequantize_written_a_second_time(quant_type, double_quant):
    shape = (13, 333)
    q = ops.quantize(torch.randn(shape), quant_type, 32, double_quant)
    expected = dequantize_in_numpy(*(t.cpu().numpy() for t in q), 13 * 333, quant_type, 32).reshape(shape)
    assert np.array_equal(ops.dequantize(*q, shape, quant_type, 32, torch.float32).cpu().numpy(), expected)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_bitsandbytes_golden(device, name):
    """Quantizes and dequantizes bit for bit like bitsandbytes (its version is in the file)."""
    quant_type, block, kind = name.split("-")
    block = int(block)
    here = torch.get_default_device()
    entry = {k.rpartition(".")[2]: torch.from_numpy(GOLDEN[k]).to(here) for k in GOLDEN.files if k.startswith(name)}
    nested = (entry["nested_absmax"], entry["nested_offset"]) if kind == "nested" else (None, None)
    dequantized = ops.dequantize(
        entry["packed"], entry["absmax"], *nested, entry["weight"].shape, quant_type, block, torch.float32
    )
    assert torch.equal(dequantized, entry["dequantized"])

    packed, absmax, nested_absmax, nested_offset = ops.quantize(entry["weight"], quant_type, block, kind == "nested")
    assert torch.equal(absmax, entry["absmax"])
    if kind == "nested":
        assert torch.equal(nested_absmax, entry["nested_absmax"])
        assert torch.equal(nested_offset, entry["nested_offset"])
        assert torch.equal(torch.tensor(_C.dynamic_map()), entry["nested_map"])
    assert torch.equal(torch.tensor(_C.codebook(quant_type)), entry["levels"])
    if quant_type == "nf4":
        assert torch.equal(packed, entry["packed"])
    else:  # bitsandbytes' CPU code has no negative zero (0 for 8); its CUDA code and the format do
        ours = ops.dequantize(packed, absmax, *nested, entry["weight"].shape, quant_type, block, torch.float32)
        assert torch.equal(ours, entry["dequantized"])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_all_zero_block_dequantizes_to_zero(device, quant_type):
    weight = torch.randn(4, 64)
    weight[1] = 0
    q = ops.quantize(weight, quant_type, 64, False)
    assert (ops.dequantize(*q, (4, 64), quant_type, 64, torch.float32)[1] == 0).all()


def test_subnormal_block_keeps_its_sign_and_size(device):
    """1 / absmax overflows, so the block is divided by absmax instead."""
    weight = torch.full((64,), -1e-40)
    weight[0] = 1e-40
    q = ops.quantize(weight, "nf4", 64, False)
    assert torch.equal(ops.dequantize(*q, (64,), "nf4", 64, torch.float32), weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_names_the_first_position(device, bad):
    weight = torch.randn(300, 1000)
    weight[270, 3] = bad
    weight[123, 456] = bad
    with pytest.raises(RuntimeError, match=r"weight\[123, 456\] is nan or inf"):
        ops.quantize(weight)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_unchecked_nan_is_the_same_on_every_isa(quant_type, monkeypatch):
    weight = torch.randn(8, 64)
    weight[2, 5], weight[3, 7] = float("nan"), float("inf")
    results = []
    for isa in _C.runnable_isas():
        monkeypatch.setenv("QLORA_CPU_ISA", isa)
        results.append(ops.quantize(weight, quant_type, 64, False, False))
    for other in results[1:]:
        assert_same(other, results[0])


@pytest.mark.parametrize("double_quant", [False, True])
def test_empty_weight(device, double_quant):
    q = ops.quantize(torch.empty(0, 64), "nf4", 64, double_quant)
    assert ops.dequantize(*q, (0, 64), "nf4", 64, torch.float32).shape == (0, 64)


def test_an_infinite_scale_cannot_be_double_quantized(device):
    """The mean of all scales would be infinite, and so every block. Without double quantization only one block is."""
    weight = torch.randn(8, 64)
    weight[3, 7] = float("inf")
    with pytest.raises(RuntimeError, match="block 3 of the weight contains inf.*double_quant=False"):
        ops.quantize(weight, check_finite=False)
    q = ops.quantize(weight, double_quant=False, check_finite=False)
    finite = ops.dequantize(*q, (8, 64), "nf4", 64, torch.float32).isfinite().all(1)
    assert finite.tolist() == [True, True, True, False, True, True, True, True]


def test_weight_need_not_be_contiguous(device):
    weight = torch.randn(48, 80)
    assert_same(ops.quantize(weight.T), ops.quantize(weight.T.contiguous()))


def test_thread_count_does_not_change_a_bit(device, threads):
    weight = torch.randn(1024, 1056)
    threads(1)
    one = ops.quantize(weight)
    threads(2)
    assert_same(ops.quantize(weight), one)


def test_bits_per_parameter_of_the_paper():
    """4.5 bits with float32 scales of 64 weights, 4.127 with double quantization (Dettmers et al. 2023, section 3)."""
    weight = torch.randn(1024, 1024)
    assert qlora.quantize(weight, double_quant=False).bits_per_param == 4.5
    assert qlora.quantize(weight).bits_per_param == pytest.approx(4.127, abs=1e-3)


def test_error_of_each_type_is_what_its_levels_allow():
    """No weight is further from its level than half the widest gap, and NF4 beats the others on normal weights."""
    weight = torch.randn(512, 512)
    errors = {}
    for quant_type in QUANT_TYPES:
        q = qlora.quantize(weight, quant_type, double_quant=False)
        difference = (q.dequantize() - weight).abs().view(-1, 64)
        levels = torch.tensor(_C.codebook(quant_type)).sort().values
        half_gap = (levels[1:] - levels[:-1]).max() / 2
        assert (difference <= half_gap * q.absmax[:, None] * (1 + 1e-6)).all()
        errors[quant_type] = difference.square().mean().item()
    assert errors["nf4"] < errors["int4"]
    assert errors["nf4"] < errors["fp4"]
