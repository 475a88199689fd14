"""Fixtures for every test: the instruction set in use, and a fixed seed."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network

import pytest
import torch

from qlora import _C


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=_C.runnable_isas())
def isa(request, monkeypatch):
    """Runs the test once for each kernel level of this machine."""
    monkeypatch.setenv("QLORA_CPU_ISA", request.param)
    assert _C.active_isa() == request.param
    return request.param


@pytest.fixture
def threads():
    """Restores torch's thread count after a test that changes it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
