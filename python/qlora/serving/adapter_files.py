"""Reads an adapter folder once, checks that it fits the served base, and returns its factors by layer."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from qlora.adapters.factors import Factors, factors_of
from qlora.adapters.files import WEIGHTS_FILE, read_adapter_config
from qlora.adapters.lora import check_adapter_folder

_MERGE = "only plain LoRA on linear layers is served beside its base; merge this adapter (qlora merge)"


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from its folder: factors by layer name, and a digest of the files' bytes."""

    folder: Path
    layers: dict[str, Factors]
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
    layers = factors_of(tensors, config, path, _MERGE)
    foreign = sorted(set(layers) - set(shapes))
    if foreign:
        raise ValueError(
            f"{path} has factors for {len(foreign)} layers, e.g. {foreign[:2]}, that the served base does not have as"
            " 4-bit layers of every token: serve its own base, or merge the adapter (qlora merge)"
        )
    for name, (a, b, _) in layers.items():
        out, into = shapes[name]
        if (b.shape[0], a.shape[1]) != (out, into):
            raise ValueError(
                f"{path}: {name} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}: this base needs"
                f" [r, {into}] and [{out}, r]"
            )
        if a.shape[0] > max_rank:
            raise ValueError(f"{path}: {name} has rank {a.shape[0]}: this server takes up to {max_rank} (--max-rank)")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{path}: the factors of {name} are not finite numbers")
    settings = json.dumps(config, sort_keys=True, default=str).encode()
    return AdapterFile(folder, layers, hashlib.sha256(content + settings).hexdigest())
