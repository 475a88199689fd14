"""The tests of the operators once more, each launch executed as PTX: `device` is an architecture here."""

import zlib

import pytest
from ptx import executor


def pytest_collection_modifyitems(items):
    """Only tests that run an operator on `device` belong here; the others ran in tests/ops."""
    here = [item for item in items if "tests/ptx/" in str(item.path).replace("\\", "/")]
    reason = executor.why_not()
    for item in here:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
        elif "device" not in item.fixturenames and not getattr(item.module, "ON_PTX", False):
            items.remove(item)


@pytest.fixture
def device(request):
    """Each test takes one architecture and one schedule, spread by its name; the counts of all runs are kept."""
    number = zlib.crc32(request.node.nodeid.encode())
    arch = executor.ARCHS[number % len(executor.ARCHS)]
    with executor.ptx(arch, seed=number % 97 + 1, desync=number % 2 == 0) as running:
        yield f"ptx-{arch}"
    if running.failure is not None:
        raise running.failure
