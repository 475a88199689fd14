"""The factors of a LoRA adapter by layer, from the tensors of its file, for those who add them to a base themselves."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from qlora.adapters.files import PEFT_PREFIX, scaling_of

_A, _B = ".lora_A.weight", ".lora_B.weight"


class Factors(NamedTuple):
    """The adapter of one linear layer; it adds ``scaling * b @ a`` to the weight."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scaling: float


def factors_of(tensors: dict[str, Tensor], config: dict[str, Any], path: Path, otherwise: str) -> dict[str, Factors]:
    """The factors by layer name, as the layers are called in the base ("model.layers.0.self_attn.q_proj").

    ``config`` is the adapter's, and ``path`` the file of the tensors. Raises ValueError for an adapter that is more
    than factors of linear layers (DoRA, trained biases, embeddings, whole modules), with the way out ``otherwise``, and
    for a damaged one.
    """
    bare = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items()}
    others = sorted(key for key in bare if not key.endswith((_A, _B)))
    if others or config.get("use_dora"):
        example = others[0] if others else "DoRA"
        raise ValueError(f"{path.parent} is more than LoRA factors of linear layers (e.g. {example}): {otherwise}")
    layers = sorted({key.removesuffix(_A).removesuffix(_B) for key in bare}, key=_layer_order)
    if not layers:
        raise ValueError(f"{path} contains no adapter")
    config = {**config, "alpha_pattern": config.get("alpha_pattern") or {}}
    found = {}
    for name in layers:
        if name + _A not in bare or name + _B not in bare:
            raise ValueError(f"{path} lacks lora_A or lora_B of {name}: it is damaged")
        a, b = bare[name + _A], bare[name + _B]
        if a.dim() != 2 or b.dim() != 2 or not a.shape[0] or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"{path}: {name} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}: they must be [r, in] and"
                " [out, r]"
            )
        found[name] = Factors(a, b, scaling_of(config, name, a.shape[0]))
    return found


def _layer_order(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
