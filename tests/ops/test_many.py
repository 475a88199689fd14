"""forward.many: layers that share an input, compared with float64 and with one call of forward for each."""

import itertools

import oracle
import pytest
import torch
from cases import DTYPES, QUANT_TYPES, weights
from tolerances import assert_within
from torch.library import opcheck

from qlora import _C, ops, reference

TOKENS = (0, 1, 3, 8, 9, 48, 129)
# in_features and the layers' out_features; each kernel of the CPU gets odd extents
SHAPES = [(1, (1, 5, 3)), (37, (5, 33)), (96, (17, 64, 2)), (128, (130, 40, 40)), (576, (136,))]


class Case:
    """Layers with different ranks; one has no adapter, another one no bias."""

    def __init__(self, m, k, out_features, dtype=torch.float32, lora_dtype=torch.float32, quant_type="nf4"):
        self.out_features = out_features
        made = [weights(n, k, quant_type, double_quant=i != 1) for i, n in enumerate(out_features)]
        self.dense = [dense for _, dense in made]
        self.weights = [weight for weight, _ in made]
        self.stacks = [[weight[i] for weight in self.weights] for i in range(4)]
        self.form = quant_type, 64
        ranks = [3, None, 17, 16][: len(out_features)]
        self.a = [None if r is None else torch.randn(r, k).to(lora_dtype) for r in ranks]
        self.b = [
            None if r is None else torch.randn(n, r).to(lora_dtype) for n, r in zip(out_features, ranks, strict=True)
        ]
        self.scaling = [0.7, 1.0, -1.5, 2.0][: len(out_features)]
        self.bias = [None if i == 0 else torch.randn(n) for i, n in enumerate(out_features)]
        self.x = torch.randn(m, k).to(dtype)
        self.grads = [torch.randn(m, n).to(dtype) for n in out_features]

    def parameters(self):
        return [t for tensors in (self.a, self.b, self.bias) for t in tensors if t is not None]

    def require_grad(self):
        for t in (self.x, *self.parameters()):
            t.requires_grad_()
        return self

    def arguments(self, x=None):
        lists = self.a, self.b, self.scaling, self.bias
        return (self.x if x is None else x, *self.stacks, self.out_features, *self.form, *lists)

    def many(self):
        return ops.forward_many(*self.arguments())

    def separate(self):
        every = zip(self.weights, self.a, self.b, self.scaling, self.bias, strict=True)
        return [ops.forward(self.x, *weight, a, b, scaling, bias) for weight, a, b, scaling, bias in every]

    def raw(self):
        """The arguments of the operator itself, where an empty tensor means none."""
        x, *stacks, out_features, quant_type, block_size, a, b, scaling, bias = self.arguments()
        none = torch.empty(0)
        stacks, adapters, bias = (
            [[none if t is None else t for t in tensors] for tensors in lists] for lists in (stacks, (a, b), (bias,))
        )
        return x, *stacks, list(out_features), quant_type, block_size, *adapters, scaling, *bias


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_gradients(device, dtype, shape, m):
    case = Case(m, *shape, dtype=dtype, lora_dtype=dtype if m % 2 else torch.float32).require_grad()
    results = case.many()
    torch.autograd.backward(results, case.grads)
    assert len(results) == len(case.dense)
    for i, y in enumerate(results):
        a, b, bias, grad = case.a[i], case.b[i], case.bias[i], case.grads[i]
        assert_within(y, *oracle.forward(device, case.x, case.dense[i], a, b, case.scaling[i], bias))
        if a is not None:
            answers = oracle.factor_gradients(device, grad, case.x, a, b, case.scaling[i])
            assert_within(a.grad, *answers[0])
            assert_within(b.grad, *answers[1])
        if bias is not None:
            assert_within(bias.grad, *oracle.bias_gradient(grad))
    assert_within(case.x.grad, *oracle.dx_many(device, case.grads, case.dense, case.a, case.b, case.scaling))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_formats(device, quant_type):
    case = Case(20, 192, (24, 40), quant_type=quant_type).require_grad()
    results = case.many()
    torch.autograd.backward(results, case.grads)
    for i, y in enumerate(results):
        adapter = case.a[i], case.b[i], case.scaling[i], case.bias[i]
        assert_within(y, *oracle.forward(device, case.x, case.dense[i], *adapter))
    assert_within(case.x.grad, *oracle.dx_many(device, case.grads, case.dense, case.a, case.b, case.scaling))


@pytest.mark.parametrize("m", [*TOKENS, 1100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_separate_calls(device, dtype, m):
    """The gradient of x is not: it is one sum over all layers."""
    case = Case(m, 128, (130, 40, 72), dtype=dtype).require_grad()
    outcomes = []
    for run in (case.many, case.separate):
        results = run()
        gradients = torch.autograd.grad(results, case.parameters(), case.grads)
        outcomes.append([*results, *gradients])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*outcomes, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", _C.runnable_isas())
def test_the_gradient_of_x_with_one_used_layer_is_that_of_forward(isa, dtype, monkeypatch):
    monkeypatch.setenv("QLORA_CPU_ISA", isa)
    case = Case(1100, 128, (130, 40, 72), dtype=dtype).require_grad()
    for used in range(3):
        ours, theirs = (
            torch.autograd.grad(run()[used], [case.x, *case.parameters()], case.grads[used], allow_unused=True)
            for run in (case.many, case.separate)
        )
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("needs_x", "needs_lora", "needs_bias"), itertools.product([True, False], repeat=3))
def test_every_combination_of_requested_gradients(device, dtype, needs_x, needs_lora, needs_bias):
    case = Case(33, 64, (24, 40, 16), dtype=dtype)
    everything = _backward(case, (True, True, True))
    some = _backward(case, (needs_x, needs_lora, needs_bias))
    for needed, all_of_kind, kind in zip((needs_x, needs_lora, needs_lora, needs_bias), everything, some, strict=True):
        for full, mine in zip(all_of_kind, kind, strict=True):
            assert torch.equal(mine, full) if needed else mine.numel() == 0


def _backward(case, needs, grads=None):
    x, *lists, _ = case.raw()
    d_x, *rest = torch.ops.qlora.backward.many(case.grads if grads is None else grads, x, *lists, *needs)
    return [d_x], *rest


def test_no_layer_is_used(device):
    case = Case(5, 64, (24, 40))
    (d_x,), d_a, d_b, d_bias = _backward(case, (True, True, True), [torch.empty(0)] * 2)
    assert torch.equal(d_x, torch.zeros_like(case.x))
    assert all(t.shape == (0,) for t in (*d_a, *d_b, *d_bias))


@pytest.mark.parametrize("frozen", ["x", "adapters", "biases", "one adapter"])
def test_only_what_requires_grad_gets_a_gradient(frozen):
    case = Case(12, 64, (24, 40, 16)).require_grad()
    kept = {
        "x": [case.x],
        "adapters": [t for t in (*case.a, *case.b) if t is not None],
        "biases": [t for t in case.bias if t is not None],
        "one adapter": [case.a[0], case.b[2]],
    }[frozen]
    for t in kept:
        t.requires_grad_(False)
    torch.autograd.backward(case.many(), case.grads)
    ours = [t.grad for t in (case.x, *case.parameters())]
    for t in (case.x, *case.parameters()):
        t.grad = None
    torch.autograd.backward(case.separate(), case.grads)
    for mine, t in zip(ours[1:], case.parameters(), strict=True):
        assert mine is None if t.grad is None else torch.equal(mine, t.grad)
    assert (ours[0] is None) == (frozen == "x")


@pytest.mark.parametrize("m", [6, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_the_same_for_every_thread_count(device, dtype, m, threads):
    case = Case(m, 96, (200, 40, 72), dtype=dtype).require_grad()
    outcomes = []
    for count in (1, 2, 3):
        threads(count)
        results = case.many()
        outcomes.append([*results, *torch.autograd.grad(results, [case.x, *case.parameters()], case.grads)])
    assert all(torch.equal(a, b) for outcome in outcomes for a, b in zip(outcome, outcomes[0], strict=True))


def test_reference_twin_and_leading_dimensions():
    case = Case(12, 64, (24, 40, 16))
    arguments = case.arguments(case.x.view(3, 4, 64))
    for ours, theirs in zip(ops.forward_many(*arguments), reference.forward_many(*arguments), strict=True):
        assert ours.shape[:2] == (3, 4)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_no_gradient_arrives():
    """From a function behind it whose backward returns none at all."""

    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            return inputs[0] + inputs[1].sum()

        @staticmethod
        def backward(ctx, grad):
            return None, None

    case = Case(3, 96, (17, 64, 2)).require_grad()
    y, z, _ = case.many()
    Silent.apply(y, z).sum().backward()
    assert all(t.grad is None or not t.grad.any() for t in (case.x, *case.parameters()))


def test_no_layers():
    x = torch.randn(3, 64)
    assert ops.forward_many(x, [], [], [], [], [], "nf4", 64) == []
    assert ops.forward_many(x.requires_grad_(), [], [], [], [], [], "nf4", 64) == []


def test_one_token_without_a_batch_dimension():
    case = Case(1, 64, (24, 40)).require_grad()
    x = case.x.detach()[0].requires_grad_()
    results = ops.forward_many(*case.arguments(x))
    torch.autograd.backward(results, [grad[0] for grad in case.grads])
    assert [y.shape for y in results] == [(24,), (40,)]
    (expected,) = torch.autograd.grad(case.many(), case.x, case.grads)
    assert torch.equal(x.grad, expected[0])


def test_opcheck():
    case = Case(5, 64, (24, 40, 16)).require_grad()
    opcheck(torch.ops.qlora.forward.many, case.raw())
    plain = [[t.detach() for t in a] if isinstance(a, list) and torch.is_tensor(a[0]) else a for a in case.raw()]
    plain[0] = case.x.detach()
    for grads in (case.grads, [case.grads[0], torch.empty(0), case.grads[2]]):
        opcheck(torch.ops.qlora.backward.many, (grads, *plain[:-1], True, True, True))


def test_compile_and_autocast():
    case = Case(5, 64, (24, 40, 16)).require_grad()
    compiled = torch.compile(ops.forward_many, fullgraph=True)
    leaves = [case.x, *case.parameters()]
    outcomes = []
    for run in (compiled, ops.forward_many):
        results = run(*case.arguments())
        outcomes.append([*results, *torch.autograd.grad(results, leaves, case.grads)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = case.many()
        for y, expected in zip(results, ops.forward_many(*case.arguments(case.x.bfloat16())), strict=True):
            assert torch.equal(y, expected)
    torch.autograd.backward(results, [grad.bfloat16() for grad in case.grads])
    assert case.x.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"absmax": slice(0, 1)}, "absmax has 1 entries: there are 2 weights in packed"),
        ({"out_features": slice(0, 1)}, "out_features has 1 entries"),
        ({"lora_b": slice(0, 1)}, "lora_b has 1 entries"),
        ({"scaling": slice(0, 1)}, "scaling has 1 entries"),
        ({"bias": slice(0, 1)}, "bias has 1 entries"),
        ({"out_features": (24, 41)}, "layer 1 of 2: .*packed has 1280 bytes: a weight of 2624 elements needs 1312"),
        ({"x": torch.randn(3, 63)}, "layer 0 of 2: .*packed has 768 bytes: a weight of 1512 elements needs 756"),
        ({"quant_type": "nf5"}, "quant_type='nf5'"),
        ({"lora_a": [torch.randn(3, 63), None]}, r"layer 0 of 2: .*lora_a has shape .* \[3, 64\]"),
        ({"lora_a": [None, None]}, "layer 0 of 2: .*lora_b was given without lora_a"),
        (
            {"lora_a": [torch.randn(3, 64).bfloat16(), None]},
            "layer 0 of 2: .*lora_a and lora_b must have the same dtype",
        ),
        (
            {"bias": [None, torch.randn(24)]},
            r"layer 1 of 2: .*bias has shape .* \[40\]",
        ),
        ({"x": torch.randn(3, 64).double()}, "x must be float32, bfloat16 or float16"),
    ],
)
def test_errors_name_layer_value_and_rule(change, message):
    case = Case(3, 64, (24, 40))
    names = ("x", "packed", "absmax", "nested_absmax", "nested_offset", "out_features", "quant_type", "block_size")
    values = dict(zip((*names, "lora_a", "lora_b", "scaling", "bias"), case.arguments(), strict=True))
    for name, new in change.items():
        values[name] = list(values[name])[new] if isinstance(new, slice) else new
    with pytest.raises(RuntimeError, match=message):
        ops.forward_many(**values)


def test_grads_of_another_shape_are_refused():
    case = Case(3, 64, (24, 40))
    with pytest.raises(RuntimeError, match="layer 1 of 2: .*grad has 4 rows: x has 3"):
        _backward(case, (True, True, True), [case.grads[0], torch.randn(4, 40)])
    with pytest.raises(RuntimeError, match="grad has 1 entries: there are 2 weights in packed"):
        _backward(case, (True, True, True), case.grads[:1])


@pytest.mark.parametrize("name", ["packed", "nested_absmax", "lora_a", "lora_b", "bias"])
def test_tensors_on_several_devices_are_refused(name):
    case = Case(3, 64, (24, 40, 16))
    names = ("packed", "absmax", "nested_absmax", "nested_offset")
    values = dict(zip(names, case.stacks, strict=True)) | {"lora_a": case.a, "lora_b": case.b, "bias": case.bias}
    values[name] = [*values[name][:2], values[name][2].to("meta")]
    with pytest.raises(RuntimeError, match="on one device"):
        ops.forward_many(
            case.x, **values, out_features=case.out_features, quant_type="nf4", block_size=64, scaling=case.scaling
        )


def test_what_has_no_gradient_is_refused():
    case = Case(3, 64, (24, 40)).require_grad()
    (grad,) = torch.autograd.grad(case.many()[0].square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()
    case.stacks[2][0].requires_grad_()
    with pytest.raises(RuntimeError, match="a 4-bit weight is frozen"):
        case.many()
