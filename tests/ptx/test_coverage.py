"""Nothing ships that was not executed."""

import pytest
from ptx import conftest, executor

TURINGS_GEMM = "4gemm6kernelINS_4fp16ELi1ELi64ELi2E"  # two stages: select.h chooses it on sm_75 alone


def test_every_kernel_ran(request):
    """Every instantiation that nvcc emits, on some architecture; in the full run on each that can run it."""
    if len(request.session.items) < 200:
        pytest.skip("only a part of the tests was asked for")
    everywhere = set().union(*executor.LAUNCHED.values())
    missing = set(executor.kernels("sm_80")) - everywhere
    assert not missing, "never launched: " + ", ".join(sorted(missing))
    if conftest.FULL:
        for arch in ("sm_80", "sm_90"):
            needed = {name for name in executor.kernels(arch) if TURINGS_GEMM not in name}
            missing = needed - executor.LAUNCHED[arch]
            assert not missing, f"never launched on {arch}: " + ", ".join(sorted(missing))
