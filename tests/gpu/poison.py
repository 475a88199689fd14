"""pytest -p poison: a CUDA error that poisons a process ends that process; xdist starts another one in its place."""

import os

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # sticky: every later call in this process would fail as well
        print(f"STICKY {item.nodeid}: {error}", flush=True)
        os._exit(70)
