"""QuantizedWeight: moving, pickling, sharding, and the entries of a bitsandbytes state dict."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import qlora
from qlora import ops, reference


def test_dequantizes_to_its_original_dtype():
    w = qlora.quantize(torch.randn(8, 64, dtype=torch.bfloat16))
    assert w.dequantize().dtype == torch.bfloat16
    assert w.dequantize(torch.float32).dtype == torch.float32
    assert w.shape == (8, 64)


def test_nbytes_counts_the_statistics():
    w = qlora.quantize(torch.randn(64, 64))
    assert w.nbytes == 2048 + 64 + 4 + 4


def test_survives_pickle_and_safe_torch_save():
    w = qlora.quantize(torch.randn(9, 65))
    again = pickle.loads(pickle.dumps(w))
    assert torch.equal(again.dequantize(), w.dequantize())
    buffer = io.BytesIO()
    torch.save(w.tensors, buffer)
    buffer.seek(0)
    assert all(torch.equal(a, b) for a, b in zip(torch.load(buffer, weights_only=True), w.tensors, strict=True))


def test_to_moves_and_keeps_the_dtypes():
    w = qlora.quantize(torch.randn(8, 64)).to("meta")
    assert w.device.type == "meta"
    assert [t.dtype for t in w.tensors] == [torch.uint8, torch.uint8, torch.float32, torch.float32]


@pytest.mark.parametrize("double_quant", [False, True])
def test_shards_are_the_rows(double_quant):
    w = qlora.quantize(torch.randn(512, 128), double_quant=double_quant)
    rows = [w.shard(i, 4).dequantize() for i in range(4)]
    assert torch.equal(torch.cat(rows), w.dequantize())


def test_a_shard_inside_a_block_is_refused():
    w = qlora.quantize(torch.randn(6, 48), double_quant=False)
    with pytest.raises(ValueError, match="multiple of 64 elements"):
        w.shard(0, 2)
    with pytest.raises(ValueError, match="shard 2 of 2"):
        qlora.quantize(torch.randn(512, 128)).shard(2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (700, 1001)])
def test_error_against_the_original(shape, dtype, threads):
    weight = torch.randn(shape).to(dtype)
    w = qlora.quantize(weight)
    arguments = (weight, *w.tensors, w.quant_type, w.block_size)
    actual = ops.quantization_error(*arguments)
    assert torch.allclose(actual, reference.quantization_error(*arguments), rtol=1e-12, atol=0)
    threads(1)
    assert torch.equal(ops.quantization_error(*arguments), actual)
    if weight.numel() > 1:
        assert 0.05 < w.error_against(weight)[0] < 0.15
    with pytest.raises(ValueError, match="has shape"):
        w.error_against(torch.randn(3))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_entries_round_trip(quant_type, double_quant):
    w = qlora.quantize(torch.randn(7, 96, dtype=torch.float16), quant_type, 32, double_quant)
    entries = w.to_bnb("layer.weight")
    assert entries["layer.weight"].shape == (7 * 48, 1)
    again = qlora.QuantizedWeight.from_bnb(entries, "layer.weight")
    assert (again.shape, again.quant_type, again.block_size, again.dtype) == ((7, 96), quant_type, 32, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, w.tensors, strict=True))


def test_bitsandbytes_entries_in_another_quant_storage():
    w = qlora.quantize(torch.randn(8, 64))
    entries = w.to_bnb()
    entries["weight"] = entries["weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    assert torch.equal(qlora.QuantizedWeight.from_bnb(entries).dequantize(), w.dequantize())


@pytest.mark.parametrize("name", ["plain", "nested"])
def test_reads_the_state_dict_of_a_real_linear4bit(name):
    """Keys and JSON as bitsandbytes wrote them (tests/data/make_bitsandbytes_golden.py)."""
    golden = np.load(Path(__file__).parent / "data" / "bitsandbytes_golden.npz")
    start = f"state-{name}:"
    entries = {key.removeprefix(start): torch.from_numpy(golden[key]) for key in golden.files if key.startswith(start)}
    w = qlora.QuantizedWeight.from_bnb(entries)
    assert torch.equal(w.dequantize(torch.float32), torch.from_numpy(golden[f"state-{name}-dequantized"]))
    ours = w.to_bnb()
    assert ours.keys() == entries.keys()
    for key, value in entries.items():
        if "quant_state" not in key:
            assert torch.equal(ours[key], value), key


def test_damaged_bitsandbytes_entries_name_the_fault():
    entries = qlora.quantize(torch.randn(8, 64)).to_bnb()
    with pytest.raises(KeyError, match="quant_state"):
        qlora.QuantizedWeight.from_bnb({"weight": entries["weight"]})
    with pytest.raises(ValueError, match="has 255 bytes"):
        qlora.QuantizedWeight.from_bnb(entries | {"weight": entries["weight"][1:]})
    with pytest.raises(ValueError, match="quant_map is another table"):
        qlora.QuantizedWeight.from_bnb(entries | {"weight.quant_map": torch.zeros(16)})
    with pytest.raises(KeyError, match="absmax"):
        qlora.QuantizedWeight.from_bnb({k: v for k, v in entries.items() if not k.endswith(".absmax")})
    with pytest.raises(ValueError, match="int4.*does not exist in bitsandbytes"):
        qlora.quantize(torch.randn(8, 64), "int4").to_bnb()
