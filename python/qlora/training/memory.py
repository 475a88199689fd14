"""Reports the memory of a run: bytes by kind, measured and planned peak, and options that need less."""

import logging
import resource
from typing import Any

import torch
from torch import nn

from qlora.nn import Experts4bit
from qlora.nn.packed import STATISTICS, PackedMatrix
from qlora.nn.replacing import tensor_bytes
from qlora.training.settings import FinetuneSettings

logger = logging.getLogger(__name__)

MIB = 2**20


def memory_by_kind(model: nn.Module, optimizer_bits: int = 32) -> dict[str, int]:
    """Bytes of the model by purpose, with the gradients and AdamW state that training allocates."""
    packed = statistics = dense_equivalent = 0
    for module in model.modules():
        if isinstance(module, PackedMatrix | Experts4bit):
            own = sum(p.nbytes for p in module.parameters(recurse=False) if p.dtype == torch.uint8)
            packed += own
            dense_equivalent += 4 * own  # two weights per packed byte, two bytes per dense weight
            statistics += sum(b.nbytes for n, b in module.named_buffers(recurse=False) if n.endswith(STATISTICS))
    trained = [p for p in model.parameters() if p.requires_grad]
    adapters = sum(p.nbytes for p in trained)
    count = sum(p.numel() for p in trained)
    return {
        "linear_layers_16bit": dense_equivalent,
        "linear_layers_4bit": packed,
        "scales": statistics,
        "embeddings_and_rest": tensor_bytes(model) - packed - statistics - adapters,
        "adapters": adapters,
        "gradients": adapters,
        "adamw_states": (2 if optimizer_bits == 8 else 8) * count,
    }


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: on a GPU, of torch's allocator since its last reset; on the CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def planned_memory(config: Any, settings: FinetuneSettings, dtype: torch.dtype, world: int = 1) -> int | None:
    """Bytes per device that a run needs by ``qlora plan``; None for models and adapters that it cannot plan."""
    from qlora.planning.estimate import Settings, estimate
    from qlora.training.trainer import share_of

    if settings.dora or settings.modules_to_save or settings.target_modules:
        return None
    try:
        plan = estimate(
            config,
            Settings(
                rank=settings.rank,
                adapt_experts=settings.adapt_experts,
                batch=share_of(settings.batch_size, settings.gradient_accumulation, world)[0],
                sequence=settings.max_length,
                checkpointing=settings.gradient_checkpointing,
                optimizer_bits=settings.optimizer_bits,
                paged=settings.is_paged,
                quant_type=settings.quant_type,
                double_quant=settings.double_quant,
                block_size=settings.block_size,
                dtype=str(dtype).removeprefix("torch."),
                devices=world if settings.fsdp else 1,
                offload_experts=settings.offload_experts is not None,
            ),
        )
    except Exception as error:  # a model that cannot be planned must not fail a run that is done
        logger.info("cannot plan the memory: %s", error)
        return None
    return plan.resident


def what_shrinks(settings: FinetuneSettings, config: Any, dtype: torch.dtype, world: int) -> str:
    """Advice in words: the planned memory of a run, and options that need less."""
    from qlora.planning.estimate import choices

    planned = planned_memory(config, settings, dtype, world)
    halved = f"--batch-size {settings.batch_size // 2} with twice the --gradient-accumulation"
    options = [
        *(["--gradient-checkpointing"] if not settings.gradient_checkpointing else []),
        *([halved] if settings.batch_size > 1 else []),
        f"--max-length below {settings.max_length}",
        *(["--optimizer paged-adamw-8bit"] if settings.optimizer != "paged-adamw-8bit" else []),
        f"--rank below {settings.rank}",
        *(
            ["--offload-experts ram or disk"]
            if choices(config) is not None and settings.offload_experts is None
            else []
        ),
        *(["--fsdp"] if world > 1 and not settings.fsdp else []),
    ]
    needs = "" if planned is None else f"By its plan (qlora plan) it needs {planned / 1e9:.2f} GB on each device. "
    return f"{needs}To need less, use {', '.join(options)}"
