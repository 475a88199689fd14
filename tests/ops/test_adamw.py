"""adamw and adamw_8bit: bit-equal to the reference on every device, close to torch's AdamW in float64."""

import pytest
import torch
from cases import DTYPES

from qlora import _C, ops, reference

HYPERPARAMETERS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.995, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((), (0,), (1,), (7, 31), (256,), (257,), (3, 1000))


def states(shape: tuple[int, ...], bits: int) -> list[torch.Tensor]:
    if bits == 32:
        return [torch.zeros(shape), torch.zeros(shape)]
    blocks = -(-torch.Size(shape).numel() // _C.MOMENT_BLOCK)
    codes = (torch.zeros(shape, dtype=torch.uint8) for _ in range(2))
    first, second = codes
    return [first, torch.zeros(blocks), second, torch.zeros(blocks)]


def op_of(module, bits: int):
    return module.adamw if bits == 32 else module.adamw_8bit


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [32, 8])
def test_equals_the_reference_bit_by_bit(device, bits, dtype, shape):
    param = torch.randn(shape).to(dtype)
    ours, ours_state = param.clone(), states(shape, bits)
    theirs, their_state = param.clone(), [s.clone() for s in ours_state]
    for step in range(1, 4):
        grad = torch.randn(shape).to(dtype) * 10.0 ** (step - 3)
        op_of(ops, bits)(ours, grad, *ours_state, **HYPERPARAMETERS, step=step)
        op_of(reference, bits)(theirs, grad, *their_state, **HYPERPARAMETERS, step=step)
        assert torch.equal(ours, theirs)
        for one, other in zip(ours_state, their_state, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_follows_torchs_adamw(device, weight_decay):
    start = torch.randn(40, 25)
    ours, moments = start.clone(), states((40, 25), 32)
    theirs = start.double().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=weight_decay)
    steps = 20
    for step in range(1, steps + 1):
        grad = torch.randn(40, 25)
        ops.adamw(ours, grad, *moments, 1e-2, 0.9, 0.99, 1e-8, weight_decay, step)
        theirs.grad = grad.double()
        optimizer.step()
    # The update of one step is at most lr / (1 - beta1), here 0.1, and takes about ten rounded operations; the
    # parameter itself is rounded twice per step.
    bound = steps * 2.0**-24 * (10 * 0.1 + 2 * theirs.abs().max().item())
    assert (ours.double() - theirs).abs().max() <= bound


@pytest.mark.parametrize("bits", [32, 8])
def test_training_converges(bits):
    param, target, state = torch.randn(4096), torch.randn(4096), states((4096,), bits)
    start = (param - target).square().mean()
    for step in range(1, 301):
        grad = param - target + 0.1 * torch.randn(4096)
        op_of(ops, bits)(param, grad, *state, 2e-2, 0.9, 0.999, 1e-8, 0.0, step)
    assert (param - target).square().mean() < 0.005 * start


def test_a_second_moment_never_becomes_zero(device):
    """In a block with a large one it would round to zero, and the next step would be lr / eps times the gradient."""
    grad = torch.full((256,), 1e-6)
    grad[0] = 1e3
    param, state = torch.zeros(256), states((256,), 8)
    for step in range(1, 4):
        ops.adamw_8bit(param, grad, *state, **HYPERPARAMETERS, step=step)
    assert (state[2] > 0).all()
    assert param.abs().max() < 0.1


def test_any_thread_count_gives_the_same_bits(threads):
    param, grad = torch.randn(100_003), torch.randn(100_003)
    results = []
    for count in (1, 2):
        threads(count)
        for bits in (32, 8):
            copy, state = param.clone(), states((100_003,), bits)
            op_of(ops, bits)(copy, grad, *state, **HYPERPARAMETERS, step=1)
            results.append((copy, *state))
    for one, other in zip(results[0] + results[1], results[2] + results[3], strict=True):
        assert torch.equal(one, other)


def test_the_unsigned_map_is_as_bitsandbytes_makes_it():
    values = torch.tensor(_C.unsigned_dynamic_map())
    assert (values.diff() > 0).all()
    assert (values[0], values[-1], len(values)) == (0.0, 1.0, 256)
    # Per decade 10^-6 … 1: twice as many points as in the decade below (Dettmers 2015, section 2).
    counts = [int(((values > 10.0 ** (e - 1)) & (values <= 10.0**e)).sum()) for e in range(-5, 1)]
    assert counts == [4, 8, 16, 32, 64, 129]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "lr=-1 must not be negative"),
        ({"beta2": 1.0}, r"beta2=1 must be in \[0, 1\)"),
        ({"step": 0}, "step=0: the first step is 1"),
        ({"param": torch.zeros(4, 6).T}, "param is not contiguous"),
        ({"param": torch.zeros(6, 4, dtype=torch.float64)}, "param must be float32, bfloat16 or float16"),
        ({"grad": torch.zeros(24)}, r"grad has shape \[24\]: it must be that of param, \[6, 4\]"),
        ({"exp_avg": torch.zeros(5)}, "exp_avg has 5 elements: it must have 24"),
        ({"exp_avg_sq": torch.zeros(6, 4).half()}, "exp_avg_sq has the wrong dtype: it must be float32"),
    ],
)
def test_errors_name_the_value_and_the_rule(change, message):
    arguments = {name: torch.zeros(6, 4) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    with pytest.raises(RuntimeError, match=message):
        ops.adamw(**(arguments | HYPERPARAMETERS | {"step": 1} | change))


def test_a_parameter_that_was_saved_for_backward_is_missed():
    """Autograd detects the in-place update."""
    w = torch.randn(3, requires_grad=True)
    y = (w * w).sum()
    ops.adamw(w, torch.ones(3), *states((3,), 32), **HYPERPARAMETERS, step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("bits", [32, 8])
def test_opcheck(bits):
    op = torch.ops.qlora.adamw if bits == 32 else torch.ops.qlora.adamw_8bit
    tensors = (torch.randn(300), torch.randn(300), *states((300,), bits))
    torch.library.opcheck(op.default, (*tensors, 1e-3, 0.9, 0.99, 1e-8, 0.1, 1))
    torch.library.opcheck(op.many, (*([tensor] for tensor in tensors), 1e-3, 0.9, 0.99, 1e-8, 0.1, [1]))


@pytest.mark.parametrize("bits", [32, 8])
def test_many_at_once_are_each_alone_bit_by_bit(device, bits):
    """At least seventeen parameters need a second launch on a GPU. Sizes, dtypes and steps differ; one is empty."""
    shapes = [SHAPES[i % len(SHAPES)] for i in range(20)]
    params = [torch.randn(shape).to(DTYPES[i % len(DTYPES)]) for i, shape in enumerate(shapes)]
    grads = [torch.randn(param.shape).to(param.dtype) for param in params]
    grads[6] = torch.randn(1000, 3).to(params[6].dtype).T  # not contiguous
    ours = [p.clone() for p in params], [states(shape, bits) for shape in shapes]
    theirs = [p.clone() for p in params], [states(shape, bits) for shape in shapes]
    for round_ in range(2):
        steps = [1 + round_ + i % 3 for i in range(20)]
        ops.adamw_many(ours[0], grads, ours[1], *HYPERPARAMETERS.values(), steps)
        for param, grad, state, step in zip(theirs[0], grads, theirs[1], steps, strict=True):
            op_of(ops, bits)(param, grad, *state, **HYPERPARAMETERS, step=step)
    for one, other in zip(ours[0] + sum(ours[1], []), theirs[0] + sum(theirs[1], []), strict=True):
        assert torch.equal(one, other)
    for one, before in zip(ours[0], params, strict=True):
        assert one.numel() < 100 or not torch.equal(one, before)


def test_lists_of_different_lengths_are_refused(device):
    param, moments = torch.zeros(3), states((3,), 32)
    with pytest.raises(RuntimeError, match="there are 1 parameters: every list must have as many"):
        torch.ops.qlora.adamw.many([param], [], *([m] for m in moments), *HYPERPARAMETERS.values(), [1])
    ops.adamw_many([], [], [], *HYPERPARAMETERS.values(), [])
