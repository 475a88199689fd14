"""Runs the operator tests again with each launch executed as PTX; here `device` is an architecture."""

import os
import zlib

import pytest
from ptx import executor

FULL = "QLORA_TEST_FULL" in os.environ  # every test on every architecture and with several schedules


def pytest_collection_modifyitems(items):
    """Keeps only tests that run an operator on `device`; the others run in tests/ops. Puts that of coverage last."""
    here = [item for item in items if "tests/ptx/" in str(item.path).replace("\\", "/")]
    reason = executor.why_not()
    for item in here:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        if item.name.startswith("test_every_kernel"):
            items.remove(item)
            items.append(item)
        elif "device" not in item.fixturenames:
            items.remove(item)


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        runs = [(arch, seed) for arch in executor.ARCHS for seed in (1, 2, 3)] if FULL else [None]
        metafunc.parametrize("device", runs, indirect=True, ids=["-".join(map(str, r)) if r else "ptx" for r in runs])


@pytest.fixture
def device(request):
    """One architecture and schedule per test, chosen by its name, or those that it was parametrized with."""
    number = zlib.crc32(request.node.nodeid.encode())
    marker = request.node.get_closest_marker("archs")
    archs = marker.args if marker else executor.ARCHS
    arch, seed = request.param or (archs[number % len(archs)], number % 97 + 1)
    if arch not in archs:
        pytest.skip(f"not for {arch}")
    with executor.ptx(arch, seed=seed, desync=number % 2 == 0) as running:
        yield f"ptx-{arch}"
    if running.failure is not None:
        raise running.failure
