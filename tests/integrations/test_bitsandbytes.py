"""bitsandbytes: reading and writing its checkpoints without it, and running its layers on qlora's kernels.

Comparisons cover only cases in which its CPU code is correct: rows of whole blocks, and training mode
(docs/guides/integrate.md).
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TOKENS, hashes, save_dense
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qlora
from qlora.integrations import bitsandbytes as ours
from qlora.integrations.transformers import quantized_layers

bnb = pytest.importorskip("bitsandbytes")


def save_bitsandbytes(folder, dense, dtype=torch.float32, **options):
    config = BitsAndBytesConfig(load_in_4bit=True, **options)
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=dtype)
    model.save_pretrained(folder)
    return model.train()


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, config=ours.checkpoint_config(folder), **options)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_checkpoint_loads_bit_for_bit_and_is_written_byte_for_byte(tmp_path, quant_type, double_quant, storage):
    theirs = save_bitsandbytes(
        tmp_path / "theirs",
        save_dense("llama", tmp_path / "dense"),
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=storage,
    )
    model = load(tmp_path / "theirs")
    for name, layer in quantized_layers(model):
        state = theirs.get_submodule(name).weight.quant_state
        assert torch.equal(layer.absmax, state.absmax)
        dense = bnb.functional.dequantize_4bit(theirs.get_submodule(name).weight.data, state)
        assert torch.equal(layer.dequantize(torch.float32), dense)
    ours.export_checkpoint(model, tmp_path / "exported", quant_storage=storage)
    assert hashes(tmp_path / "exported") == hashes(tmp_path / "theirs")
    # save_pretrained writes a checkpoint in qlora's format.
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]["quant_method"] == "qlora"


def test_compute_dtype_and_skipped_layers_are_read(tmp_path):
    save_bitsandbytes(
        tmp_path / "theirs",
        save_dense("llama", tmp_path / "dense"),
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "q_proj"],
    )
    model = load(tmp_path / "theirs")
    layer = model.model.layers[0].self_attn
    assert layer.k_proj.compute_dtype == torch.bfloat16
    assert type(layer.q_proj) is torch.nn.Linear
    ours.export_checkpoint(model, tmp_path / "exported")
    assert hashes(tmp_path / "exported") == hashes(tmp_path / "theirs")


def test_what_is_no_4_bit_checkpoint_is_named(tmp_path):
    dense = save_dense("llama", tmp_path / "dense")
    with pytest.raises(ValueError, match="is not quantized"):
        ours.checkpoint_config(dense)
    config = json.loads((dense / "config.json").read_text())
    for options, message in (
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit bitsandbytes checkpoint"),
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'"),
    ):
        (dense / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
        with pytest.raises(ValueError, match=message):
            ours.checkpoint_config(dense)


def test_damaged_checkpoints_are_refused(tmp_path):
    dense = save_dense("llama", tmp_path / "dense")
    save_bitsandbytes(tmp_path / "theirs", dense)
    path = tmp_path / "theirs" / "model.safetensors"
    whole = load_file(path)
    layer = "model.layers.0.mlp.up_proj.weight"
    shorter = {f"{layer}.absmax": whole[f"{layer}.absmax"][:-1].clone()}
    without = [key for key in whole if key.startswith(f"{layer}.")]
    for state in (
        {key: value for key, value in whole.items() if key != f"{layer}.absmax"},
        {key: value for key, value in whole.items() if key not in without},
        whole | shorter,
    ):
        save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(RuntimeError, match="(?i)conversion|mismatch"):
            load(tmp_path / "theirs")


def test_what_bitsandbytes_does_not_know_is_not_exported(tmp_path):
    config = qlora.QLoRAConfig(quant_type="int4")
    model = AutoModelForCausalLM.from_pretrained(save_dense("llama", tmp_path / "dense"), quantization_config=config)
    with pytest.raises(ValueError, match="int4"):
        ours.export_checkpoint(model, tmp_path / "exported")
    config = qlora.QLoRAConfig()
    model = AutoModelForCausalLM.from_pretrained(save_dense("mixtral", tmp_path / "moe"), quantization_config=config)
    with pytest.raises(ValueError, match="experts"):
        ours.export_checkpoint(model, tmp_path / "exported")


class TestAccelerate:
    """bitsandbytes' layers and calls on qlora's kernels."""

    @pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
    def layer(self, request):
        torch.manual_seed(0)
        layer = bnb.nn.Linear4bit(
            256, 96, bias=True, quant_type="nf4", compress_statistics=True, compute_dtype=request.param
        )
        return layer.to("cpu").train(), request.param

    def test_linear4bit_trains_as_before(self, layer):
        layer, dtype = layer
        x = torch.randn(40, 256, dtype=dtype)
        grad = torch.randn(40, 96, dtype=dtype)

        def step():
            leaf = x.clone().requires_grad_()
            layer.bias.grad = None
            y = layer(leaf)
            y.backward(grad)
            return y.detach(), leaf.grad, layer.bias.grad

        before = step()
        with ours.accelerate():
            on_ours = step()
        assert all(torch.equal(a, b) for a, b in zip(before, step(), strict=True)), "undo left something behind"
        # Sums of 256 and 96 products in another order, and one rounding to the dtype.
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7}[dtype]
        for a, b in zip(before, on_ours, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * a.abs().max().item())

    def test_it_runs_our_operator(self, layer):
        layer, dtype = layer
        x = torch.randn(3, 256, dtype=dtype)
        weight = layer.weight.quant_state
        expected = qlora.ops.forward(
            x, layer.weight.data.flatten(), weight.absmax, weight.state2.absmax, weight.offset.reshape(1), (96, 256),
            "nf4", 64, bias=layer.bias.to(dtype),
        )  # fmt: skip
        with ours.accelerate(), torch.no_grad():
            assert torch.equal(layer(x), expected)

    def test_eval_mode_does_not_change_the_weights(self, layer):
        layer, dtype = layer
        x = torch.randn(1, 256, dtype=dtype)
        before = {key: value.clone() for key, value in layer.state_dict().items() if key != "bias"}  # biases are cast
        with ours.accelerate():
            layer.eval()
            y = layer(x)
            state = layer.state_dict()
            assert all(torch.equal(state[key], value) for key, value in before.items())
            layer.train()
            assert torch.equal(layer(x), y)

    def test_who_asks_twice_undoes_twice_in_any_order(self, layer):
        layer, dtype = layer
        x = torch.randn(4, 256, dtype=dtype, requires_grad=True)
        before = layer(x)
        first, second = ours.accelerate(), ours.accelerate()
        on_ours = layer(x)
        first.undo()
        assert torch.equal(layer(x), on_ours)
        assert not torch.equal(on_ours, before) or dtype == torch.bfloat16
        second.undo()
        assert torch.equal(layer(x), before)
        second.undo()  # an extra call does nothing
        with ours.accelerate():
            assert torch.equal(layer(x), on_ours)
        assert torch.equal(layer(x), before)

    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_functions(self, quant_type, dtype):
        dense = torch.randn(64, 128).to(dtype)
        functional = bnb.functional
        packed, state = functional.quantize_4bit(dense, quant_type=quant_type, compress_statistics=True)
        dequantized = functional.dequantize_4bit(packed, state)
        with ours.accelerate():
            ours_packed, ours_state = functional.quantize_4bit(dense, quant_type=quant_type, compress_statistics=True)
            ours_dequantized = functional.dequantize_4bit(ours_packed, ours_state)
            if quant_type == "nf4" or dtype == torch.float32:
                assert torch.equal(ours_dequantized, dequantized)
            else:  # 16-bit numbers are often halfway between two levels: their CPU code rounds those up, qlora and
                # their CUDA code towards zero. Both results are equally far from the weight.
                error = (dequantized.float() - dense.float()).abs()
                torch.testing.assert_close((ours_dequantized.float() - dense.float()).abs(), error, rtol=0, atol=0.02)
            assert torch.equal(ours_state.absmax, state.absmax)
            if quant_type == "nf4":
                assert torch.equal(ours_packed, packed)
            out = torch.empty_like(dense)
            functional.dequantize_4bit(packed, state, out=out)
            assert torch.equal(out, dequantized)
            x = torch.randn(1, 128).to(dtype)
            plain, plain_state = functional.quantize_4bit(dense, quant_type=quant_type)
            y = functional.gemv_4bit(x, plain.t(), state=plain_state)
            expected = x.double() @ functional.dequantize_4bit(plain, plain_state).double().t()
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(y.double(), expected, rtol=eps, atol=(eps + 1e-6) * 20)

    def test_weights_repacked_before_are_refused(self, layer):
        layer, _ = layer
        layer.eval()
        x = torch.randn(1, 256)
        with torch.no_grad():
            layer(x)
        if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            pytest.skip("bitsandbytes repacks weights on processors with AVX512-BF16 only")
        with ours.accelerate(), torch.no_grad(), pytest.raises(ValueError, match="before the first forward"):
            layer(x)
