"""Fixtures for all tests: the device in use, and a fixed seed."""

import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network
# A separate cache: inductor's cache key ignores ATEN_CPU_CAPABILITY, and code compiled in a process limited to AVX2
# gives nan or aborts in one that is not.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="qlora-inductor-")

import devices
import pytest
import torch

from qlora import _C


def pytest_unconfigure():
    shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=devices.available())
def device(request, monkeypatch):
    """Runs the test on each device that this machine has: every CPU kernel level, simt, a GPU."""
    name = request.param
    if name.startswith("cpu-"):
        monkeypatch.setenv("QLORA_CPU_ISA", name[4:])
        assert _C.active_isa() == name[4:]
        yield name
    elif name.startswith("simt"):
        arch, seed = (int(part) for part in name[8:].split("-seed")) if "-" in name else (80, 1)
        with devices.simt(seed=seed, arch=arch):
            yield name
    else:
        torch.set_default_device(name)
        yield name
        torch.set_default_device(None)


@pytest.fixture
def threads():
    """Restores torch's thread count after a test that changes it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
