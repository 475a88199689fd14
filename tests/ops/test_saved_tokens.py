"""What the operators keep for their backward: their tokens only where the gradient of a low-rank factor reads them."""

import pytest
import torch
from cases import DTYPES, weights
from ops.test_experts import expert_weights

from qlora import ops

M, N, K, R = 40, 24, 96, 3


def forward(x, a, b, lora_x):
    return ops.forward(x, *weights(N, K)[0], a, b, 0.7, None, lora_x)


def forward_of_the_base(x, a, b, lora_x):
    return ops.forward(x, *weights(N, K)[0])


def multi(x, a, b, lora_x):
    of_row = torch.arange(M) % 2 - 1
    return ops.forward_multi(x, *weights(N, K)[0], a[None], b[None], torch.tensor([0.7]), of_row)


def many(x, a, b, lora_x):
    packed, absmax, nested_absmax, nested_offset, _, *form = weights(N, K)[0]
    stacks = [[t] * 2 for t in (packed, absmax, nested_absmax, nested_offset)]
    return ops.forward_many(x, *stacks, [N, N], *form, [a, None], [b, None], [0.7, 1.0])[0]


def experts(x, a, b, lora_x):
    of_row = torch.arange(2 * M) % 3
    return ops.forward_experts(x, *expert_weights(3, N, K)[0], of_row, a.expand(3, R, K), b.expand(3, N, R), 0.7)


def affine(x, a, b, lora_x):
    integers = torch.randint(-8, 8, (K, N), dtype=torch.int8)
    return ops.forward_affine(x, integers, 0.1, -0.2, a.T, b.T, 2.0)


def kept(call):
    """The storages that a call keeps for its backward, and its result."""
    storages = set()

    def pack(t):
        storages.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return storages, call()


@pytest.mark.parametrize("trains", ["a", "b", "both", "nothing"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "dropped"),
    [*((op, False) for op in (forward_of_the_base, forward, multi, many, experts, affine)), (forward, True)],
)
def test_tokens_are_kept_only_for_factors_that_train(device, op, dtype, dropped, trains):
    x = torch.randn(M, K).to(dtype).requires_grad_()
    lora_x = torch.randn(M, K).to(dtype) if dropped else None
    a, b = torch.randn(R, K), torch.randn(N, R)

    def gradients(a, b):
        torch.manual_seed(1)
        storages, y = kept(lambda: op(x, a, b, lora_x))
        leaves = [t for t in (x, a, b) if t.requires_grad and (t is x or op is not forward_of_the_base)]
        given = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype)
        return storages, dict(zip(map(id, leaves), torch.autograd.grad(y, leaves, given), strict=True))

    all_a, all_b = a.clone().requires_grad_(), b.clone().requires_grad_()
    _, expected = gradients(all_a, all_b)
    a.requires_grad_(trains in ("a", "both"))
    b.requires_grad_(trains in ("b", "both"))
    storages, actual = gradients(a, b)

    reads = trains != "nothing" and op is not forward_of_the_base
    assert (x.untyped_storage().data_ptr() in storages) == (reads and not dropped)
    if dropped:
        assert (lora_x.untyped_storage().data_ptr() in storages) == reads
    for t, twin in ((x, x), (a, all_a), (b, all_b)):
        if id(t) in actual:
            assert torch.equal(actual[id(t)], expected[id(twin)])


def test_a_frozen_layer_needs_as_little_memory_as_a_dense_one():
    """In a chain of layers, whose inputs nothing else keeps."""
    x = torch.randn(M, K, requires_grad=True)
    weight = weights(K, K)[0]
    ours, _ = kept(lambda: ops.forward(ops.forward(x, *weight), *weight))
    dense = torch.randn(K, K)
    theirs, _ = kept(lambda: torch.nn.functional.linear(torch.nn.functional.linear(x, dense), dense))
    assert len(theirs) == 1
    assert ours == {t.untyped_storage().data_ptr() for t in weight[:4]}


def test_tokens_without_values_are_not_copied():
    """A backward operator makes no contiguous tensor of x where no factor needs a gradient."""
    arguments = torch.randn(M, N), torch.zeros(1).expand(M, K), *weights(N, K)[0], torch.randn(R, K), torch.randn(N, R)

    def copies(needs_lora):
        with torch.profiler.profile() as profile:
            torch.ops.qlora.backward(*arguments, 1.0, None, True, needs_lora, False, False)
        return any("clone" in event.key or "copy" in event.key for event in profile.key_averages())

    assert not copies(needs_lora=False)
    assert copies(needs_lora=True)
