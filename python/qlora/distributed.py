"""Training on several processes: keeps frozen tensors out of DDP's broadcasts, and refuses FSDP1.

FSDP2 (``torch.distributed.fsdp.fully_shard``) shards packed weights as they are and needs nothing from this module.
"""

import os
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """This process's place among those that torchrun started; world is 1 without torchrun."""

    world: int
    rank: int
    local_rank: int

    @classmethod
    def of_environment(cls) -> "Processes":
        variables = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
        return cls(*(int(os.environ.get(name, default)) for name, default in variables.items()))

    @property
    def is_writer(self) -> bool:
        return self.rank == 0


def ignore_frozen(model: nn.Module) -> list[str]:
    """Makes DistributedDataParallel ignore frozen parameters and all buffers, and returns their names.

    Every process has loaded the same ones. Without this call DDP broadcasts all packed weights when it is constructed,
    and all statistics before each forward. Call it on the module that you pass to DistributedDataParallel.
    """
    names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    names += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return names


def largest_list(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the children of its longest list of modules."""
    longest: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(longest):
            longest = list(module)
    return longest


def refuse_fsdp1() -> None:
    """Raises ValueError if accelerate launched this process for FSDP1, which cannot flatten packed weights."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes") and (
        os.environ.get("FSDP_VERSION", "1") == "1"
    ):
        raise ValueError(
            "FSDP1 flattens parameters and cannot flatten 4-bit weights, which are integers: set fsdp_version: 2"
            " (accelerate launch --fsdp_version 2)"
        )
