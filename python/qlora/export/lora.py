"""The factors of a LoRA adapter in a folder of PEFT, for runtimes that add them to a base themselves."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from qlora.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from qlora.storage.weights import open_safetensors

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


class Factors(NamedTuple):
    """The adapter of one linear layer; it adds ``scaling * b @ a`` to the weight."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scaling: float


def read_factors(adapter: Path) -> dict[str, Factors]:
    """The factors by layer name, as the layers are called in the base ("model.layers.0.self_attn.q_proj").

    Raises ValueError for an adapter that is more than factors of linear layers: DoRA, trained biases, embeddings or
    whole modules, which only a merge can express; and for a damaged one.
    """
    from peft.utils.other import get_pattern_key

    config = json.loads((adapter / CONFIG_FILE).read_text())
    path = adapter / WEIGHTS_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    with open_safetensors(path) as handle:
        tensors = {key.removeprefix(_PREFIX): handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    others = sorted(key for key in tensors if not key.endswith((_A, _B)))
    if others or config.get("use_dora"):
        raise ValueError(
            f"{adapter} is more than LoRA factors of linear layers (e.g. {others[0] if others else 'DoRA'}): a separate"
            " adapter cannot express that. Export the merged model: without --adapter-only, or with qlora merge"
        )
    layers = sorted({key.removesuffix(_A).removesuffix(_B) for key in tensors}, key=_layer_order)
    if not layers:
        raise ValueError(f"{path} contains no adapter")
    found = {}
    for name in layers:
        if name + _A not in tensors or name + _B not in tensors:
            raise ValueError(f"{path} lacks lora_A or lora_B of {name}: it is damaged")
        a, b = tensors[name + _A], tensors[name + _B]
        patterns: dict[str, Any] = config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(patterns.keys(), name), config["lora_alpha"])
        scaling = float(alpha) / (a.shape[0] ** 0.5 if config.get("use_rslora") else a.shape[0])
        found[name] = Factors(a, b, scaling)
    return found


def _layer_order(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
