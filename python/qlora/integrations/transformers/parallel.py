"""4-bit layers under transformers' DistributedConfig: FSDP2 and expert parallelism of a checkpoint that is in 4 bit.

transformers shards parameters, not buffers: the scales of linear layers stay whole, as under FSDP2 alone, and those of
experts are cut here to the experts of this process.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qlora.nn import Experts4bit
from qlora.nn.packed import STATISTICS


def refuse_sharded(name: str, placeholder: Tensor) -> None:
    """Raises ValueError if a dense weight is about to be quantized shard by shard: its blocks would be cut."""
    if isinstance(placeholder, DTensor):
        raise ValueError(
            f"{name} is sharded while it loads, and can only be quantized whole: make a 4-bit checkpoint first, with"
            " qlora quantize, and load that one with the same DistributedConfig"
        )


def refuse_tensor_parallel(name: str, weight: Tensor) -> None:
    """Raises ValueError for a packed weight that a tensor-parallel plan has sharded: its scales are whole."""
    if isinstance(weight, DTensor) and "tp" in (weight.device_mesh.mesh_dim_names or ()):
        raise ValueError(
            f"{name} is sharded by a tensor-parallel plan, which 4-bit layers do not support: use fsdp_size, and"
            " ep_size for experts, in DistributedConfig"
        )


def are_local(experts: Experts4bit) -> bool:
    """Whether ``experts`` has the scales of only some of its weights' experts."""
    name = experts.weight_names[0]
    return getattr(experts, name).shape[0] != getattr(experts, f"{name}_{STATISTICS[0]}").shape[0]


def keep_local_experts(experts: Experts4bit) -> None:
    """Cuts the scales of ``experts`` to this process's experts, if transformers has sharded the weights by experts."""
    for name in experts.weight_names:
        weight = getattr(experts, name)
        if not isinstance(weight, DTensor) or experts.num_experts == weight.shape[0]:
            continue
        first = weight.device_mesh.get_local_rank("ep") * experts.num_experts
        for statistic in STATISTICS:
            whole = getattr(experts, f"{name}_{statistic}")
            mine: Any = whole[first : first + experts.num_experts].clone(memory_format=torch.contiguous_format)
            mine._is_hf_initialized = True
            experts.register_buffer(f"{name}_{statistic}", mine)
