"""QLoRALinear: the fused layer equals base + scaling * x Aᵀ Bᵀ; adapters, merging, caching, trained bases."""

import copy

import pytest
import torch
from torch import nn

from qlora.nn import Linear4bit, QLoRALinear


def make(bias=True, **options) -> QLoRALinear:
    layer = QLoRALinear(nn.Linear(64, 48, bias), 4, **options)
    with torch.no_grad():
        layer.lora_b["default"].normal_()
    return layer


def dense_output(layer, x):
    low_rank = layer.adapters["default"].scaling * (layer.lora_b["default"].double() @ layer.lora_a["default"].double())
    weight = layer.base.dequantize(torch.float32).double() + low_rank
    return x.double() @ weight.T + (0 if layer.bias is None else layer.bias.double())


def close(a, b, tolerance=1e-4):
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.fixture
def x():
    return torch.randn(20, 64)


def test_a_new_adapter_changes_nothing(x):
    linear = nn.Linear(64, 48)
    layer = QLoRALinear(linear, 4)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("alpha", [None, 8, -3.5])
def test_forward(device, x, alpha, bias):
    layer = make(bias, alpha=alpha)
    assert layer.adapters["default"].scaling == (1.0 if alpha is None else alpha / 4)
    for tokens in (x, x[:1]):
        assert close(layer(tokens), dense_output(layer, tokens))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_quantization_options_reach_the_base(quant_type, double_quant):
    layer = make(quant_type=quant_type, double_quant=double_quant, block_size=32)
    weight = layer.base.quantized_weight
    assert (weight.quant_type, weight.double_quant, weight.block_size) == (quant_type, double_quant, 32)


def test_only_the_adapter_trains(x):
    layer = make()
    layer(x).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_a.default", "lora_b.default"}


def test_float32_adapters_over_bfloat16_activations(x):
    layer = make()
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.lora_a["default"].grad.dtype == torch.float32


def test_dropout_acts_on_the_adapter_only_and_only_in_training(x):
    layer = make(dropout=0.5)
    layer.eval()
    assert torch.equal(layer(x), make_without_dropout(layer)(x))
    layer.train()
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    low_rank = dropped @ layer.lora_a["default"].T @ layer.lora_b["default"].T
    assert close(y, layer.base(x) + low_rank, 1e-3)


def make_without_dropout(layer):
    twin = copy.deepcopy(layer)
    twin.adapters["default"] = type(twin.adapters["default"])(4, 4.0, 0.0)
    return twin


def test_named_adapters_switch(x):
    layer = make()
    layer.add_adapter("other", 2, alpha=6)
    with torch.no_grad():
        layer.lora_b["other"].normal_()
    assert layer.active_adapter == "other"
    assert not layer.lora_a["default"].requires_grad
    expected = {}
    for name in ("default", "other"):
        layer.set_adapter(name)
        expected[name] = layer(x)
        low_rank = layer.adapters[name].scaling * (x @ layer.lora_a[name].T @ layer.lora_b[name].T)
        assert close(expected[name], layer.base(x) + low_rank, 1e-3)
    with layer.adapters_disabled():
        assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer(x), expected["other"])
    layer.delete_adapter("other")
    assert layer.active_adapter is None
    assert torch.equal(layer(x), layer.base(x))


def test_merge_to_16_bit_and_unmerge_exactly(x):
    layer = make(dropout=0.2).eval()
    before = layer(x)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    report = layer.merge(dtype=torch.bfloat16)
    assert report.format == "bfloat16"
    assert 0 < report.relative_error <= 2**-9  # half a bfloat16 ulp, relative
    assert close(layer(x), before, 0.05)
    layer.unmerge()
    assert torch.equal(layer(x), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


def test_merge_keeps_the_original_dtype_unless_told_otherwise(x):
    layer = QLoRALinear(nn.Linear(64, 48, dtype=torch.float16), 4)
    assert layer.merge().format == "float16"
    assert layer(x.half()).dtype == torch.float16


def test_merge_to_4_bit_reports_what_it_adds(x):
    layer = make()
    exact = layer.base.dequantize(torch.float32) + layer.lora_b["default"] @ layer.lora_a["default"]
    report = layer.merge(requantize=True)
    merged = layer.merged_linear()
    assert isinstance(merged, Linear4bit)
    assert torch.equal(merged(x), layer(x))
    error = (merged.dequantize(torch.float32) - exact).norm() / exact.norm()
    assert report.relative_error == pytest.approx(error.item(), rel=1e-4)
    assert 0.03 < report.relative_error < 0.2  # NF4 of a normal weight: about 9 %
    layer.unmerge()


@pytest.mark.parametrize("search", [False, True])
def test_a_merge_says_how_much_of_the_adapter_it_keeps(search):
    """The base lies on the quantization grid, so rounding undoes most of a small adapter."""
    layer = QLoRALinear(nn.Linear(256, 192, bias=False), 8)
    layer.lora_b["default"].data.normal_(std=1e-3)
    base = layer.base.dequantize(torch.float32)
    delta = layer.lora_b["default"] @ layer.lora_a["default"]
    assert delta.norm() < 0.02 * base.norm()

    def kept(merged):
        return (((merged.double() - base) * delta).sum() / delta.double().square().sum()).item()

    report = layer.merge(requantize=True, search_scales=search)
    assert report.adapter_kept == pytest.approx(kept(layer.merged_linear().dequantize(torch.float32)), abs=1e-5)
    assert report.adapter_kept < 0.6
    layer.unmerge()
    report = layer.merge(dtype=torch.float32)
    assert report.adapter_kept == pytest.approx(1, abs=1e-4)
    layer.unmerge()
    report = layer.merge(dtype=torch.bfloat16)
    assert report.adapter_kept == pytest.approx(kept(layer.merged_linear().weight.detach()), abs=1e-5)
    assert report.adapter_kept > 0.95


@pytest.mark.parametrize("requantize", [False, True])
def test_an_adapter_that_is_nan_does_not_look_perfect(requantize):
    layer = QLoRALinear(nn.Linear(64, 48), 4)
    layer.lora_b["default"].data[3, 1] = float("nan")
    if requantize:
        with pytest.raises(RuntimeError, match="is nan or inf"):
            layer.merge(requantize=True)
        return
    report = layer.merge(dtype=torch.bfloat16)
    assert report.relative_error != report.relative_error
    assert report.adapter_kept != report.adapter_kept


def test_an_adapter_that_changes_nothing_is_kept_whole():
    layer = QLoRALinear(nn.Linear(64, 48), 4)
    assert layer.merge(requantize=True).adapter_kept == 1.0


def test_merged_linear_stands_alone(x):
    layer = make()
    layer.merge(dtype=torch.float32)
    merged = layer.merged_linear()
    assert type(merged) is nn.Linear
    assert torch.equal(merged(x), layer(x))


def test_what_would_lose_a_merged_state_is_refused():
    layer = make()
    layer.merge()
    for action in (layer.merge, layer.disable_adapters, lambda: layer.set_adapter("default")):
        with pytest.raises(RuntimeError, match="is merged; call unmerge"):
            action()
    layer.unmerge()
    with pytest.raises(RuntimeError, match="no adapter is merged"):
        layer.unmerge()


def test_cache_dequantized_gives_the_same_values_and_is_dropped(x):
    layer = make(cache_dequantized=True)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    assert close(y, dense_output(layer, x), 1e-4)
    y.sum().backward()
    assert leaf.grad is not None
    assert layer.diagnostics()["cache_bytes"] == 48 * 64 * 4
    layer.reset_state()
    assert layer.diagnostics()["cache_bytes"] == 0
    assert "_dense" not in " ".join(layer.state_dict())


def test_the_cache_follows_the_weight(x):
    layer, other = make(cache_dequantized=True), make()
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert close(layer(x), other(x))


def test_a_cache_built_in_inference_mode_serves_training(x):
    layer = make(cache_dequantized=True)
    with torch.inference_mode():
        layer(x)
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("options", [{"cache_dequantized": True}, {"freeze_base": False}])
def test_float32_adapters_are_not_rounded_on_the_dense_paths(options, x):
    """With bfloat16 activations the low-rank term is computed in the adapters' float32, as in the fused path."""
    linear = nn.Linear(64, 48, bias=False)
    linear.weight.data.zero_()
    layer = QLoRALinear(linear, 4, **options)
    with torch.no_grad():
        layer.lora_b["default"].normal_()
    exact = x.bfloat16().double() @ layer.lora_a["default"].T.double() @ layer.lora_b["default"].T.double()
    y = layer(x.bfloat16()).double()
    # One rounding of a float32 sum to bfloat16; adapters in bfloat16 would add three.
    assert ((y - exact).abs() <= 2**-8 * exact.abs() * (1 + 2**-8) + 1e-5).all()


def test_merging_a_trained_base_merges_what_the_forward_computes(x):
    layer = make(freeze_base=False)
    before = layer(x)
    layer.merge(dtype=torch.float32)
    assert close(layer.eval()(x), before)


def test_a_merged_layer_in_training_warns_and_refuses_a_state_dict(x):
    layer = make()
    state = layer.state_dict()
    layer.merge()
    with pytest.warns(UserWarning, match="no gradient until unmerge"):
        layer(x)
    with pytest.raises(RuntimeError, match="is merged; call unmerge"):
        layer.load_state_dict(state)
    with pytest.raises(ValueError, match="contradicts requantize"):
        make().merge(requantize=True, dtype=torch.float16)


def test_trained_base_is_quantized_straight_through(x):
    linear = nn.Linear(64, 48)
    layer = QLoRALinear(linear, 4, freeze_base=False)
    fake = QLoRALinear(copy.deepcopy(linear), 4).base.dequantize()
    assert torch.equal(layer(x), nn.functional.linear(x, fake, linear.bias))
    layer(x).sum().backward()
    # straight-through: the same gradient as for a dense layer's weight
    assert close(linear.weight.grad, x.sum(0).expand(48, 64), 1e-4)
    assert linear.bias.grad is not None
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = linear.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(linear.weight, before)


def test_trained_base_learns():
    """Regression to another layer's output: the loss with fake quantization falls well below its start."""
    target, layer = nn.Linear(32, 16), QLoRALinear(nn.Linear(32, 16), 2, freeze_base=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(200):
        x = torch.randn(64, 32)
        loss = (layer(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_diagnostics_count_every_byte():
    d = make().diagnostics()
    assert d["base_bytes"] == 48 * 32
    assert d["statistics_bytes"] == 48 + 4 + 4
    assert d["adapter_bytes"] == 4 * (64 * 4 + 48 * 4)
    assert d["bits_per_param"] == 8 * (48 * 32 + 56) / (48 * 64)
    assert 0.05 < d["quantization_error"] < 0.15
    assert d["active_adapter"] == "default"


def test_state_dict_round_trip(x):
    first, second = make(), make()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_wraps_a_layer_that_is_4_bit_already(x):
    base = Linear4bit(64, 48, quant_type="fp4", block_size=32)
    layer = QLoRALinear(base, 4)
    assert layer.base is base
    assert (layer.quant_type, layer.block_size) == ("fp4", 32)
    assert layer.diagnostics()["quantization_error"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank": 4, "dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"rank": 4, "freeze_base": False, "cache_dequantized": True}, "needs freeze_base=True"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        QLoRALinear(nn.Linear(64, 48), **options)


def test_bad_adapters_and_bases():
    layer = make()
    with pytest.raises(KeyError, match="adapter 'x' does not exist"):
        layer.set_adapter("x")
    with pytest.raises(ValueError, match="exists already"):
        layer.add_adapter("default", 2)
    with pytest.raises(ValueError, match="without dots"):
        layer.add_adapter("a.b", 2)
    with pytest.raises(ValueError, match="'keys' is reserved"):
        layer.add_adapter("keys", 2)
    with pytest.raises(TypeError, match="Conv1d"):
        QLoRALinear(nn.Conv1d(1, 1, 1), 4)
    with pytest.raises(ValueError, match="full-precision base"):
        QLoRALinear(Linear4bit(64, 48), 4, freeze_base=False)
