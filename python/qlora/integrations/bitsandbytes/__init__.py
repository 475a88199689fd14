"""bitsandbytes: its checkpoints are read and written without it, and its own code runs on the kernels of this package.

``checkpoint_config`` and ``export_checkpoint`` need transformers, ``accelerate`` needs bitsandbytes.
"""

from qlora.integrations.bitsandbytes.checkpoints import checkpoint_config, export_checkpoint, is_checkpoint
from qlora.integrations.bitsandbytes.operators import Acceleration, accelerate

__all__ = ["Acceleration", "accelerate", "checkpoint_config", "export_checkpoint", "is_checkpoint"]
