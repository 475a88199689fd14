"""Linear4bit: behaves like an nn.Linear, with a weight that is frozen and never cast."""

import pytest
import torch
from torch import nn

import qlora
from qlora.nn import Linear4bit


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("in_features", [64, 75])
def test_equals_a_dense_layer_with_the_dequantized_weight(device, in_features, bias):
    linear = nn.Linear(in_features, 48, bias)
    layer = Linear4bit.from_linear(linear)
    dense = nn.Linear(in_features, 48, bias)
    dense.weight.data = layer.dequantize()
    if bias:
        dense.bias.data = linear.bias.data
    for m in (1, 40):
        x = torch.randn(m, in_features)
        assert torch.allclose(layer(x), dense(x), rtol=1e-5, atol=1e-5)


def test_is_a_linear_layer_with_a_frozen_uint8_weight():
    layer = Linear4bit(64, 48)
    assert isinstance(layer, nn.Linear)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.shape == (48, 32)
    assert not layer.weight.requires_grad
    assert sorted(layer.state_dict()) == ["_extra_state", "absmax", "bias", "nested_absmax", "nested_offset", "weight"]


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_casting_the_model_leaves_the_statistics_alone(cast):
    layer = Linear4bit(64, 48)
    before = layer.dequantize(torch.float32)
    cast(layer)
    assert layer.nested_absmax.dtype == torch.float32
    assert torch.equal(layer.dequantize(torch.float32), before)


def test_moves_to_another_device():
    layer = Linear4bit(64, 48).to("meta")
    assert {t.device.type for t in (layer.weight, layer.absmax, layer.nested_absmax, layer.bias)} == {"meta"}


@pytest.mark.parametrize("in_features", [64, 75])
def test_state_dict_round_trip(in_features):
    first, second = Linear4bit(in_features, 48), Linear4bit(in_features, 48)
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, in_features)
    assert torch.equal(first(x), second(x))


def test_statistics_of_the_wrong_length_are_refused():
    layer = Linear4bit(64, 48)
    state = layer.state_dict()
    state["absmax"] = state["absmax"][:-1]
    with pytest.raises(RuntimeError, match="absmax"):
        layer.load_state_dict(state)


def test_a_state_dict_in_another_format_is_refused():
    """The tensors have the same shapes: without the extra state they would load and dequantize to other weights."""
    state = Linear4bit(64, 48, quant_type="nf4").state_dict()
    with pytest.raises(ValueError, match="'nf4'.*this layer has.*'fp4'"):
        Linear4bit(64, 48, quant_type="fp4").load_state_dict(state)


def test_from_weight_needs_a_matrix():
    with pytest.raises(ValueError, match="needs"):
        Linear4bit.from_weight(qlora.quantize(torch.randn(64)))


def test_gradient_flows_to_the_input_only():
    layer = Linear4bit(64, 48)
    x = torch.randn(20, 64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(20, 64), rtol=1e-4, atol=1e-4)
    assert layer.weight.grad is None


def test_a_replica_of_data_parallel_computes_the_same():
    """torch.nn.DataParallel's replicas keep tensors as plain attributes, as this test sets them."""
    layer, x = Linear4bit(64, 48, bias=False), torch.randn(3, 64)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.data)
    for name, buffer in layer._buffers.items():
        setattr(replica, name, buffer)
    assert torch.equal(replica(x), layer(x))
