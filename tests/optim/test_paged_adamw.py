"""PagedAdamW compared with torch and bitsandbytes, its state dict, and its paging."""

import ctypes
import subprocess
import sys

import pytest
import torch
from torch import nn

from qlora import ops
from qlora.optim import PagedAdamW
from qlora.optim.paging import ManagedMemory, MappedFiles, _Driver

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def problem(seed=0, dtype=torch.float32):
    """A small regression with parameters below and above min_8bit_size."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 48)).to(dtype)
    x, y = torch.randn(64, 48, dtype=dtype), torch.randn(64, 48, dtype=dtype)

    def loss():
        return (model(x) - y).square().mean()

    return model, loss


def train(model, loss, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def parameters(model):
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def test_follows_torchs_adamw():
    model, loss = problem()
    reference, reference_loss = problem()
    losses = train(model, loss, PagedAdamW(model.parameters(), **OPTIONS), 30)
    expected = train(reference, reference_loss, torch.optim.AdamW(reference.parameters(), **OPTIONS), 30)
    assert losses[-1] < 0.5 * losses[0]
    # A step divides by sqrt(v), which amplifies rounding errors of tiny gradients to lr times a few float32 units.
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(parameters(model), parameters(reference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [32, 8])
def test_follows_bitsandbytes(bits):
    bnb = pytest.importorskip("bitsandbytes")
    theirs = {32: bnb.optim.AdamW32bit, 8: bnb.optim.AdamW8bit}[bits]
    model, loss = problem()
    reference, reference_loss = problem()
    start = parameters(model)
    losses = train(model, loss, PagedAdamW(model.parameters(), **OPTIONS, bits=bits), 30)
    expected = train(reference, reference_loss, theirs(reference.parameters(), **OPTIONS), 30)
    torch.testing.assert_close(losses, expected, rtol={32: 1e-4, 8: 2e-2}[bits], atol=0)
    # 8 bit: moments have errors up to 1/256 of a block's largest one, and qlora never rounds a second moment to zero.
    moved, apart = parameters(model) - start, parameters(model) - parameters(reference)
    assert apart.norm() <= {32: 1e-3, 8: 0.1}[bits] * moved.norm()


def test_8bit_is_the_operator_and_small_parameters_stay_in_32_bit():
    model, loss = problem()
    optimizer = PagedAdamW(model.parameters(), **OPTIONS, bits=8)
    weight = model[0].weight
    expected = weight.detach().clone()
    state = [torch.zeros(96, 48, dtype=torch.uint8), torch.zeros(18), torch.zeros(96, 48, dtype=torch.uint8)]
    state.append(torch.zeros(18))
    train(model, loss, optimizer, 1)
    ops.adamw_8bit(expected, weight.grad, *state, 1e-2, 0.9, 0.99, 1e-8, 0.1, 1)
    assert torch.equal(weight, expected)
    assert optimizer.state[weight]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[model[0].bias]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, bits, dtype):
    model, loss = problem(dtype=dtype)
    optimizer = PagedAdamW(model.parameters(), **OPTIONS, bits=bits)
    train(model, loss, optimizer, 5)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    train(model, loss, optimizer, 5)

    resumed, loss = problem(dtype=dtype)
    for parameter in resumed.parameters():
        parameter.data.zero_()
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed.load_state_dict(saved["model"])
    again = PagedAdamW(resumed.parameters(), lr=1.0, bits=bits, page_dir=tmp_path / "pages")
    again.load_state_dict(saved["optimizer"])
    assert again.param_groups[0]["lr"] == OPTIONS["lr"]
    train(resumed, loss, again, 5)
    assert torch.equal(parameters(resumed), parameters(model))
    assert not list((tmp_path / "pages").iterdir())


def test_a_state_that_does_not_fit_is_refused():
    model, loss = problem()
    optimizer = PagedAdamW(model.parameters(), **OPTIONS, bits=8)
    train(model, loss, optimizer, 1)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"bits=32 .*must have \['exp_avg', 'exp_avg_sq', 'step'\]"):
        PagedAdamW(model.parameters(), bits=32).load_state_dict(state)
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:-1]
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 0 is torch.uint8 \(95, 48\)"):
        PagedAdamW(model.parameters(), bits=8).load_state_dict(state)
    torch_optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    train(model, loss, torch_optimizer, 1)
    with pytest.raises(ValueError, match="momentum_buffer"):
        PagedAdamW(model.parameters()).load_state_dict(torch_optimizer.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 16}, "bits=16"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": float("nan")}, "eps=nan"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PagedAdamW([nn.Parameter(torch.zeros(2))], **options)


def test_gradients_scaled_clipped_missing_and_sparse():
    model, loss = problem()
    reference, reference_loss = problem()
    optimizer, expected = (
        PagedAdamW(model.parameters(), **OPTIONS),
        torch.optim.AdamW(reference.parameters(), **OPTIONS),
    )
    for side, function, used in ((model, loss, optimizer), (reference, reference_loss, expected)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for i in range(3):
            used.zero_grad()
            scaler.scale(function()).backward()
            scaler.unscale_(used)
            nn.utils.clip_grad_norm_(side.parameters(), 0.1)
            if i == 1:
                side[0].bias.grad = torch.full_like(side[0].bias, torch.inf)  # the scaler skips this step
                scaler._per_optimizer_states[id(used)]["found_inf_per_device"][torch.device("cpu")].fill_(1)
            scaler.step(used)
            scaler.update()
    torch.testing.assert_close(parameters(model), parameters(reference), rtol=1e-5, atol=1e-6)
    assert optimizer.state[model[0].weight]["step"] == 2
    frozen = nn.Parameter(torch.ones(3))
    PagedAdamW([frozen]).step()
    assert torch.equal(frozen, torch.ones(3))
    table = nn.Embedding(5, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        PagedAdamW(table.parameters()).step()


def test_schedulers_groups_and_closures():
    model, loss = problem()
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters(), "weight_decay": 0.0}]
    optimizer = PagedAdamW(groups, **OPTIONS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    before = loss().item()

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    assert optimizer.step(closure).item() == before
    schedule.step()
    assert loss().item() < before
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.325)


class TestPages:
    def test_mapped_files_have_no_names_and_start_at_zero(self, tmp_path):
        tensor = MappedFiles(tmp_path / "new").zeros((3, 5), torch.float32)
        assert not list((tmp_path / "new").iterdir())
        assert torch.equal(tensor, torch.zeros(3, 5))
        tensor += 1
        assert tensor.sum() == 15

    def test_the_same_steps_with_and_without_files(self, tmp_path):
        sides = []
        for page_dir in (None, tmp_path):
            model, loss = problem()
            train(model, loss, PagedAdamW(model.parameters(), **OPTIONS, bits=8, page_dir=page_dir), 3)
            sides.append(parameters(model))
        assert torch.equal(*sides)

    def test_a_full_disk_is_an_error_before_the_step(self, tmp_path, monkeypatch):
        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.posix_fallocate", full)
        with pytest.raises(OSError, match=r"page_dir=.*no room for 1 MiB of optimizer state.*No space left"):
            MappedFiles(tmp_path).zeros((2**18,), torch.float32)
        assert not list(tmp_path.iterdir())

    LIMITED = """
import resource, sys, torch
from torch import nn
from qlora.optim import PagedAdamW
page_dir = sys.argv[1] if len(sys.argv) > 1 else None
small = nn.Parameter(torch.zeros(2))
small.grad = torch.ones(2)
PagedAdamW([small], page_dir=page_dir).step()  # triggers late imports before memory is limited
weight = nn.Parameter(torch.zeros(16, 2**20))
weight.grad = torch.ones_like(weight)
used = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
limit = used + 64 * 2**20  # too little for 128 MiB of state
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
optimizer = PagedAdamW([weight], page_dir=page_dir)
for _ in range(2):
    optimizer.step()
state = sum(t.nbytes for t in optimizer.state[weight].values())
print(state > 64 * 2**20, weight.mean().item() < 0)
"""

    def test_state_larger_than_the_process_may_hold(self, tmp_path):
        """Limits the process's private memory; with page_dir the state is in mapped files, which do not count."""

        def run(*arguments):
            command = [sys.executable, "-c", self.LIMITED, *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=False)

        refused = run()
        assert refused.returncode != 0
        assert "can't allocate memory" in refused.stderr
        paged = run(str(tmp_path))
        assert paged.stdout.split() == ["True", "True"], paged.stderr

    def test_page_dir_is_for_the_cpu(self, tmp_path):
        parameter = nn.Parameter(torch.zeros(2, device="meta"))
        parameter.grad = torch.zeros(2, device="meta")
        with pytest.raises(ValueError, match="page_dir=.* is for parameters on the CPU"):
            PagedAdamW([parameter], page_dir=tmp_path).step()

    def test_managed_memory_calls_the_driver(self, tmp_path):
        """With a library that replaces the driver: checks the calls, and how errors are raised."""
        source = tmp_path / "driver.c"
        source.write_text(
            "#include <stdint.h>\n#include <stdlib.h>\n"
            "int live, prefetched, fail;\n"
            "int cuMemAllocManaged(uint64_t* p, size_t n, unsigned flags) {\n"
            "  if (fail || flags != 1) return 2;\n  *p = (uint64_t)malloc(n); ++live; return 0;\n}\n"
            "int cuMemFree_v2(uint64_t p) { free((void*)p); --live; return 0; }\n"
            "int cuMemPrefetchAsync(uint64_t p, size_t n, int device, void* stream) {\n"
            "  prefetched += n; return device == 1 ? 0 : 101;\n}\n"
        )
        library = tmp_path / "libdriver.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        driver = _Driver(str(library))
        counters = driver._library

        def counter(name):
            return ctypes.c_int.in_dll(counters, name)

        pointer = driver.allocate(4096)
        assert counter("live").value == 1
        driver.prefetch(pointer, 4096, 1, 0)
        assert counter("prefetched").value == 4096
        with pytest.raises(RuntimeError, match="cuMemPrefetchAsync failed with CUDA driver error 101"):
            driver.prefetch(pointer, 1, 0, 0)
        driver.free(pointer)
        assert counter("live").value == 0
        counter("fail").value = 1
        with pytest.raises(RuntimeError, match=r"cuMemAllocManaged\(64\) failed with CUDA driver error 2"):
            driver.allocate(64)
        assert ManagedMemory(torch.device("cuda", 0), driver) is not None
