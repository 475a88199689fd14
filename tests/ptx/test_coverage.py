"""Checks that the PTX tests executed every kernel."""

import pytest
from ptx import conftest, executor

# Shapes with one group of warps, which select.h chooses only on sm_75.
TURINGS = ("ShapeILi1ELi4ELi64ELi2ELi1ELi32ELi4EE", "ShapeILi4ELi64ELi1EE")


def test_every_kernel_ran(request):
    """Every instantiation that nvcc emits ran on some architecture; in the full run, on each that can run it."""
    if len(request.session.items) < 200:
        pytest.skip("only some of the tests were selected")
    everywhere = set().union(*executor.LAUNCHED.values())
    missing = set(executor.kernels("sm_80")) - everywhere
    assert not missing, "never launched: " + ", ".join(sorted(missing))
    if conftest.FULL:
        for arch in ("sm_80", "sm_90"):
            needed = {name for name in executor.kernels(arch) if not any(t in name for t in TURINGS)}
            missing = needed - executor.LAUNCHED[arch]
            assert not missing, f"never launched on {arch}: " + ", ".join(sorted(missing))
