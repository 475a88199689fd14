"""Runs every operator test that uses a device as PTX."""

from ops.test_adamw import *  # noqa: F403
from ops.test_affine import *  # noqa: F403
from ops.test_backward import *  # noqa: F403
from ops.test_calibrate import *  # noqa: F403
from ops.test_forward import *  # noqa: F403
from ops.test_multi import *  # noqa: F403
from ops.test_quantize import *  # noqa: F403
from simt.test_gemm_tiles import test_every_tile, test_many_adapters_by_dequantize_matmul  # noqa: F401
