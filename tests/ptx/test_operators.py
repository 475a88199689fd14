"""Runs every operator test that uses a device as PTX."""

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
from simt.test_gemm_tiles import (  # noqa: F401
    test_every_tile,
    test_every_tile_of_experts,
    test_many_adapters_by_dequantize_matmul,
)
