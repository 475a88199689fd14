"""Runs every operator test that uses a device as PTX, and checks that each kernel ran in one of them.

All in one file, because processes that share the tests (pytest-xdist) divide them by files.
"""

import pytest
from ops.test_adamw import *  # noqa: F403
from ops.test_affine import *  # noqa: F403
from ops.test_affine import test_forward_and_gradients as test_affine_forward_and_gradients  # noqa: F401
from ops.test_backward import *  # noqa: F403
from ops.test_calibrate import *  # noqa: F403
from ops.test_experts import *  # noqa: F403

# Names that a file below has too.
from ops.test_experts import test_bitwise_the_same_for_every_thread_count as test_experts_bitwise_the_same  # noqa: F401
from ops.test_experts import test_forward_and_gradients as test_experts_forward_and_gradients  # noqa: F401
from ops.test_forward import *  # noqa: F403
from ops.test_multi import *  # noqa: F403
from ops.test_quantize import *  # noqa: F403
from ptx import conftest, executor
from simt.test_gemm_tiles import (  # noqa: F401
    test_every_tile,
    test_every_tile_of_experts,
    test_many_adapters_by_dequantize_matmul,
)

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
