"""Groups of layers with one input: one operation for all of them, with the results of the single layers."""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from tiny_models import CONFIGS, TOKENS
from torch import nn
from torch.utils.checkpoint import checkpoint

import qlora
from qlora.nn import Linear4bit, QLoRALinear, share_inputs, shared_input

K = 64


class Attention(nn.Module):
    """Projections of one input and an output that shows each of them; ``other`` is a second input for k and v."""

    def __init__(self, make=lambda n: QLoRALinear(nn.Linear(K, n), 4)):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (make(n) for n in (K, 32, 32, K))

    def forward(self, x, other=None):
        other = x if other is None else other
        q, k, v = self.q_proj(x), self.k_proj(other), self.v_proj(other)
        return self.o_proj(q + torch.cat((k, v), -1))


@pytest.fixture
def together(monkeypatch):
    """Counts the layers of each operation that computes a group."""
    sizes = []
    compute = shared_input._compute

    def counted(products, x):
        sizes.append(len(products))
        return compute(products, x)

    monkeypatch.setattr(shared_input, "_compute", counted)
    return sizes


@pytest.fixture
def attention():
    torch.manual_seed(0)
    module = Attention()
    for name, parameter in module.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter)
    assert share_inputs(module) == 1
    return module


def step(module, *inputs):
    """The output, and the gradients of the first input and of the parameters."""
    x = inputs[0].clone().requires_grad_()
    module.zero_grad()
    y = module(x, *inputs[1:])
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return y.detach(), x.grad, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    """Everything has the same bits, but for the gradient of x.

    That is one sum, rounded once. Autograd rounds three products and two sums, each by half a unit of its dtype.
    """
    assert torch.equal(ours[0], theirs[0])
    eps = torch.finfo(ours[1].dtype).eps
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=4 * theirs[1].abs().max().item() * eps)
    assert ours[2].keys() == theirs[2].keys()
    assert all(torch.equal(grad, theirs[2][name]) for name, grad in ours[2].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 24, 80])
def test_a_step_is_that_of_single_layers(attention, together, dtype, tokens):
    x = torch.randn(2, tokens, K).to(dtype)
    ours = step(attention, x)
    assert together == [3]
    assert share_inputs(attention, enabled=False) == 1
    theirs = step(attention, x)
    assert together == [3]
    assert_same(ours, theirs)


def test_inference(attention, together):
    x = torch.randn(12, K)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            share_inputs(attention)
            ours = attention(x)
            share_inputs(attention, enabled=False)
            assert torch.equal(ours, attention(x))
    assert together == [3, 3]


def test_frozen_layers_of_every_kind_are_members(together):
    module = Attention()
    module.k_proj, module.v_proj = Linear4bit(K, 32), Linear4bit(K, 32, bias=False)
    share_inputs(module)
    x = torch.randn(12, K)
    ours = step(module, x)
    assert together == [3]
    share_inputs(module, enabled=False)
    assert_same(ours, step(module, x))


def test_few_tokens_are_computed_layer_by_layer(attention, together):
    with torch.no_grad():
        for tokens in (0, 1, 8):
            attention(torch.randn(tokens, K))
    assert together == []


def test_compute_dtype(together):
    module = Attention(lambda n: Linear4bit(K, n))
    for layer in module.children():
        layer.compute_dtype = torch.bfloat16
    share_inputs(module)
    x = torch.randn(12, K)
    ours = step(module, x)
    assert together == [3]
    assert ours[0].dtype == torch.float32
    share_inputs(module, enabled=False)
    theirs = step(module, x)
    assert torch.equal(ours[0], theirs[0])


def test_autocast(attention, together):
    x = torch.randn(12, K)
    outputs = []
    for enabled in (True, False):
        share_inputs(attention, enabled)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(attention(x))
    assert together == [3]
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(*outputs)


def test_another_input_is_computed_alone_and_ends_the_group(attention, together):
    x, other = torch.randn(12, K), torch.randn(14, K)[:12]
    ours = step(attention, x, other)
    assert together == [3]
    again = step(attention, x, other)
    assert together == [3]
    assert_same(ours, again)
    fresh = Attention()
    fresh.load_state_dict(attention.state_dict())
    assert_same(ours, step(fresh, x, other))


def test_an_input_that_changed_in_place_is_another_input(attention, together):
    class Changing(Attention):
        def forward(self, x):
            x = x.clone()
            q = self.q_proj(x)
            k = self.k_proj(x.mul_(2))
            return self.o_proj(q + torch.cat((k, self.v_proj(x)), -1))

    attention.__class__ = Changing
    x = torch.randn(12, K)
    with torch.no_grad():
        ours = attention(x)
        share_inputs(attention, enabled=False)
        assert torch.equal(ours, attention(x))
    share_inputs(attention)
    with torch.inference_mode():  # where tensors do not count their changes
        assert torch.equal(ours, attention(x))


def test_chunks_in_one_call(attention, together):
    class Chunked(Attention):
        def forward(self, x):
            return torch.cat([Attention.forward(self, chunk) for chunk in x.split(10)])

    attention.__class__ = Chunked
    x = torch.randn(30, K)
    ours = step(attention, x)
    assert together == [3, 3, 3]
    share_inputs(attention, enabled=False)
    theirs = step(attention, x)
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("crosses", [True, False])
def test_checkpointing(attention, together, reentrant, crosses):
    """The recomputation does what the forward did, also if that or another forward has just disabled the group."""
    x, other = torch.randn(12, K), torch.randn(12, K) if crosses else None
    plain = copy.deepcopy(attention)
    share_inputs(plain, enabled=False)

    class Block(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *inputs):
            return checkpoint(self.inner, *inputs, use_reentrant=reentrant)

    block = Block(attention)
    theirs = step(plain, x, other)
    is_disabled = crosses and reentrant
    for used in ([3, 3], [3, 3] if is_disabled else [3, 3, 3, 3]):
        ours = step(block, x, other)
        assert together == used
        assert torch.equal(ours[0], theirs[0])
        assert all(torch.equal(grad, theirs[2][name.removeprefix("inner.")]) for name, grad in ours[2].items())
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    share_inputs(attention)
    for y in [block(given, other) for given in inputs]:
        y.sum().backward()
    expected = x.clone().requires_grad_()
    plain(expected, other).sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(inputs[0].grad, expected.grad)


def test_compile_computes_layer_by_layer(attention, together):
    x = torch.randn(12, K)
    compiled = torch.compile(attention, fullgraph=True)
    with torch.no_grad():
        y = compiled(x)
    assert together == []
    share_inputs(attention, enabled=False)
    with torch.no_grad():
        assert torch.equal(y, attention(x))


def test_hooks_of_members_run(attention, together):
    seen = []
    attention.k_proj.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    handle = attention.v_proj.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(12, K)
    with torch.no_grad():
        ours = attention(x)
        assert together == [3]
        assert len(seen) == 1
        assert seen[0] is x
        share_inputs(attention, enabled=False)
        assert torch.equal(ours, attention(x))
        share_inputs(attention)
        handle.remove()
        assert not torch.equal(ours, attention(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.k_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        lambda m: m.k_proj.register_full_backward_hook(lambda module, grads, outputs: None),
        lambda m: m.k_proj.base.register_forward_hook(lambda module, args, output: output + 1),
        lambda m: m.k_proj.merge(),
        lambda m: m.k_proj.disable_adapters(),
        lambda m: m.k_proj.deactivate(),
        lambda m: setattr(m.k_proj, "cache_dequantized", True),
        lambda m: setattr(m.k_proj, "forward", lambda x: m.v_proj.base(x)),
        lambda m: m.k_proj.add_adapter("dropped", 4, dropout=0.5),
        lambda m: setattr(m, "k_proj", nn.Linear(K, 32)),
        lambda m: setattr(m, "k_proj", QLoRALinear(nn.Linear(K, 32), 4, block_size=32)),
        lambda m: setattr(m, "k_proj", QLoRALinear(nn.Linear(K, 32), 4, freeze_base=False)),
    ],
    ids=[
        "hook before",
        "backward hook",
        "hook of the base",
        "merged",
        "disabled",
        "inactive",
        "dense cache",
        "own forward",
        "dropout",
        "dense",
        "block size",
        "trained base",
    ],
)
def test_a_member_that_does_more_is_computed_alone(attention, together, change):
    change(attention)
    x = torch.randn(12, K)
    outputs = []
    for enabled in (True, False):
        share_inputs(attention, enabled)
        torch.manual_seed(1)
        outputs.append(attention(x))
    assert together == []
    assert torch.equal(*outputs)


def test_dropout_only_matters_in_training(attention, together):
    attention.k_proj.add_adapter("dropped", 4, dropout=0.5)
    attention.eval()(torch.randn(12, K))
    assert together == [3]


def test_an_error_leaves_no_open_group(attention, together):
    with pytest.raises(RuntimeError, match="in_features"):
        attention(torch.randn(12, K + 1))
    assert shared_input._OPEN.calls == ()

    class Failing(Attention):
        def forward(self, x):
            self.q_proj(x)
            raise ValueError("stopped")

    attention.__class__ = Failing
    with pytest.raises(ValueError, match="stopped"):
        attention(torch.randn(12, K))
    assert shared_input._OPEN.calls == ()
    attention.__class__ = Attention
    attention(torch.randn(12, K))
    assert together == [3, 3]


def test_an_interrupted_call_ends_with_the_next(attention, together):
    class Interrupted(Attention):
        def forward(self, x):
            self.q_proj(x)
            raise KeyboardInterrupt  # torch runs no hooks after it

    attention.__class__ = Interrupted
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            attention(torch.randn(12, K))
    assert len(shared_input._OPEN.calls) == 1
    attention.__class__ = Attention
    attention(torch.randn(12, K))
    assert shared_input._OPEN.calls == ()
    assert together == [3] * 4


def test_threads(attention):
    """Each thread has groups of its own, as in a server."""
    inputs = [torch.randn(12, K) for _ in range(4)]
    with torch.no_grad():
        expected = [attention(x) for x in inputs]
    wrong = []

    def run(x, y):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(attention(x), y):
                    wrong.append(x)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_pickles_and_state_dicts(attention, together):
    assert not any("shared" in name or "group" in name for name in attention.state_dict())
    x = torch.randn(12, K)
    file = io.BytesIO()
    torch.save(attention, file)
    file.seek(0)
    with torch.no_grad():
        y = attention(x)
        for other in (copy.deepcopy(attention), torch.load(file, weights_only=False)):
            del together[:]
            assert torch.equal(other(x), y)
            assert together == [3]
            nn.init.zeros_(other.k_proj.lora_b["default"])
            assert not torch.equal(other(x), y)  # its own layers, not those of the original
            assert torch.equal(attention(x), y)


def test_a_replaced_layer_is_a_member(attention, together):
    attention.k_proj = QLoRALinear(nn.Linear(K, 32), 2)
    attention(torch.randn(12, K))
    assert together == [3]


def test_nothing_outlives_a_call(attention):
    x = torch.randn(12, K)
    y = attention(x)
    alive = weakref.ref(x), weakref.ref(y)
    del x, y
    assert [ref() for ref in alive] == [None, None]
    model = weakref.ref(attention)
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_referrers(attention))
        attention(torch.randn(12, K))
        assert len(gc.get_referrers(attention)) == before
    finally:
        gc.enable()
    assert model() is attention


def test_share_inputs_counts_groups_and_is_idempotent(attention):
    model = nn.Sequential(attention, Attention(), nn.Linear(K, K))
    assert share_inputs(model) == 2
    assert share_inputs(model) == 2
    assert len(attention._forward_pre_hooks) == len(attention._forward_hooks) == 1
    assert share_inputs(nn.Linear(4, 4)) == 0


@pytest.mark.parametrize(("name", "groups"), [("llama", 4), ("qwen2", 4), ("falcon", 0), ("phi3", 0)])
def test_models_of_transformers(name, groups, together):
    """Biases (Llama here, Qwen2), and models with nothing to group: fused projections."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = CONFIGS.get(name, {k: v for k, v in CONFIGS["llama"].items() if k != "attention_bias"})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options))
    qlora.prepare_model(model, 4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    outcomes = []
    for enabled in (True, False):
        assert share_inputs(model, enabled) == groups
        model.zero_grad()
        tokens = TOKENS.repeat(2, 1)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        outcomes.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert len(together) == groups
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    for ours, theirs in zip(outcomes[0][1], outcomes[1][1], strict=True):
        # float32 sums of at most 192 products in another order, through two layers
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
