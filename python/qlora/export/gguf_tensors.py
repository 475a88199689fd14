"""Tensors in a GGUF file: their names and order of rows, their types, and writing them one at a time."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.export.gguf_architectures import Architecture
from qlora.storage.files import complete_file, require_space

TYPES = ("f16", "bf16", "f32", "q8_0")
_HEADER_BYTES = 1 << 16  # an upper bound of what precedes a tensor's data, for the check of the disk, without tokens
_FLOAT16_MAX = 65504.0


class GgufTensor(NamedTuple):
    """A tensor as it will stand in the file."""

    name: str
    shape: tuple[int, ...]  # as in torch; the file lists the extents in reverse
    type: str  # one of TYPES
    read: Callable[[], Tensor]  # float, of that shape


def names_of(architecture: Architecture, layers: int) -> Callable[[str], str | None]:
    """A function from a name in transformers ("model.layers.0.mlp.up_proj.weight") to llama.cpp's, None if unknown."""
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.gguf)
    table = gguf.get_tensor_name_map(arch, layers)
    return lambda name: table.get_name(name, try_suffixes=(".weight", ".bias"))


def interleave_rows(tensor: Tensor, heads: int) -> Tensor:
    """Reorders rows so that those which are rotated together are neighbours: (heads * d, …), d even."""
    pairs = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def rotated_heads(name: str, config: Any) -> int | None:
    """The heads of the projection that a name in transformers belongs to, if llama.cpp interleaves its rows."""
    module = name.rpartition(".")[0].rpartition(".")[2] if name.endswith((".weight", ".bias")) else name.split(".")[-1]
    if module == "q_proj":
        return config.num_attention_heads
    return config.num_key_value_heads if module == "k_proj" else None


def type_of(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """The type of a tensor in a file of type ``wanted``: vectors stay float32, rows that q8_0 cannot split are f16."""
    if len(shape) < 2:
        return "f32"
    return "f16" if wanted == "q8_0" and shape[-1] % 32 else wanted


def write_gguf(
    path: Path, writer: Any, tensors: Iterable[GgufTensor], on_progress: Callable[[int, int], None] | None = None
) -> int:
    """Writes a file: the keys that ``writer`` (a GGUFWriter without a file) has, then one tensor after another.

    Needs memory for one tensor. The file appears under its name when it is complete. Returns its bytes. Raises OSError
    if the disk is full, before anything is written where that can be known, and ValueError for values that a type
    cannot hold.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    tensors = list(tensors)
    total = 0
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.type.upper()]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = torch.Size(tensor.shape).numel() // block * block_bytes
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
        total += size
    path.parent.mkdir(parents=True, exist_ok=True)
    require_space(path.parent, total + _HEADER_BYTES, f"{path.name}")
    with complete_file(path) as staging:
        try:
            writer.write_header_to_file(staging)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for done, tensor in enumerate(tensors):
                writer.write_tensor_data(_encoded(tensor))
                if on_progress is not None:
                    on_progress(done + 1, len(tensors))
        finally:
            writer.close()
        return staging.stat().st_size


def _encoded(tensor: GgufTensor) -> Any:
    from gguf import GGMLQuantizationType, quants

    value = tensor.read().detach().to("cpu", torch.float32).contiguous()
    if tuple(value.shape) != tensor.shape:
        raise ValueError(f"{tensor.name} has shape {tuple(value.shape)}: the file announces {tensor.shape}")
    largest = max(value.max().item(), -value.min().item()) if value.numel() else 0.0  # abs() would need a copy
    limit = _FLOAT16_MAX if tensor.type == "f16" else float("inf")
    if not largest <= limit or largest == float("inf"):  # nan compares false
        raise ValueError(
            f"{tensor.name} has the value {largest:.4g}, which a tensor of type {tensor.type} cannot hold: "
            + ("use --type bf16 or f32" if largest > limit and largest < float("inf") else "the weights are broken")
        )
    if tensor.type == "f32":
        return value.numpy()
    if tensor.type == "f16":
        return value.to(torch.float16).numpy()
    if tensor.type == "bf16":
        return value.to(torch.bfloat16).view(torch.int16).numpy()
    return quants.quantize(value.numpy(), GGMLQuantizationType[tensor.type.upper()])
