"""Reads an adapter folder once, checks that it fits the served base, and returns its factors by layer."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.adapters.files import WEIGHTS_FILE, read_adapter_config, scaling_of
from qlora.adapters.lora import check_adapter_folder
from qlora.serving.layers import LayerAdapter

_PREFIX = "base_model.model."
_MERGE = "only plain LoRA on linear layers is served beside its base; merge this adapter (qlora merge)"
_FACTORS = {".lora_A.weight": 0, ".lora_B.weight": 1}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from its folder: factors by layer name, and a digest of the files' bytes."""

    folder: Path
    layers: dict[str, LayerAdapter]
    digest: str


def read_adapter(folder: Path, base: Path, shapes: dict[str, tuple[int, int]], max_rank: int) -> AdapterFile:
    """Reads a LoRA adapter in PEFT's format for a base whose 4-bit layers have ``shapes``: name → (out, in).

    The file is read once into memory, so a file that changes meanwhile is either the old or refused as damaged.
    Raises FileNotFoundError without the two files, and ValueError for an adapter of another base or kind, for layers
    that this base does not have in 4 bit, for wrong shapes, for a rank above ``max_rank``, and for numbers that are not
    finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    check_adapter_folder(folder, base)
    config = read_adapter_config(folder, _MERGE)
    path = folder / WEIGHTS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    content = path.read_bytes()
    try:
        tensors = load(content)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (truncated or damaged): {error}") from error
    pairs = _pairs(path, tensors)
    foreign = sorted(set(pairs) - set(shapes))
    if foreign:
        raise ValueError(
            f"{path} has factors for {len(foreign)} layers, e.g. {foreign[:2]}, that the served base does not have as"
            " 4-bit layers of every token: serve its own base, or merge the adapter (qlora merge)"
        )
    layers = {}
    for name, (a, b) in sorted(pairs.items()):
        out, into = shapes[name]
        if a.dim() != 2 or b.dim() != 2 or not a.shape[0] or a.shape != (b.shape[1], into) or b.shape[0] != out:
            raise ValueError(
                f"{path}: {name} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}: this base needs"
                f" [r, {into}] and [{out}, r]"
            )
        if a.shape[0] > max_rank:
            raise ValueError(f"{path}: {name} has rank {a.shape[0]}: this server takes up to {max_rank} (--max-rank)")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{path}: the factors of {name} are not finite numbers")
        layers[name] = LayerAdapter(a, b, scaling_of(config, name, a.shape[0]))
    settings = json.dumps(config, sort_keys=True, default=str).encode()
    return AdapterFile(folder, layers, hashlib.sha256(content + settings).hexdigest())


def _pairs(path: Path, tensors: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """lora_A and lora_B of each layer. Raises ValueError for other tensors and for a factor without its partner."""
    found: dict[str, list[Any]] = {}
    for key, tensor in tensors.items():
        suffix = next((s for s in _FACTORS if key.endswith(s)), None)
        if suffix is None or not key.startswith(_PREFIX):
            raise ValueError(f"{path}: {key} is no factor of a linear layer: {_MERGE}")
        layer = key.removeprefix(_PREFIX).removesuffix(suffix)
        found.setdefault(layer, [None, None])[_FACTORS[suffix]] = tensor
    if not found:
        raise ValueError(f"{path} contains no adapter")
    half = sorted(layer for layer, factors in found.items() if any(factor is None for factor in factors))
    if half:
        raise ValueError(f"{path} lacks a factor of {half[:3]}: an adapter needs lora_A and lora_B of each layer")
    return {layer: (a, b) for layer, (a, b) in found.items()}
