"""pytest plugin (-p poison): after a sticky CUDA error it ends the process, which xdist replaces by a new one."""

import os

import pytest
import torch


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # sticky: every later call in this process would also fail
        print(f"STICKY {item.nodeid}: {error}", flush=True)
        os._exit(70)
